"""Sends spans to an OpenTelemetry collector, by OTLP over HTTP. The only module that knows OpenTelemetry.

Spans are made of what is known once a call is over, so the SDK's tracer is not used, only what comes after it:
a finished span costs 6 microseconds this way, 45 with a tracer that follows it from its begin.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Final

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event as SdkEvent
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link as SdkLink
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState

from serving.spans import Kind, Span, TraceContext

logger = logging.getLogger(__name__)

_PATH: Final = "/v1/traces"
_QUIET_S: Final = 60.0
"""Time between two warnings that spans do not arrive, seconds."""

_PERIOD_S: Final = 1.0
"""Longest time for which spans are gathered, seconds."""

_BATCH: Final = 256
"""Spans that are sent at once: to encode them takes some ten milliseconds of the interpreter's time."""

_MAX_WAITING: Final = 16_384
"""Spans that wait to be sent, about 16 MB; more are dropped."""

_SCOPE: Final = InstrumentationScope("serving")
_SAMPLED, _NOT_SAMPLED = TraceFlags(TraceFlags.SAMPLED), TraceFlags(TraceFlags.DEFAULT)
_KINDS: Final[Mapping[Kind, SpanKind]] = {
    "internal": SpanKind.INTERNAL,
    "server": SpanKind.SERVER,
    "client": SpanKind.CLIENT,
}


class _Resource(Resource):
    """A resource that is told apart by identity: the SDK's own makes JSON of itself for each span, 18 of 48 us."""

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other


class _Sparingly(logging.Handler):
    """Says once in a while, in our log, what keeps spans from arriving, be it found here or by OpenTelemetry."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._last, self._num_left_out = 0.0, 0

    def emit(self, record: logging.LogRecord) -> None:
        """Say what OpenTelemetry says of every batch."""
        self.say(record.getMessage())

    def say(self, reason: str) -> None:
        """Say it, or count it."""
        now = time.monotonic()
        if self._last and now - self._last < _QUIET_S:
            self._num_left_out += 1
            return
        extra = {"reason": reason, "left_out": self._num_left_out}
        self._last, self._num_left_out = now, 0
        logger.warning("traces are not exported", extra=extra)


_sparingly: Final = _Sparingly()


class Exporter:
    """Gathers spans, and sends them from a thread of its own. Never waits: what is too much is dropped.

    The SDK's batch processor would log each span that it drops, which costs callers more than the span, and makes
    whoever closes it wait for half a minute if the collector is away.

    Args:
        endpoint: Base URL of the collector; empty for what the variables OTEL_EXPORTER_OTLP_* say.
        resource: What the process is.
    """

    def __init__(self, endpoint: str, resource: Mapping[str, str]) -> None:
        _take_over_the_log()
        known = Resource.create(dict(resource))
        self._resource = _Resource(known.attributes, known.schema_url)
        url = endpoint.rstrip("/").removesuffix(_PATH) + _PATH if endpoint else None
        self._exporter = OTLPSpanExporter(endpoint=url)
        self._waiting: deque[tuple[Span, int]] = deque()
        self._num_dropped = 0
        self._wake = threading.Event()
        self._is_closing = self._is_over = False
        self._thread = threading.Thread(target=self._work, name="otlp", daemon=True)
        self._thread.start()

    def send(self, spans: Sequence[Span]) -> None:
        """Let spans be sent, all or none of them."""
        if len(self._waiting) + len(spans) > _MAX_WAITING:
            self._num_dropped += len(spans)
            return
        # The wall clock may be set between two calls, so what is one moment in a call must be read once.
        epoch_ns = time.time_ns() - time.monotonic_ns()
        self._waiting.extend([(span, epoch_ns) for span in spans])
        if len(self._waiting) >= _BATCH:
            self._wake.set()

    def close(self, timeout_s: float) -> None:
        """Send what is left, as far as the time allows."""
        self._is_closing = True
        self._wake.set()
        self._thread.join(timeout_s)
        self._is_over = True
        self._exporter.shutdown()  # type: ignore[no-untyped-call]  # ends a try that still goes on

    def _work(self) -> None:
        while not self._is_closing:
            self._wake.wait(_PERIOD_S)
            self._wake.clear()
            while self._waiting and not self._is_over:
                batch = [self._waiting.popleft() for _ in range(min(_BATCH, len(self._waiting)))]
                self._export(batch)
            if self._num_dropped:
                dropped, self._num_dropped = self._num_dropped, 0
                _sparingly.say(f"{dropped} spans were too many at once, and are dropped")

    def _export(self, batch: Sequence[tuple[Span, int]]) -> None:
        try:
            self._exporter.export([self._readable(*part) for part in batch])
        except Exception as error:  # noqa: BLE001 - whatever one batch has, the thread must live for the next
            _sparingly.say(f"{type(error).__name__}: {error}")

    def _readable(self, span: Span, epoch_ns: int) -> ReadableSpan:
        return ReadableSpan(
            span.name,
            context=_context(span.context),
            parent=_context(span.parent, is_remote=span.is_remote) if span.parent else None,
            resource=self._resource,
            attributes=span.attributes,
            events=[SdkEvent(event.name, event.attributes, _ns(event.at, epoch_ns)) for event in span.events],
            links=[SdkLink(_context(link.context), link.attributes) for link in span.links],
            kind=_KINDS[span.kind],
            status=Status(StatusCode.ERROR, span.error) if span.error else _UNSET,
            start_time=_ns(span.began_at, epoch_ns),
            end_time=_ns(span.ended_at, epoch_ns),
            instrumentation_scope=_SCOPE,
        )


_UNSET: Final = Status(StatusCode.UNSET)


def _context(context: TraceContext, *, is_remote: bool = False) -> SpanContext:
    return SpanContext(
        context.trace_id,
        context.span_id,
        is_remote,
        _SAMPLED if context.is_sampled else _NOT_SAMPLED,
        TraceState.from_header([context.state]) if context.state else None,
    )


def _ns(at: float, epoch_ns: int) -> int:
    return round(at * 1e9) + epoch_ns


def _take_over_the_log() -> None:
    for name in ("opentelemetry.exporter", "opentelemetry.sdk"):
        theirs = logging.getLogger(name)
        theirs.handlers, theirs.propagate = [_sparingly], False
    # A line with the text of each `tracestate` that is not well formed: strangers could fill a disk.
    theirs = logging.getLogger("opentelemetry.trace")
    theirs.handlers, theirs.propagate = [logging.NullHandler()], False
