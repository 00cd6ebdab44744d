"""What the generator can do by itself: it calls a server that only echoes, before it calls the service."""

import asyncio
import contextlib
import signal
from collections.abc import Iterator, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, Final

import grpc

from serving.loadtest.endpoint import Endpoint
from serving.loadtest.errors import GeneratorDied
from serving.loadtest.fleet import Fleet
from serving.loadtest.generator import ClosedLoop
from serving.loadtest.results import GeneratorLimits, Stage
from serving.loadtest.summary import stage

MAX_SHARE_OF_LIMIT: Final = 0.7
"""Above this share of its own limit the generator's queue is in every response time: at 0.7 of a single server's
capacity half of the work or more has to wait, whatever the law of arrivals."""

MAX_LAG_MS: Final = 5.0
"""99th percentile of the lag above which the generator was late by itself."""

MAX_CPU: Final = 0.9
"""Processor time per second and process above which it had no time left."""

_CONCURRENCY: Final = 64
_WARM_UP_S: Final = 0.3
_SECONDS: Final = 1.0
_SPAWN: Final = get_context("spawn")
_START_TIMEOUT_S: Final = 30.0
_END_TIMEOUT_S: Final = 5.0


def measure_limits(fleet: Fleet) -> GeneratorLimits:
    """Measure the processes of the generator against echo servers, one for each, with their smallest operation."""
    with contextlib.ExitStack() as stack:
        endpoints = [stack.enter_context(echo_server()) for _ in range(fleet.num_processes)]
        alone = _measure(fleet, endpoints, fleet.num_processes)
        busy = _measure(fleet, endpoints, _CONCURRENCY * fleet.num_processes)
    return GeneratorLimits(
        num_processes=fleet.num_processes,
        calls_per_s=busy.rate_per_s,
        echo_p50_ms=alone.service_time.p50 if alone.service_time else 0.0,
        is_limiting=False,
        reason="",
    )


def judge(limits: GeneratorLimits | None, stages: Sequence[Stage]) -> list[str]:
    """Return why stages measure the generator rather than the service; empty if none does."""
    reasons = []
    for item in stages:
        label = f"{item.offered_per_s:g}/s" if item.offered_per_s is not None else f"{item.concurrency} callers"
        if limits is not None and item.rate_per_s > MAX_SHARE_OF_LIMIT * limits.calls_per_s:
            share = item.rate_per_s / limits.calls_per_s
            reasons.append(
                f"{label}: {item.rate_per_s:,.0f} requests/s are {share:.0%} of the {limits.calls_per_s:,.0f}/s "
                f"that the generator reaches against an echo"
            )
        if item.send_lag_p99_ms > MAX_LAG_MS:
            reasons.append(f"{label}: 1 % of requests were sent {item.send_lag_p99_ms:.1f} ms late or later")
        if item.generator_cpu > MAX_CPU:
            reasons.append(f"{label}: the generator used {item.generator_cpu:.2f} of a processor per process")
    return reasons


@contextlib.contextmanager
def echo_server() -> Iterator[Endpoint]:
    """Run a server that answers every call with its request, in a process of its own on loopback.

    Raises:
        GeneratorDied: If it does not start.
    """
    ours, theirs = _SPAWN.Pipe()
    process = _SPAWN.Process(target=_echo, args=(theirs,), daemon=True)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process.start()
    finally:
        signal.signal(signal.SIGINT, before)
    theirs.close()
    try:
        if not ours.poll(_START_TIMEOUT_S):
            raise GeneratorDied(exit_code=process.exitcode)
        yield Endpoint(target=f"127.0.0.1:{ours.recv()}")
    finally:
        ours.close()  # it ends when its pipe does
        process.join(_END_TIMEOUT_S)
        if process.is_alive():
            process.kill()
            process.join()


def _measure(fleet: Fleet, endpoints: Sequence[Endpoint], concurrency: int) -> Stage:
    plan = ClosedLoop(concurrency=concurrency, seconds=_WARM_UP_S + _SECONDS)
    course = fleet.run(endpoints, plan, is_echo=True)
    return stage(
        course.records,
        begin_s=_WARM_UP_S,
        seconds=_SECONDS,
        names=["echo"],
        rows=[1],
        offered_per_s=None,
        concurrency=concurrency,
        generator_cpu=course.cpu_share(_WARM_UP_S, _WARM_UP_S + _SECONDS),
    )


def _echo(pipe: Connection) -> None:
    asyncio.run(_serve_echo(pipe))


async def _serve_echo(pipe: Connection) -> None:
    async def echo(body: bytes, _context: object) -> bytes:
        return body

    class Handler(grpc.GenericRpcHandler):
        def service(self, _details: Any) -> Any:  # noqa: ANN401 - of gRPC
            return grpc.unary_unary_rpc_method_handler(echo)

    server = grpc.aio.server(options=[("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", -1)])
    server.add_generic_rpc_handlers((Handler(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    pipe.send(port)
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(pipe.fileno(), ended.set)
    await ended.wait()
    await server.stop(None)
