"""Makes the load, in one process and on one event loop: sends when a request is due, never when it suits.

An open loop never waits: a request is sent at its time even if all before it are unanswered, and its response time
counts from when it was due. So a service that stalls is seen by every request that would have come meanwhile
(Tene, "How not to measure latency": coordinated omission). In a closed loop each caller waits for its answer.

The deadline goes to the service as the header grpc-timeout; this side keeps no timer of gRPC. Otherwise gRPC
itself would end each call at its deadline, and a service that never answers would look like one that says so in
time.
"""

import asyncio
import contextlib
import selectors
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, NamedTuple, Self

from grpc import aio

from serving.loadtest.arrivals import Schedule, choose
from serving.loadtest.checks import difference
from serving.loadtest.dialects import DIALECTS, ProtocolName, Values
from serving.loadtest.endpoint import Endpoint
from serving.loadtest.ledger import GRACE_S, End, Ledger, end_of_answer, end_of_failure
from serving.loadtest.workload import Operation

Method = Any
"""What gRPC calls a multi-callable."""

_MAX_BURST: Final = 256
"""Requests that are sent in one turn of the event loop after it was late; then answers have their turn."""

_WATCH_S: Final = 0.1
"""How often calls that never end are looked for."""

_TOKEN_S: Final = 1.0
"""How often a file of a token is read again."""

_MAX_KNOWN: Final = 8
_PUSHBACK: Final = "grpc-retry-pushback-ms"
_MAX_TIMEOUT_MS: Final = 99_999_999
"""Longest time that fits the header: eight digits."""


@dataclass(slots=True)
class Request:
    """A prepared request with its right answer."""

    body: bytes
    answer: bytes | None = None
    """Bytes of the answer that was checked before the load; None if contents are not checked."""

    expected: Values = field(default_factory=dict)
    """What must be in the answer; what `answer` holds, if empty."""

    also_right: set[bytes] = field(default_factory=set)
    """Other bytes that were found right."""


class Prepared(NamedTuple):
    """An operation with its requests."""

    operation: Operation
    share: float
    requests: list[Request]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What every process of a load test is given."""

    protocol: ProtocolName
    workload: Sequence[Prepared]
    deadline_s: float
    tolerance: float
    num_channels: int
    seed: int

    @property
    def shares(self) -> tuple[float, ...]:
        """Share of each operation."""
        return tuple(prepared.share for prepared in self.workload)

    def for_echo(self) -> Self:
        """Return the same for a server that echoes: the smallest operation, whose right answer is its request."""
        smallest = min(self.workload, key=lambda prepared: prepared.operation.rows)
        echoed = [Request(request.body, request.body) for request in smallest.requests]
        return replace(self, workload=[Prepared(smallest.operation, 1.0, echoed)])


@dataclass(frozen=True, kw_only=True)
class ClosedLoop:
    """Callers that each wait for their answer before they ask again."""

    concurrency: int
    seconds: float


class Part(NamedTuple):
    """Which part of the load is this process's: one of `total`, from 0 on."""

    number: int
    total: int


def new_event_loop() -> asyncio.AbstractEventLoop:
    """Return an event loop whose timers are exact to some 100 us.

    epoll, which asyncio would choose, waits whole milliseconds: half a millisecond on average, which would be in
    every response time.
    """
    return asyncio.SelectorEventLoop(selectors.SelectSelector())


