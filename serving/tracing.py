"""Which calls are traced, and what their spans are.

A call of a traced caller is one span of the caller's trace, with its stages below it: receive, prepare, queue,
engine, reply, each from the end of the one before it. Rows of many calls share a run of a graph: the run's span
lies below the `engine` span of the traced request that has waited longest, and is linked with all of them, both
ways. What the replica does lies below the run's span.
"""

import os
import random
import socket
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Final, NamedTuple, Protocol

from serving.config import ServingConfig, TracingConfig
from serving.errors import TracingUnavailable
from serving.spans import (
    PARENT_KEY,
    STATE_KEY,
    Attributes,
    BatchTrace,
    CallTrace,
    Link,
    RunTrace,
    Span,
    TraceContext,
    Value,
    Visit,
    longest_waiting,
    new_context,
    parse,
)

_FLUSH_S: Final = 2.0
"""Time for the last spans to reach the collector when the process ends, seconds."""

_OUR_FAILURES: Final = frozenset(
    {"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"}
)
"""Codes by which a server's span has failed, as OpenTelemetry's conventions for gRPC have it: the others are what
callers did."""


class Exporter(Protocol):
    """Who sends spans, see `otlp.Exporter`."""

    def send(self, spans: Sequence[Span]) -> None:
        """Let spans be sent, without waiting."""
        ...

    def close(self, timeout_s: float) -> None:
        """Send what is left, as far as the time allows."""
        ...


class CallFacts(NamedTuple):
    """What a call's span says. Times are monotonic."""

    path: str
    """Full name of the method, such as `vae.v1.VaeService/Encode`."""
    code: str
    """Name of the gRPC status."""
    code_number: int
    began_at: float
    received_at: float
    """When the body was there; 0 if it never was."""
    ended_at: float
    attributes: Attributes
    reason: str = ""
    """Of the error that it ended with."""
    is_unary: bool = True
    """Whether one request has one answer, so that every moment belongs to a stage."""


