"""What a model did: requests, rows, runs, and where the time went, as ModelStatistics tells it."""

import time
from collections.abc import Callable
from typing import Final

from protos.inference import inference_pb2 as pb
from serving.tickets import Ticket

_NANOSECONDS: Final = 1e9


class Statistics:
    """Counts the requests of one model in this process.

    Args:
        wall_clock: Seconds since 1970.
    """

    __slots__ = (
        "_fail_s", "_input_s", "_last_at", "_num_failed", "_num_rows", "_num_runs", "_num_succeeded", "_output_s",
        "_queue_s", "_run_s", "_success_s", "_wall_clock",
    )  # fmt: skip

    def __init__(self, *, wall_clock: Callable[[], float] = time.time) -> None:
        self._wall_clock = wall_clock
        self._num_succeeded = self._num_failed = self._num_rows = 0
        self._success_s = self._fail_s = self._num_runs = self._last_at = 0.0
        self._queue_s = self._input_s = self._run_s = self._output_s = 0.0

    def succeed(self, ticket: Ticket, *, total_s: float, input_s: float, output_s: float) -> None:
        """Count a request that ended well.

        Args:
            ticket: What the queues told of it.
            total_s: From the parsed request to the answer, seconds.
            input_s: To check the request and make arrays of it, seconds.
            output_s: To make the answer of arrays, seconds.
        """
        self._num_succeeded += 1
        self._num_rows += ticket.num_rows
        self._num_runs += ticket.run_share
        self._success_s += total_s
        self._queue_s += ticket.queue_s
        self._input_s += input_s
        self._run_s += ticket.run_s
        self._output_s += output_s
        self._last_at = self._wall_clock()

    def fail(self, total_s: float) -> None:
        """Count a request that failed or was cancelled, after so many seconds."""
        self._num_failed += 1
        self._fail_s += total_s

    def message(self, name: str, version: str) -> pb.ModelStatistics:
        """Return the counts of the model of that name and version."""

        def duration(count: int, seconds: float) -> pb.StatisticDuration:
            return pb.StatisticDuration(count=count, ns=round(seconds * _NANOSECONDS))

        count = self._num_succeeded
        return pb.ModelStatistics(
            name=name,
            version=version,
            last_inference=round(self._last_at * 1000),
            inference_count=self._num_rows,
            # Shares of a run add up to less than one run until its other requests are counted too.
            execution_count=max(round(self._num_runs), min(1, count)),
            inference_stats=pb.InferStatistics(
                success=duration(count, self._success_s),
                fail=duration(self._num_failed, self._fail_s),
                queue=duration(count, self._queue_s),
                compute_input=duration(count, self._input_s),
                compute_infer=duration(count, self._run_s),
                compute_output=duration(count, self._output_s),
            ),
        )
