"""The gateway's end: open connections to the replicas of one deployment, and which of them runs the next rows.

Serve's handle stays what is trusted: it names the replicas, and runs whatever no connection can.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

from numpy.typing import NDArray

from serving.direct import frames
from serving.direct.connection import FrameProtocol
from serving.direct.frames import Buffer, FrameError
from serving.direct.security import Security
from serving.direct.server import DONE, EXPIRED, Address, Backlog, question
from serving.errors import DeadlineExceeded

logger = logging.getLogger(__name__)

Rows = NDArray[Any]

_CONNECT_TIMEOUT_S: Final = 2.0
_FORGET_AFTER_S: Final = 30.0
"""Time after which a replica that nobody has confirmed, and that has no open connection, is forgotten."""

_RETRY_AFTER_S: Final = 30.0
"""Time for which a replica that cannot be connected to is left to Serve's handle: its port may be closed to us."""


class RunFailed(Exception):
    """The graph raised on these rows, in the replica; its log has the stack."""


class LaneLost(Exception):
    """The replica is gone, or does not answer: run the rows elsewhere.

    Attributes:
        reason: What happened.
        may_have_run: Whether the rows may have reached the replica.
    """

    def __init__(self, *, reason: str, may_have_run: bool) -> None:
        super().__init__(reason)
        self.reason, self.may_have_run = reason, may_have_run


class Answer(NamedTuple):
    """What a replica answers."""

    version: str
    run_s: float
    """From when the replica had the rows until it had the outputs."""

    outputs: tuple[Rows, ...]


class Lane:
    """The way to one replica: as many connections as it has runs in flight, kept open.

    Args:
        address: Of the replica.
        security: Transport security of the cluster's inside.
    """

    def __init__(self, address: Address, security: Security) -> None:
        self.address, self.num_in_flight, self.confirmed_at = address, 0, 0.0
        self._context = security.client_context()
        self._idle: list[FrameProtocol] = []
        self._waiting: dict[FrameProtocol, asyncio.Future[Buffer]] = {}
        self._is_closed = False

    @property
    def has_open_connections(self) -> bool:
        """Whether it is known to live."""
        return bool(self._idle or self._waiting)

    async def open(self) -> None:
        """Make a connection, to be there when a run comes.

        Raises:
            LaneLost: If there can be none.
        """
        self._idle.append(await self._connect())

    async def run(
        self,
        rows: Rows,
        outputs: Sequence[str],
        timeout_s: float,
        backlog: Backlog = ("", 0.0),
        context: str = "",
    ) -> Answer:
        """Run rows on the replica.

        Args:
            rows: Shape (rows, *row_shape); not to be changed meanwhile.
            outputs: Names of the outputs to compute.
            timeout_s: Time after which nobody waits for them.
            backlog: Name of the gateway, and this replica's part of the rows that wait there.
            context: Token of the run's trace; empty if it is not traced.

        Raises:
            DeadlineExceeded: If the rows' turn came too late.
            LaneLost: If the replica did not answer in time, or is gone.
            RunFailed: If the graph raised.
        """
        self.num_in_flight += 1
        try:
            async with asyncio.timeout(timeout_s):
                connection = self._idle.pop() if self._idle else await self._connect()
                text = question(outputs, timeout_s, backlog, context)
                frame = await self._ask(connection, frames.pack(text, [rows]))
            text, values = frames.unpack(frame)
        except TimeoutError:
            raise LaneLost(reason="no answer in time", may_have_run=True) from None
        except FrameError as error:
            raise LaneLost(reason=str(error), may_have_run=True) from None
        finally:
            self.num_in_flight -= 1
        kind, _, rest = text.partition(" ")
        if kind == DONE:
            version, run_us = rest.split(" ")
            return Answer(version, int(run_us) / 1e6, tuple(values))
        if kind == EXPIRED:
            raise DeadlineExceeded
        raise RunFailed(rest)

    def close(self) -> None:
        """Close the connections; runs in flight end as lost."""
        self._is_closed = True
        for connection in [*self._idle, *self._waiting]:
            connection.abort()

    async def _connect(self) -> FrameProtocol:
        loop, address = asyncio.get_running_loop(), self.address

        def make() -> FrameProtocol:
            return FrameProtocol(self._on_frame, self._on_end)

        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                where = address.host, address.port
                _, connection = await loop.create_connection(make, *where, ssl=self._context)
        except (OSError, TimeoutError) as error:
            raise LaneLost(reason=f"no connection ({type(error).__name__})", may_have_run=False) from None
        connection.send([address.token])
        if self._is_closed:
            connection.abort()
        return connection

    async def _ask(self, connection: FrameProtocol, parts: list[Buffer]) -> Buffer:
        if not connection.is_open:
            raise LaneLost(reason="connection closed", may_have_run=False)
        answer: asyncio.Future[Buffer] = asyncio.get_running_loop().create_future()
        self._waiting[connection] = answer
        connection.send(parts)
        try:
            frame = await answer
        except BaseException:
            self._waiting.pop(connection, None)
            connection.abort()  # what still comes on it belongs to nobody
            raise
        if connection.is_open:  # a replica that drains answers, and closes
            self._idle.append(connection)
        return frame

    def _on_frame(self, connection: FrameProtocol, frame: Buffer) -> None:
        answer = self._waiting.pop(connection, None)
        if answer is None:
            connection.abort()
        elif not answer.done():
            answer.set_result(frame)

    def _on_end(self, connection: FrameProtocol) -> None:
        if connection in self._idle:
            self._idle.remove(connection)
        answer = self._waiting.pop(connection, None)
        if answer is not None and not answer.done():
            answer.set_exception(LaneLost(reason="connection lost", may_have_run=True))


