"""On a real Ray: counts stay exact while replicas die and come, and one address finds all of them."""

import threading
import time
from collections.abc import Iterator
from typing import NamedTuple, Self

import numpy as np
import pytest

from deploy.observability import panels
from serving.client import VaeClient
from serving.demo import free_port
from tests.bundles import DATA_SHAPE, LATENT_DIM, small_bundle
from tests.end_to_end.service import Service, running, wait_until
from tests.observability.ledger import NO_RETRIES, Ledger
from tests.observability.prometheus import Prometheus, program, prometheus
from tests.observability.test_dashboards import lines, runnable

pytestmark = [pytest.mark.ray, pytest.mark.slow]

HIDDEN = (1024, 1024, 1024)
"""Wide enough that a few callers keep a replica busy, as in tests/end_to_end/test_autoscaling.py."""

NUM_ROWS = 512
NUM_CALLERS = 4
UP_S = 60.0
TIMEOUT_S = 30.0
GRAPHS = ("encoder", "decoder")
EVER = "sum by (graph) (last_over_time(vae_replica_rows_total[1h]))"
"""Rows that replicas have run, those that are gone included: each was scraped after its last run."""


class Scaled(NamedTuple):
    """A service on Ray, whose encoder may have two replicas, and who watches it."""

    service: Service
    prometheus: Prometheus
    ledger: Ledger

    def num_replicas(self, graph: str) -> float:
        """Return how many replicas the gateway says that a graph has."""
        return self.prometheus.value(f'min(vae_replicas{{graph="{graph}"}})')

    def num_targets(self, role: str) -> float:
        """Return how many processes of a role answer scrapes."""
        return self.prometheus.value(f'count(up{{role="{role}"}} == 1) or vector(0)')


@pytest.fixture(scope="module")
def scaled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scaled]:
    """Run the service on Ray beside a Prometheus."""
    program("prometheus")
    folder, port = tmp_path_factory.mktemp("scaled"), free_port()
    bundle = small_bundle(folder / "wide", hidden=HIDDEN)
    options = ("--metrics-port", str(port), "--set", "encoder.max_replicas=2")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
            patch.delenv(name, raising=False)
        patch.setenv("RAY_AUTH_MODE", "token")
        with running(bundle, *options) as service, prometheus(folder, port) as watcher:
            ledger = Ledger()
            with ledger.watching():
                yield Scaled(service, watcher, ledger)
            assert service.stop() == 0


class Callers:
    """Threads that encode until they are told to stop."""

    def __init__(self, target: str) -> None:
        self._target, self._is_over = target, threading.Event()
        self.num_calls = 0
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._call) for _ in range(NUM_CALLERS)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join(timeout=2 * TIMEOUT_S)

    def _call(self) -> None:
        images = np.zeros((NUM_ROWS, *DATA_SHAPE), np.uint8)
        with VaeClient(self._target, timeout_s=TIMEOUT_S, options=NO_RETRIES) as client:
            while not self._is_over.is_set():
                client.encode(images)
                with self._lock:
                    self.num_calls += 1


def call_both(target: str, num_calls: int, num_rows: int) -> None:
    """Encode and decode, one call after the other."""
    with VaeClient(target, timeout_s=TIMEOUT_S, options=NO_RETRIES) as client:
        for _ in range(num_calls):
            client.encode(np.zeros((num_rows, *DATA_SHAPE), np.uint8))
            client.decode(np.zeros((num_rows, LATENT_DIM), np.float32))


