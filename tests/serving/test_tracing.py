"""Which calls are traced, and what a collector sees of them: a real one, behind the whole service."""

import asyncio
import contextlib
import io
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from protos.vae.v1 import vae_pb2 as pb
from serving import tracing
from serving.bundle import Bundle
from serving.config import ServingConfig
from serving.errors import TracingUnavailable
from serving.gateway.server import GatewayServer
from serving.spans import BatchTrace, CallTrace, Computed, Event, RunTrace, Span, Visit, new_context
from serving.standalone import in_process
from serving.tensors import to_message
from serving.tracing import CallFacts, Tracer
from tests.serving.collector import Collector, collecting
from tests.serving.harness import (
    PuppetEngine,
    call,
    eventually,
    failure,
    sample_stream,
    serving_with,
    settings,
    wire,
)

ROOT = Path(__file__).parents[2]
TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED = (("traceparent", f"00-{TRACE}-{SPAN}-01"), ("tracestate", "congo=t61"))
NOT_SAMPLED = (("traceparent", f"00-{TRACE}-{SPAN}-00"),)
ENCODE = "vae.v1.VaeService/Encode"


@pytest.fixture
def collector() -> Iterator[Collector]:
    """Run a collector."""
    with collecting() as running:
        yield running


def traced(bundle_dir: Path, collector: Collector, *overrides: str, share: float = 0.0) -> ServingConfig:
    """Return the configuration of a service that sends traces."""
    own = ("tracing.exporter=otlp", f"tracing.endpoint={collector.endpoint}", f"tracing.sample_share={share}")
    return settings(bundle_dir, *own, *overrides)


@contextlib.asynccontextmanager
async def calling(config: ServingConfig) -> AsyncIterator[grpc.aio.Channel]:
    """Run the service; its end sends what spans are left."""
    async with in_process(config) as server, wire(server.port) as channel:
        yield channel


def encode_request(num_rows: int = 1) -> pb.EncodeRequest:
    """Return a request of zeros."""
    return pb.EncodeRequest(data=to_message(np.zeros((num_rows, 1, 4, 4), np.float32)))


class Kept:
    """An exporter that keeps spans."""

    def __init__(self) -> None:
        self.spans: list[Span] = []

    def send(self, spans: Sequence[Span]) -> None:
        """Keep."""
        self.spans += spans

    def close(self, _timeout_s: float) -> None:
        """Nothing is left."""


def tracer(*, share: float = 0.0, is_remote: bool = False, drawn: float = 0.5) -> tuple[Tracer, Kept]:
    """Return a tracer and what it makes."""
    kept = Kept()
    return Tracer(kept, sample_share=share, is_remote=is_remote, draw=lambda: drawn), kept


def facts(code: str = "OK", number: int = 0, **options: Any) -> CallFacts:  # noqa: ANN401 - fields of facts
    """Return what is known of a call that took from 10 to 20."""
    return CallFacts(ENCODE, code, number, 10.0, 11.0, 20.0, {}, **options)


@pytest.mark.parametrize(
    ("sent", "share", "is_traced"),
    [
        (dict(SAMPLED), 0.0, True),
        (dict(NOT_SAMPLED), 1.0, False),
        ({}, 0.49, False),
        ({}, 0.51, True),
        ({}, 0.0, False),
        ({}, 1.0, True),
        ({"traceparent": "nonsense"}, 1.0, True),
        ({"traceparent": "nonsense"}, 0.0, False),
    ],
)
def test_the_caller_decides_else_the_share_does(
    sent: Mapping[str, str | bytes], share: float, *, is_traced: bool
) -> None:
    """Parent based; a `traceparent` that is none counts as none. The draw here is one half."""
    trace = tracer(share=share)[0].begin(sent)
    assert (trace is not None) is is_traced


def test_stages_tile_the_call() -> None:
    """Each stage begins where the one before it ended, through two graphs, from the first moment to the last."""
    maker, kept = tracer()
    trace = CallTrace(new_context())
    for graph, at in (("encoder", 12.0), ("decoder", 15.0)):
        visit = trace.visit(graph, arrived_at=at, num_rows=3)
        assert visit is not None
        visit.first_run_at, visit.ended_at = at + 1, at + 2
    maker.end_call(trace, facts())
    whole, *stages = kept.spans
    names = ["receive", "prepare", "queue", "engine", "prepare", "queue", "engine", "reply"]
    assert [span.name for span in stages] == names
    assert [span.ended_at for span in stages] == [*(span.began_at for span in stages[1:]), whole.ended_at]
    assert stages[0].began_at == whole.began_at
    assert {span.parent for span in stages} == {whole.context}


