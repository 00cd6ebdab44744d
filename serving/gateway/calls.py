"""One call: what is known of it before its body is read, and how bytes become a request and an answer bytes.

Every method is registered as one that reads a stream, which is the same on the wire: so credentials are checked
before the body is read, and a body that does not arrive is noticed (a unary handler of gRPC would wait for ever).
It costs nothing: 148 microseconds of processor time for an echo, 157 as a unary handler, one alternating run.
"""

import asyncio
import functools
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any, Final, NamedTuple, Protocol

import grpc
from google.protobuf.message import DecodeError, Message

from serving.errors import (
    Draining,
    MalformedMessage,
    MetadataTooLarge,
    OutOfRange,
    RequestStalled,
    ResponseStalled,
)
from serving.gateway import statuses
from serving.gateway.replies import Answer
from serving.spans import PARENT_KEY, CallTrace, new_id, parse
from serving.tickets import HIGHEST, Ticket

Context = grpc.aio.ServicerContext[Any, Any]
Proceed = Callable[["Call"], Awaitable[bytes]]
Unary = Callable[[Any, Ticket], Awaitable[Answer]]
ServerStream = Callable[[Any, Ticket], AsyncIterator[Answer]]
Bidirectional = Callable[[AsyncIterator[Any], "Call"], AsyncIterator[Message]]

REQUEST_ID_KEY: Final = "x-request-id"
TIMINGS_KEY: Final = "vae-timings"
"""Metadata key by which a caller asks for the timings of a call, with any value."""

PRIORITY_KEY: Final = "vae-priority"
MAX_SMALL_BYTES: Final = 64 * 1024
"""Largest request without tensors: parsing multiplies the size of hostile messages."""

_UNREAD_ABORT_S: Final = 0.5
_TICK_S: Final = 0.01
_PRIORITIES: Final = frozenset({"1", "2", "3"})
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Method(NamedTuple):
    """One method of a service; exactly one of the three behaviours is given."""

    request_type: type[Message]
    """Class of the request."""

    unary: Unary | None = None
    """Answers a request with a response."""

    server_stream: ServerStream | None = None
    """Answers a request with a stream of responses."""

    bidirectional: Bidirectional | None = None
    """Answers a stream of requests with a stream of responses; makes a ticket for each request."""

    priority: int = HIGHEST
    """Priority of its rows, unless the caller steps back."""

    is_small: bool = False
    """Whether its requests hold no tensors, and so nothing large."""


