"""A graph whose runs are noted: the same answers, each run counted once, its trace told."""

import time
from collections.abc import Callable

import numpy as np
import pytest
from prometheus_client import REGISTRY

from serving.bundle import Bundle, golden_latents
from serving.errors import DeadlineExceeded
from serving.observed_runs import ObservedGraph
from serving.runtime import GraphRuntime
from serving.spans import RunTrace, TraceContext

FOREVER = 1e12


@pytest.fixture
def plain(small: Bundle) -> GraphRuntime:
    """Return the decoder as it is."""
    return GraphRuntime(small, "decoder", device="cpu", threads=1)


def counts() -> Callable[[], tuple[float, float, float]]:
    """Return what tells how many runs, rows and failures there were since now."""

    def read() -> tuple[float, float, float]:
        names = ("vae_replica_run_seconds_count", "vae_replica_rows_total", "vae_replica_failures_total")
        runs, rows, failures = (REGISTRY.get_sample_value(name, {"graph": "decoder"}) or 0.0 for name in names)
        return runs, rows, failures

    before = read()
    return lambda: tuple(now - then for now, then in zip(read(), before, strict=True))  # type: ignore[return-value]  # three


def test_a_run_is_that_of_the_graph_and_counted_once(small: Bundle, plain: GraphRuntime) -> None:
    """Bit for bit; one run with its rows, no failure; the trace has the graph, the rows and the times."""
    observed = ObservedGraph("decoder", plain)
    latents = golden_latents(small.manifest.latent_dim)
    grown, trace, before = counts(), RunTrace(TraceContext(1, 2)), time.monotonic()
    (found,) = observed.run_until(FOREVER, latents, ("mean",), trace)
    np.testing.assert_array_equal(found, plain.run(latents, ("mean",))[0])
    assert grown() == (1, len(latents), 0)
    assert trace.computed is not None
    assert (trace.computed.graph, trace.computed.num_rows, trace.computed.error) == ("decoder", len(latents), "")
    assert before <= trace.computed.began_at <= trace.computed.ended_at <= time.monotonic()
    assert trace.computed.version == observed.report.version == small.manifest.version


def test_a_run_that_comes_too_late_is_a_failure(small: Bundle, plain: GraphRuntime) -> None:
    """It raises as the graph does, counts no rows, and its trace says why."""
    observed = ObservedGraph("decoder", plain)
    grown, trace = counts(), RunTrace(TraceContext(1, 2))
    with pytest.raises(DeadlineExceeded):
        observed.run_until(0.0, golden_latents(small.manifest.latent_dim), ("mean",), trace)
    assert grown() == (0, 0, 1)
    assert trace.computed is not None
    assert trace.computed.error == "DeadlineExceeded"