def test_a_stream_has_no_stages_between_its_requests() -> None:
    """Nobody knows whether the service or the caller took the time."""
    maker, kept = tracer()
    trace = CallTrace(new_context())
    for at in (12.0, 15.0):
        visit = trace.visit("encoder", arrived_at=at, num_rows=1)
        assert visit is not None
        visit.first_run_at, visit.ended_at = at + 1, at + 2
    maker.end_call(trace, facts(is_unary=False))
    assert [span.name for span in kept.spans[1:]] == ["receive", "queue", "engine", "queue", "engine"]


@pytest.mark.parametrize(
    ("code", "number", "is_ours"),
    [
        ("INVALID_ARGUMENT", 3, False),
        ("RESOURCE_EXHAUSTED", 8, False),
        ("UNAVAILABLE", 14, True),
        ("INTERNAL", 13, True),
    ],
)
def test_a_span_fails_for_what_is_our_fault(code: str, number: int, *, is_ours: bool) -> None:
    """As the conventions for servers have it; every error is named in `error.type`."""
    maker, kept = tracer()
    maker.end_call(CallTrace(new_context()), facts(code, number, reason="WHY"))
    (whole, *_) = kept.spans
    assert bool(whole.error) is is_ours
    assert (whole.attributes["error.type"], whole.attributes["rpc.grpc.status_code"]) == ("WHY", number)


def test_rows_that_never_ran_have_waited_until_the_end() -> None:
    """A request that expires has a queue span with its error and no engine span."""
    maker, kept = tracer()
    trace = CallTrace(new_context())
    visit = trace.visit("encoder", arrived_at=12.0, num_rows=1)
    assert visit is not None
    visit.ended_at, visit.error = 19.0, "DeadlineExceeded"
    maker.end_call(trace, facts("DEADLINE_EXCEEDED", 4))
    by_name = {span.name: span for span in kept.spans}
    assert "engine" not in by_name
    assert (by_name["queue"].ended_at, by_name["queue"].error) == (19.0, "DeadlineExceeded")


def test_a_call_with_too_many_visits_says_so() -> None:
    """What was left out is counted on the call's span."""
    maker, kept = tracer()
    trace = CallTrace(new_context())
    trace.num_left_out = 7
    maker.end_call(trace, facts())
    assert kept.spans[0].attributes["vae.visits_left_out"] == 7


@pytest.mark.parametrize(("is_remote", "kinds"), [(True, ("client", "server")), (False, ("internal", "internal"))])
def test_a_run_and_its_computation(*, is_remote: bool, kinds: tuple[str, str]) -> None:
    """The run lies below the request that waited longest and links all; the computation lies below the run."""
    maker, kept = tracer(is_remote=is_remote)
    late, early = (Visit(new_context(), "encoder", arrived_at=at, num_rows=2) for at in (2.0, 1.0))
    run = RunTrace(early.context.child())
    run.events.append(Event(3.2, "replica lost", {"attempt": 1}))
    run.computed = Computed("encoder", 4, 3.5, 3.9, "CPUExecutionProvider", "abc", "Boom")
    maker.end_run(BatchTrace(run, "encoder", [late, early], 3, 5, 3.0, 4.0, ""))
    whole, computation = kept.spans
    assert (whole.name, computation.name) == ("run encoder", "onnxruntime encoder")
    assert (whole.kind, computation.kind) == kinds
    assert (whole.parent, computation.parent) == (early.context, run.context)
    assert [link.context for link in whole.links] == [late.call, early.call]
    assert whole.attributes == {"vae.graph": "encoder", "vae.rows": 5, "vae.requests": 3}
    assert whole.events == run.events
    assert computation.error == "Boom"


async def test_the_trace_of_a_caller_goes_on(bundle_dir: Path, collector: Collector) -> None:
    """Call, stages, run and computation are in the caller's trace, each below its parent and within its time."""
    async with calling(traced(bundle_dir, collector)) as channel:
        await call(channel, "Encode", encode_request(3), metadata=(*SAMPLED, ("x-request-id", "mine")))
    whole = collector.one(ENCODE)
    assert (whole.trace, whole.parent) == (TRACE, SPAN)
    assert {span.trace for span in collector.spans} == {TRACE}
    assert {span.proto.trace_state for span in collector.spans} == {"congo=t61"}
    stages = collector.below(whole)
    assert [stage.name for stage in stages] == ["receive", "prepare", "queue", "engine", "reply"]
    assert sum(stage.ended - stage.began for stage in stages) == whole.ended - whole.began
    (run,) = collector.below(collector.one("engine"))
    (computation,) = collector.below(run)
    assert (run.name, computation.name) == ("run encoder", "onnxruntime encoder")
    assert whole.began < run.began < computation.began < computation.ended < run.ended < whole.ended
    assert run.links == [(whole.trace, whole.id)]
    assert collector.one("engine").links == [(run.trace, run.id)]
    assert len(collector.spans) == 8
    assert (
        whole.attributes.items()
        >= {
            "rpc.system": "grpc",
            "rpc.service": "vae.v1.VaeService",
            "rpc.method": "Encode",
            "rpc.grpc.status_code": 0,
            "vae.request_id": "mine",
            "vae.rows": 3,
        }.items()
    )
    assert computation.attributes["vae.provider"] == "CPUExecutionProvider"
    assert whole.process["service.name"] == "vae-gateway"


