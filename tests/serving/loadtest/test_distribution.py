"""A distribution gives back what was recorded, and says how sure a quantile is."""

import numpy as np
import pytest

from serving.loadtest.distribution import Distribution, is_more_often
from serving.loadtest.errors import ReportError
from serving.loadtest.results import Latency
from tests.serving.loadtest.synthetic import latency

PRECISION = 2e-3
"""Three significant digits of the histogram, and the step between two ranks."""


def _exponential(num: int, seed: int, scale_s: float = 0.01) -> Latency:
    found = latency(np.random.default_rng(seed).exponential(scale_s, num))
    assert found is not None
    return found


def test_quantiles_come_back(seed: int) -> None:
    """Within the precision of the histogram."""
    recorded = _exponential(20_000, seed)
    distribution = Distribution.of(recorded)
    assert distribution.num_values == 20_000
    for share, value in ((0.5, recorded.p50), (0.99, recorded.p99), (0.999, recorded.p999)):
        assert distribution.quantile_ms(share) == pytest.approx(value, rel=PRECISION)


def test_the_curve_rises_and_ends_where_one_value_is_left(seed: int) -> None:
    """Shares and latencies rise; the last share leaves at least one of n values above it."""
    curve = Distribution.of(_exponential(1000, seed)).curve()
    shares, times = zip(*curve, strict=True)
    assert list(shares) == sorted(set(shares))
    assert list(times) == sorted(times)
    assert shares[0] == 0
    assert 0.99 < shares[-1] <= 1 - 1 / 1000


def test_what_is_above_a_limit_is_counted(seed: int) -> None:
    """As many as the share that the quantile leaves, within the precision of the histogram."""
    distribution = Distribution.of(_exponential(20_000, seed))
    assert distribution.num_above(0) == pytest.approx(20_000, abs=20)  # some take less than a microsecond
    assert distribution.num_above(distribution.quantile_ms(0.9)) == pytest.approx(2000, rel=0.02)
    assert distribution.num_above(distribution.quantile_ms(1.0)) == 0


@pytest.mark.parametrize(("num", "share"), [(300, 0.01), (300, 0.5), (20_000, 0.5), (20_000, 0.01)])
def test_chance_is_rarely_taken_for_a_difference(num: int, share: float, seed: int) -> None:
    """At most 2.5 % of 2,000 pairs of equal trials; four standard errors of that are 1.4 %."""
    later, earlier = np.random.default_rng(seed).binomial(num, share, (2, 2000))
    found = [is_more_often(int(a), num, int(b), num) for a, b in zip(later, earlier, strict=True)]
    assert np.mean(found) < 0.039


def test_a_difference_is_found_when_there_are_enough_trials() -> None:
    """Ten of a hundred after one of a hundred, and not two after one; both ways of computing agree."""
    assert is_more_often(10, 100, 1, 100)
    assert not is_more_often(2, 100, 1, 100)
    assert not is_more_often(0, 100, 0, 100)
    assert not is_more_often(1, 100, 10, 100)
    found = [is_more_often(later, 1000, num - later, 1000) for num in (100, 101) for later in range(50, 80)]
    assert found[:30].index(True) == found[30:].index(True) == 11  # 61 and more, summed or approximated


def test_later_trials_may_be_more() -> None:
    """Twice the events of twice the trials are as frequent."""
    assert not is_more_often(200, 2000, 100, 1000)
    assert is_more_often(200, 1000, 100, 1000)


def test_a_broken_histogram_is_said(seed: int) -> None:
    """A report that was edited by hand is no reason for a stack trace."""
    broken = _exponential(10, seed).model_copy(update={"histogram": "HISTFAAAnonsense"})
    with pytest.raises(ReportError, match="a histogram does not decode"):
        Distribution.of(broken)
