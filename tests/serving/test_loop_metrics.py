"""Counters and histograms without locks export exactly what those of `prometheus_client` do."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from serving.loop_metrics import LoopCounter, LoopHistogram

BUCKETS = (0.1, 0.5, 2.5, 64)


def samples(registry: CollectorRegistry) -> set[tuple[str, tuple[tuple[str, str], ...], float]]:
    """Return what is scraped, without the times of creation."""
    text = generate_latest(registry).decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items())), sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


@given(st.lists(st.one_of(st.sampled_from(BUCKETS), st.integers(0, 100).map(float))))
def test_a_histogram_is_that_of_the_library(values: list[float]) -> None:
    """Same buckets, counts and sums, bounds included; whole numbers, so that sums are exact in any order."""
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    loop = LoopHistogram("x_seconds", "Time.", ["method"], buckets=BUCKETS, registry=ours).labels("Encode")
    library = Histogram("x_seconds", "Time.", ["method"], buckets=BUCKETS, registry=theirs).labels("Encode")
    for value in values:
        loop.observe(value)
        library.observe(value)
    assert samples(ours) == samples(theirs)


def test_a_counter_is_that_of_the_library() -> None:
    """Same name, labels and value; the child of a label is one and the same."""
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    loop = LoopCounter("x", "Calls.", ["method", "code"], registry=ours)
    library = Counter("x", "Calls.", ["method", "code"], registry=theirs)
    for counter in (loop, library):
        counter.labels("Encode", "OK").inc()
        counter.labels("Encode", "OK").inc(2)
        counter.labels("Decode", "OK").inc(0)
    assert samples(ours) == samples(theirs)
    assert loop.labels("Encode", "OK") is loop.labels("Encode", "OK")


def test_a_name_is_taken_once() -> None:
    """Two families of one name would be one scrape that Prometheus refuses."""
    registry = CollectorRegistry()
    LoopCounter("x", "Calls.", ["method"], registry=registry)
    with pytest.raises(ValueError, match="Duplicated"):
        LoopHistogram("x_total", "Calls.", ["method"], buckets=BUCKETS, registry=registry)
