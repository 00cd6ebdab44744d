"""From lines of the ledger to a stage: sums balance, percentiles are those of the values."""

import numpy as np
import pytest
from hdrh.histogram import HdrHistogram

from serving.loadtest import summary
from serving.loadtest.ledger import OUTCOMES, RECORD, STATUSES
from serving.loadtest.results import Counts, Outcome, Stage
from serving.loadtest.summary import Records

RIGHT, REFUSED = OUTCOMES.index(Outcome.RIGHT), OUTCOMES.index(Outcome.REFUSED)


@pytest.fixture
def records(seed: int) -> Records:
    """Return ten seconds of a thousand random ends, unsorted, as several processes write them."""
    random, number = np.random.default_rng(seed), 1000
    lines = np.zeros(number, RECORD)
    lines["due_s"] = random.uniform(0, 10, number)
    lines["service_us"] = random.lognormal(8, 1, number)
    lines["lag_us"] = random.integers(0, 500, number)
    lines["response_us"] = lines["service_us"] + lines["lag_us"]
    lines["request_bytes"], lines["response_bytes"] = 100, random.integers(0, 1000, number)
    lines["operation"] = random.integers(0, 2, number)
    lines["outcome"] = random.integers(0, len(OUTCOMES), number)
    lines["status"] = random.integers(0, len(STATUSES), number)
    return lines


def staged(records: Records, begin_s: float = 2.0, seconds: float = 6.0) -> Stage:
    """Return a stage within the records."""
    return summary.stage(
        records,
        begin_s=begin_s,
        seconds=seconds,
        names=["encode:1", "sample:4"],
        rows=[1, 4],
        offered_per_s=100.0,
        concurrency=None,
        generator_cpu=0.5,
    )


def test_a_stage_holds_what_was_due_in_it(records: Records) -> None:
    """Warm-up and later stages do not count; what was due within does, whenever it ended."""
    stage = staged(records)
    inside = records[(records["due_s"] >= 2) & (records["due_s"] < 8)]
    assert stage.counts.sent == len(inside) < len(records)
    assert stage.counts.right == (inside["outcome"] == RIGHT).sum()
    assert stage.rate_per_s == len(inside) / 6
    assert stage.goodput_per_s == stage.counts.right / 6


def test_operations_and_windows_add_up_to_the_stage(records: Records) -> None:
    """Nothing is counted twice or forgotten, in whole seconds."""
    stage = staged(records)
    assert Counts.total(operation.counts for operation in stage.operations) == stage.counts
    assert Counts.total(window.counts for window in stage.windows) == stage.counts
    for operation in stage.operations:
        assert sum(operation.statuses.values()) == operation.counts.sent
        assert operation.request_bytes == 100 * operation.counts.sent
    assert stage.operations[1].rows == 4 * stage.operations[1].counts.right
    assert stage.rows_per_s * 6 == pytest.approx(sum(operation.rows for operation in stage.operations))


def test_windows_are_the_seconds_of_the_stage(records: Records) -> None:
    """Each has its percentiles; a second that the stage does not fill would look like a fall, and is left out."""
    stage = staged(records, seconds=5.5)
    assert [window.start_s for window in stage.windows] == [0, 1, 2, 3, 4]
    within = records[(records["due_s"] >= 3) & (records["due_s"] < 4) & (records["outcome"] == RIGHT)]
    expected = np.quantile(within["response_us"], 0.99, method="inverted_cdf") / 1000
    assert stage.windows[1].p99_ms == pytest.approx(expected)
    assert len(staged(records, seconds=0.5).windows) == 1


def test_percentiles_are_those_of_right_answers(records: Records) -> None:
    """Within the 0.1 % that the histogram keeps; refusals, which are quick, do not make a service look quick."""
    stage = staged(records)
    right = records[(records["due_s"] >= 2) & (records["due_s"] < 8) & (records["outcome"] == RIGHT)]
    for values, latency in (
        (right["response_us"], stage.response_time),
        (right["service_us"], stage.service_time),
    ):
        assert latency is not None
        for name, share in {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p999": 0.999}.items():
            rank = np.sort(values)[max(0, int(share * len(values) + 0.5) - 1)] / 1000
            assert getattr(latency, name) == pytest.approx(rank, rel=1.1e-3)
        assert latency.max == values.max() / 1000
        assert latency.mean == pytest.approx(values.mean() / 1000)
        assert latency.p999 <= latency.max


def test_the_histogram_is_the_whole_distribution(records: Records) -> None:
    """Other tools decode it: it holds each value once, as if it had been recorded one by one."""
    values = records["response_us"]
    latency = summary.latency(values)
    assert latency is not None
    expected = HdrHistogram(1, 3_600_000_000, 3)
    for value in values.tolist():
        expected.record_value(value)
    decoded = HdrHistogram.decode(latency.histogram)
    assert decoded.total_count == len(values)
    for share in (1, 50, 99, 99.9):
        assert decoded.get_value_at_percentile(share) == expected.get_value_at_percentile(share)


def test_nothing_is_no_distribution() -> None:
    """A stage without a right answer has no percentiles, and does not fail."""
    lines = np.zeros(3, RECORD)
    lines["outcome"] = REFUSED
    stage = staged(lines, begin_s=0.0, seconds=1.0)
    assert (stage.response_time, stage.service_time, stage.windows[0].p50_ms) == (None, None, None)
    assert stage.counts.refused == 3
    empty = staged(lines[:0], begin_s=0.0, seconds=1.0)
    assert (empty.counts.sent, empty.send_lag_p99_ms) == (0, 0.0)
