"""Counters and histograms for one event loop: what `prometheus_client` exports, without its locks.

A call makes ten observations. Those of `prometheus_client` take a lock each, and a histogram's a second one: with
them a call of one row spent 4 % of its processor time on being measured. Here an observation is two additions, to
be made on one thread; the thread that scrapes copies what it finds, and may see a sum one observation ahead.
"""

import bisect
from collections.abc import Iterator, Sequence

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString


class LoopCounter(Collector):
    """A counter.

    Args:
        name: Name without `_total`.
        documentation: What it counts.
        labelnames: Its labels, from closed sets.
        registry: Where it is collected.
    """

    class Child:
        """The counter of one set of label values."""

        __slots__ = ("value",)

        def __init__(self) -> None:
            self.value = 0.0

        def inc(self, amount: float = 1.0) -> None:
            """Add an amount that is not negative."""
            self.value += amount

    def __init__(
        self,
        name: str,
        documentation: str,
        labelnames: Sequence[str],
        *,
        registry: CollectorRegistry = REGISTRY,
    ) -> None:
        self.name, self.documentation, self.labelnames = name, documentation, tuple(labelnames)
        self._children: dict[tuple[str, ...], LoopCounter.Child] = {}
        registry.register(self)

    def labels(self, *values: str) -> Child:
        """Return the counter of these label values; keep it, rather than ask each time."""
        child = self._children.get(values)
        if child is None:
            child = self._children[values] = LoopCounter.Child()
        return child

    def describe(self) -> list[Metric]:
        """Return the family without samples."""
        return [CounterMetricFamily(self.name, self.documentation, labels=self.labelnames)]

    def collect(self) -> Iterator[Metric]:
        """Return the family."""
        family = CounterMetricFamily(self.name, self.documentation, labels=self.labelnames)
        for values, child in list(self._children.items()):
            family.add_metric(values, child.value)
        yield family


class LoopHistogram(Collector):
    """A histogram.

    Args:
        name: Name, with its unit.
        documentation: What it measures.
        labelnames: Its labels, from closed sets.
        buckets: Upper bounds, increasing; the one of infinity is added.
        registry: Where it is collected.
    """

    class Child:
        """The histogram of one set of label values."""

        __slots__ = ("bounds", "counts", "total")

        def __init__(self, bounds: tuple[float, ...]) -> None:
            self.bounds, self.counts, self.total = bounds, [0] * (len(bounds) + 1), 0.0

        def observe(self, value: float) -> None:
            """Count a value: a bound belongs to the bucket below it."""
            self.counts[bisect.bisect_left(self.bounds, value)] += 1
            self.total += value

    def __init__(
        self,
        name: str,
        documentation: str,
        labelnames: Sequence[str],
        *,
        buckets: Sequence[float],
        registry: CollectorRegistry = REGISTRY,
    ) -> None:
        self.name, self.documentation, self.labelnames = name, documentation, tuple(labelnames)
        self._bounds = tuple(float(bound) for bound in buckets)
        self._children: dict[tuple[str, ...], LoopHistogram.Child] = {}
        registry.register(self)

    def labels(self, *values: str) -> Child:
        """Return the histogram of these label values; keep it, rather than ask each time."""
        child = self._children.get(values)
        if child is None:
            child = self._children[values] = LoopHistogram.Child(self._bounds)
        return child

    def describe(self) -> list[Metric]:
        """Return the family without samples."""
        return [HistogramMetricFamily(self.name, self.documentation, labels=self.labelnames)]

    def collect(self) -> Iterator[Metric]:
        """Return the family."""
        family = HistogramMetricFamily(self.name, self.documentation, labels=self.labelnames)
        names = [*map(floatToGoString, self._bounds), "+Inf"]
        for values, child in list(self._children.items()):
            below, buckets = 0, []
            for name, count in zip(names, list(child.counts), strict=True):
                below += count
                buckets.append((name, float(below)))
            family.add_metric(values, buckets, child.total)
        yield family