class Call:
    """One call on its way through the surroundings.

    Args:
        path: Full name of the method, such as `vae.v1.VaeService/Encode`.
        context: Of gRPC.
        priority: Of the method.
    """

    __slots__ = (
        "_request_id", "arrived_at", "client", "code", "context", "expires_at", "metadata", "metadata_bytes",
        "path", "priority", "reason", "received_at", "request_bytes", "response_bytes", "taken", "trace",
        "unread_bytes",
    )  # fmt: skip

    def __init__(self, path: str, context: Context, priority: int = HIGHEST) -> None:
        self.path, self.context = path, context
        self.arrived_at = self.expires_at = time.monotonic()
        self.code = grpc.StatusCode.OK
        self.client = ""
        """Who calls: `key:NAME`, `jwt:SUBJECT`, `cert:COMMON NAME`, or the address of a stranger."""
        pairs: Any = context.invocation_metadata() or ()  # made anew by each call of it
        self.metadata: dict[str, str | bytes] = dict(pairs)
        """What the caller sent beside the body; of a repeated key the last value."""
        asked = self.metadata.get(PRIORITY_KEY)
        self.priority = max(priority, int(asked)) if asked in _PRIORITIES else priority
        """The method's, from which callers may step back by `vae-priority: 3`."""
        self.metadata_bytes = sum([len(key) + len(value) for key, value in pairs])
        self.unread_bytes = 0
        """Size of an answer, or of the message of a stream that its caller does not take."""
        self._request_id = ""
        self.reason = ""
        """Reason of the error that the call ended with, from the catalogue."""
        self.received_at = 0.0
        """When the body was there; of a stream of requests the first. Zero until then."""
        self.request_bytes = self.response_bytes = 0
        """Size of the messages that were read, and of those that were written."""
        self.taken: Ticket | None = None
        """What came of its rows; of a stream of requests the sum."""
        self.trace: CallTrace | None = None
        """Where what happens is noted; None unless the call is traced."""

    @property
    def method(self) -> str:
        """Name of the method without its service, for metrics and logs."""
        return self.path.rpartition("/")[2]

    @property
    def request_id(self) -> str:
        """The caller's id where it is well formed, else one of ours."""
        if not self._request_id:
            given = self.metadata.get(REQUEST_ID_KEY, "")
            is_good = isinstance(given, str) and _REQUEST_ID.fullmatch(given)
            self._request_id = str(given) if is_good else f"{new_id(64):016x}"
        return self._request_id

    @property
    def trace_id(self) -> str:
        """Id of the trace it belongs to, ours or, traced here or not, the caller's; empty if there is none."""
        if self.trace is not None:
            return self.trace.context.trace_name
        sent = self.metadata.get(PARENT_KEY)
        context = None if sent is None else parse(sent)
        return context.trace_name if context else ""

    def make_ticket(self) -> Ticket:
        """Return a ticket for a request of this call."""
        ticket = Ticket(self.expires_at, client=self.client, priority=self.priority)
        ticket.trace = self.trace
        if self.taken is None:
            self.taken = ticket
        return ticket

    def add(self, ticket: Ticket) -> None:
        """Count what one of several requests of this call took."""
        if ticket is not self.taken and self.taken is not None:
            self.taken.add(ticket)

    def receive(self, body: Any) -> None:  # noqa: ANN401 - bytes, or the end of the stream
        """Take note of a message that has arrived."""
        if not self.received_at:
            self.received_at = time.monotonic()
        if body is not grpc.aio.EOF:
            self.request_bytes += len(body)

    def tell(self, version: str) -> None:
        """Put into the trailing metadata of an answer what its caller wants to know."""
        pairs = [(REQUEST_ID_KEY, self.request_id)]
        if TIMINGS_KEY in self.metadata and self.taken is not None:
            taken = self.taken
            pairs += [
                ("vae-queue-us", str(round(taken.queue_s * 1e6))),
                ("vae-engine-us", str(round(taken.run_s * 1e6))),
                ("vae-total-us", str(round((time.monotonic() - self.arrived_at) * 1e6))),
                ("vae-batch-rows", str(taken.batch_rows)),
                ("vae-model-version", version),
            ]
        self.context.set_trailing_metadata(tuple(pairs))

    def check_metadata(self, max_bytes: int) -> None:
        """Refuse a flood of metadata. gRPC's own limit binds only callers who have acknowledged it.

        Raises:
            MetadataTooLarge: If keys and values together are more than so many bytes.
        """
        if self.metadata_bytes > max_bytes:
            raise MetadataTooLarge(limit=max_bytes, actual=self.metadata_bytes)

    async def end(self, status: statuses.Status) -> bytes:
        """End the call with a status; does not return.

        A caller who does not read is not waited for: gRPC delivers the status if they ever do.
        """
        self.code, self.reason = status.code, status.reason
        trailers = (*status.trailers, (REQUEST_ID_KEY, self.request_id))
        try:
            async with asyncio.timeout(_UNREAD_ABORT_S if self.unread_bytes else None):
                await self.context.abort(status.code, status.message, trailers)
        except TimeoutError:
            raise asyncio.CancelledError from None
        raise AssertionError("abort does not return")  # pragma: no cover - for the type checker


class Surround(Protocol):
    """One concern around a call."""

    async def around(self, call: Call, proceed: Proceed) -> bytes:
        """Do what comes before, proceed, do what comes after."""
        ...


