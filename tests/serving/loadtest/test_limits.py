"""When a stage measures the generator rather than the service. The measurement itself: test_fleet.py."""

import pytest

from serving.loadtest.limits import MAX_CPU, MAX_LAG_MS, MAX_SHARE_OF_LIMIT, judge
from serving.loadtest.results import Counts, GeneratorLimits, Stage

LIMITS = GeneratorLimits(num_processes=1, calls_per_s=1000, echo_p50_ms=0.5, is_limiting=False, reason="")


def stage(*, rate: float = 100.0, lag_ms: float = 0.1, cpu: float = 0.2) -> Stage:
    """Return a stage with these figures."""
    return Stage(
        offered_per_s=rate,
        concurrency=None,
        seconds=1,
        operations=[],
        windows=[],
        counts=Counts.total([]),
        rate_per_s=rate,
        goodput_per_s=rate,
        rows_per_s=rate,
        response_time=None,
        service_time=None,
        send_lag_p99_ms=lag_ms,
        generator_cpu=cpu,
    )


@pytest.mark.parametrize(
    ("item", "reasons"),
    [
        (stage(), []),
        (stage(rate=1000 * MAX_SHARE_OF_LIMIT * 1.01), ["71% of the 1,000/s"]),
        (stage(lag_ms=MAX_LAG_MS * 1.1), ["sent 5.5 ms late"]),
        (stage(cpu=MAX_CPU + 0.05), ["0.95 of a processor"]),
        (stage(rate=900, lag_ms=9, cpu=1), ["90%", "9.0 ms late", "1.00 of a processor"]),
    ],
)
def test_each_way_of_being_the_limit_is_said(item: Stage, reasons: list[str]) -> None:
    """Too near to what it can do, too late, or out of processor time; and nothing otherwise."""
    found = judge(LIMITS, [stage(), item])
    assert len(found) == len(reasons)
    for text, part in zip(found, reasons, strict=True):
        assert part in text


def test_without_a_measurement_lag_and_processor_still_count() -> None:
    """They need no echo."""
    assert len(judge(None, [stage(rate=1e6, lag_ms=9, cpu=1)])) == 2
