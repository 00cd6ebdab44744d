"""All processes of a service, read through one gateway: what is shown is what was counted."""

import asyncio
import json
import math
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram

from serving.client import VaeClient
from serving.fleet import Look, Process, Unreachable, look, quantile, summarise
from serving.standalone import in_process
from tests.serving.harness import settings

BOUNDS = (0.1, 0.5, 1.0, 5.0)


def process(role: str, replica: str = "", **samples: float) -> Process:
    """Return a process that began long ago, with samples of one graph or method."""
    labels = {"encoder": (("graph", "encoder"),), "gateway": ()}.get(role, ())
    found = {(name, labels): value for name, value in samples.items()}
    return Process(f"{role}{replica}:1", role, replica, {("process_start_time_seconds", ()): 1.0, **found})


async def test_what_is_shown_is_what_was_called(bundle_dir: Path) -> None:
    """Calls, rows and the version of a real service between two looks."""
    async with in_process(settings(bundle_dir, "gateway.metrics_port=0")) as server:
        url = f"http://127.0.0.1:{server.metrics_port}"

        def use() -> tuple[Look, Look]:
            before = look(url)
            with VaeClient(f"127.0.0.1:{server.port}") as client:
                for _ in range(3):
                    client.sample(5)
            return before, look(url)

        before, now = await asyncio.to_thread(use)
    summary = summarise(now, before)
    seconds = now.at - before.at
    assert summary.is_ready
    assert summary.unreachable == {}
    (sample,) = [row for row in summary.methods if row.method == "Sample"]
    assert sample.calls_per_s * seconds == pytest.approx(3)
    assert sample.errors_per_s == 0
    assert 0 < sample.p50_ms <= sample.p99_ms
    decoder = next(row for row in summary.graphs if row.graph == "decoder")
    assert decoder.rows_per_s * seconds == pytest.approx(15)
    assert decoder.num_replicas == 1
    (gateway,) = summary.processes
    assert gateway.rows_per_s * seconds == pytest.approx(15)
    assert decoder.versions[0] in gateway.serves
    assert gateway.memory_mib > 10


def test_replicas_of_two_versions_are_both_named() -> None:
    """An upgrade that stopped half way shows."""
    models = [
        Process(
            f"a:{port}", "encoder", str(port), {("vae_replica_model", (("graph", "encoder"), ("version", v))): 1.0}
        )
        for port, v in ((1, "aaa"), (2, "bbb"))
    ]
    summary = summarise(Look(0.0, models, {}))
    assert summary.graphs[0].versions == ("aaa", "bbb")
    assert summary.graphs[0].num_replicas == 2
    assert not summary.is_ready  # no gateway was found


def test_a_restart_between_two_looks_is_no_negative_rate() -> None:
    """A process that began anew at the same address counts from its own beginning."""
    old = process("encoder", vae_replica_rows_total=1000.0)
    new = process("encoder", vae_replica_rows_total=10.0)
    new.samples["process_start_time_seconds", ()] = 2.0
    summary = summarise(Look(10.0, [new], {}), Look(8.0, [old], {}))
    assert summary.processes[0].rows_per_s == pytest.approx(10 / 2)
    same = summarise(Look(10.0, [old], {}), Look(8.0, [old], {}))
    assert same.processes[0].rows_per_s == 0


@given(st.lists(st.floats(0.001, 4.9), min_size=1), st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.99, 1.0]))
def test_a_quantile_lies_in_the_bucket_of_the_true_one(values: list[float], share: float) -> None:
    """Its bucket is that of the value at the rank; nothing more can be known of a histogram."""
    registry = CollectorRegistry()
    histogram = Histogram("x_seconds", "Time.", buckets=BOUNDS, registry=registry)
    for value in values:
        histogram.observe(value)
    below = {
        float(sample.labels["le"]): sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.name == "x_seconds_bucket"
    }
    true = sorted(values)[max(0, math.ceil(share * len(values)) - 1)]
    upper = next(bound for bound in BOUNDS if true <= bound)
    lower = max([0.0, *(bound for bound in BOUNDS if bound < true)])
    assert lower <= quantile(share, below) <= upper


def test_a_histogram_without_values_has_no_quantile() -> None:
    """NaN, which tables show as a dash."""
    assert math.isnan(quantile(0.5, {}))
    assert math.isnan(quantile(0.5, {1.0: 0.0, math.inf: 0.0}))


@pytest.fixture
def gateway_of_ghosts() -> Iterator[str]:
    """Serve targets of which one is Ray's and one is not there."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps(
                [
                    {"targets": ["127.0.0.1:9"], "labels": {"role": "encoder", "replica": "gone"}},
                    {"targets": ["127.0.0.1:10"], "labels": {"role": "ray"}},
                ]
            ).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def test_a_process_that_cannot_be_read_is_named(gateway_of_ghosts: str) -> None:
    """It hides none of the others; Ray's own exporters are not ours to show."""
    found = look(gateway_of_ghosts)
    assert found.processes == []
    assert list(found.unreachable) == ["127.0.0.1:9"]
    assert "refused" in found.unreachable["127.0.0.1:9"]


@pytest.mark.parametrize("url", ["127.0.0.1:9090", "http://127.0.0.1:9"])
def test_no_gateway_is_said_with_what_to_do(url: str) -> None:
    """A wrong address, or nobody there."""
    with pytest.raises(Unreachable, match=r"metrics"):
        look(url)