async def test_a_call_through_both_graphs_runs_twice(bundle_dir: Path, collector: Collector) -> None:
    """Reconstruct waits and runs in each graph, and its stages still add up."""
    request = pb.ReconstructRequest(data=encode_request().data)
    async with calling(traced(bundle_dir, collector, share=1.0)) as channel:
        await call(channel, "Reconstruct", request)
    (whole,) = [span for span in collector.spans if not span.parent]
    stages = collector.below(whole)
    graphs = [stage.attributes["vae.graph"] for stage in stages if stage.name == "engine"]
    assert graphs == ["encoder", "decoder"]
    assert sum(stage.ended - stage.began for stage in stages) == whole.ended - whole.began
    assert [span.name for span in collector.spans if span.name.startswith("run")] == ["run encoder", "run decoder"]


async def test_a_run_names_every_traced_request_in_it(
    bundle_dir: Path, small: Bundle, collector: Collector
) -> None:
    """Requests that were batched are found from their run, and the run from each of them."""
    engine = PuppetEngine(small.manifest)
    config = traced(bundle_dir, collector)
    async with serving_with(engine, small.manifest, config) as server, wire(server.port) as channel:
        engine.is_open.clear()
        first = asyncio.create_task(call(channel, "Encode", encode_request()))
        await eventually(lambda: engine.num_running == 1)
        parents = [f"{number:016x}" for number in range(1, 6)]
        others = [
            asyncio.create_task(
                call(channel, "Encode", encode_request(2), metadata=(("traceparent", f"00-{TRACE}-{parent}-01"),))
            )
            for parent in parents
        ]
        untraced = asyncio.create_task(call(channel, "Encode", encode_request()))
        await eventually(lambda: server.operations.encoder.num_waiting == 11)
        engine.is_open.set()
        await asyncio.gather(first, untraced, *others)
    calls = collector.named(ENCODE)
    run = collector.one("run encoder")
    assert sorted(span.parent for span in calls) == parents
    assert sorted(run.links) == sorted((span.trace, span.id) for span in calls)
    assert run.attributes == {"vae.graph": "encoder", "vae.rows": 11, "vae.requests": 6}
    engines = collector.named("engine")
    assert [span.links for span in engines] == [[(run.trace, run.id)]] * 5
    assert run.parent in {span.id for span in engines}
    assert {span.attributes["vae.batch_rows"] for span in calls} == {11}


async def test_a_request_in_several_runs_names_them_all(bundle_dir: Path, collector: Collector) -> None:
    """Ten rows in runs of at most four."""
    async with calling(traced(bundle_dir, collector, "batching.max_batch_rows=4")) as channel:
        await call(channel, "Encode", encode_request(10), metadata=SAMPLED)
    runs = collector.named("run encoder")
    assert [run.attributes["vae.rows"] for run in runs] == [4, 4, 2]
    assert sorted(collector.one("engine").links) == sorted((run.trace, run.id) for run in runs)


async def test_a_failed_run_is_a_failed_span(bundle_dir: Path, small: Bundle, collector: Collector) -> None:
    """Run, engine and call say so, with the class of the error and not its text."""
    engine = PuppetEngine(small.manifest)
    engine.error = ValueError("secret")
    config = traced(bundle_dir, collector)
    async with serving_with(engine, small.manifest, config) as server, wire(server.port) as channel:
        error = await failure(channel, "Encode", encode_request(), metadata=SAMPLED)
    assert error.code() is grpc.StatusCode.INTERNAL
    for name in ("run encoder", "engine", ENCODE):
        assert collector.one(name).failed
    assert "secret" not in str([span.proto for span in collector.spans])


async def test_a_refused_call_is_traced_too(bundle_dir: Path, collector: Collector) -> None:
    """Its time is receive and reply; bad input is the caller's fault, not a failure of the span."""
    async with calling(traced(bundle_dir, collector)) as channel:
        await failure(channel, "Encode", b"\xff", metadata=SAMPLED)
    whole = collector.one(ENCODE)
    assert [span.name for span in collector.below(whole)] == ["receive", "reply"]
    assert whole.attributes["rpc.grpc.status_code"] == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert not whole.failed


