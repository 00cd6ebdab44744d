"""Ratios are taken within a round; other work and other values are noticed."""

import math

import numpy as np
import pytest

from training.bench.plan import Setting
from training.bench.processes import Lap
from training.bench.report import EvaluationResult, Spread, Timing, TrainingResult
from training.bench.tasks import Fitted, Measured

SETTING = Setting(latent_dim=20, batch_size=128, num_threads=1)
LAPS = [Lap(9.0, 9.0), Lap(2.0, 1.0), Lap(4.0, 1.0), Lap(3.0, 3.0)]
OUR_LAPS = [Lap(5.0, 5.0), Lap(1.0, 1.0), Lap(4.0, 0.5), Lap(1.0, 1.0)]


def _result(fit: Fitted, ours: Fitted) -> TrainingResult:
    return TrainingResult.of(
        "x", fit, LAPS, ours=(ours, OUR_LAPS), setting=SETTING, target=1.5, start_elbo=-200, num_images=600
    )


def test_ratios_are_of_the_same_round_and_leave_out_the_first() -> None:
    """Rounds 2/1, 4/4, 3/1: a busy moment that hits both of a round leaves their ratio alone."""
    timing = Timing.of(LAPS, OUR_LAPS)
    assert timing.ratio == Spread(median=2, low=1, high=3)
    assert timing.cpu_ratio == Spread(median=2, low=1, high=3)
    assert (timing.seconds, timing.median_seconds) == ((2, 4, 3), 3)


def test_ours_compared_with_itself_is_one() -> None:
    """Whatever the times are."""
    assert Timing.of(OUR_LAPS, OUR_LAPS).ratio == Spread(median=1, low=1, high=1)


def test_throughput_is_of_the_median_round() -> None:
    """600 images in 3 seconds."""
    fit = Fitted({}, 7, -100)
    assert _result(fit, fit).images_per_second == 200


@pytest.mark.parametrize(
    ("num_parameters", "elbo", "is_comparable"),
    [(7, -100.0, True), (7, -109.9, True), (7, -110.1, False), (7, -89.9, False), (8, -100.0, False)],
)
def test_other_work_is_noticed(num_parameters: int, elbo: float, *, is_comparable: bool) -> None:
    """Ours rose from -200 to -100: within ten nats of it, with as many parameters, is the same work."""
    result = _result(Fitted({}, num_parameters, elbo), Fitted({}, 7, -100.0))
    assert result.is_comparable is is_comparable
    assert result.climb == pytest.approx((elbo + 200) / 100)


@pytest.mark.parametrize(("elbo", "is_comparable"), [(-198.6, True), (-198.4, False)])
def test_half_a_nat_is_the_noise_of_a_short_fit(elbo: float, *, is_comparable: bool) -> None:
    """Where ours rose by one nat, a tenth of that would be chance."""
    assert _result(Fitted({}, 7, elbo), Fitted({}, 7, -199.0)).is_comparable is is_comparable


def test_a_contestant_that_diverged_is_not_comparable() -> None:
    """Not a number is near nothing."""
    assert not _result(Fitted({}, 7, math.nan), Fitted({}, 7, -100.0)).is_comparable


def _evaluation(theirs: list[float], ours: list[float]) -> EvaluationResult:
    return EvaluationResult.of(
        "x",
        Measured(np.array(theirs)),
        LAPS,
        ours=(Measured(np.array(ours)), OUR_LAPS),
        setting=SETTING,
        target=3,
    )


def test_error_of_a_difference_is_of_the_differences_of_single_images() -> None:
    """Images differ by tens of nats, which both see alike: only what is left of them is Monte Carlo noise."""
    result = _evaluation([100.1, 120.0, 139.9], [100.0, 120.0, 140.0])
    assert result.difference == pytest.approx(0, abs=1e-12)
    # Standard deviation of (0.1, 0, -0.1) is 0.1.
    assert result.difference_standard_error == pytest.approx(0.1 / math.sqrt(3))
    assert result.standard_error == pytest.approx(19.9 / math.sqrt(3))
    assert result.nll == pytest.approx(120)
    assert result.agrees


def test_other_values_are_noticed() -> None:
    """A shift of one nat with noise of a hundredth is no chance."""
    assert not _evaluation([101.01, 121.0, 140.99], [100.0, 120.0, 140.0]).agrees