class Tracer:
    """Makes spans of what was noted.

    Args:
        exporter: Who sends them.
        sample_share: Share of the calls without a trace of the caller's that are traced.
        is_remote: Whether graphs run in other processes, which send spans of their own.
        draw: Numbers in [0, 1).
    """

    def __init__(
        self,
        exporter: Exporter,
        *,
        sample_share: float,
        is_remote: bool,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._exporter, self._sample_share, self._is_remote, self._draw = exporter, sample_share, is_remote, draw

    def begin(self, sent: Mapping[str, str | bytes]) -> CallTrace | None:
        """Return what is to be noted of a call; None if it is not traced.

        The caller decides, where the metadata that were sent have a `traceparent`.
        """
        if PARENT_KEY in sent and (parent := parse(sent[PARENT_KEY], sent.get(STATE_KEY, ""))):
            return CallTrace(parent.child(), parent) if parent.is_sampled else None
        return CallTrace(new_context()) if self._draw() < self._sample_share else None

    def end_call(self, trace: CallTrace, facts: CallFacts) -> None:
        """Send the spans of a call."""
        service, _, method = facts.path.rpartition("/")
        attributes: dict[str, Value] = {
            "rpc.system": "grpc",
            "rpc.service": service,
            "rpc.method": method,
            "rpc.grpc.status_code": facts.code_number,
            **facts.attributes,
        }
        if facts.code != "OK":
            attributes["error.type"] = facts.reason or facts.code
        if trace.num_left_out:
            attributes["vae.visits_left_out"] = trace.num_left_out
        whole = Span(
            facts.path,
            trace.context,
            trace.parent,
            facts.began_at,
            facts.ended_at,
            attributes,
            kind="server",
            error=(facts.reason or facts.code) if facts.code in _OUR_FAILURES else "",
            is_remote=True,
        )
        self._exporter.send([whole, *_stages(trace, facts)])

    def end_run(self, batch: BatchTrace) -> None:
        """Send the span of a run, and of what this process computed in it."""
        span = Span(
            f"run {batch.graph}",
            batch.run.context,
            longest_waiting(batch.visits).context,
            batch.began_at,
            batch.ended_at,
            {
                "vae.graph": batch.graph,
                "vae.rows": batch.num_rows,
                "vae.requests": batch.num_requests,
            },
            kind="client" if self._is_remote else "internal",
            links=[Link(visit.call, {"vae.rows": visit.num_rows}) for visit in batch.visits],
            events=batch.run.events,
            error=batch.error,
        )
        self._exporter.send([span])
        self.end_computation(batch.run)

    def end_computation(self, run: RunTrace) -> None:
        """Send the span of what this process computed for a run, if it did."""
        computed = run.computed
        if computed is None:
            return
        attributes: Attributes = {
            "vae.graph": computed.graph,
            "vae.rows": computed.num_rows,
            "vae.provider": computed.provider,
            "vae.model_version": computed.version,
        }
        span = Span(
            f"onnxruntime {computed.graph}",
            run.context.child(),
            run.context,
            computed.began_at,
            computed.ended_at,
            attributes,
            kind="server" if self._is_remote else "internal",
            error=computed.error,
            is_remote=self._is_remote,
        )
        self._exporter.send([span])

    def close(self) -> None:
        """Send what is left; what a collector does not take in two seconds is lost."""
        self._exporter.close(_FLUSH_S)


def start(config: ServingConfig, role: str, *, instance: str = "") -> Tracer | None:
    """Return the tracer of this process; None if traces are off, which then cost nothing.

    Args:
        config: The service's configuration.
        role: What the process is: gateway, encoder or decoder.
        instance: Its name among those of its role; by default host and process.

    Raises:
        TracingUnavailable: If OpenTelemetry is not installed.
    """
    if config.tracing.exporter == "none":
        return None
    check(config.tracing)
    from serving import otlp  # noqa: PLC0415 - an extra, and a quarter of a second

    resource = {
        "service.namespace": "vae",
        "service.name": f"vae-{role}",
        "service.version": metadata.version("vae-serving"),
        "service.instance.id": instance or f"{socket.gethostname()}:{os.getpid()}",
    }
    exporter = otlp.Exporter(config.tracing.endpoint, resource)
    return Tracer(exporter, sample_share=config.tracing.sample_share, is_remote=config.engine == "ray")


def check(config: TracingConfig) -> None:
    """Refuse traces that nobody can send.

    Raises:
        TracingUnavailable: If OpenTelemetry is not installed.
    """
    if config.exporter == "none":
        return
    try:
        from serving import otlp  # noqa: F401, PLC0415 - as above
    except ImportError as error:
        raise TracingUnavailable(missing=error.name or str(error)) from None


def _stages(trace: CallTrace, facts: CallFacts) -> list[Span]:
    """Return the spans of the stages of a call, in their order."""
    if not facts.received_at:
        return []
    stages = [_stage(trace, "receive", facts.began_at, facts.received_at)]
    reached = facts.received_at
    for visit in trace.visits:
        if facts.is_unary and visit.arrived_at > reached:  # what was asked is read and checked, noise is drawn
            stages.append(_stage(trace, "prepare", reached, visit.arrived_at))
        stages += _of_visit(trace, visit, facts.ended_at)
        reached = max(reached, visit.ended_at or facts.ended_at)
    if facts.is_unary:
        stages.append(_stage(trace, "reply", reached, facts.ended_at))
    return stages


def _of_visit(trace: CallTrace, visit: Visit, call_ended_at: float) -> list[Span]:
    attributes: Attributes = {"vae.graph": visit.graph, "vae.rows": visit.num_rows}
    ended_at = visit.ended_at or call_ended_at
    run_at = visit.first_run_at or ended_at
    error = visit.error
    queue = _stage(trace, "queue", visit.arrived_at, run_at, attributes)
    if not visit.first_run_at:
        return [queue._replace(error=error)]
    links = [Link(run, {}) for run in visit.runs]
    engine = Span("engine", visit.context, trace.context, run_at, ended_at, attributes, links=links, error=error)
    return [queue, engine]


def _stage(
    trace: CallTrace, name: str, began_at: float, ended_at: float, attributes: Mapping[str, Value] | None = None
) -> Span:
    return Span(name, _child_of(trace), trace.context, began_at, ended_at, attributes or {})


def _child_of(trace: CallTrace) -> TraceContext:
    return trace.context.child()
