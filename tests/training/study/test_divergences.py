"""Rows 11, 12 and 17: what the terms do to q, both orders of the divergence, the prior's gradient."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.training.study.sections import assert_shown
from training import estimators, gaussians
from training.estimators import Function, GaussianLatents
from training.study import divergences
from training.study.bound import one_dimensional
from training.study.claims import Check
from training.study.divergences import Humps, climb, objectives_of
from training.study.setup import Study


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """Return a quick study."""
    return Study(tmp_path)


def _failed(checks: tuple[Check, ...]) -> list[str]:
    return [check.name for check in checks if not check.passed]


def test_entropy(study: Study) -> None:
    """A spike without the entropy, the posterior with it, one hump of two."""
    assert_shown(divergences.entropy(study), 11)


def test_the_two_climbs_do_not_pass_for_each_other() -> None:
    """The spike is not the posterior, and the posterior does not shrink for ever."""
    joint, bound = objectives_of(one_dimensional(divergences.WEIGHT, divergences.SCALE))
    alone, whole = climb(joint, num_steps=400), climb(bound, num_steps=400)
    assert not _failed(divergences.collapse_checks(alone))
    assert len(_failed(divergences.collapse_checks(whole))) >= 2
    assert _failed(divergences.posterior_checks(alone)) == [r"both terms: $\sigma^2$ after 400 steps"]


@pytest.mark.parametrize(("weight", "scale"), [(1.0, 1.0), (2.0, 0.3), (0.0, 1.0)])
def test_posterior_variance_is_that_of_the_model(weight: float, scale: float) -> None:
    """The formula of the text is the model's own posterior; without a signal it is the prior's variance."""
    model = one_dimensional(weight, scale)
    covariance = model.posterior(torch.zeros((1, 1), dtype=torch.float64)).covariance
    assert divergences.posterior_variance(weight, scale) == pytest.approx(covariance.item(), abs=1e-12)


def test_expected_log_joint_of_two_humps_is_its_sampled_mean(source: torch.Generator) -> None:
    """The closed form by fourth moments is right within five standard errors."""
    mean, scale = torch.tensor([0.4], dtype=torch.float64), torch.tensor([0.7], dtype=torch.float64)
    latents = mean + scale * torch.randn(200_000, generator=source, dtype=torch.float64)
    values = divergences.hump_log_joint(latents)
    exact = divergences.hump_expected_log_joint(mean, scale).item()
    assert values.mean().item() == pytest.approx(exact, abs=5 * values.std().item() / math.sqrt(len(values)))


def test_a_q_that_covers_both_humps_is_found() -> None:
    """If the wide q were the best, its mass on the other side, and its gap, would give it away."""
    humps = Humps.fitted()
    assert not _failed(divergences.hump_checks(humps))
    wide = [1, 1, 1]
    covering = humps._replace(means=humps.means[wide], scales=humps.scales[wide], bounds=humps.bounds[wide])
    assert _failed(divergences.hump_checks(covering)) == [
        "mass of $q$ on the other hump's side",
        "what a $q$ on one hump misses",
        "bound of the best $q$ around zero - bound on one hump",
    ]


def test_asymmetry(study: Study) -> None:
    """Known values in both orders, laws, zero-forcing and covering."""
    assert_shown(divergences.asymmetry(study), 12)


def test_the_other_order_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """A divergence with its arguments exchanged fails both known values and the integral."""
    kl = gaussians.kl
    monkeypatch.setattr(
        gaussians, "kl", lambda mean, log_var, other, other_log_var: kl(other, other_log_var, mean, log_var)
    )
    failed = _failed(divergences.known_kl_checks())
    assert len(failed) == 3
    assert "cross entropy - entropy, integrals" in failed


def test_a_symmetric_distance_is_not_the_divergence(
    source: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The squared distance of the means has no order and may leave unequal distributions at zero."""

    def distance(mean: Tensor, _log_var: Tensor, other: Tensor, _other_log_var: Tensor) -> Tensor:
        return (mean - other).square().sum(dim=-1)

    monkeypatch.setattr(gaussians, "kl", distance)
    assert _failed(divergences.law_checks(source, num=1000)) == ["median difference of the two orders"]


def test_fits_of_the_wrong_order_are_found() -> None:
    """Gaussians that cover where they should stay inside one part fail, and the other way round."""
    fits = divergences.fit_both_orders()
    assert not _failed(divergences.order_checks(fits))
    exchanged = fits._replace(
        means=fits.covering_means,
        scales=fits.covering_scales,
        covering_means=fits.means,
        covering_scales=fits.scales,
    )
    failed = _failed(divergences.order_checks(exchanged))
    assert any(
        "moment matching" in check.source for check in divergences.order_checks(exchanged) if not check.passed
    )
    assert any("largest error of mean" in name for name in failed)


def test_expected_log_prior(study: Study) -> None:
    """Closed form, autograd, an integral and both estimators agree."""
    assert_shown(divergences.expected_log_prior(study), 17)


def test_a_wrong_closed_form_is_found(source: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """The value without its variance term has another gradient and is no integral."""
    monkeypatch.setattr(
        gaussians,
        "expected_standard_normal_log_prob",
        lambda mean, log_var: gaussians.standard_normal_log_prob(mean) + 0 * log_var.sum(dim=-1),
    )
    assert len(_failed(divergences.autograd_checks(source))) == 2


@pytest.mark.parametrize("name", list(divergences.ESTIMATORS))
def test_a_sign_error_in_an_estimator_is_found(
    name: str, source: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An estimator whose gradient has the wrong sign fails its own check alone."""
    estimator = divergences.ESTIMATORS[name]

    def turned(function: Function, latents: GaussianLatents, noise: Tensor) -> Tensor:
        return -estimator(function, latents, noise)

    monkeypatch.setitem(divergences.ESTIMATORS, name, turned)
    noise = torch.randn((20_000, 1, 1), generator=source, dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    failed = _failed(divergences.sampling_checks(one, one, noise))
    assert failed == [rf"gradient in $(\mu, \sigma)$, {name}, worst entry"]
    assert estimators.reparametrised in divergences.ESTIMATORS.values() or name == "reparametrised"
