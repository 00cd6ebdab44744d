"""What is learned of the times of runs: always a lower bound, soon a tight one, forgotten when it may be wrong."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.service_times import ServiceTimes

ROUNDING = 1 + 1e-9
"""Of float64, over some hundreds of steps."""


def learned(
    runs: list[tuple[int, float]], *, now: float = 0.0, num_in_flight: int = 1, repeat: int = 3
) -> ServiceTimes:
    """Return what runs of (rows, seconds) teach, each seen several times."""
    times = ServiceTimes()
    for num_rows, run_s in runs * repeat:
        times.observe(num_rows, run_s, num_in_flight=num_in_flight, now=now)
    return times


@given(
    fixed_s=st.floats(0, 1),
    per_row_s=st.floats(0, 0.01),
    runs=st.lists(
        st.tuples(st.integers(1, 2000), st.sampled_from([0.0, 0.001, 1.0, 30.0]), st.integers(1, 8)), max_size=60
    ),
    asked=st.lists(st.integers(1, 2000), min_size=1, max_size=10),
    silence_s=st.sampled_from([0.0, 0.5, 10.0, 1e6]),
)
@settings(max_examples=300, deadline=None)
def test_the_estimate_is_a_lower_bound(
    fixed_s: float, per_row_s: float, runs: list[tuple[int, float, int]], asked: list[int], silence_s: float
) -> None:
    """Where a run of n rows takes a + b n, alone or k of them at once k times as long, no estimate is above it."""

    def time_of(num_rows: int) -> float:
        return fixed_s + per_row_s * num_rows

    times, now = ServiceTimes(), 0.0
    for num_rows, pause_s, num_in_flight in runs:
        now += pause_s
        times.observe(num_rows, num_in_flight * time_of(num_rows), num_in_flight=num_in_flight, now=now)
        for number in (*asked, num_rows):
            assert 0 <= times.busy_s(number, now) <= time_of(number) * ROUNDING
    now += silence_s
    for number in asked:
        assert 0 <= times.busy_s(number, now) <= time_of(number) * ROUNDING
        assert times.busy_s(number, now) <= times.slowest_s * ROUNDING


def test_nothing_is_known_at_first() -> None:
    """Without runs the least time is zero, whatever the rows: nobody is refused by guess."""
    times = ServiceTimes()
    assert (times.busy_s(1, 0.0), times.busy_s(4096, 1e9), times.slowest_s) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(("num_rows", "expected"), [(512, 0.1), (256, 0.05), (1, 0.1 / 512), (4096, 0.1)])
def test_one_size_bounds_the_others(num_rows: int, expected: float) -> None:
    """More rows take no less time, and fewer rows at least their share of it."""
    assert learned([(512, 0.1)]).busy_s(num_rows, 0.0) == pytest.approx(expected)


def test_the_tightest_bound_counts() -> None:
    """A small run says what any run costs, a large one what its rows cost."""
    times = learned([(1, 0.010), (512, 0.020)])
    assert times.busy_s(1, 0.0) == pytest.approx(0.010)
    assert times.busy_s(300, 0.0) == pytest.approx(0.020 * 300 / 512)
    assert times.busy_s(100, 0.0) == pytest.approx(0.010)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_one_slow_run_of_the_first_three_does_not_count(place: int) -> None:
    """The first run of a graph may load or compile: nobody is refused for it, and it is forgotten."""
    times = ServiceTimes()
    for index in range(3):
        times.observe(64, 5.0 if index == place else 0.01, num_in_flight=1, now=0.0)
        assert times.busy_s(64, 0.0) <= 0.01
    assert times.busy_s(64, 0.0) == pytest.approx(0.01)


@pytest.mark.parametrize("slow_s", [1.0, 60.0, 1e9])
def test_an_outlier_does_not_shut_the_door(slow_s: float) -> None:
    """One run, however slow, raises an estimate by half at most, and the next good runs bring it down."""
    times = learned([(64, 0.01)])
    times.observe(64, slow_s, num_in_flight=1, now=0.0)
    assert times.busy_s(64, 0.0) <= 0.015
    for _ in range(5):
        times.observe(64, 0.01, num_in_flight=1, now=0.0)
    assert times.busy_s(64, 0.0) == pytest.approx(0.01, rel=0.05)


def test_an_engine_that_became_slower_is_learned() -> None:
    """Runs that stay slow are believed after some dozen of them."""
    times = learned([(64, 0.01)])
    for _ in range(60):
        times.observe(64, 0.1, num_in_flight=1, now=0.0)
    assert times.busy_s(64, 0.0) == pytest.approx(0.1, rel=0.05)


def test_an_engine_that_became_faster_is_learned() -> None:
    """Each faster run halves what is too much."""
    times = learned([(64, 0.1)])
    for _ in range(6):
        times.observe(64, 0.01, num_in_flight=1, now=0.0)
    assert times.busy_s(64, 0.0) < 0.012


def test_silence_opens_the_door() -> None:
    """Without runs an estimate loses half in two seconds: whoever was refused is let in and can prove it wrong."""
    times = learned([(64, 0.1)], now=100.0)
    for silence_s, expected in ((0.0, 0.1), (2.0, 0.05), (4.0, 0.025), (20.0, 0.1 / 1024), (1e9, 0.0)):
        assert times.busy_s(64, 100.0 + silence_s) == pytest.approx(expected)


@pytest.mark.parametrize("silence_s", [1.0, 10.0, 60.0, 3600.0, 1e7])
def test_what_was_forgotten_in_silence_is_learned_again_at_once(silence_s: float) -> None:
    """After a quiet night the first run that is as slow as before brings the whole estimate back."""
    times = learned([(64, 0.1)])
    times.observe(64, 0.1, num_in_flight=1, now=silence_s)
    assert times.busy_s(64, silence_s) == pytest.approx(0.1)


def test_after_silence_one_fast_run_corrects_the_estimate() -> None:
    """A service that was refused too strictly is open after the first run that shows so."""
    times = learned([(64, 1.0)])
    times.observe(64, 0.01, num_in_flight=1, now=10.0)  # the estimate has aged to 0.03
    assert times.busy_s(64, 10.0) < 0.022


def test_runs_that_share_the_engine_are_charged_their_part() -> None:
    """Of four runs at once, each says that alone it might take a quarter of the time."""
    assert learned([(64, 0.4)], num_in_flight=4).busy_s(64, 0.0) == pytest.approx(0.1)


def test_the_estimate_is_tight_where_times_scatter(seed: int) -> None:
    """With times that scatter by a fifth, the estimate lies between the fastest run and the mean."""
    random = np.random.default_rng(seed)
    times = learned([(400, 0.01)])
    for run_s in 0.01 * random.uniform(0.8, 1.2, 2000):
        times.observe(400, run_s, num_in_flight=1, now=0.0)
        assert 0.0079 < times.busy_s(400, 0.0) < 0.0105
