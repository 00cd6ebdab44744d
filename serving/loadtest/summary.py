"""From the lines of the ledger to what a report says of a stage."""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from hdrh.histogram import HdrHistogram
from numpy.typing import NDArray

from serving.loadtest.ledger import OUTCOMES, RECORD, STATUSES
from serving.loadtest.results import Counts, Latency, OperationResult, Outcome, Stage, Window

Records = NDArray[Any]
"""Lines of the ledger, see `ledger.RECORD`."""

_HIGHEST_US: Final = 3_600_000_000
_DIGITS: Final = 3
"""Significant digits of a histogram: values within 0.1 %."""

_QUANTILES: Final = {"p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0, "p999": 99.9}
_RIGHT: Final = OUTCOMES.index(Outcome.RIGHT)


def read_lines(lines: bytes) -> Records:
    """Return the bytes of a ledger as records."""
    return np.frombuffer(lines, RECORD)


def counts(records: Records) -> Counts:
    """Return how many requests ended how."""
    numbers = np.bincount(records["outcome"], minlength=len(OUTCOMES)).tolist()
    return Counts(
        sent=len(records), **{str(outcome): number for outcome, number in zip(OUTCOMES, numbers, strict=True)}
    )


def statuses(records: Records) -> dict[str, int]:
    """Return requests by the name of their status, most first."""
    numbers = np.bincount(records["status"], minlength=len(STATUSES)).tolist()
    present = [(name, number) for name, number in zip(STATUSES, numbers, strict=True) if number]
    return dict(sorted(present, key=lambda item: -item[1]))


def latency(microseconds: NDArray[np.uint32]) -> Latency | None:
    """Return the distribution of times, or None of none."""
    if not len(microseconds):
        return None
    histogram = HdrHistogram(1, _HIGHEST_US, _DIGITS)
    values, numbers = np.unique(np.minimum(microseconds, _HIGHEST_US), return_counts=True)
    for value, number in zip(values.tolist(), numbers.tolist(), strict=True):
        histogram.record_value(value, number)
    at = histogram.get_percentile_to_value_dict(list(_QUANTILES.values()))
    return Latency(
        mean=float(microseconds.mean(dtype=np.float64)) / 1000,
        max=float(microseconds.max()) / 1000,
        histogram=histogram.encode().decode("ascii"),
        # The histogram's steps end above the values in them: no quantile may exceed the maximum.
        **{name: min(at[share], int(values[-1])) / 1000 for name, share in _QUANTILES.items()},
    )


def stage(
    records: Records,
    *,
    begin_s: float,
    seconds: float,
    names: Sequence[str],
    rows: Sequence[int],
    offered_per_s: float | None,
    concurrency: int | None,
    generator_cpu: float,
) -> Stage:
    """Return what became of the requests that were due in [begin_s, begin_s + seconds).

    Args:
        records: Lines of a schedule, of all processes.
        begin_s: Begin of the stage, since that of the schedule.
        seconds: Its length.
        names: Operations by index.
        rows: Rows of each.
        offered_per_s: Requests due per second, in an open loop.
        concurrency: Callers, in a closed loop.
        generator_cpu: Processor time of the generator.
    """
    due = records["due_s"] - begin_s
    inside = records[(due >= 0) & (due < seconds)]
    right = inside[inside["outcome"] == _RIGHT]
    total = counts(inside)
    num_rows = int(np.asarray(rows)[right["operation"]].sum())
    return Stage(
        offered_per_s=offered_per_s,
        concurrency=concurrency,
        seconds=seconds,
        operations=[
            _operation(name, inside[inside["operation"] == index], rows[index]) for index, name in enumerate(names)
        ],
        windows=_windows(inside, begin_s, seconds),
        counts=total,
        rate_per_s=total.sent / seconds,
        goodput_per_s=total.right / seconds,
        rows_per_s=num_rows / seconds,
        response_time=latency(right["response_us"]),
        service_time=latency(right["service_us"]),
        send_lag_p99_ms=_quantile_ms(inside["lag_us"], 0.99) or 0.0,
        generator_cpu=generator_cpu,
    )


def _operation(name: str, records: Records, rows: int) -> OperationResult:
    right = records[records["outcome"] == _RIGHT]
    return OperationResult(
        name=name,
        counts=counts(records),
        statuses=statuses(records),
        rows=rows * len(right),
        request_bytes=int(records["request_bytes"].sum(dtype=np.int64)),
        response_bytes=int(records["response_bytes"].sum(dtype=np.int64)),
        response_time=latency(right["response_us"]),
        service_time=latency(right["service_us"]),
    )


def _windows(records: Records, begin_s: float, seconds: float) -> list[Window]:
    """Return the seconds of a stage; one that the stage does not fill is left out, unless it is the only one."""
    second = (records["due_s"] - begin_s).astype(np.int64)
    num_windows = max(1, int(seconds + 1e-9))
    order = np.argsort(second, kind="stable")
    edges = np.searchsorted(second[order], np.arange(num_windows + 1))
    windows = []
    for number in range(num_windows):
        within = records[order[edges[number] : edges[number + 1]]]
        right = within["response_us"][within["outcome"] == _RIGHT]
        windows.append(
            Window(
                start_s=float(number),
                counts=counts(within),
                p50_ms=_quantile_ms(right, 0.5),
                p99_ms=_quantile_ms(right, 0.99),
            )
        )
    return windows


def _quantile_ms(microseconds: NDArray[np.uint32], share: float) -> float | None:
    """Return the time that a share does not exceed: one that occurred, no mean of two."""
    if not len(microseconds):
        return None
    return float(np.quantile(microseconds, share, method="inverted_cdf")) / 1000