class Generator:
    """Sends requests and writes down how each ended.

    Args:
        settings: Of the load test.
        endpoint: Where to send.
        ledger: Where to write.
    """

    def __init__(self, settings: Settings, endpoint: Endpoint, ledger: Ledger) -> None:
        self._settings, self._endpoint, self._ledger = settings, endpoint, ledger
        self._dialect = DIALECTS[settings.protocol]
        self._channels: list[aio.Channel] = []
        self._methods: list[list[Method]] = []
        self._next_channel = 0
        self._metadata: tuple[tuple[str, str], ...] = ()
        self._metadata_until = 0.0
        self._open: dict[Any, float] = {}
        """Calls without an end, and when they began, oldest first."""

        self._num_started = 0
        self._num_ended = 0
        self._start_s = 0.0
        self._is_stopped = asyncio.Event()

    @property
    def num_in_flight(self) -> int:
        """Requests that were due and have not ended."""
        return self._num_started - self._num_ended

    async def open(self, timeout_s: float = 5.0) -> None:
        """Connect all channels.

        Raises:
            TimeoutError: If one does not connect in time.
        """
        self._channels = [self._endpoint.channel() for _ in range(self._settings.num_channels)]
        paths = [self._dialect.path(prepared.operation) for prepared in self._settings.workload]
        # Without serialisers gRPC sends and returns bytes as they are.
        self._methods = [[channel.unary_unary(path) for channel in self._channels] for path in paths]
        async with asyncio.timeout(timeout_s):
            await asyncio.gather(*(channel.channel_ready() for channel in self._channels))

    async def close(self) -> None:
        """Close all channels."""
        await asyncio.gather(*(channel.close() for channel in self._channels))

    def stop(self) -> None:
        """Send no more."""
        self._is_stopped.set()

    async def run(self, plan: Schedule | ClosedLoop, part: Part, *, start_s: float) -> None:
        """Send this process's part of the load, and wait until every request has its end.

        Args:
            plan: What is due.
            part: Which part of it is sent here.
            start_s: When the plan begins, monotonic time.
        """
        self._start_s = start_s
        self._is_stopped.clear()
        watch = asyncio.create_task(self._watch())
        try:
            if isinstance(plan, ClosedLoop):
                await self._run_closed(plan, part)
            else:
                await self._run_open(plan, part)
            while self.num_in_flight:  # noqa: ASYNC110 - an event for each request would cost more
                await asyncio.sleep(_WATCH_S / 10)
        finally:
            watch.cancel()

    async def _run_open(self, schedule: Schedule, part: Part) -> None:
        """Send each request when it is due."""
        loop, finished = asyncio.get_running_loop(), asyncio.Event()
        due = _in_order(schedule, part)
        waiting = next(due, None)

        def send() -> None:
            nonlocal waiting
            now_s = loop.time() - self._start_s
            for _ in range(_MAX_BURST):
                if waiting is None or self._is_stopped.is_set():
                    finished.set()
                    return
                if waiting[0] > now_s:
                    loop.call_at(self._start_s + waiting[0], send)
                    return
                self._start(*waiting)
                waiting = next(due, None)
            loop.call_soon(send)

        loop.call_at(self._start_s + (waiting[0] if waiting else 0.0), send)
        stopped = asyncio.create_task(self._is_stopped.wait())
        done = asyncio.create_task(finished.wait())
        await asyncio.wait({stopped, done}, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        done.cancel()

    async def _run_closed(self, plan: ClosedLoop, part: Part) -> None:
        """Keep this process's callers busy until the time is over."""
        await asyncio.sleep(max(0.0, self._start_s - time.monotonic()))
        callers = range(part.number, plan.concurrency, part.total)
        await asyncio.gather(*(self._caller(number, plan.seconds) for number in callers))

    async def _caller(self, number: int, seconds: float) -> None:
        for operation, request in choose(self._settings.shares, self._settings.seed, caller=number):
            due_s = time.monotonic() - self._start_s
            if due_s >= seconds or self._is_stopped.is_set():
                return
            self._num_started += 1
            # As the service asks of its callers: without this, refusals alone would fill the processors.
            wait_s = await self._call(due_s, operation, request)
            if wait_s:
                left_s = seconds - (time.monotonic() - self._start_s)
                await asyncio.sleep(min(wait_s, max(0.0, left_s)))

    def _start(self, due_s: float, operation: int, request: float) -> None:
        self._num_started += 1
        # The loop holds a task that it has not begun; then `_open` holds the call, which holds the task.
        asyncio.get_running_loop().create_task(self._call(due_s, operation, request))

    async def _call(self, due_s: float, operation: int, number: float) -> float:
        """Make one call and write down its end; return how long the service asks to wait, seconds."""
        settings = self._settings
        requests = settings.workload[operation].requests
        request = requests[int(number * len(requests))]
        method = self._methods[operation][self._next_channel]
        self._next_channel = (self._next_channel + 1) % len(self._channels)
        sent = time.monotonic()
        call = method(request.body, **self._options(sent))
        self._open[call] = sent
        wait_s, num_bytes = 0.0, 0
        try:
            answer: bytes = await call
            ended = time.monotonic()
            is_right = answer == request.answer or self._is_right(settings.workload[operation], request, answer)
            num_bytes = len(answer)
            end = end_of_answer(is_right=is_right, seconds=ended - sent, deadline_s=settings.deadline_s)
        except aio.AioRpcError as error:
            ended = time.monotonic()
            end, wait_s = self._end_of(error, ended - sent)
        except asyncio.CancelledError:  # by the watch, or with the whole process
            ended = time.monotonic()
            end = end_of_failure(None, has_reason=False, seconds=ended - sent, deadline_s=settings.deadline_s)
        finally:
            del self._open[call]
            self._num_ended += 1
        start_s = self._start_s
        self._ledger.add(
            operation,
            end,
            due_s=due_s,
            sent_s=sent - start_s,
            ended_s=ended - start_s,
            request_bytes=len(request.body),
            response_bytes=num_bytes,
        )
        return wait_s

    def _options(self, now: float) -> dict[str, Any]:
        """Return what goes beside a request."""
        if now >= self._metadata_until:
            self._metadata_until = now + _TOKEN_S
            with contextlib.suppress(OSError, ValueError):  # the file is being replaced: the old token stays
                self._metadata = self._endpoint.metadata() + self._timeout
        if self._endpoint.retries:  # attempts share one deadline, which only gRPC can divide
            return {"metadata": self._metadata, "timeout": self._settings.deadline_s}
        return {"metadata": self._metadata}

    @property
    def _timeout(self) -> tuple[tuple[str, str], ...]:
        """The deadline as the service reads it."""
        timeout_ms = min(max(1, round(self._settings.deadline_s * 1000)), _MAX_TIMEOUT_MS)
        return () if self._endpoint.retries else (("grpc-timeout", f"{timeout_ms}m"),)

    def _is_right(self, prepared: Prepared, request: Request, answer: bytes) -> bool:
        """Look into an answer whose bytes are not the known ones."""
        if request.answer is None or answer in request.also_right:
            return True
        try:
            actual = self._dialect.read(prepared.operation, answer)
            request.expected = request.expected or self._dialect.read(prepared.operation, request.answer)
        except Exception:  # noqa: BLE001 - bytes of a broken service may hold anything
            return False
        if difference(request.expected, actual, self._settings.tolerance):
            return False
        if len(request.also_right) < _MAX_KNOWN:
            request.also_right.add(answer)
        return True

    def _end_of(self, error: aio.AioRpcError, seconds: float) -> tuple[End, float]:
        trailers = {str(key): value for key, value in error.trailing_metadata() or ()}
        pushback_ms = str(trailers.get(_PUSHBACK, ""))
        end = end_of_failure(
            error.code(), has_reason=bool(trailers), seconds=seconds, deadline_s=self._settings.deadline_s
        )
        return end, int(pushback_ms) / 1000 if pushback_ms.isdecimal() else 0.0

    async def _watch(self) -> None:
        """Give up calls that have no end after their deadline and the grace."""
        limit_s = self._settings.deadline_s + GRACE_S
        while True:
            oldest = time.monotonic() - limit_s
            for call in [call for call, _ in _while_before(self._open, oldest)]:
                call.cancel()
            await asyncio.sleep(_WATCH_S)


def _while_before(calls: dict[Any, float], oldest: float) -> Iterator[tuple[Any, float]]:
    for call, sent in calls.items():  # in the order in which they were sent
        if sent > oldest:
            return
        yield call, sent


def _in_order(schedule: Schedule, part: Part) -> Iterator[tuple[float, int, float]]:
    """Return what is due here, one by one: Python's numbers are faster than an array's elements."""
    for arrivals in schedule.part(part.number, part.total):
        yield from zip(*(values.tolist() for values in arrivals), strict=True)
