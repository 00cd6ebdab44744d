"""The replica's end: takes frames of rows, answers frames of outputs.

It listens on a port of its own beside Serve's, and reads nothing from those who do not begin with the token that
it made. The token is told through Serve's handle, which only members of the cluster can call. Nothing that is
received is ever unpickled. A local socket was no faster than TCP within one machine.
"""

import asyncio
import hmac
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, NamedTuple

from numpy.typing import NDArray

from serving.direct import frames
from serving.direct.connection import FrameProtocol
from serving.direct.frames import Buffer
from serving.direct.security import Security
from serving.errors import DeadlineExceeded
from serving.spans import continue_run

logger = logging.getLogger(__name__)

Backlog = tuple[str, float]
"""Name of a gateway, and a replica's part of the rows that wait there."""

Run = Callable[[NDArray[Any], tuple[str, ...], float, Backlog], Awaitable[tuple[str, Sequence[NDArray[Any]]]]]

_TOKEN_BYTES: Final = 32
_PREAMBLE_TIMEOUT_S: Final = 5.0
DONE, EXPIRED, FAILED = "done", "expired", "failed"


class Address(NamedTuple):
    """Where a replica listens."""

    replica: str
    """Its id."""

    host: str
    port: int
    token: bytes
    """What opens its door."""


def question(outputs: Sequence[str], timeout_s: float, backlog: Backlog, context: str = "") -> str:
    """Return the text that goes with rows, and with the token of their trace where they have one."""
    gateway, num_waiting = backlog
    return f"{timeout_s} {num_waiting} {gateway} {','.join(outputs)} {context}".rstrip()


class DirectServer:
    """Answers runs of one replica.

    Args:
        run: Runs the graph on rows, given names of outputs, the seconds after which nobody waits, and what waits
            in the gateway; returns the version of the model and the outputs.
        replica: Id of the replica.
        host: Address to listen on.
        security: Transport security of the cluster's inside.
    """

    def __init__(self, run: Run, *, replica: str, host: str, security: Security | None = None) -> None:
        self._run, self._host, self._security = run, host, security or Security()
        self._replica, self._token = replica, secrets.token_bytes(_TOKEN_BYTES)
        self._server: asyncio.Server | None = None
        self._connections: set[FrameProtocol] = set()
        self._runs: dict[FrameProtocol, asyncio.Task[None]] = {}
        self._is_closing = False
        self.address: Address | None = None
        """None until it listens, and when it has stopped."""

    async def start(self) -> None:
        """Listen.

        Raises:
            OSError: If no port can be bound.
        """
        loop = asyncio.get_running_loop()
        context = self._security.server_context()
        self._server = await loop.create_server(self._connect, self._host, 0, ssl=context)
        port = self._server.sockets[0].getsockname()[1]
        self.address = Address(self._replica, self._host, port, self._token)

    async def close(self, grace_s: float) -> None:
        """Take no more runs; return when those in flight have been answered, or after the grace."""
        self._is_closing, self.address = True, None
        if self._server is not None:
            self._server.close()
        for connection in self._connections - self._runs.keys():
            connection.close()
        if self._runs:
            await asyncio.wait(self._runs.values(), timeout=grace_s)
        for connection in set(self._connections):
            connection.close()

    def _connect(self) -> FrameProtocol:
        connection = FrameProtocol(self._begin, self._end, is_preamble=self._is_token, preamble_bytes=_TOKEN_BYTES)
        self._connections.add(connection)
        asyncio.get_running_loop().call_later(_PREAMBLE_TIMEOUT_S, self._end_strangers, connection)
        return connection

    def _is_token(self, given: bytes) -> bool:
        return not self._is_closing and hmac.compare_digest(given, self._token)

    @staticmethod
    def _end_strangers(connection: FrameProtocol) -> None:
        if not connection.is_trusted:
            connection.abort()

    def _begin(self, connection: FrameProtocol, frame: Buffer) -> None:
        if connection in self._runs or self._is_closing:  # one at a time, and none in a drain: it runs elsewhere
            connection.abort()
            return
        self._runs[connection] = asyncio.get_running_loop().create_task(self._answer(connection, frame))

    def _end(self, connection: FrameProtocol) -> None:
        self._connections.discard(connection)
        if task := self._runs.pop(connection, None):
            task.cancel()  # nobody waits for it any more

    async def _answer(self, connection: FrameProtocol, frame: Buffer) -> None:
        try:
            parts = await self._outputs(frame)
        finally:
            self._runs.pop(connection, None)
        if connection.is_open:
            connection.send(parts)
            if self._is_closing:
                connection.close()

    async def _outputs(self, frame: Buffer) -> list[Buffer]:
        began = time.monotonic()
        try:
            text, (rows,) = frames.unpack(frame)
            timeout_s, num_waiting, gateway, outputs, *context = text.split(" ")
            if context:
                continue_run(context[0])
            backlog = gateway, float(num_waiting)
            version, values = await self._run(rows, tuple(outputs.split(",")), float(timeout_s), backlog)
            run_us = round((time.monotonic() - began) * 1e6)
            return frames.pack(f"{DONE} {version} {run_us}", values)
        except DeadlineExceeded:
            return frames.pack(EXPIRED, [])
        except Exception as error:
            logger.exception("a run failed")
            return frames.pack(f"{FAILED} {type(error).__name__}", [])
