"""Spans reach a real collector; without one nobody waits, and the log says so once."""

import logging
import time
from collections.abc import Iterator

import pytest

from serving import otlp
from serving.otlp import Exporter, _sparingly
from serving.spans import Event, Link, Span, Value, new_context
from tests.serving.collector import Collector, collecting

NOWHERE = "http://127.0.0.1:9"


@pytest.fixture
def collector() -> Iterator[Collector]:
    """Run a collector."""
    with collecting() as running:
        yield running


@pytest.fixture(autouse=True)
def _log_from_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget that a test before this one has warned."""
    monkeypatch.setattr(_sparingly, "_last", 0.0)


def span(name: str = "queue") -> Span:
    """Return a span of a millisecond that ends now."""
    now = time.monotonic()
    return Span(name, new_context(), new_context(), now - 1e-3, now, {"vae.rows": 3})


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the reasons in our warnings."""
    return [str(vars(record)["reason"]) for record in caplog.records if record.name == "serving.otlp"]


def test_what_is_sent_arrives(collector: Collector) -> None:
    """Ids, times, kind, attributes, links, events, status, state and resource."""
    exporter = Exporter(collector.endpoint, {"service.name": "vae-gateway"})
    context, parent, other = (new_context()._replace(state="a=1") for _ in range(3))
    wall = time.time() - time.monotonic()
    began = time.monotonic()
    event = Event(began + 0.25, "replica lost", {"attempt": 1})
    link = Link(other, {"vae.rows": 2})
    attributes: dict[str, Value] = {"text": "x", "number": 3, "share": 0.5, "is": True}
    sent = Span("run", context, parent, began, began + 0.5, attributes, "client", [link], [event], "Boom")
    exporter.send([sent])
    exporter.close(5)
    got = collector.one("run")
    assert got.trace == f"{context.trace_id:032x}"
    assert (got.id, got.parent) == (f"{context.span_id:016x}", f"{parent.span_id:016x}")
    assert abs(got.began / 1e9 - wall - began) < 5e-3  # the two clocks are read one after the other
    assert got.ended - got.began == 500_000_000
    assert got.attributes == attributes
    assert got.links == [(f"{other.trace_id:032x}", f"{other.span_id:016x}")]
    (happened,) = got.proto.events
    assert (happened.name, happened.time_unix_nano - got.began) == ("replica lost", 250_000_000)
    assert (got.proto.kind, got.proto.trace_state) == (got.proto.SPAN_KIND_CLIENT, "a=1")
    assert got.failed
    assert got.proto.status.message == "Boom"
    assert got.process["service.name"] == "vae-gateway"


@pytest.mark.parametrize("ending", ["", "/", "/v1/traces"])
def test_the_endpoint_is_a_base_url(collector: Collector, ending: str) -> None:
    """However it is written, spans go to its /v1/traces."""
    exporter = Exporter(collector.endpoint + ending, {})
    exporter.send([span()])
    exporter.close(5)
    assert collector.paths == {"/v1/traces"}
    assert collector.one("queue").attributes == {"vae.rows": 3}


def test_without_an_endpoint_the_environment_says_where(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The SDK's own variables, for those who have them anyway."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
    exporter = Exporter("", {})
    exporter.send([span()])
    exporter.close(5)
    assert len(collector.spans) == 1


@pytest.mark.parametrize("state", ["no pair", "a=1,a=2", ",".join(f"k{number}=1" for number in range(40))])
def test_a_state_that_is_not_well_formed_is_left_out(collector: Collector, state: str) -> None:
    """Its span arrives, and what a stranger wrote there is not in the log."""
    exporter = Exporter(collector.endpoint, {})
    sent = span()
    exporter.send([sent._replace(context=sent.context._replace(state=state))])
    exporter.close(5)
    assert collector.one("queue").proto.trace_state == ""
    logger = logging.getLogger("opentelemetry.trace.span")
    reached = []
    while logger is not None:
        reached += logger.handlers
        logger = logger.parent if logger.propagate else None  # type: ignore[assignment]  # the root has none
    assert [type(handler) for handler in reached] == [logging.NullHandler]


def test_a_collector_that_is_away_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """More spans than can wait are taken at once, the end comes in time, the log has one line."""
    exporter = Exporter(NOWHERE, {})
    batch = [span() for _ in range(100)]
    with caplog.at_level(logging.WARNING):
        began = time.monotonic()
        for _ in range(1000):
            exporter.send(batch)
        sent_at = time.monotonic()
        exporter.close(0.5)
        closed_at = time.monotonic()
        exporter._thread.join(10)  # noqa: SLF001 - it must not warn in the next test
    assert sent_at - began < 5  # some 50 ms of an idle machine; one try of the exporter alone takes up to 10 s
    assert closed_at - sent_at < 2
    assert len(warnings(caplog)) == 1


def test_what_is_too_much_is_dropped_call_by_call(
    collector: Collector, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Spans that come together arrive together or not at all; how many did not is said."""
    monkeypatch.setattr(otlp, "_MAX_WAITING", 10)
    exporter = Exporter(collector.endpoint, {})
    with caplog.at_level(logging.WARNING):
        for number in range(5):
            exporter.send([span(f"call {number}") for _ in range(4)])
        exporter.close(5)
    assert [len(collector.named(f"call {number}")) for number in range(5)] == [4, 4, 0, 0, 0]
    (reason,) = warnings(caplog)
    assert reason.startswith("12 spans")


def test_a_collector_that_refuses_is_named_once(collector: Collector, caplog: pytest.LogCaptureFixture) -> None:
    """Its answer is in the warning."""
    collector.status = 400
    exporter = Exporter(collector.endpoint, {})
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            exporter.send([span() for _ in range(600)])  # more than a batch
        exporter.close(2)
    assert collector.num_requests > 1
    (reason,) = warnings(caplog)
    assert "400" in reason
