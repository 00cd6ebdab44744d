"""Every estimator has the exact gradient as its mean; enumeration, closed forms and linear models are oracles."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.training.test_objectives import LinearGaussian
from training import estimators, gaussians
from training.estimators import BernoulliLatents, CategoricalLatent, Function, GaussianLatents, Latents
from training.variance_probe import (
    Estimator,
    elbo_estimators,
    gradients,
    importance_weighted_estimators,
    quadratic,
    quadratic_expectation,
    standard_estimators,
)

STANDARD_ERRORS = 5
"""A sample mean is further than this from its expectation once in two million tests."""

MEAN = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)
LOG_VAR = torch.tensor([-1.0, 0.3, 0.0], dtype=torch.float64)


def _assert_mean(draws: Tensor, expected: Tensor) -> None:
    error = (draws.mean(dim=0) - expected).abs()
    assert bool((error <= STANDARD_ERRORS * draws.std(dim=0) / math.sqrt(len(draws))).all())


def _draws(surrogate: Callable[[Tensor], Tensor], parameters: Tensor, num_draws: int) -> Tensor:
    """Return one gradient per draw, by a copy of the parameters for each."""
    copies = parameters.expand(num_draws, -1).clone().requires_grad_()
    (found,) = torch.autograd.grad(surrogate(copies).sum(), copies)
    return found


@pytest.mark.parametrize("name", list(standard_estimators(0.0)))
def test_gradient_of_a_quadratic(name: str, source: torch.Generator) -> None:
    """For f = -|z|^2 / 2 the mean gradient is (-mean, -variance / 2), and the value's mean is E_q[f]."""
    estimator = standard_estimators(quadratic_expectation(MEAN, 1.0))[name]
    noise = torch.randn((50_000, 3, 3), generator=source, dtype=torch.float64)
    mean, log_var = MEAN.expand(50_000, -1), LOG_VAR.expand(50_000, -1)
    _assert_mean(
        _draws(lambda copies: estimator(quadratic, GaussianLatents(copies, log_var), noise), MEAN, 50_000), -MEAN
    )
    _assert_mean(
        _draws(lambda copies: estimator(quadratic, GaussianLatents(mean, copies), noise), LOG_VAR, 50_000),
        -0.5 * LOG_VAR.exp(),
    )
    expectation = gaussians.expected_standard_normal_log_prob(MEAN, LOG_VAR) + 1.5 * math.log(2 * math.pi)
    _assert_mean(estimator(quadratic, GaussianLatents(mean, log_var), noise), expectation)


@pytest.mark.parametrize("name", [*elbo_estimators(), *importance_weighted_estimators()])
def test_gradient_of_the_elbo_of_a_linear_model(name: str, source: torch.Generator) -> None:
    """With one sample (two for leave-one-out) all have mean value and gradient of the exact bound."""
    model, data, mean, log_var = _linear(source)
    num_samples = 2 if "leave" in name else 1
    estimator = {**elbo_estimators(), **importance_weighted_estimators()}[name]
    noise = torch.randn((50_000, num_samples, 2), generator=source, dtype=torch.float64)
    parameters = torch.cat((mean, log_var)).requires_grad_()
    (exact,) = torch.autograd.grad(
        model.exact_elbo(data, parameters[:2].unsqueeze(0), parameters[2:].unsqueeze(0)).sum(), parameters
    )

    def surrogate(copies: Tensor) -> Tensor:
        return estimator(_joint(model, data), GaussianLatents(copies[:, :2], copies[:, 2:]), noise)

    draws = _draws(surrogate, parameters.detach(), 50_000)
    _assert_mean(draws, exact)
    _assert_mean(
        surrogate(parameters.detach().expand(50_000, -1)), model.exact_elbo(data, mean[None], log_var[None])[0]
    )


def test_sticking_the_landing_is_silent_at_the_posterior(source: torch.Generator) -> None:
    """At q = posterior every sample's path gradient is zero; the total derivative still has variance there."""
    model = LinearGaussian.drawn(source, is_orthogonal=True).with_exact_encoder()
    _, data = model.sample(1, source)
    mean, log_var = (parameter[0] for parameter in model.posterior(data))
    noise = torch.randn((1_000, 1, 2), generator=source, dtype=torch.float64)
    latents = GaussianLatents(mean, log_var)
    landing = gradients(estimators.sticking_the_landing, _joint(model, data), latents, noise)
    assert landing.abs().max().item() <= 1e-12
    for other in (estimators.total_derivative, estimators.entropy_elbo, estimators.score_function_elbo):
        assert gradients(other, _joint(model, data), latents, noise).var(dim=0).min().item() > 0.01