def test_counts_are_exact_through_a_restart_and_a_growth(scaled: Scaled) -> None:
    """A replica is killed and replaced, another is added by load: calls and rows are those that were sent."""
    service, watcher = scaled.service, scaled.prometheus
    wait_until(lambda: all(scaled.num_targets(graph) == 1 for graph in GRAPHS), "both replicas are scraped")
    assert scaled.num_targets("gateway") == 1

    call_both(service.target, num_calls=20, num_rows=7)
    watcher.wait_for_scrapes()  # what the victim did is known before it dies
    victim = service.replica("Decoder")
    victim.kill()
    wait_until(lambda: victim not in service.replicas("Decoder"), "it is gone")
    both = 'count(last_over_time(vae_replica_rows_total{graph="decoder"}[1h]))'
    wait_until(lambda: watcher.value(both) == 2, "another decoder is scraped", timeout_s=UP_S)
    wait_until(service.is_serving, "the service is healthy")
    call_both(service.target, num_calls=10, num_rows=11)

    with Callers(service.target) as callers:
        wait_until(lambda: scaled.num_replicas("encoder") == 2, "the encoder grows", timeout_s=UP_S)
        wait_until(lambda: scaled.num_targets("encoder") == 2, "both encoders are scraped", timeout_s=UP_S)
        ran = 'count(vae_replica_rows_total{graph="encoder"} > 0) == 2'
        wait_until(lambda: bool(watcher.series(ran)), "both encoders run rows", timeout_s=UP_S)
    watcher.wait_for_scrapes()

    by_code = watcher.values("sum by (method, code) (vae_calls_total) > 0", "method", "code")
    assert by_code == scaled.ledger.calls == {("Encode", "OK"): 30 + callers.num_calls, ("Decode", "OK"): 30}
    num_encoded, num_decoded = 20 * 7 + 10 * 11 + NUM_ROWS * callers.num_calls, 20 * 7 + 10 * 11
    expected = {("encoder",): num_encoded, ("decoder",): num_decoded}
    assert watcher.values("sum by (graph) (vae_batch_rows_sum)", "graph") == expected
    assert watcher.values(EVER, "graph") == expected
    responses = watcher.values("sum by (method) (vae_response_bytes_sum) > 0", "method")
    assert responses == scaled.ledger.response_bytes


def test_every_process_is_one_target(scaled: Scaled) -> None:
    """The gateway lists itself, each replica by its name, and Ray's own exporter beside them."""
    found = scaled.prometheus.series('up{job="vae"} == 1')
    roles = sorted(labels["role"] for labels, _ in found)
    assert roles == sorted(["gateway", "decoder", *["encoder"] * round(scaled.num_targets("encoder")), "ray"])
    replicas = [labels["replica"] for labels, _ in found if labels["role"] in GRAPHS]
    assert len(set(replicas)) == len(replicas)


def test_one_version_is_served(scaled: Scaled) -> None:
    """Gateway and replicas name the same; the alert on skew has nothing to say."""
    versions = scaled.prometheus.values("count by (version) (vae_replica_model or vae_model_info)", "version")
    assert len(versions) == 1


def test_only_gateways_say_whether_they_are_ready(scaled: Scaled) -> None:
    """A replica has none of a gateway's numbers: not even a zero, which would read as not ready."""
    assert scaled.prometheus.values("vae_ready", "role").keys() == {("gateway",)}
    assert scaled.prometheus.values("count by (role) (vae_calls_total)", "role").keys() == {("gateway",)}
    assert scaled.prometheus.values("vae_model_info", "role") == {("gateway",): 1}


def test_no_alert_on_health_stays(scaled: Scaled) -> None:
    """A replica that died has been replaced, and nothing is left of it: none is pending."""
    watched = "VaeNotReady|VaeVersionSkew|VaeReplicasMissing|VaeGone|VaeBatcherStalled"
    pending = f'ALERTS{{alertname=~"{watched}"}}'
    wait_until(lambda: not scaled.prometheus.series(pending), "no alert on health is pending", timeout_s=20)


def test_every_line_of_both_dashboards_has_data(scaled: Scaled) -> None:
    """Those of Ray too; Ray reports each ten seconds."""

    def empty() -> list[str]:
        asked = [line for board in panels.BOARDS for line in lines(board) if not line.query.may_be_empty]
        found = scaled.prometheus.series
        return [line.query.expr for line in asked if not found(runnable(line.query.expr, over="1m"))]

    deadline = time.monotonic() + 30
    while (missing := empty()) and time.monotonic() < deadline:
        time.sleep(1)
    assert not missing