async def test_chunks_of_a_stream_are_in_the_trace_of_their_call(bundle_dir: Path, collector: Collector) -> None:
    """Each chunk has waited and run."""
    async with calling(traced(bundle_dir, collector)) as channel:
        stream = sample_stream(
            channel, pb.SampleStreamRequest(num_samples=30, max_chunk_rows=10), metadata=SAMPLED
        )
        assert len([response async for response in stream]) == 3
    (whole,) = collector.named("vae.v1.VaeService/SampleStream")
    names = [span.name for span in collector.below(whole)]
    assert sorted(names) == ["engine"] * 3 + ["queue"] * 3 + ["receive"]
    assert whole.attributes["vae.rows"] == 30


async def test_who_is_not_sampled_sends_nothing(bundle_dir: Path, collector: Collector) -> None:
    """The caller's decision against outranks our share, and our share of none is none."""
    async with calling(traced(bundle_dir, collector, share=1.0)) as channel:
        await call(channel, "Encode", encode_request(), metadata=NOT_SAMPLED)
    async with calling(traced(bundle_dir, collector, share=0.0)) as channel:
        await call(channel, "Encode", encode_request())
    assert collector.num_requests == 0


async def test_calls_are_answered_while_the_collector_is_away(
    bundle_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And the service stops in time."""
    config = settings(
        bundle_dir, "tracing.exporter=otlp", "tracing.endpoint=http://127.0.0.1:9", "tracing.sample_share=1"
    )
    async with calling(config) as channel:
        answers = await asyncio.gather(*(call(channel, "Encode", encode_request()) for _ in range(50)))
    assert all(answer.HasField("mean") for answer in answers)
    assert sum(record.name == "serving.otlp" for record in caplog.records) <= 1


def encode_lines(stream: io.StringIO) -> list[dict[str, Any]]:
    """Return the lines of the access log about Encode."""
    lines = [json.loads(line) for line in stream.getvalue().splitlines() if '"event": "call"' in line]
    return [line for line in lines if line["method"] == ENCODE]


@pytest.mark.parametrize(("metadata", "expected"), [(SAMPLED, TRACE), (NOT_SAMPLED, TRACE), ((), None)])
async def test_the_line_of_a_call_names_the_trace_of_its_caller(
    bundle_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    metadata: tuple[tuple[str, str], ...],
    expected: str | None,
) -> None:
    """Also where traces are off: the caller's logs and ours are joined by it."""
    monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
    async with calling(settings(bundle_dir)) as channel:
        await call(channel, "Encode", encode_request(), metadata=metadata)
    assert [line.get("trace_id") for line in encode_lines(stream)] == [expected]


async def test_the_line_of_a_call_names_the_trace_that_begins_here(
    bundle_dir: Path, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the line one finds the spans."""
    monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
    async with calling(traced(bundle_dir, collector, share=1.0)) as channel:
        await call(channel, "Encode", encode_request())
    assert [line["trace_id"] for line in encode_lines(stream)] == [collector.one(ENCODE).trace]


async def test_nothing_is_noted_when_traces_are_off(service: GatewayServer) -> None:
    """Even for a caller with a trace: no surround, no note on any request."""
    noted: list[BatchTrace] = []
    service.operations.encoder.on_traced_run = noted.append
    async with wire(service.port) as channel:
        await call(channel, "Encode", encode_request(), metadata=SAMPLED)
    assert not noted


def test_opentelemetry_is_loaded_only_for_traces() -> None:
    """A service without them does not import it; one with them does."""
    code = (
        "import sys\n"
        "import serving.standalone\n"
        "from serving import tracing\n"
        "from serving.config import ServingConfig\n"
        "def loaded(): return any(name.startswith('opentelemetry') for name in sys.modules)\n"
        "off = tracing.start(ServingConfig(), 'gateway')\n"
        "assert off is None and not loaded(), 'loaded though off'\n"
        "on = tracing.start(ServingConfig.parse({'tracing': {'exporter': 'otlp'}}), 'gateway')\n"
        "assert loaded(), 'not loaded though on'\n"
        "on.close()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_traces_without_opentelemetry_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the way out in the message; off, nobody misses it."""
    monkeypatch.setitem(sys.modules, "serving.otlp", None)
    monkeypatch.delattr("serving.otlp", raising=False)
    tracing.check(ServingConfig().tracing)
    with pytest.raises(TracingUnavailable, match=r"pip install 'vae-serving\[tracing\]'"):
        tracing.check(ServingConfig.parse({"tracing": {"exporter": "otlp"}}).tracing)
