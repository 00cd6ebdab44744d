"""Rows 19 and 21 on the bound: every check passes, and fails where an estimator is broken."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.training.study.sections import assert_shown
from training import estimators, gaussians, presets, variance_probe
from training.config import TrainingConfig
from training.data import Dataset, binarise_rows
from training.models.vae import VAE
from training.study import bound_gradients, sampled
from training.study.bound_gradients import BIASED, DREG, ENTROPY_FORM, STICKING, TOTAL
from training.study.gradients import SCORE
from training.study.learning_curves import LearningCurve
from training.study.setup import Study


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """Return a quick study."""
    return Study(tmp_path)


def test_sticking_the_landing(study: Study) -> None:
    """Silent at the posterior, the closed forms beside it."""
    assert_shown(bound_gradients.sticking_the_landing(study), 21)


def test_importance_weighted(study: Study) -> None:
    """DReG is unbiased and its signal grows; the plain one drowns; sticking the landing goes astray."""
    assert_shown(bound_gradients.importance_weighted(study), 21)


@pytest.mark.slow
def test_training_with_each(study: Study) -> None:
    """The score function learns; a baseline makes it learn faster; reparametrisation is first."""
    assert_shown(bound_gradients.training_with_each(study), 19, 21)


def test_image_model_variance(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a model that was trained for a moment: order of the variances, equal means."""

    def smoke(_: Study) -> TrainingConfig:
        return presets.smoke()

    monkeypatch.setattr(bound_gradients, "main_config", smoke)
    assert_shown(bound_gradients.image_model_variance(study), 21)


def test_a_gradient_that_does_not_vanish_at_the_posterior_is_found(digits: Dataset) -> None:
    """The total derivative in the place of sticking the landing fails."""
    known = bound_gradients.known_posterior(digits)
    noise = sampled.noise(torch.Generator().manual_seed(0), 400, 4, len(known.posterior.mean))
    still = {
        name: variance_probe.gradients(candidate, known.log_joint, known.posterior, noise)
        for name, candidate in variance_probe.elbo_estimators().items()
    }
    rows = {1.5: bound_gradients.landing_rows(known, 1.5, noise)}
    right, wrong = (
        [check.passed for check in bound_gradients.landing_checks(found, rows, known.precision, 4)]
        for found in (still, still | {STICKING: still[TOTAL]})
    )
    assert right == [True, True, True]
    assert wrong == [False, True, True]


def test_a_wrong_variance_beside_the_posterior_is_found(digits: Dataset) -> None:
    """What was measured at one width of q does not pass for another."""
    known = bound_gradients.known_posterior(digits)
    noise = sampled.noise(torch.Generator().manual_seed(0), 400, 4, len(known.posterior.mean))
    still = {
        name: variance_probe.gradients(candidate, known.log_joint, known.posterior, noise)
        for name, candidate in variance_probe.elbo_estimators().items()
    }
    rows = {1.5: bound_gradients.landing_rows(known, 2.0, noise)}
    passed = [check.passed for check in bound_gradients.landing_checks(still, rows, known.precision, 4)]
    assert passed == [True, True, False]


def test_a_biased_estimator_in_the_place_of_dreg_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """It differs from the plain one in the mean, and is no different from sticking the landing."""
    monkeypatch.setattr(estimators, "doubly_reparametrised", estimators.importance_weighted_sticking)
    source = torch.Generator().manual_seed(0)
    rows = {k: bound_gradients.weighted_row(sampled.noise(source, 5_000, k, 2)) for k in (1, 2, 8, 16)}
    failed = [check.name for check in bound_gradients.weighted_checks(rows) if not check.passed]
    assert "largest mean difference of doubly reparametrised and plain, $k > 1$" in failed
    assert "smallest bias of sticking the landing, $k > 1$" in failed


def test_the_limit_of_the_biased_estimator_is_a_mean_over_the_posterior() -> None:
    """Normalised weights turn samples of q into ones of the posterior: there E[grad log w], by quadrature."""
    place = torch.linspace(-6, 7, 20_001, dtype=torch.float64)
    slope = (place - 0.5 - bound_gradients.SHIFT) / bound_gradients.Q_VARIANCE
    slope -= (place - 0.5) / bound_gradients.POSTERIOR_VARIANCE
    expected = float(torch.trapezoid(_log_posterior(place).exp() * slope, place))
    assert expected == pytest.approx(-bound_gradients.SHIFT / bound_gradients.Q_VARIANCE, abs=1e-9)


def test_the_model_of_the_weights_has_the_posterior_that_is_claimed() -> None:
    """Log p(x, z) minus the log density of N(0.5, 0.5) is log p(x) for every z."""
    latents = torch.linspace(-3, 3, 7, dtype=torch.float64)
    evidence = bound_gradients.weighted_log_joint(latents.unsqueeze(1)) - _log_posterior(latents)
    torch.testing.assert_close(evidence, torch.full_like(evidence, -1.5155121235))


def _log_posterior(place: Tensor) -> Tensor:
    mean = torch.full((1,), 0.5, dtype=torch.float64)
    log_var = torch.full_like(mean, math.log(bound_gradients.POSTERIOR_VARIANCE))
    return gaussians.log_prob(place.unsqueeze(1), mean, log_var)


def test_a_wrong_order_of_variances_on_images_is_found(small_vae: VAE) -> None:
    """Score function and reparametrised exchanged."""
    image = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]])
    found = bound_gradients.image_rows(small_vae, image, 4_000, torch.Generator().manual_seed(0))
    assert all(check.passed for check in bound_gradients.image_checks({"right": [found]}))
    exchanged = found | {SCORE: found[ENTROPY_FORM], ENTROPY_FORM: found[SCORE]}
    failed = [check.name for check in bound_gradients.image_checks({"wrong": [exchanged]}) if not check.passed]
    assert failed == ["wrong: score function > with either baseline > reparametrised"]


def test_a_run_that_unlearns_is_found() -> None:
    """A bound that falls, and curves in another order than their scatter."""
    falling, rising = (LearningCurve("", (0, 1), ends) for ends in ((-20.0, -25.0), (-25.0, -20.0)))
    assert [check.passed for check in bound_gradients.training_checks(falling, rising, falling)] == [False, False]


def test_the_runs_share_their_start(study: Study, digits: Dataset) -> None:
    """What is compared is the gradient alone: the bound before the first step is the same number."""
    starts = {
        bound_gradients.gaussian_curve(study, "", baseline, num_steps=1, num_samples=2).elbo[0]
        for baseline in (estimators.no_baseline, estimators.leave_one_out, None)
    }
    assert len(starts) == 1
    held_out = binarise_rows(digits.validation, seed=study.seed)
    assert -held_out[0].numel() < starts.pop() < 0


def test_names_are_those_of_the_probe() -> None:
    """A renamed estimator would leave a hole in the tables."""
    assert {TOTAL, ENTROPY_FORM, STICKING} < set(variance_probe.elbo_estimators())
    assert {BIASED, DREG} < set(variance_probe.importance_weighted_estimators())
