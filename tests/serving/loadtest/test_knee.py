"""The search of the knee, on services whose knee is known."""

from collections.abc import Callable

import pytest

from serving.loadtest.knee import RESOLUTION, find_knee, is_good
from serving.loadtest.results import Counts, Latency, Stage

LIMIT_MS = 50.0


def stage(rate: float, *, p99_ms: float, share_right: float = 1.0) -> Stage:
    """Return a stage with these figures."""
    right = round(1000 * share_right)
    time = Latency(mean=1, p50=1, p90=1, p95=1, p99=p99_ms, p999=p99_ms, max=p99_ms, histogram="")
    return Stage(
        offered_per_s=rate,
        concurrency=None,
        seconds=10,
        operations=[],
        windows=[],
        counts=Counts(sent=1000, right=right, refused=1000 - right, lost=0, wrong=0),
        rate_per_s=rate,
        goodput_per_s=rate * share_right,
        rows_per_s=0,
        response_time=time if right else None,
        service_time=None,
        send_lag_p99_ms=0,
        generator_cpu=0,
    )


def queue(capacity: float, measured: list[float]) -> Callable[[float], Stage]:
    """Return a service whose p99 is that of an M/M/1 queue: ln(100) / (capacity - rate)."""

    def measure(rate: float) -> Stage:
        measured.append(rate)
        p99_ms = 4605.2 / (capacity - rate) if rate < capacity else 1e6
        return stage(rate, p99_ms=p99_ms)

    return measure


@pytest.mark.parametrize("start", [10.0, 1000.0, 7777.0])
@pytest.mark.parametrize("capacity", [300.0, 1234.0, 5000.0])
def test_the_knee_is_found_from_below_and_from_above(start: float, capacity: float) -> None:
    """The rate at which p99 crosses its bound lies between the two that are reported, which are close."""
    measured: list[float] = []
    knee = find_knee(queue(capacity, measured), start_per_s=start, p99_limit_ms=LIMIT_MS)
    crossing = capacity - 4605.2 / LIMIT_MS
    assert knee.good_per_s is not None
    assert knee.bad_per_s is not None
    assert knee.good_per_s <= crossing <= knee.bad_per_s <= knee.good_per_s * (1 + RESOLUTION)
    assert len(measured) < 30
    assert "99% right" in knee.criterion
    assert "50 ms" in knee.criterion


def test_one_hiccup_does_not_move_the_knee() -> None:
    """A rate is bad only if it is bad twice."""
    measured: list[float] = []
    steady = queue(1000.0, measured)

    def measure(rate: float) -> Stage:
        measured_stage = steady(rate)
        return stage(rate, p99_ms=1e3) if len(measured) == 2 else measured_stage

    knee = find_knee(measure, start_per_s=100.0, p99_limit_ms=LIMIT_MS)
    assert knee.good_per_s is not None
    assert knee.good_per_s > 800


def test_refusals_are_a_knee_too() -> None:
    """A service that sheds load keeps its p99, and is bad for the share that it refuses."""

    def measure(rate: float) -> Stage:
        return stage(rate, p99_ms=5.0, share_right=min(1.0, 500 / rate))

    knee = find_knee(measure, start_per_s=100.0, p99_limit_ms=LIMIT_MS)
    assert knee.good_per_s is not None
    assert knee.good_per_s <= 500 / 0.99 <= (knee.bad_per_s or 0)


def test_an_interruption_keeps_what_is_known() -> None:
    """What was good so far is the answer."""
    measured: list[float] = []

    def measure(rate: float) -> Stage | None:
        return None if len(measured) == 3 else queue(1e9, measured)(rate)

    knee = find_knee(measure, start_per_s=100.0, p99_limit_ms=LIMIT_MS)
    assert (knee.good_per_s, knee.bad_per_s) == (400.0, None)


def test_a_service_that_is_never_good_has_no_knee() -> None:
    """The search ends below one request in two seconds."""
    knee = find_knee(lambda rate: stage(rate, p99_ms=1.0, share_right=0.0), start_per_s=4.0, p99_limit_ms=LIMIT_MS)
    assert knee.good_per_s is None
    assert knee.bad_per_s is not None
    assert knee.bad_per_s <= 1


def test_what_is_good() -> None:
    """Both the share of right answers and the percentile count."""
    assert is_good(stage(1, p99_ms=LIMIT_MS, share_right=0.99), LIMIT_MS)
    assert not is_good(stage(1, p99_ms=LIMIT_MS * 1.01), LIMIT_MS)
    assert not is_good(stage(1, p99_ms=1, share_right=0.98), LIMIT_MS)