def test_doubly_reparametrised_is_silent_at_the_posterior_too(source: torch.Generator) -> None:
    """All weights are equal at the posterior, and so is the bound: log p(x) with no gradient, for any k."""
    model = LinearGaussian.drawn(source, is_orthogonal=True).with_exact_encoder()
    _, data = model.sample(1, source)
    latents = GaussianLatents(*(parameter[0] for parameter in model.posterior(data)))
    noise = torch.randn((100, 7, 2), generator=source, dtype=torch.float64)
    found = gradients(estimators.doubly_reparametrised, _joint(model, data), latents, noise)
    assert found.abs().max().item() <= 1e-12
    bounds = estimators.doubly_reparametrised(_joint(model, data), latents, noise)
    torch.testing.assert_close(bounds, model.log_evidence(data).expand(100), rtol=0, atol=1e-10)


def test_doubly_reparametrised_is_unbiased_where_sticking_the_landing_is_not(source: torch.Generator) -> None:
    """For k = 5: DReG minus the plain gradient has mean zero on common noise, and less variance; STL is off."""
    model, data, mean, log_var = _linear(source)
    noise = torch.randn((50_000, 5, 2), generator=source, dtype=torch.float64)
    found = {
        name: gradients(estimator, _joint(model, data), GaussianLatents(mean, log_var), noise)
        for name, estimator in importance_weighted_estimators().items()
    }
    plain, landing, doubly = found.values()
    _assert_mean(doubly - plain, torch.zeros(2, dtype=torch.float64))
    assert doubly.var(dim=0).sum().item() < plain.var(dim=0).sum().item()
    difference = landing - plain
    errors = difference.mean(dim=0).abs() * math.sqrt(50_000) / difference.std(dim=0)
    assert errors.max().item() > 2 * STANDARD_ERRORS


def test_doubly_reparametrised_with_one_sample_is_sticking_the_landing(source: torch.Generator) -> None:
    """For k = 1 the single weight is one, and both gradients are the same numbers."""
    model, data, mean, log_var = _linear(source)
    noise = torch.randn((50, 1, 2), generator=source, dtype=torch.float64)
    landing, doubly = (
        gradients(estimator, _joint(model, data), GaussianLatents(mean, log_var), noise)
        for estimator in (estimators.sticking_the_landing, estimators.doubly_reparametrised)
    )
    torch.testing.assert_close(doubly, landing, rtol=0, atol=1e-12)


def test_signal_to_noise_of_the_encoder_gradient(source: torch.Generator) -> None:
    """At k = 64 the mean of the plain gradient has drowned in its deviation; that of DReG has not."""
    model, data, mean, log_var = _linear(source)
    ratios: dict[tuple[str, int], float] = {}
    for num_samples in (1, 64):
        noise = torch.randn((4_000, num_samples, 2), generator=source, dtype=torch.float64)
        for estimator in (estimators.importance_weighted, estimators.doubly_reparametrised):
            found = gradients(estimator, _joint(model, data), GaussianLatents(mean, log_var), noise)
            ratios[estimator.__name__, num_samples] = float((found.mean(dim=0).abs() / found.std(dim=0)).max())
    assert ratios["importance_weighted", 64] < 0.5 * ratios["importance_weighted", 1]
    assert ratios["doubly_reparametrised", 64] > 2 * ratios["importance_weighted", 64]


LOGITS = torch.tensor([0.3, -1.0, 2.0, 0.0, 0.7, -0.4, 1.1, -2.0], dtype=torch.float64)
SCORES = torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0, 0.0, 2.0, 10.0], dtype=torch.float64)


def _baselines(expectation: float) -> dict[str, estimators.Baseline]:
    return {
        "none": estimators.no_baseline,
        "mean": estimators.constant(expectation),
        "leave one out": estimators.leave_one_out,
    }


@pytest.mark.parametrize("name", ["none", "mean", "leave one out"])
def test_score_function_of_a_categorical_latent(name: str, source: torch.Generator) -> None:
    """Eight states: over 250,000 draws of four samples the mean is the enumerated gradient p (f - E f)."""
    probabilities = LOGITS.softmax(dim=0)
    expectation = probabilities @ SCORES
    noise = torch.rand((250_000, 4, 1), generator=source, dtype=torch.float64)
    draws = _draws(
        lambda copies: estimators.score_function(
            lambda states: states @ SCORES,
            CategoricalLatent(copies),
            noise,
            baseline=_baselines(float(expectation))[name],
        ),
        LOGITS,
        250_000,
    )
    _assert_mean(draws, probabilities * (SCORES - expectation))


@pytest.mark.parametrize("name", ["none", "mean", "leave one out"])
def test_score_function_of_bernoulli_latents(name: str, source: torch.Generator) -> None:
    """Three bits and a coupled f: the mean is the gradient of the sum over all eight states."""
    states = torch.cartesian_prod(*3 * [torch.tensor([0.0, 1.0], dtype=torch.float64)])
    logits = LOGITS[:3].clone().requires_grad_()

    def coupled(bits: Tensor) -> Tensor:
        value: Tensor = SCORES[(bits @ torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64)).long()]
        return value

    expectation = (BernoulliLatents(logits).log_prob(states).exp() * coupled(states)).sum()
    (exact,) = torch.autograd.grad(expectation, logits)
    noise = torch.rand((100_000, 4, 3), generator=source, dtype=torch.float64)
    draws = _draws(
        lambda copies: estimators.score_function(
            coupled, BernoulliLatents(copies), noise, baseline=_baselines(expectation.item())[name]
        ),
        logits.detach(),
        100_000,
    )
    _assert_mean(draws, exact)


