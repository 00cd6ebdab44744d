"""The client: one process that sends ready bytes over one connection and checks every answer."""

import asyncio
import selectors
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any, Final, NamedTuple, TypeVar

import grpc
import numpy as np

from tests.benchmarks.peers.calls import Calls, Series

T = TypeVar("T")

RIGHT: Final = "OK"
WRONG: Final = "WRONG"
"""An answer with status OK that is not ONNX Runtime's own."""

TIMEOUT_S: Final = 10.0
MIN_WARM_UP_S: Final = 0.2
MAX_WARM_UP_S: Final = 4.0
_MAX_MESSAGE_BYTES: Final = 64 * 2**20
_POLL_S: Final = 0.02
_START_POLL_S: Final = 0.2


class Window(NamedTuple):
    """What was measured in one stretch of time."""

    calls_per_s: float
    """Right answers per second."""

    p50_ms: float
    p99_ms: float
    statuses: dict[str, int]
    """Calls per status, those before and after the window included."""

    late_ms: float = 0.0
    """99th percentile of how late the generator itself was, open loop."""


class Target:
    """One series of calls to one server.

    Args:
        channel: Connection to the server.
        series: Which interface.
        calls: What is sent and what is expected.
    """

    def __init__(self, channel: grpc.aio.Channel, series: Series, calls: Calls) -> None:
        self._call: Any = channel.unary_unary(series.method(calls.workload))
        self._metadata = series.metadata(calls.workload)
        self._bodies = calls.bodies
        self._is_right = calls.is_right

    async def call(self, index: int) -> str:
        """Make one call; return its status, or that the answer was wrong."""
        index %= len(self._bodies)
        try:
            answer = await self._call(self._bodies[index], timeout=TIMEOUT_S, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            return error.code().name
        return RIGHT if self._is_right(index, answer) else WRONG


def run(measurement: Coroutine[Any, Any, T]) -> T:
    """Run a measurement in an event loop of its own, whose timers are exact to microseconds.

    The loop's usual selector, epoll, rounds every sleep up to a millisecond: as long as a call.
    """
    factory: Callable[[], asyncio.AbstractEventLoop] = lambda: asyncio.SelectorEventLoop(  # noqa: E731 - a factory
        selectors.SelectSelector()
    )
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(measurement)


def connect(port: int) -> grpc.aio.Channel:
    """Return a connection of its own to a server on this machine."""
    limits = [(f"grpc.max_{way}_message_length", _MAX_MESSAGE_BYTES) for way in ("send", "receive")]
    return grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=[*limits, ("grpc.use_local_subchannel_pool", 1)])


async def until_right(
    port: int, series: Series, calls: Calls, *, is_alive: Callable[[], bool], timeout_s: float
) -> None:
    """Call until the server answers rightly.

    Raises:
        RuntimeError: If it ends, or does not answer rightly in time.
    """
    deadline, status = time.monotonic() + timeout_s, "nothing"
    while time.monotonic() < deadline:
        if not is_alive():
            raise RuntimeError("the server ended instead of serving")
        async with connect(port) as channel:
            status = await Target(channel, series, calls).call(0)
        if status == RIGHT:
            return
        await asyncio.sleep(_START_POLL_S)
    raise RuntimeError(f"no right answer in {timeout_s:g} s, the last was {status}")


async def closed_loop(port: int, series: Series, calls: Calls, *, concurrency: int, seconds: float) -> Window:
    """Keep `concurrency` calls in flight; measure the answers of some seconds, once every caller has had one."""
    ends: list[tuple[float, float]] = []
    statuses: Counter[str] = Counter()
    is_over = False
    async with connect(port) as channel:
        target = Target(channel, series, calls)

        async def caller(index: int) -> None:
            while not is_over:
                began = time.monotonic()
                status = await target.call(index)
                statuses[status] += 1
                if status == RIGHT:
                    ended = time.monotonic()
                    ends.append((ended, ended - began))
                index += 1

        began = time.monotonic()
        callers = [asyncio.create_task(caller(index)) for index in range(concurrency)]
        while (warm_s := time.monotonic() - began) < MAX_WARM_UP_S:
            if warm_s >= MIN_WARM_UP_S and len(ends) >= concurrency:
                break
            await asyncio.sleep(_POLL_S)
        opens = time.monotonic()
        await asyncio.sleep(seconds)
        closes, is_over = time.monotonic(), True
        await asyncio.gather(*callers)
    latencies = [latency for end, latency in ends if opens <= end < closes]
    return Window(len(latencies) / (closes - opens), *_percentiles(latencies), dict(statuses))


async def open_loop(port: int, series: Series, calls: Calls, *, rate: float, seconds: float, seed: int) -> Window:
    """Send calls as a Poisson process of `rate` per second; latencies count from when each call was due.

    A server that falls behind is charged for the waiting; the generator's own lateness is charged to everybody.
    """
    random = np.random.default_rng(seed)
    gaps = random.exponential(1 / rate, max(1, round(rate * seconds)))
    latencies: list[float] = []
    late: list[float] = []
    statuses: Counter[str] = Counter()
    async with connect(port) as channel:
        target = Target(channel, series, calls)
        for index in range(len(calls.bodies)):
            await target.call(index)

        async def send(index: int, due: float) -> None:
            late.append(time.monotonic() - due)
            status = await target.call(index)
            statuses[status] += 1
            if status == RIGHT:
                latencies.append(time.monotonic() - due)

        began = time.monotonic()
        sent = []
        for index, offset in enumerate(np.cumsum(gaps)):
            due = began + float(offset)
            if (wait := due - time.monotonic()) > 0:
                await asyncio.sleep(wait)
            sent.append(asyncio.create_task(send(index, due)))
        await asyncio.gather(*sent)
        elapsed = time.monotonic() - began
    late_ms = float(np.percentile(late, 99)) * 1000
    return Window(len(latencies) / elapsed, *_percentiles(latencies), dict(statuses), late_ms)


def _percentiles(latencies: list[float]) -> tuple[float, float]:
    """Return median and 99th percentile in milliseconds; not a number where there was no right answer."""
    if not latencies:
        return float("nan"), float("nan")
    p50, p99 = np.percentile(latencies, (50, 99)) * 1000
    return float(p50), float(p99)
