"""What surrounds every call: its id, its metrics, its errors, its deadline.

A surrounding wraps a handler once, when the server is built, so that a call pays for no lookup. The outermost
comes first. No RPC method has a `try`, an `abort` or a timer of its own.
"""

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Final, Protocol

import grpc
from google.protobuf.message import DecodeError, Message

from serving import metrics
from serving.config import LimitsConfig
from serving.errors import DeadlineExceeded, MalformedMessage, ServingError
from serving.gateway import statuses

logger = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
Proceed = Callable[["Call"], Awaitable[bytes]]

_CLOCK_SLACK_S: Final = 0.02
"""A caller whose deadline passes may cancel some milliseconds before our clock agrees."""

REQUEST_ID_KEY: Final = "x-request-id"
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Call:
    """One call on its way through the surroundings."""

    __slots__ = ("_request_id", "arrived_at", "body", "code", "context", "expires_at", "method")

    def __init__(self, method: str, body: bytes, context: Context) -> None:
        self.method, self.body, self.context = method, body, context
        self.arrived_at = self.expires_at = time.monotonic()
        self.code = grpc.StatusCode.OK
        self._request_id = ""

    @property
    def request_id(self) -> str:
        """The caller's id where it is well formed, else one of ours."""
        if not self._request_id:
            given = dict(self.context.invocation_metadata() or ()).get(REQUEST_ID_KEY, "")
            is_good = isinstance(given, str) and _REQUEST_ID.fullmatch(given)
            self._request_id = str(given) if is_good else secrets.token_hex(8)
        return self._request_id

    async def end(self, status: statuses.Status) -> bytes:
        """End the call with a status; does not return."""
        self.code = status.code
        await self.context.abort(status.code, status.message, status.trailers)
        raise AssertionError("abort does not return")  # pragma: no cover - for the type checker


class Surround(Protocol):
    """One concern around a call."""

    async def around(self, call: Call, proceed: Proceed) -> bytes:
        """Do what comes before, proceed, do what comes after."""
        ...


class Traffic:
    """What the drain and the health of a server ask: how many calls run, and when the last one came."""

    def __init__(self) -> None:
        self.num_in_flight = 0
        self.last_arrival = time.monotonic()


class Observe:
    """Counts the call and times it."""

    def __init__(self, traffic: Traffic) -> None:
        self._traffic = traffic

    async def around(self, call: Call, proceed: Proceed) -> bytes:
        """Count, whatever the end."""
        self._traffic.num_in_flight += 1
        self._traffic.last_arrival = call.arrived_at
        try:
            return await proceed(call)
        except asyncio.CancelledError:
            # gRPC cancels a handler when the caller gives up or its deadline passes.
            is_late = time.monotonic() >= call.expires_at - _CLOCK_SLACK_S
            call.code = grpc.StatusCode.DEADLINE_EXCEEDED if is_late else grpc.StatusCode.CANCELLED
            raise
        finally:
            self._traffic.num_in_flight -= 1
            metrics.CALLS.labels(call.method, call.code.name).inc()
            metrics.CALL_LATENCY.labels(call.method).observe(time.monotonic() - call.arrived_at)


class MapErrors:
    """Ends a failed call with the status of its error; hides what the catalogue does not know."""

    async def around(self, call: Call, proceed: Proceed) -> bytes:
        """Map, and log what an operator must see."""
        try:
            return await proceed(call)
        except (asyncio.CancelledError, grpc.aio.AbortError):
            raise
        except ServingError as error:
            if type(error) in statuses.CATALOGUE:
                detail = getattr(error, "detail", "")
                if detail:
                    logger.warning("call failed", extra={"method": call.method, "detail": detail})
                return await call.end(statuses.of(error))
            return await self._hide(call)
        except Exception:  # noqa: BLE001 - the caller must not read what it is
            return await self._hide(call)

    async def _hide(self, call: Call) -> bytes:
        extra = {"method": call.method, "error_id": call.request_id}
        logger.error("call failed", extra=extra, exc_info=True)  # noqa: LOG014 - called from the except blocks above
        return await call.end(statuses.internal(call.request_id))


class LimitTime:
    """Gives the call its deadline: the caller's, cut to the longest allowed, or the default."""

    def __init__(self, limits: LimitsConfig) -> None:
        self._default_s, self._max_s = limits.default_deadline_s, limits.max_deadline_s

    async def around(self, call: Call, proceed: Proceed) -> bytes:
        """Proceed until the deadline.

        Raises:
            DeadlineExceeded: If it passes.
        """
        asked_s: float | None = call.context.time_remaining()  # None without a deadline, whatever the stubs say
        if asked_s is not None and asked_s <= self._max_s:
            call.expires_at = call.arrived_at + asked_s
            return await proceed(call)  # gRPC itself cancels the call then
        given_s = self._default_s if asked_s is None else self._max_s
        call.expires_at = call.arrived_at + given_s
        try:
            async with asyncio.timeout(given_s):
                return await proceed(call)
        except TimeoutError:
            raise DeadlineExceeded from None


def handler(
    method: str,
    request_type: type[Message],
    behaviour: Callable[[Any, float], Awaitable[Message]],
    surrounds: Iterable[Surround],
) -> "grpc.RpcMethodHandler[bytes, bytes]":
    """Return the gRPC handler of one unary method.

    Bytes are parsed here and not by gRPC, which would answer UNKNOWN with the text of the exception to a
    message that does not parse.

    Args:
        method: Name of the method, for metrics and logs.
        request_type: Class of the request.
        behaviour: Answers a request, given the monotonic time at which it expires.
        surrounds: What surrounds it, outermost first.
    """

    async def answer(call: Call) -> bytes:
        try:
            request = request_type.FromString(call.body)
        except DecodeError:
            raise MalformedMessage(message_type=request_type.__name__) from None
        return (await behaviour(request, call.expires_at)).SerializeToString()

    proceed: Proceed = answer
    for surround in reversed(list(surrounds)):
        proceed = _wrap(surround, proceed)

    async def unary(body: bytes, context: Context) -> bytes:
        return await proceed(Call(method, body, context))

    return grpc.unary_unary_rpc_method_handler(unary)


def _wrap(surround: Surround, inner: Proceed) -> Proceed:
    def proceed(call: Call) -> Awaitable[bytes]:
        return surround.around(call, inner)

    return proceed