@pytest.mark.parametrize("latents", [CategoricalLatent(LOGITS), BernoulliLatents(LOGITS)])
def test_discrete_latents_have_no_path(latents: Latents) -> None:
    """Asking for the reparametrised gradient of a discrete latent is refused, and the way out is named."""
    with pytest.raises(estimators.NotReparametrisable, match="use score_function"):
        estimators.reparametrised(quadratic, latents, torch.rand(1, 8))


@pytest.mark.parametrize(
    ("latents", "probabilities"),
    [
        (CategoricalLatent(LOGITS), LOGITS.softmax(dim=0)),
        (BernoulliLatents(LOGITS), LOGITS.sigmoid()),
    ],
)
def test_discrete_samples_have_their_probabilities(
    latents: Latents, probabilities: Tensor, source: torch.Generator
) -> None:
    """Frequencies over 100,000 draws are the probabilities; noise at its end still gives a state."""
    width = 1 if isinstance(latents, CategoricalLatent) else 8
    samples = latents.sample(torch.rand((100_000, width), generator=source, dtype=torch.float64))
    _assert_mean(samples, probabilities)
    # Float32 probabilities may sum to less than the largest noise: the end itself stands for that.
    last = latents.sample(torch.ones((1, width), dtype=torch.float64))
    assert last.sum().item() == (1 if width == 1 else 0)


def test_bernoulli_entropy_is_the_mean_surprise() -> None:
    """The closed form is the sum over both states of every bit."""
    one = LOGITS.sigmoid()
    expected = -(one * one.log() + (1 - one) * (1 - one).log()).sum()
    torch.testing.assert_close(BernoulliLatents(LOGITS).entropy(), expected, rtol=0, atol=1e-12)


def test_only_the_reparametrised_sample_is_differentiable() -> None:
    """Equal values for equal noise, but a plain sample carries no gradient: the two computation graphs."""
    latents = GaussianLatents(MEAN.clone().requires_grad_(), LOG_VAR)
    noise = torch.ones((2, 3), dtype=torch.float64)
    assert latents.rsample(noise).requires_grad
    assert not latents.sample(noise).requires_grad
    assert torch.equal(latents.rsample(noise), latents.sample(noise))


@pytest.mark.parametrize(
    "estimator",
    [
        estimators.score_function,
        estimators.reparametrised,
        estimators.total_derivative,
        estimators.sticking_the_landing,
        estimators.importance_weighted,
        estimators.doubly_reparametrised,
    ],
)
def test_parameters_of_the_model_get_their_gradient(estimator: Estimator, source: torch.Generator) -> None:
    """What f holds is learnt too: with one sample all estimators give the plain gradient of f at the sample."""
    slope = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    noise = torch.randn((1, 3), generator=source, dtype=torch.float64)
    latents = GaussianLatents(MEAN.clone().requires_grad_(), LOG_VAR)
    (found,) = torch.autograd.grad(estimator(lambda z: slope * quadratic(z), latents, noise), slope)
    torch.testing.assert_close(found, quadratic(latents.sample(noise))[0])


def test_leave_one_out_needs_two_samples() -> None:
    """A single sample leaves none to average, and the message says what to do."""
    with pytest.raises(ValueError, match="at least two samples"):
        estimators.leave_one_out(torch.ones(5, 1))


def test_running_mean_lags_by_one_call() -> None:
    """The baseline is known before the samples: zero at first, then the average of earlier calls alone."""
    baseline = estimators.RunningMean(decay=0.5)
    assert baseline(torch.tensor([4.0])) == 0
    assert baseline(torch.tensor([100.0])) == pytest.approx(4)
    # Weights 1/4 and 1/2 of the two calls seen, divided by their sum.
    assert baseline(torch.tensor([0.0])) == pytest.approx((0.25 * 4 + 0.5 * 100) / 0.75)


def _linear(source: torch.Generator) -> tuple[LinearGaussian, Tensor, Tensor, Tensor]:
    """Return a linear model, one row of data, and a q beside the posterior."""
    model = LinearGaussian.drawn(source)
    _, data = model.sample(1, source)
    mean = model.exact_posterior_mean(data)[0] + torch.tensor([0.3, -0.2], dtype=torch.float64)
    return model, data, mean, torch.tensor([-1.0, -1.5], dtype=torch.float64)


def _joint(model: LinearGaussian, data: Tensor) -> Function:
    def log_joint(latents: Tensor) -> Tensor:
        return model.likelihood(latents).log_prob(data) + gaussians.standard_normal_log_prob(latents)

    return log_joint
