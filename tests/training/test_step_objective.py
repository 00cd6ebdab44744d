"""What a step climbs has the value and the gradient that the settings name, and records both terms of the ELBO."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from training import estimators, gaussians, objectives
from training.config import OptimizerConfig
from training.estimators import GaussianLatents
from training.models.vae import VAE
from training.step_objective import StepObjective, noise_shape

EXACT = 1e-10
"""Rounding of float64 in sums of dozens of terms, relative and absolute."""

BFLOAT16 = 0.02
"""Relative error of products of bfloat16 factors, of 8 significant bits: 2^-8 in each of four layers."""

ONE = torch.ones((), dtype=torch.float64)
ROWS, SAMPLES = 6, 4


@pytest.fixture
def vae(small_vae: VAE) -> VAE:
    """Return an untrained model in double precision."""
    return small_vae.double()


@pytest.fixture
def data(source: torch.Generator) -> Tensor:
    """Return binary rows."""
    return (torch.rand((ROWS, 1, 2, 2), generator=source) < 0.4).double()


@pytest.fixture
def noise(source: torch.Generator) -> Tensor:
    """Return noise for several samples of each row."""
    return torch.randn((ROWS, SAMPLES, 2), generator=source, dtype=torch.float64)


def _settings(**values: object) -> OptimizerConfig:
    return OptimizerConfig.parse({"num_samples": SAMPLES, **values})


def _weighted(gradient: str) -> OptimizerConfig:
    return _settings(bound="importance-weighted", gradient=gradient, warm_up_fraction=0)


def _gradients(vae: VAE, value: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(value, list(vae.parameters()), retain_graph=True))


def _assert_same(vae: VAE, value: Tensor, expected: Tensor) -> None:
    """Compare the value and every gradient."""
    torch.testing.assert_close(value, expected, rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(_gradients(vae, value), _gradients(vae, expected), rtol=EXACT, atol=EXACT)


Reference = Callable[[VAE, Tensor, Tensor], Tensor]

REFERENCES: dict[str, tuple[OptimizerConfig, Reference]] = {
    "elbo": (_settings(), lambda vae, data, noise: objectives.elbo(vae, data, noise).value),
    "sticking": (
        _settings(gradient="sticking-the-landing"),
        lambda vae, data, noise: estimators.sticking_the_landing(
            objectives.log_joint(vae, data), GaussianLatents(*vae.posterior(data)), noise
        ),
    ),
    "score": (_settings(gradient="score-function"), objectives.elbo_by_score_function),
    "leave one out": (
        _settings(gradient="score-function", baseline="leave-one-out"),
        lambda vae, data, noise: objectives.elbo_by_score_function(
            vae, data, noise, baseline=estimators.leave_one_out
        ),
    ),
    "weighted": (_weighted("reparametrised"), objectives.importance_weighted_elbo),
    "weighted, sticking": (
        _weighted("sticking-the-landing"),
        lambda vae, data, noise: objectives.importance_weighted_elbo(
            vae, data, noise, gradient="sticking-the-landing"
        ),
    ),
    "weighted, doubly": (
        _weighted("doubly-reparametrised"),
        lambda vae, data, noise: objectives.importance_weighted_elbo(
            vae, data, noise, gradient="doubly-reparametrised"
        ),
    ),
}


@pytest.mark.parametrize(("settings", "reference"), REFERENCES.values(), ids=REFERENCES)
def test_objective_is_the_estimator_of_that_name(
    settings: OptimizerConfig, reference: Reference, vae: VAE, data: Tensor, noise: Tensor
) -> None:
    """With weight one, value and gradients are those of `training.objectives` and `training.estimators`."""
    value, _ = StepObjective(vae, settings)(data, noise, ONE)
    _assert_same(vae, value, reference(vae, data, noise).mean())


def test_one_sample_needs_no_dimension_of_samples(vae: VAE, data: Tensor, noise: Tensor) -> None:
    """The default, noise of one latent per row, is the same as a single sample of several."""
    assert noise_shape(OptimizerConfig(), ROWS, 2) == (ROWS, 2)
    assert noise_shape(_settings(), ROWS, 2) == (ROWS, SAMPLES, 2)
    assert noise_shape(_weighted("reparametrised").override(["num_samples=1"]), ROWS, 2) == (ROWS, 1, 2)
    plain, _ = StepObjective(vae, OptimizerConfig())(data, noise[:, 0], ONE)
    one, _ = StepObjective(vae, OptimizerConfig())(data, noise[:, :1], ONE)
    _assert_same(vae, plain, one)


@pytest.mark.parametrize("name", REFERENCES)
def test_both_terms_are_recorded_whatever_is_climbed(name: str, vae: VAE, data: Tensor, noise: Tensor) -> None:
    """Mean log-likelihood of the samples, closed-form KL, and the bound without the weight that the KL has."""
    settings, reference = REFERENCES[name]
    _, recorded = StepObjective(vae, settings)(data, noise, 0.25 * ONE)
    terms = objectives.elbo(vae, data, noise)
    bound = reference(vae, data, noise) if settings.bound == "importance-weighted" else terms.value
    expected = torch.stack([terms.log_likelihood.mean(), terms.kl.mean(), bound.mean()])
    torch.testing.assert_close(recorded, expected.detach(), rtol=EXACT, atol=EXACT)
    assert not recorded.requires_grad


@pytest.mark.parametrize("name", ["elbo", "sticking", "score", "leave one out"])
def test_weight_multiplies_the_divergence_alone(name: str, vae: VAE, data: Tensor, noise: Tensor) -> None:
    """Value and gradients are linear in the weight; without it the log-likelihood is left, with its estimator."""
    settings, _ = REFERENCES[name]
    objective = StepObjective(vae, settings)
    none, half, full = (objective(data, noise, weight * ONE)[0] for weight in (0.0, 0.5, 1.0))
    _assert_same(vae, half, 0.5 * (none + full))
    q = GaussianLatents(*vae.posterior(data))

    def log_likelihood(latents: Tensor) -> Tensor:
        return vae.likelihood(latents).log_prob(data.unsqueeze(1))

    if settings.gradient == "score-function":
        one_left_out = settings.baseline == "leave-one-out"
        baseline = estimators.leave_one_out if one_left_out else estimators.no_baseline
        expected = estimators.score_function(log_likelihood, q, noise, baseline=baseline)
    else:
        expected = estimators.reparametrised(log_likelihood, q, noise)
    _assert_same(vae, none, expected.mean())


def test_importance_weighted_bound_has_no_weight(vae: VAE, data: Tensor, noise: Tensor) -> None:
    """There is no KL term in it."""
    objective = StepObjective(vae, _weighted("reparametrised"))
    first, second = (objective(data, noise, weight * ONE)[0] for weight in (0.1, 1.0))
    assert torch.equal(first, second)


def test_free_bits_of_two_processes_are_those_of_one(vae: VAE, data: Tensor, noise: Tensor) -> None:
    """Whether a dimension pays is decided by the joined batch, so the gradients of the halves have its mean."""
    halves = [slice(0, ROWS // 2), slice(ROWS // 2, ROWS)]
    per_dim = [
        gaussians.kl_to_standard_normal(*(part.unsqueeze(-1) for part in vae.posterior(data[half]))).mean(dim=0)
        for half in halves
    ]
    joined = torch.stack(per_dim).mean(dim=0).detach()
    settings = _settings(free_nats=float(joined.mean()))  # one of the two dimensions pays
    whole, _ = StepObjective(vae, settings)(data, noise, ONE)
    objective = StepObjective(vae, settings, joined_mean=lambda _: joined)
    parts = [objective(data[half], noise[half], ONE)[0] for half in halves]
    mean = [(one + two) / 2 for one, two in zip(*(_gradients(vae, part) for part in parts), strict=True)]
    torch.testing.assert_close(mean, _gradients(vae, whole), rtol=EXACT, atol=EXACT)


def test_bfloat16_is_for_the_networks_alone(small_vae: VAE, data: Tensor, noise: Tensor) -> None:
    """Value and gradients are float32, near those of float32, and not the same: the networks did round."""
    single, samples = data.float(), noise.float()
    found = {}
    for precision in ("float32", "bfloat16"):
        objective = StepObjective(small_vae, _settings(precision=precision))
        value, recorded = objective(single, samples, torch.ones(()))
        assert value.dtype == recorded.dtype == torch.float32
        gradients = _gradients(small_vae, value)
        assert {gradient.dtype for gradient in gradients} == {torch.float32}
        found[precision] = torch.cat([value.detach().view(1), *(gradient.flatten() for gradient in gradients)])
    difference = (found["bfloat16"] - found["float32"]).norm() / found["float32"].norm()
    assert 0 < difference < BFLOAT16
