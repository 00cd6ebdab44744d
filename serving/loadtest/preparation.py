"""Before the load: what is served, requests ready as bytes, and the right answer of each."""

import asyncio
import functools
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import grpc

from serving.loadtest.checks import difference
from serving.loadtest.dialects import DIALECTS, Dialect, ProtocolName, Values
from serving.loadtest.endpoint import Endpoint
from serving.loadtest.errors import BadWorkload, ContentDiffers, LoadTestError, ServiceNotReady
from serving.loadtest.generator import Prepared, Request
from serving.loadtest.workload import Contents, ModelFacts, Operation, contents

Expect = Callable[[Operation, Contents], Values]
"""Returns the arrays of the right answer, given what a request asks."""

MAX_POOL: Final = 256
"""Requests of an operation: two that are swapped by mistake are noticed unless they are the same one."""

_POOL_BYTES: Final = 32 * 2**20
"""Requests and answers of an operation that are held in memory, about; each process has them."""

_MIN_POOL: Final = 4
_REACH_TIMEOUT_S: Final = 3.0
_RETRY_S: Final = 0.2
_CALLERS_FAULT: Final = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.OUT_OF_RANGE,
        grpc.StatusCode.FAILED_PRECONDITION,
    }
)


async def ask_facts(endpoint: Endpoint, protocol: ProtocolName, *, timeout_s: float) -> ModelFacts:
    """Return what is served.

    Args:
        endpoint: Where.
        protocol: How to ask.
        timeout_s: Of one call.

    Raises:
        ServiceNotReady: If nothing answers there within three seconds.
    """
    channel = endpoint.channel()
    try:
        return await _reach(channel, endpoint, DIALECTS[protocol], timeout_s)
    finally:
        await channel.close()


@dataclass(frozen=True, kw_only=True)
class Checking:
    """How contents are checked."""

    is_on: bool = True
    """Whether they are."""

    expect: Expect | None = None
    """Knows the right answers; without it, the answers to the same requests made alone are taken as right."""

    tolerance: float = 0.0
    """As for `checks.difference`."""


async def prepare(
    endpoint: Endpoint,
    protocol: ProtocolName,
    shares: Mapping[Operation, float],
    facts: ModelFacts,
    *,
    seed: int,
    timeout_s: float,
    checking: Checking,
) -> list[Prepared]:
    """Make requests and learn their right answers, by calls that are made alone, one after the other.

    Args:
        endpoint: Where the service is.
        protocol: Which of its protocols.
        shares: Operations and their shares.
        facts: What is served.
        seed: Of the requests.
        timeout_s: Of one call.
        checking: How contents are checked.

    Raises:
        BadWorkload: If the service refuses a request for what it asks.
        ServiceNotReady: If a call fails.
        ContentDiffers: If an answer differs from the right one.
    """
    dialect = DIALECTS[protocol]
    for operation in shares:
        _check_rows(operation, facts)
        dialect.path(operation)
    channel = endpoint.channel()

    async def alone(operation: Operation, body: bytes) -> bytes:
        call: Any = channel.unary_unary(dialect.path(operation))
        try:
            answer: bytes = await call(body, timeout=timeout_s, metadata=endpoint.metadata())
        except grpc.aio.AioRpcError as error:
            raise _refused(error, operation, endpoint) from None
        return answer

    try:
        prepared = []
        for operation, share in shares.items():
            ask = functools.partial(contents, operation, facts, seed=seed)
            requests = await _requests(operation, ask, alone, dialect=dialect, checking=checking)
            prepared.append(Prepared(operation, share, requests))
        return prepared
    finally:
        await channel.close()


async def _requests(
    operation: Operation,
    ask: Callable[..., Contents],
    alone: Callable[[Operation, bytes], Awaitable[bytes]],
    *,
    dialect: Dialect,
    checking: Checking,
) -> list[Request]:
    """Return the requests of an operation, as many as memory and the check want."""
    requests: list[Request] = []
    num_requests = MAX_POOL
    while len(requests) < num_requests:
        asked = ask(index=len(requests))
        body, answer = dialect.body(operation, asked), None
        if checking.is_on or not requests:  # the first also shows whether the service takes it
            answer = await alone(operation, body)
            num_requests = max(_MIN_POOL, min(MAX_POOL, _POOL_BYTES // (len(body) + 2 * len(answer))))
        if not checking.is_on or answer is None:
            requests.append(Request(body))
            continue
        expected = {} if checking.expect is None else checking.expect(operation, asked)
        try:
            differs = difference(expected, dialect.read(operation, answer), checking.tolerance)
        except Exception as error:  # bytes of a strange service may hold anything
            problem = f"answered with what cannot be read ({str(error)[:100]})"
            raise ContentDiffers(operation=operation.name, problem=problem) from error
        if differs:
            problem = f"{differs.problem} (tolerance {checking.tolerance:g})"
            raise ContentDiffers(operation=operation.name, problem=problem)
        requests.append(Request(body, answer, expected))
    return requests


def _refused(error: grpc.aio.AioRpcError, operation: Operation, endpoint: Endpoint) -> LoadTestError:
    said = f"{error.code().name}: {error.details()}"
    if error.code() in _CALLERS_FAULT:
        return BadWorkload("--mix", given=operation.name, expected=f"what the service takes; it says {said}")
    problem = f"{operation.name}, made alone before the load, ended as {said}"
    return ServiceNotReady(target=endpoint.target, problem=problem)


async def _reach(channel: grpc.aio.Channel, endpoint: Endpoint, dialect: Dialect, timeout_s: float) -> ModelFacts:
    """Ask until something answers, for some seconds: a service may just be starting."""

    async def call(path: str, body: bytes) -> bytes:
        method: Any = channel.unary_unary(path)
        answer: bytes = await method(body, timeout=timeout_s, metadata=endpoint.metadata())
        return answer

    loop = asyncio.get_running_loop()
    until = loop.time() + _REACH_TIMEOUT_S
    while True:
        try:
            async with asyncio.timeout_at(until + _RETRY_S):
                return await dialect.facts(call)
        except TimeoutError:
            problem = f"no answer within {_REACH_TIMEOUT_S:g} s; is it up, and is it TLS (--ca) or not?"
            raise ServiceNotReady(target=endpoint.target, problem=problem) from None
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE or loop.time() > until:
                problem = f"{error.code().name}: {error.details()}"
                raise ServiceNotReady(target=endpoint.target, problem=problem) from None
        await asyncio.sleep(_RETRY_S)


def _check_rows(operation: Operation, facts: ModelFacts) -> None:
    if facts.max_rows is not None and operation.rows > facts.max_rows:
        expected = f"at most {facts.max_rows} rows, the limit of the service"
        raise BadWorkload("--mix", given=operation.name, expected=expected)
