"""Reports as a load test would write them, made of a seeded queue: plausible, and known in every number."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from hdrh.histogram import HdrHistogram
from numpy.typing import NDArray

from serving.loadtest.results import (
    Counts,
    GeneratorLimits,
    Knee,
    Latency,
    LoadReport,
    OperationResult,
    Stage,
    Window,
)

DEADLINE_S = 1.0
SECONDS = 12
ROWS = {"encode:1": 1, "sample:64": 64, "decode:16": 16}
MIX = {"encode:1": 0.5, "sample:64": 0.2, "decode:16": 0.3}


class Calls(NamedTuple):
    """Requests of one stage: when they were due, how long they took, what became of them."""

    due_s: NDArray[np.float64]
    times_s: NDArray[np.float64]
    operations: NDArray[np.int64]
    outcomes: NDArray[np.str_]


def latency(times_s: NDArray[np.float64]) -> Latency | None:
    """Return the distribution of times."""
    if not len(times_s):
        return None
    histogram = HdrHistogram(1, 3_600_000_000, 3)
    for value, count in zip(*np.unique((times_s * 1e6).astype(int), return_counts=True), strict=True):
        histogram.record_value(int(value), int(count))
    quantiles = {name: float(np.quantile(times_s, share)) * 1e3 for name, share in _SHARES.items()}
    encoded = histogram.encode().decode()
    return Latency(
        mean=float(times_s.mean()) * 1e3, max=float(times_s.max()) * 1e3, histogram=encoded, **quantiles
    )


def report(
    rates: Sequence[float] = (200.0, 400.0, 800.0, 1600.0, 1300.0, 1100.0),
    *,
    seed: int = 5,
    capacity: float = 1200.0,
    num_lost: int = 0,
    num_wrong: int = 0,
    **changes: Any,  # noqa: ANN401 - any field of a report
) -> LoadReport:
    """Return the report of an open loop against a queue with a known capacity, requests per second.

    Requests that would end after their deadline are refused; of the last stage some may be lost or wrong.
    """
    stages = _stages(tuple(rates), seed, capacity, num_lost, num_wrong)
    pairs = zip(rates, stages, strict=True)
    good = [rate for rate, stage in pairs if stage.counts.right >= 0.99 * stage.counts.sent]
    bad = [rate for rate in rates if rate not in good]
    knee = Knee(
        criterion="99 % right and p99 at most 100 ms",
        good_per_s=max(good, default=None),
        bad_per_s=min(bad, default=None),
    )
    fields: dict[str, Any] = {
        "label": "demo service",
        "command": "vae-serve load --find-knee --mix encode:1=0.5,sample:64=0.2,decode:16=0.3",
        "target": "localhost:50051",
        "protocol": "vae",
        "mode": "open",
        "model": "digits 4444a250293f",
        "mix": MIX,
        "deadline_s": DEADLINE_S,
        "seed": seed,
        "started_at": "2026-11-27T12:00:00Z",
        "machine": {"processors": "2", "architecture": "x86_64", "python": "3.11.9", "grpcio": "1.85.1"},
        "checks": "every answer compared with the bundle's own graphs, bit by bit",
        "stages": stages,
        "counts": Counts.total(stage.counts for stage in stages),
        "limits": GeneratorLimits(
            num_processes=2, calls_per_s=6800.0, echo_p50_ms=0.41, is_limiting=False, reason=""
        ),
        "knee": knee if len(rates) > 1 else None,
        "notes": [],
    }
    return LoadReport(**(fields | changes))


_SHARES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p999": 0.999}


@functools.cache
def _stages(rates: tuple[float, ...], seed: int, capacity: float, num_lost: int, num_wrong: int) -> list[Stage]:
    random = np.random.default_rng(seed)
    return [
        _stage(_calls(random, rate, capacity), rate, lost=num_lost * is_last, wrong=num_wrong * is_last)
        for rate, is_last in zip(rates, [False] * (len(rates) - 1) + [True], strict=True)
    ]


def _calls(random: np.random.Generator, rate: float, capacity: float) -> Calls:
    num = int(random.poisson(rate * SECONDS))
    due = np.sort(random.uniform(0, SECONDS, num))
    operations = random.choice(len(MIX), num, p=list(MIX.values()))
    service = np.array(list(ROWS.values()))[operations] + 10.0
    service *= random.gamma(16, 1 / 16, num) / (service.mean() * capacity)
    times, outcomes, free_at = np.empty(num), np.full(num, "right", "U8"), 0.0
    for index in range(num):
        waits = max(free_at - due[index], 0.0)
        if waits > 0.25 * DEADLINE_S:
            times[index], outcomes[index] = 0.001, "refused"
            continue
        free_at = due[index] + waits + service[index]
        times[index] = waits + service[index] + 0.0006
    return Calls(due, times, operations, outcomes)


def _stage(calls: Calls, rate: float, *, lost: int, wrong: int) -> Stage:
    right = np.flatnonzero(calls.outcomes == "right")
    calls.outcomes[right[:lost]] = "lost"
    calls.outcomes[right[lost : lost + wrong]] = "wrong"
    operations = [_operation(calls, index, name) for index, name in enumerate(MIX)]
    is_right = calls.outcomes == "right"
    counts = Counts.total(operation.counts for operation in operations)
    return Stage(
        offered_per_s=rate,
        concurrency=None,
        seconds=SECONDS,
        operations=operations,
        windows=[_window(calls, second) for second in range(SECONDS)],
        counts=counts,
        rate_per_s=counts.sent / SECONDS,
        goodput_per_s=counts.right / SECONDS,
        rows_per_s=sum(operation.rows for operation in operations) / SECONDS,
        response_time=latency(calls.times_s[is_right]),
        service_time=latency(calls.times_s[is_right] * 0.95),
        send_lag_p99_ms=0.4,
        generator_cpu=min(0.9, rate / 4000),
    )


def _operation(calls: Calls, index: int, name: str) -> OperationResult:
    own = calls.operations == index
    counts = _counts(calls.outcomes[own])
    times = calls.times_s[own & (calls.outcomes == "right")]
    ends = {
        "OK": counts.right + counts.wrong,
        "RESOURCE_EXHAUSTED": counts.refused,
        "LOST_AFTER_DEADLINE": counts.lost,
    }
    return OperationResult(
        name=name,
        counts=counts,
        statuses={status: count for status, count in ends.items() if count},
        rows=counts.right * ROWS[name],
        request_bytes=counts.sent * ROWS[name] * 64,
        response_bytes=counts.right * ROWS[name] * 256,
        response_time=latency(times),
        service_time=latency(times * 0.95),
    )


def _window(calls: Calls, second: int) -> Window:
    own = (calls.due_s >= second) & (calls.due_s < second + 1)
    times = calls.times_s[own & (calls.outcomes == "right")] * 1e3
    p50, p99 = np.quantile(times, [0.5, 0.99]) if len(times) else (None, None)
    return Window(start_s=second, counts=_counts(calls.outcomes[own]), p50_ms=p50, p99_ms=p99)


def _counts(outcomes: NDArray[np.str_]) -> Counts:
    ends = {name: int((outcomes == name).sum()) for name in ("right", "refused", "lost", "wrong")}
    return Counts(sent=len(outcomes), **ends)
