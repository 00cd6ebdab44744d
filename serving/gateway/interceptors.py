"""What surrounds every call: its trace, its metrics, its errors, who calls, how many may, its deadline.

A surrounding wraps a handler once, when the server is built, so that a call pays for no lookup. The outermost
comes first. No RPC method has a `try`, an `abort` or a timer of its own.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable
from typing import Any, Final

import grpc

from serving import metrics
from serving.errors import DeadlineExceeded, ServingError
from serving.gateway import statuses
from serving.gateway.access_log import AccessLog
from serving.gateway.admission import Admission
from serving.gateway.calls import Call, Proceed
from serving.gateway.identity import Identity
from serving.spans import CallTrace, Value
from serving.tracing import CallFacts, Tracer

logger = logging.getLogger(__name__)

_LARGE_ANSWER: Final = 64 * 1024
"""Size of an answer, bytes, above which it counts until it is read: less goes out unread anyway."""

_MAX_CLIENT: Final = 128
"""Longest name of a client in a span, characters."""

_CLOCK_SLACK_S: Final = 0.02
"""A caller whose deadline passes may cancel some milliseconds before our clock agrees."""


class Sparingly:
    """Lets so many lines a second into the log: what strangers can cause must not fill a disk."""

    def __init__(self, lines_per_s: int) -> None:
        self._lines_per_s, self._second, self._num_lines, self._num_left_out = lines_per_s, 0, 0, 0

    def allow(self) -> int | None:
        """Return how many lines were left out before this one, or None if it is left out too."""
        second = int(time.monotonic())
        if second != self._second:
            self._second, self._num_lines = second, 0
        self._num_lines += 1
        if self._num_lines > self._lines_per_s:
            self._num_left_out += 1
            return None
        left_out, self._num_left_out = self._num_left_out, 0
        return left_out


_sparingly: Final = Sparingly(lines_per_s=20)


class Traffic:
    """What the drain and the health of a server ask: how many calls run, and when the last one came."""

    def __init__(self) -> None:
        self.num_in_flight = 0
        self.last_arrival = time.monotonic()


class Observe:
    """Counts the call, times it and its stages, and writes its line of the access log."""

    def __init__(self, traffic: Traffic, access_log: AccessLog) -> None:
        self._traffic, self._access_log = traffic, access_log

    async def around(self, call: Call, proceed: Proceed) -> bytes:
        """Count, whatever the end."""
        self._traffic.num_in_flight += 1
        self._traffic.last_arrival = call.arrived_at
        try:
            return await proceed(call)
        except asyncio.CancelledError:
            # gRPC cancels a handler when the caller gives up or its deadline passes.
            if call.code is not grpc.StatusCode.OK:
                raise  # it has its status, which the caller does not read
            is_late = time.monotonic() >= call.expires_at - _CLOCK_SLACK_S
            call.code = grpc.StatusCode.DEADLINE_EXCEEDED if is_late else grpc.StatusCode.CANCELLED
            raise
        finally:
            self._traffic.num_in_flight -= 1
            total_s = time.monotonic() - call.arrived_at
            _count(call, total_s)
            self._access_log.write(call, total_s)


def _count(call: Call, total_s: float) -> None:
    meters = metrics.call(call.method)
    meters.end(call.code.name)
    meters.latency.observe(total_s)
    if call.reason:
        meters.error(call.reason, statuses.blame(call.reason))
    if not call.received_at:
        return
    receive_s = call.received_at - call.arrived_at
    meters.receive.observe(receive_s)
    meters.request_bytes.observe(call.request_bytes)
    if call.response_bytes:
        meters.response_bytes.observe(call.response_bytes)
    taken = call.taken
    if taken is not None and taken.num_rows:
        meters.rows.observe(taken.num_rows)
        meters.queue.observe(taken.queue_s)
        meters.engine.observe(taken.run_s)
        # Parts of one call that run side by side may take longer together than the call.
        meters.reply.observe(max(0.0, total_s - receive_s - taken.queue_s - taken.run_s))


class Trace:
    """Notes the stages of a call that is traced, and makes spans of them at its end.

    Args:
        tracer: Who decides which calls are, and makes the spans.
        is_unary: Whether one request of the method has one answer.
    """

    def __init__(self, tracer: Tracer, *, is_unary: bool) -> None:
        self._tracer, self._is_unary = tracer, is_unary

    def around(self, call: Call, proceed: Proceed) -> Awaitable[bytes]:
        """Note, whatever the end. A call that is not traced goes its way without a frame of ours."""
        call.trace = trace = self._tracer.begin(call.metadata)
        return proceed(call) if trace is None else self._traced(call, trace, proceed)

    async def _traced(self, call: Call, trace: CallTrace, proceed: Proceed) -> bytes:
        try:
            return await proceed(call)
        finally:
            self._tracer.end_call(trace, self._facts(call, time.monotonic()))

    def _facts(self, call: Call, ended_at: float) -> CallFacts:
        attributes: dict[str, Value] = {
            "vae.request_id": call.request_id,
            "vae.client": call.client[:_MAX_CLIENT],
            "vae.request_bytes": call.request_bytes,
            "vae.response_bytes": call.response_bytes,
        }
        if (taken := call.taken) is not None and taken.num_rows:
            attributes |= {"vae.rows": taken.num_rows, "vae.batch_rows": taken.batch_rows}
        number = call.code.value[0]
        times = call.arrived_at, call.received_at, ended_at
        return CallFacts(
            call.path, call.code.name, number, *times, attributes, reason=call.reason, is_unary=self._is_unary
        )


class MapErrors:
    """Ends a failed call with the status of its error; hides what the catalogue does not know."""

    async def around(self, call: Call, proceed: Proceed) -> bytes:
        """Map, and log what an operator must see."""
        try:
            return await proceed(call)
        except (asyncio.CancelledError, grpc.aio.AbortError):
            raise
        except Exception as error:  # noqa: BLE001 - the caller must not read what it is
            status = report(call, error)
        # Here and not above: gRPC keeps the exception of the abort in a cycle of references, and with `error` as
        # its context the request would stay in memory until the collector comes: 11 MB for a hostile 256 KiB.
        return await call.end(status)


def report(call: Call, error: Exception) -> statuses.Status:
    """Return the status of an error, and log what an operator must see of it."""
    if type(error) in statuses.CATALOGUE and isinstance(error, ServingError):
        detail = getattr(error, "detail", "")
        if detail and (line := _sparingly.allow()) is not None:
            extra = {"method": call.method, "client": call.client, "detail": detail, "left_out": line}
            logger.warning("call failed", extra=extra)
        return statuses.of(error)
    extra = {"method": call.method, "error_id": call.request_id}
    logger.error("call failed", extra=extra, exc_info=error)
    return statuses.internal(call.request_id)


class Authenticate:
    """Learns who calls, before the body is read, and whether they may."""

    def __init__(self, identity: Identity, *, max_metadata_bytes: int) -> None:
        self._identity, self._max_metadata_bytes = identity, max_metadata_bytes

    async def around(self, call: Call, proceed: Proceed) -> bytes:
        """Proceed as a known client.

        Raises:
            MetadataTooLarge: If the call brings too much metadata.
            Unauthenticated: If the caller brings no valid credentials and needs them.
            PermissionDenied: If the caller may not call this method.
        """
        call.check_metadata(self._max_metadata_bytes)
        call.client = await self._identity.identify(call.context, call.metadata)
        self._identity.authorize(call.client, call.path)
        return await proceed(call)


class Admit:
    """Lets a bounded number of calls in, of each client too.

    gRPC holds an answer that its caller does not read after the handler has ended: sixty unread answers of 4,096
    images were 1.6 GB. So what is large counts until the call is over.
    """

    def __init__(self, admission: Admission) -> None:
        self._admission = admission

    async def around(self, call: Call, proceed: Proceed) -> bytes:
        """Proceed if there is room.

        Raises:
            QueueFull: If there are too many calls, or too many answers are not read.
            RateLimited: If the client calls too fast.
        """
        self._admission.enter(call.client, call.priority)
        try:
            answer = await proceed(call)
            call.unread_bytes = len(answer)
        finally:
            self._admission.leave(call.client)
            if call.unread_bytes > _LARGE_ANSWER:
                let_go: Any = self._admission.hold(call.client, call.unread_bytes)
                call.context.add_done_callback(let_go)
        return answer


class LimitTime:
    """Gives the call its deadline: the caller's, cut to the longest allowed, or the default.

    Args:
        default_s: For a caller that brings none, seconds.
        max_s: The longest allowed, seconds.
    """

    def __init__(self, *, default_s: float, max_s: float) -> None:
        self._default_s, self._max_s = min(default_s, max_s), max_s

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
            async with asyncio.timeout(given_s) as timer:
                return await proceed(call)
        except TimeoutError:
            if not timer.expired():
                raise
            raise DeadlineExceeded from None
