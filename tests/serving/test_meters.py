"""What replicas report about their load: laws of time that is shared, under a clock that the test moves."""

import threading
import time

import pytest

from serving.meters import CallMeter, RowMeter

ROUNDING = 1e-9
"""Relative: sums of a few dozen float64 numbers."""


class Clock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now_s

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        self.now_s += seconds


@pytest.fixture
def clock() -> Clock:
    """Return a clock."""
    return Clock()


@pytest.fixture
def meter(clock: Clock) -> RowMeter:
    """Return a meter on the clock."""
    return RowMeter(clock)


def run(meter: RowMeter, clock: Clock, num_rows: int, seconds: float, *, is_done: bool = True) -> None:
    """Run rows alone."""
    begun = meter.begin(num_rows)
    clock.sleep(seconds)
    meter.end(begun, num_rows, is_done=is_done)


def test_a_replica_that_did_nothing_knows_nothing(meter: RowMeter, clock: Clock) -> None:
    """No load, and no cost of a row either."""
    clock.sleep(1)
    assert meter.report() == {"busy": 0, "row_s": 0, "least_row_s": 0, "waiting_rows": 0}


def test_busy_is_the_share_of_the_time_since_the_last_report(meter: RowMeter, clock: Clock) -> None:
    """Each report begins anew, and no run between two of them is missed."""
    for seconds in (0.2, 0.1):
        run(meter, clock, 5, seconds)
        clock.sleep(0.35)
    assert meter.report()["busy"] == pytest.approx(0.3, rel=ROUNDING)
    clock.sleep(2)
    assert meter.report()["busy"] == 0


def test_a_run_that_goes_on_counts_in_each_report(meter: RowMeter, clock: Clock) -> None:
    """A replica in the middle of a long run is busy, although nothing ended."""
    begun = meter.begin(64)
    for _ in range(3):
        clock.sleep(1)
        assert meter.report()["busy"] == 1
    meter.end(begun, 64, is_done=True)
    assert meter.report()["row_s"] == pytest.approx(3 / 64, rel=ROUNDING)


def test_runs_that_overlap_are_charged_the_time_they_took_together(meter: RowMeter, clock: Clock) -> None:
    """Processor sharing: what all runs are charged is the time in which anything ran, whatever overlapped."""
    first = meter.begin(10)
    clock.sleep(1)
    second = meter.begin(10)
    clock.sleep(2)
    meter.end(first, 10, is_done=True)
    clock.sleep(1)
    meter.end(second, 10, is_done=True)
    report = meter.report()
    assert report["busy"] == 1
    # 1 + 2/2 and 2/2 + 1 seconds: two each, four together. The first weighs half: it is one half-life older.
    assert report["row_s"] == pytest.approx((2 * 0.5 + 2) / (10 * 0.5 + 10), rel=ROUNDING)


def test_a_row_costs_what_it_costs_in_large_runs(meter: RowMeter, clock: Clock) -> None:
    """With t(n) = a + b n the least time per row is that of the largest runs; that of late follows what is run."""
    a, b = 0.01, 0.001
    for num_rows in (1, 16, 256):
        for _ in range(3):
            run(meter, clock, num_rows, a + b * num_rows)
    for _ in range(50):
        run(meter, clock, 1, a + b)
        clock.sleep(1)
    report = meter.report()
    assert report["least_row_s"] == pytest.approx(a / 256 + b, rel=ROUNDING)
    assert report["row_s"] == pytest.approx(a + b, rel=1e-6)  # the large runs are 50 half-lives away


def test_the_first_run_of_a_size_is_no_measure(meter: RowMeter, clock: Clock) -> None:
    """It may load or wake what the next ones find ready: two more are awaited, and the quickest counts."""
    run(meter, clock, 4, 9.0)
    run(meter, clock, 4, 0.4)
    assert meter.report()["least_row_s"] == 0
    run(meter, clock, 4, 0.8)
    assert meter.report()["least_row_s"] == pytest.approx(0.1, rel=ROUNDING)


def test_the_cost_of_a_row_follows_a_machine_that_became_slower(meter: RowMeter, clock: Clock) -> None:
    """What was reached once does not hold for ever."""
    for _ in range(3):
        run(meter, clock, 8, 0.08)
    for _ in range(40):
        run(meter, clock, 8, 0.16)
    assert meter.report()["least_row_s"] == pytest.approx(0.02, rel=0.01)  # 0.8^40 of the difference is left


def test_a_size_that_no_longer_comes_is_forgotten(meter: RowMeter, clock: Clock) -> None:
    """After ten minutes its time is no measure of the machine."""
    for _ in range(3):
        run(meter, clock, 8, 0.08)
    clock.sleep(601)
    assert meter.report()["least_row_s"] == 0


def test_a_run_that_was_not_done_costs_time_and_teaches_nothing(meter: RowMeter, clock: Clock) -> None:
    """Rows that came too late are dropped in no time: that must not look like a fast graph."""
    for _ in range(3):
        run(meter, clock, 8, 0.0, is_done=False)
    report = meter.report()
    assert report["row_s"] == report["least_row_s"] == 0


def test_waiting_rows_are_those_of_the_gateways_and_those_here(meter: RowMeter, clock: Clock) -> None:
    """The latest word of each gateway counts, for some seconds; rows here wait until they run."""
    meter.hear("one", 30)
    meter.hear("two", 5)
    meter.hear("one", 20)
    meter.hold(8)
    meter.hold(4)
    begun = meter.begin(8)
    assert meter.report()["waiting_rows"] == 20 + 5 + 4
    meter.end(begun, 8, is_done=True)
    meter.hold(-8)
    clock.sleep(2)
    meter.hear("two", 7)
    clock.sleep(2)
    assert meter.report()["waiting_rows"] == 7 + 4


def test_rows_that_are_given_up_while_they_run_leave_nothing_behind(meter: RowMeter) -> None:
    """A caller may leave before its run ends, which the run does not notice."""
    meter.hold(8)
    begun = meter.begin(8)
    meter.hold(-8)
    assert meter.report()["waiting_rows"] == 0
    meter.end(begun, 8, is_done=True)
    assert meter.report()["waiting_rows"] == 0


def test_threads_share_a_meter() -> None:
    """Runs of several threads are all counted: the charged times add up to the busy time."""
    meter, num_runs = RowMeter(), 200

    def work() -> None:
        for _ in range(num_runs):
            meter.hold(1)
            begun = meter.begin(1)
            meter.end(begun, 1, is_done=True)
            meter.hold(-1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    time.sleep(0.01)
    report = meter.report()
    assert report["waiting_rows"] == 0
    assert 0 < report["busy"] < 1
    assert meter.report()["busy"] == 0, "nothing runs any more"


def test_a_gateway_reports_its_processor_time_and_what_is_in_flight(clock: Clock) -> None:
    """Busy is processor time per time since the last report; the rest is what is so now."""
    processor = Clock()
    meter = CallMeter(lambda: 3, lambda: 70, clock=clock, processor_clock=processor)
    clock.sleep(2)
    processor.sleep(0.5)
    assert meter.report() == {"busy": pytest.approx(0.25, rel=ROUNDING), "calls": 3, "rows": 70}
    clock.sleep(1)
    assert meter.report()["busy"] == 0


def test_reports_hold_numbers_only() -> None:
    """Serve switches reports off for good when one of them holds anything else."""
    for report in (RowMeter().report(), CallMeter(lambda: 1, lambda: 2).report()):
        assert all(type(value) is float for value in report.values())
