"""A graph whose runs are counted, timed and traced where they happen: in a replica, or in the only process."""

import time
from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from serving import metrics
from serving.bundle import Graph
from serving.runtime import GraphRuntime
from serving.spans import Computed, RunTrace

Rows = NDArray[Any]


class ObservedGraph:
    """Runs a graph and notes what came of it. May be used by several threads.

    Args:
        name: Which half of the model.
        graph: Ready to run.
    """

    def __init__(self, name: Graph, graph: GraphRuntime) -> None:
        self._name, self._graph, self._metrics = name, graph, metrics.replica(name)
        self.report = graph.report
        metrics.describe_replica(name, graph.report)

    def run_until(
        self, expires_at: float, rows: Rows, outputs: Sequence[str], trace: RunTrace | None
    ) -> list[Rows]:
        """Run rows as `GraphRuntime.run_until` does.

        Args:
            expires_at: Monotonic time after which nobody waits.
            rows: Input of the graph.
            outputs: Names of the outputs to compute.
            trace: Told how it went; None if no row belongs to a traced call.
        """
        began_at, error = time.monotonic(), ""
        try:
            values = self._graph.run_until(expires_at, rows, outputs)
        except Exception as failure:
            error = type(failure).__name__
            self._metrics.failed()
            raise
        else:
            self._metrics.ran(len(rows), time.monotonic() - began_at)
            return list(values)
        finally:
            if trace is not None:
                times, report = (began_at, time.monotonic()), self.report
                trace.computed = Computed(self._name, len(rows), *times, report.provider, report.version, error)
