"""Metrics have help, units and closed labels; each is counted where it happens."""

import re
import subprocess
import sys

from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from prometheus_client.metrics import MetricWrapperBase

from serving import metrics
from serving.loop_metrics import LoopCounter, LoopHistogram
from serving.runtime import LoadReport

Metric = LoopCounter | LoopHistogram | MetricWrapperBase
OURS: list[Metric] = [value for value in vars(metrics).values() if isinstance(value, Metric)]
LABELS = {"method", "code", "graph", "stage", "reason", "blame", "version", "provider", "precision"}


def label_names(metric: Metric) -> tuple[str, ...]:
    """Return the names of a metric's labels."""
    if isinstance(metric, LoopCounter | LoopHistogram):
        return metric.labelnames
    return tuple(metric._labelnames)  # noqa: SLF001 - there is no public way


def family(metric: Metric) -> tuple[str, str]:
    """Return the name and the help of a metric."""
    (described, *_) = metric.describe()
    return described.name, described.documentation


def test_every_metric_is_named_and_explained() -> None:
    """Names begin with `vae_`, what measures time or size says its unit, the help is a sentence."""
    assert len(OURS) > 25
    for metric in OURS:
        name, documentation = family(metric)
        assert re.fullmatch(r"vae_[a-z_]+", name)
        assert re.fullmatch(r"[A-Z0-9][^\n]+\.", documentation)
        if isinstance(metric, Histogram | LoopHistogram):
            assert name.endswith(("_seconds", "_rows", "_bytes", "_ratio"))


def test_labels_come_from_closed_sets() -> None:
    """No label can hold what a caller chose."""
    names = {name for metric in OURS for name in label_names(metric)}
    assert names == LABELS


def test_kinds_fit_their_names() -> None:
    """Counters count up; gauges do not claim a total."""
    for metric in OURS:
        name, _ = family(metric)
        assert not name.endswith("_total")
        if isinstance(metric, Gauge):
            assert not isinstance(metric, Counter)


def test_the_registry_holds_each_family_once() -> None:
    """Importing twice does not declare twice."""
    names = [family.name for family in REGISTRY.collect() if family.name.startswith("vae_")]
    assert len(names) == len(set(names))


def _value(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


def test_a_call_is_counted_once_under_its_code() -> None:
    """The counter of one end moves, the others do not; errors also count by reason and by who must act."""
    meters = metrics.call("TestOfMetrics")
    meters.end("OK")
    meters.end("INTERNAL")
    meters.error("INTERNAL", "service")
    assert metrics.call("TestOfMetrics") is meters
    assert _value("vae_calls_total", method="TestOfMetrics", code="OK") == 1
    assert _value("vae_calls_total", method="TestOfMetrics", code="INTERNAL") == 1
    labels = {"method": "TestOfMetrics", "reason": "INTERNAL", "blame": "service"}
    assert _value("vae_call_errors_total", **labels) == 1


def test_a_replica_says_what_it_serves_and_counts_what_ran() -> None:
    """Rows and runs of those that ended well; failures apart; counters are there before the first run."""
    report = LoadReport(version="abc", provider="CPUExecutionProvider", threads=1, load_s=0.5)
    before = _value("vae_replica_rows_total", graph="decoder")
    runs = _value("vae_replica_run_seconds_count", graph="decoder")
    failures = _value("vae_replica_failures_total", graph="decoder")
    metrics.describe_replica("decoder", report)
    assert REGISTRY.get_sample_value("vae_replica_rows_total", {"graph": "decoder"}) == before
    meters = metrics.replica("decoder")
    meters.ran(7, 0.25)
    meters.failed()
    assert _value("vae_replica_rows_total", graph="decoder") == before + 7
    assert _value("vae_replica_run_seconds_count", graph="decoder") == runs + 1
    assert _value("vae_replica_failures_total", graph="decoder") == failures + 1
    labels = {"graph": "decoder", "version": "abc", "provider": "CPUExecutionProvider", "precision": "fp32"}
    assert _value("vae_replica_model", **labels) == 1
    metrics.describe_replica("decoder", report._replace(version="def"))
    assert REGISTRY.get_sample_value("vae_replica_model", labels) is None
    assert _value("vae_replica_model", **labels | {"version": "def"}) == 1


def test_the_build_is_described() -> None:
    """The versions of what runs, from the installed packages."""
    metrics.describe_build()
    (info,) = [family for family in REGISTRY.collect() if family.name == "vae_build"]
    labels = info.samples[0].labels
    assert set(labels) == {"version", "python", "grpcio", "onnxruntime", "ray"}
    assert all(re.match(r"\d+\.\d+", value) for value in labels.values())


def test_a_process_without_a_gateway_has_none_of_its_gauges() -> None:
    """A replica must not say that it is not ready, or that it knows no version: alerts would believe it."""
    code = "from serving import metrics; from prometheus_client import generate_latest as g; print(g().decode())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    names = set(re.findall(r"^(vae_\w+)", done.stdout, re.MULTILINE))
    assert not names & {"vae_ready", "vae_model_info", "vae_calls_in_flight", "vae_calls_limit"}


def test_counters_that_rules_watch_exist_before_their_first_event() -> None:
    """`rate` does not see the event with which a series appears."""
    metrics.expect("ExpectedOfMetrics")
    for code in ("OK", "UNAVAILABLE"):
        assert REGISTRY.get_sample_value("vae_calls_total", {"method": "ExpectedOfMetrics", "code": code}) == 0
    metrics.batch("graph-of-metrics")
    dropped = {"graph": "graph-of-metrics", "reason": "failed"}
    assert REGISTRY.get_sample_value("vae_rows_dropped_total", dropped) == 0
