"""Metrics can be scraped, have help and closed labels, and never stop the service."""

import logging
import re
import socket
import urllib.request

import pytest
from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from prometheus_client.metrics import MetricWrapperBase

from serving import metrics

OURS = [value for value in vars(metrics).values() if isinstance(value, MetricWrapperBase)]


def test_every_metric_is_named_and_explained() -> None:
    """Names begin with `vae_`, times are in seconds, the help is a sentence."""
    assert len(OURS) >= 8
    for metric in OURS:
        (family, *_) = metric.describe()
        assert re.fullmatch(r"vae_[a-z_]+", family.name)
        assert re.fullmatch(r"[A-Z][^\n]+\.", family.documentation)
        if isinstance(metric, Histogram) and (
            "latency" in family.name or "wait" in family.name or "run" in family.name
        ):
            assert family.name.endswith("_seconds")


def test_labels_come_from_closed_sets() -> None:
    """No label can hold what a caller chose."""
    names = {name for metric in OURS for name in metric._labelnames}  # noqa: SLF001 - there is no public way
    assert names <= {"method", "code", "graph"}


def test_kinds_fit_their_names() -> None:
    """Counters count up, gauges do not claim a total."""
    assert isinstance(metrics.CALLS, Counter)
    assert isinstance(metrics.QUEUE_ROWS, Gauge)


def test_metrics_are_scraped_over_http() -> None:
    """A free port is chosen and told, answers with every family, and is free again after the end."""
    metrics.CALLS.labels("Encode", "OK").inc(0)
    endpoint = metrics.expose("127.0.0.1", 0)
    assert endpoint is not None
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{endpoint.port}/metrics", timeout=5) as response:
            text = response.read().decode()
    finally:
        endpoint.close()
    for metric in OURS:
        (family, *_) = metric.describe()
        assert f"# HELP {family.name}" in text
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", endpoint.port)) != 0


def test_a_taken_port_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """A metrics port that cannot be had is said, and stops nothing."""
    with socket.socket() as taken, caplog.at_level(logging.WARNING, logger="serving.metrics"):
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert metrics.expose("127.0.0.1", port) is None
    (record,) = caplog.records
    assert record.message == "metrics are not exposed"
    assert vars(record)["port"] == port


def test_the_registry_holds_each_family_once() -> None:
    """Importing twice does not declare twice."""
    names = [family.name for family in REGISTRY.collect() if family.name.startswith("vae_")]
    assert len(names) == len(set(names))