class Lanes:
    """The ways to the replicas of one deployment.

    Args:
        security: Transport security of the cluster's inside.
        clock: Monotonic seconds.
    """

    def __init__(self, security: Security | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._security = clock, security or Security()
        self._lanes: dict[str, Lane] = {}
        self._avoided: dict[Address, float] = {}
        self._opening: dict[Lane, asyncio.Task[None]] = {}
        self._turn = 0

    def __len__(self) -> int:
        return len(self._lanes)

    def confirm(self, address: Address) -> None:
        """Take note that a replica lives at an address, and connect to it; forget those that are gone."""
        now = self._clock()
        if self._avoided.get(address, 0.0) > now:
            return
        known = self._lanes.get(address.replica)
        if known is None or known.address != address:
            if known is not None:
                self.drop(known)
            known = self._lanes[address.replica] = Lane(address, self._security)
        known.confirmed_at = now
        if not known.has_open_connections and known not in self._opening:
            self._opening[known] = asyncio.get_running_loop().create_task(self._open(known))
        for lane in list(self._lanes.values()):
            if not lane.has_open_connections and now - lane.confirmed_at > _FORGET_AFTER_S:
                self.drop(lane)

    def choose(self) -> Lane | None:
        """Return the way with the fewest runs in flight, in turn among equals; None if none is open."""
        lanes = [lane for lane in self._lanes.values() if lane.has_open_connections]
        if not lanes:
            return None
        self._turn += 1
        first = self._turn % len(lanes)
        return min(lanes[first:] + lanes[:first], key=lambda lane: lane.num_in_flight)

    def drop(self, lane: Lane, *, avoid_s: float = 0.0) -> None:
        """Forget a replica, and for some time also that it is confirmed; then Serve's handle names it again."""
        if self._lanes.get(lane.address.replica) is lane:
            del self._lanes[lane.address.replica]
        now = self._clock()
        self._avoided = {address: until for address, until in self._avoided.items() if until > now}
        if avoid_s:
            self._avoided[lane.address] = now + avoid_s
        lane.close()

    def close(self) -> None:
        """Close all."""
        for task in self._opening.values():
            task.cancel()
        for lane in list(self._lanes.values()):
            self.drop(lane)

    async def _open(self, lane: Lane) -> None:
        try:
            await lane.open()
        except LaneLost as lost:
            logger.warning("no way to a replica but Serve's own", extra={"reason": lost.reason})
            self.drop(lane, avoid_s=_RETRY_AFTER_S)
        finally:
            del self._opening[lane]
