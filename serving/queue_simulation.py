"""How long calls take when they queue: a simulation of what gateways and graphs do with Poisson arrivals.

Why not a formula: no closed form is known for a quantile of a queue whose servers take all that waits as one run
(for the mean and one server Inoue gives a bound). Where there are formulas, the tests compare with them:
Pollaczek and Khinchine for a gateway, Crommelin for replicas that run one call at a time, Inoue for a replica that
batches; and everywhere with the service's own `RowBatcher` in virtual time.

References:
    Inoue, Queueing analysis of GPU-based inference servers with dynamic batching: a closed-form characterization,
    Performance Evaluation 147, 2021. https://arxiv.org/abs/1912.06322
"""

import heapq
import math
from bisect import bisect_right
from typing import Final

import numpy as np
from numpy.typing import NDArray

from serving.capacity import Cost

Times = NDArray[np.float64]
Counts = NDArray[np.int64]

MIN_SHARE_ROWS: Final = 64
"""Rows below which a run is not split among idle replicas: see `serving.batching`."""


def through_gateways(
    arrivals: Times, service_s: Times, *, num_gateways: int, random: np.random.Generator
) -> Times:
    """Return when calls leave gateways that each work on one at a time, in the order of arrival.

    A connection, and so a call, meets a gateway at random: the queues are separate.

    Args:
        arrivals: Ascending, seconds, shape (n,).
        service_s: Processor time of each call, seconds, shape (n,).
        num_gateways: How many.
        random: Draws each call's gateway.
    """
    ends = np.empty_like(arrivals)
    gateways = random.integers(num_gateways, size=len(arrivals))
    for gateway in range(num_gateways):
        own = np.flatnonzero(gateways == gateway)
        work = np.cumsum(service_s[own])
        # Lindley's recursion, unrolled: a call ends after the work since the last moment at which nobody waited.
        began = np.maximum.accumulate(arrivals[own] - (work - service_s[own]))
        ends[own] = began + work
    return ends


def through_replicas(
    arrivals: Times, rows: Counts, cost: Cost, *, num_replicas: int, max_batch_rows: int
) -> Times:
    """Return when the rows of calls have run on replicas that batch while they are busy.

    A replica that is free takes all rows that wait, up to a full batch; where several are free, each a share. The
    rows of a call may be split over runs, and it ends with the last.

    Args:
        arrivals: Seconds, shape (n,), in any order.
        rows: Of each call, at least one, shape (n,).
        cost: Time of a run.
        num_replicas: How many.
        max_batch_rows: Most rows of a run.
    """
    order = np.argsort(arrivals, kind="stable")
    last_rows = np.cumsum(rows[order])
    bounds, ends = _runs(arrivals[order].tolist(), last_rows.tolist(), cost, num_replicas, max_batch_rows)
    first = np.searchsorted(bounds, last_rows - rows[order], side="right")
    last = np.searchsorted(bounds, last_rows, side="left")
    found = ends[last]
    for index in np.flatnonzero(first < last):
        found[index] = ends[first[index] : last[index] + 1].max()
    result = np.empty_like(found)
    result[order] = found
    return result


def _runs(
    arrivals: list[float], last_rows: list[int], cost: Cost, num_replicas: int, max_batch_rows: int
) -> tuple[Counts, Times]:
    """Return for each run the number of the row after its last, and its end."""
    free_at = [0.0] * num_replicas
    bounds: list[int] = []
    ends: list[float] = []
    first = taken = 0
    num_rows = last_rows[-1]
    while taken < num_rows:
        now = max(free_at[0], arrivals[first])
        waiting = last_rows[bisect_right(arrivals, now, first) - 1] - taken
        size = min(waiting, max_batch_rows)
        if waiting > MIN_SHARE_ROWS and (num_free := sum(at <= now for at in free_at)) > 1:
            size = min(size, max(math.ceil(waiting / num_free), MIN_SHARE_ROWS))
        taken += size
        end = now + cost.per_call_s + cost.per_row_s * size
        heapq.heapreplace(free_at, end)
        bounds.append(taken)
        ends.append(end)
        first = bisect_right(last_rows, taken, first)
    return np.array(bounds), np.array(ends)