class Reading:
    """Waits for what callers send: for the body of a request a limited time, for the next until a drain.

    All bodies have the same time, so one timer for the oldest is enough: a timer for each call would cost 13
    microseconds of each, 5 % of a call of one row.

    Args:
        timeout_s: Time for the body of a request to arrive, seconds.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self.is_draining = False
        """Whether streams must end at the next opportunity."""
        self._idle: set[asyncio.Task[Any]] = set()
        self._began: dict[asyncio.Task[Any], float] = {}
        self._is_watching = False

    async def read(self, context: Context) -> Any:  # noqa: ANN401 - bytes, or the end of the stream
        """Return what the caller sends next.

        Raises:
            RequestStalled: If it does not arrive in time.
        """
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - for the type checker: gRPC runs a handler in a task
        loop = asyncio.get_running_loop()
        self._began[task] = loop.time()
        if not self._is_watching:
            self._is_watching = True
            loop.call_later(self._timeout_s, self._end_the_stalled)
        try:
            return await context.read()
        except asyncio.CancelledError as error:
            if error.args == (self,) and task.uncancel() == 0:  # ours, and the caller did not leave meanwhile
                raise RequestStalled(timeout_s=self._timeout_s) from None
            raise
        finally:
            del self._began[task]

    async def read_next(self, context: Context) -> Any:  # noqa: ANN401 - as above
        """Return what comes next on a stream of requests; its end also when the server drains."""
        if self.is_draining:
            return grpc.aio.EOF
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - as above
        self._idle.add(task)
        try:
            return await context.read()
        except asyncio.CancelledError as error:
            if error.args == (self,) and task.uncancel() == 0:
                return grpc.aio.EOF
            raise
        finally:
            self._idle.discard(task)

    def drain(self) -> None:
        """Let streams end: those that wait for a request now, the others at their next chunk or request."""
        self.is_draining = True
        for task in self._idle:
            task.cancel(self)

    def _end_the_stalled(self) -> None:
        loop = asyncio.get_running_loop()
        latest = loop.time() - self._timeout_s
        for task, began in self._began.items():  # the oldest first
            if began > latest:
                break
            task.cancel(self)
        self._is_watching = bool(self._began)
        if self._is_watching:
            oldest = max(
                next(iter(self._began.values())), latest
            )  # those that are ended now leave in the next turn
            loop.call_at(oldest + self._timeout_s + _TICK_S, self._end_the_stalled)


class Patience(NamedTuple):
    """How long a caller may take."""

    reading: Reading
    """To send the body of a request."""

    write_s: float
    """To take one message of a stream, seconds."""


def handler(
    path: str, method: Method, surrounds: Iterable[Surround], patience: Patience, *, version: str = ""
) -> "grpc.RpcMethodHandler[bytes, bytes]":
    """Return the gRPC handler of one method.

    Bytes are parsed here and not by gRPC, which would answer UNKNOWN with the text of the exception to a
    message that does not parse.

    Args:
        path: Full name of the method.
        method: The request and the behaviour.
        surrounds: What surrounds it, outermost first.
        patience: How long a caller may take.
        version: Of the model, for callers who ask.
    """
    proceed: Proceed = _innermost(method, patience, version)
    for surround in reversed(list(surrounds)):
        proceed = functools.partial(_around, surround, proceed)

    async def answer(_requests: object, context: Context) -> bytes:
        return await proceed(Call(path, context, method.priority))

    async def stream(_requests: object, context: Context) -> None:
        await proceed(Call(path, context, method.priority))

    if method.unary:
        return grpc.stream_unary_rpc_method_handler(answer)
    return grpc.stream_stream_rpc_method_handler(stream)


def _around(surround: Surround, inner: Proceed, call: Call) -> Awaitable[bytes]:
    return surround.around(call, inner)


def _innermost(method: Method, patience: Patience, version: str) -> Proceed:
    async def unary(call: Call) -> bytes:
        assert method.unary is not None  # noqa: S101 - for the type checker
        body = await patience.reading.read(call.context)
        call.receive(body)
        answer = (await method.unary(_parse(body, method), call.make_ticket())).SerializeToString()
        call.response_bytes = len(answer)
        call.tell(version)
        return answer

    async def server_stream(call: Call) -> bytes:
        assert method.server_stream is not None  # noqa: S101 - as above
        body = await patience.reading.read(call.context)
        call.receive(body)
        responses = method.server_stream(_parse(body, method), call.make_ticket())
        await _write_all(call, responses, patience, is_resumable=True)
        call.tell(version)
        return b""

    async def bidirectional(call: Call) -> bytes:
        assert method.bidirectional is not None  # noqa: S101 - as above
        requests = _read_all(call, method, patience.reading)
        await _write_all(call, method.bidirectional(requests, call), patience, is_resumable=False)
        if patience.reading.is_draining:
            raise Draining
        call.tell(version)
        return b""

    if method.unary:
        return unary
    return server_stream if method.server_stream else bidirectional


async def _read_all(call: Call, method: Method, reading: Reading) -> AsyncIterator[Message]:
    while (body := await reading.read_next(call.context)) is not grpc.aio.EOF:
        call.receive(body)
        yield _parse(body, method)


def _parse(body: Any, method: Method) -> Message:  # noqa: ANN401 - bytes, or the end of the stream
    """Return the message of bytes.

    Raises:
        MalformedMessage: If they do not parse, or there are none.
        OutOfRange: If they are more than a request without tensors needs.
    """
    kind = method.request_type
    if body is grpc.aio.EOF:
        raise MalformedMessage(message_type=kind.__name__)
    if method.is_small and len(body) > MAX_SMALL_BYTES:
        raise OutOfRange("request", expected=f"at most {MAX_SMALL_BYTES} bytes", actual=f"{len(body)} bytes")
    try:
        return kind.FromString(body)
    except DecodeError:
        raise MalformedMessage(message_type=kind.__name__) from None


async def _write_all(
    call: Call, responses: AsyncIterator[Answer], patience: Patience, *, is_resumable: bool
) -> None:
    """Send responses as they are made; the next is asked for when the caller has taken this one.

    Raises:
        ResponseStalled: If the caller does not take one in time.
        Draining: If the server is about to stop, and the caller can resume the stream elsewhere.
    """
    try:
        async for response in responses:
            body = response.SerializeToString()
            call.response_bytes += len(body)
            try:
                async with asyncio.timeout(patience.write_s):
                    await call.context.write(body)
            except TimeoutError:
                call.unread_bytes = len(body)
                raise ResponseStalled(timeout_s=patience.write_s) from None
            if is_resumable and patience.reading.is_draining:
                raise Draining
    finally:
        await responses.aclose()  # type: ignore[attr-defined]  # an async generator: what it holds is let go now
