"""What Prometheus has is what the client counted: calls, errors, rows and bytes, one by one."""

import pytest

from tests.observability.conftest import Watched

pytestmark = pytest.mark.slow


def test_calls_are_counted_by_method_and_code(watched: Watched) -> None:
    """Each call once, with the code that its caller saw; no other call is invented."""
    counted = watched.prometheus.values("sum by (method, code) (vae_calls_total) > 0", "method", "code")
    assert counted == watched.driven.ledger.calls


def test_every_kind_of_call_was_made(watched: Watched) -> None:
    """The load has all methods of the service, and errors that each of the three parties must act on."""
    methods = {method for method, _ in watched.driven.ledger.calls}
    ours = {"GetModel", "Encode", "Decode", "Sample", "SampleStream", "Reconstruct", "Score", "Interpolate"}
    assert ours <= methods
    blamed = watched.prometheus.values("sum by (blame) (vae_call_errors_total)", "blame")
    assert set(blamed) == {("client",), ("load",), ("service",)}


def test_errors_are_counted_by_reason(watched: Watched) -> None:
    """Each error once, with the reason that its caller was told."""
    counted = watched.prometheus.values("sum by (method, reason) (vae_call_errors_total)", "method", "reason")
    assert counted == watched.driven.ledger.errors


def test_rows_are_counted_by_graph(watched: Watched) -> None:
    """Gateway and replica agree with what was asked for: no row twice, none left out."""
    expected = watched.driven.rows
    assert watched.prometheus.values("sum by (graph) (vae_batch_rows_sum)", "graph") == expected
    assert watched.prometheus.values("sum by (graph) (vae_replica_rows_total)", "graph") == expected


def test_rows_are_counted_by_method(watched: Watched) -> None:
    """A call knows the rows that were run for it in both graphs."""
    counted = watched.prometheus.values("sum by (method) (vae_call_rows_sum) > 0", "method")
    assert counted == watched.driven.call_rows


def test_bytes_are_those_of_the_messages(watched: Watched) -> None:
    """Requests whose body was read, and answers, are as large as the client's messages."""
    ledger = watched.driven.ledger
    counted = watched.prometheus.values("sum by (method) (vae_request_bytes_sum) > 0", "method")
    assert counted == {method: size for method, size in ledger.request_bytes.items() if size}
    counted = watched.prometheus.values("sum by (method) (vae_response_bytes_sum) > 0", "method")
    assert counted == ledger.response_bytes


def test_every_call_is_timed(watched: Watched) -> None:
    """Whatever its end, and the bucket of infinity has them all."""
    expected = watched.driven.ledger.by_method
    counted = watched.prometheus.values("sum by (method) (vae_call_latency_seconds_count)", "method")
    assert counted == expected
    infinite = watched.prometheus.values('sum by (method) (vae_call_latency_seconds_bucket{le="+Inf"})', "method")
    assert infinite == expected


def test_nothing_waits_when_all_is_answered(watched: Watched) -> None:
    """Gauges are back at zero; no row was dropped; no counter has fallen."""
    ask = watched.prometheus.value
    for gauge in ("vae_calls_in_flight", "vae_queue_rows", "vae_queue_bytes", "vae_batches_in_flight"):
        assert ask(f"sum({gauge})") == 0
    assert ask("sum(vae_rows_dropped_total)") == 0
    assert ask("sum(vae_replica_failures_total)") == 0
    assert ask("sum(resets(vae_calls_total[10m])) + sum(resets(vae_replica_rows_total[10m]))") == 0


def test_an_increase_sees_the_first_call_with_a_code(watched: Watched) -> None:
    """Counters of the codes that rules watch exist before the first call: a rate does not miss it."""
    expr = 'sum(increase(vae_calls_total{method="ModelInfer",code="UNAVAILABLE"}[10m]))'
    assert watched.prometheus.value(expr) > 0


def test_one_process_is_one_target(watched: Watched) -> None:
    """The in-process service lists itself alone, as a gateway, and serves one version in both graphs."""
    assert watched.prometheus.values('up{job="vae"}', "role") == {("gateway",): 1}
    versions = watched.prometheus.values("count by (version) (vae_replica_model or vae_model_info)", "version")
    assert list(versions.values()) == [3]  # two graphs and the gateway
