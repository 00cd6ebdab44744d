"""Laws of the bounds, with models whose log p(x) is known as oracles."""

import math
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from training import estimators, gaussians, objectives
from training.models.vae import VAE

LOG_EVIDENCE = -1.5155121235
"""log p(x = 1) of z ~ N(0, 1), x | z ~ N(z, 1): log N(1; 0, 2)."""


@dataclass(frozen=True)
class IsotropicGaussian:
    """N(mean, variance I), the likelihood of the linear model."""

    mean: Tensor
    variance: float

    def log_prob(self, data: Tensor) -> Tensor:
        """Return the log density in nats."""
        return gaussians.log_prob(data, self.mean, torch.full_like(self.mean, math.log(self.variance)))


@dataclass(frozen=True)
class LinearGaussian:
    """Z ~ N(0, I), x | z ~ N(W z, variance I), with a linear encoder: everything about it is known. An oracle."""

    weight: Tensor
    variance: float
    encoder: Tensor
    encoder_log_var: Tensor

    @classmethod
    def drawn(cls, source: torch.Generator, *, is_orthogonal: bool = False) -> "LinearGaussian":
        """Return a model of five data and two latent dimensions; orthogonal: the posterior is diagonal."""
        weight = torch.randn((5, 2), generator=source, dtype=torch.float64)
        if is_orthogonal:
            weight = torch.linalg.qr(weight).Q * torch.tensor([1.5, 0.7], dtype=torch.float64)
        encoder = 0.3 * torch.randn((2, 5), generator=source, dtype=torch.float64)
        log_var = torch.randn(2, generator=source, dtype=torch.float64) - 1
        return cls(weight, 0.6, encoder, log_var)

    @property
    def exact_covariance(self) -> Tensor:
        """Return the covariance of p(z | x)."""
        precision = self.weight.T @ self.weight / self.variance
        covariance: Tensor = torch.linalg.inv(precision + torch.eye(2, dtype=torch.float64))
        return covariance

    def with_exact_encoder(self) -> "LinearGaussian":
        """Return the model whose q is the posterior; the weight must be orthogonal."""
        covariance = self.exact_covariance
        encoder = covariance @ self.weight.T / self.variance
        return LinearGaussian(self.weight, self.variance, encoder, covariance.diagonal().log())

    def posterior(self, data: Tensor) -> tuple[Tensor, Tensor]:
        """Return q(z | x)."""
        mean = data @ self.encoder.T
        return mean, self.encoder_log_var.expand_as(mean)

    def exact_posterior_mean(self, data: Tensor) -> Tensor:
        """Return the mean of p(z | x)."""
        mean: Tensor = data @ self.weight @ self.exact_covariance / self.variance
        return mean

    def likelihood(self, latents: Tensor) -> IsotropicGaussian:
        """Return p(x | z)."""
        return IsotropicGaussian(latents @ self.weight.T, self.variance)

    def sample(self, num_rows: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return latents and data."""
        latents = torch.randn((num_rows, 2), generator=source, dtype=torch.float64)
        noise = torch.randn((num_rows, 5), generator=source, dtype=torch.float64)
        return latents, latents @ self.weight.T + self.variance**0.5 * noise

    def log_evidence(self, data: Tensor) -> Tensor:
        """Return log p(x) = log N(x; 0, W W^T + variance I)."""
        covariance = self.weight @ self.weight.T + self.variance * torch.eye(5, dtype=torch.float64)
        squares = (data * torch.linalg.solve(covariance, data.T).T).sum(dim=1)
        log_prob: Tensor = -0.5 * (squares + torch.logdet(covariance) + 5 * math.log(2 * math.pi))
        return log_prob

    def exact_elbo(self, data: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
        """Return the bound with its expectation over q done by hand."""
        spread = (log_var.exp() * self.weight.square().sum(dim=0)).sum(dim=1) / (2 * self.variance)
        at_mean = self.likelihood(mean).log_prob(data)
        return at_mean - spread - gaussians.kl_to_standard_normal(mean, log_var)

    def kl_to_posterior(self, data: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
        """Return KL(q, p(z | x)) with the full covariance of the posterior."""
        precision = torch.linalg.inv(self.exact_covariance)
        offset = mean - self.exact_posterior_mean(data)
        squares = (offset @ precision * offset).sum(dim=1)
        traces = (log_var.exp() * precision.diagonal()).sum(dim=1)
        divergence: Tensor = squares + traces - 2 + torch.logdet(self.exact_covariance) - log_var.sum(dim=1)
        return 0.5 * divergence


@pytest.fixture
def linear(source: torch.Generator) -> LinearGaussian:
    """Return a linear model with a posterior that is not diagonal."""
    return LinearGaussian.drawn(source)


def _column(value: float) -> Tensor:
    return torch.tensor([[value]], dtype=torch.float64)


def _expected_log_likelihood(mean: Tensor, log_var: Tensor) -> Tensor:
    """Return E_q[log N(1; z, 1)]: the log density at the mean, less half the variance."""
    at_mean = gaussians.log_prob(_column(1), mean, torch.zeros_like(mean))
    return at_mean - 0.5 * log_var.exp().sum(dim=-1)


@pytest.mark.parametrize(
    ("mean", "variance", "elbo", "gap"),
    [(0.0, 1.0, -1.9189385332, 0.4034264097), (0.5, 0.5, LOG_EVIDENCE, 0.0)],
    ids=["q is the prior", "q is the posterior"],
)
def test_evidence_is_bound_plus_gap(mean: float, variance: float, elbo: float, gap: float) -> None:
    """Log p(x) = ELBO + KL(q, posterior), and the gap closes at the posterior N(1/2, 1/2)."""
    q_mean, q_log_var = _column(mean), _column(math.log(variance))
    bound = _expected_log_likelihood(q_mean, q_log_var) - gaussians.kl_to_standard_normal(q_mean, q_log_var)
    distance = gaussians.kl(q_mean, q_log_var, _column(0.5), _column(math.log(0.5)))
    assert bound.item() == pytest.approx(elbo, abs=1e-10)
    assert distance.item() == pytest.approx(gap, abs=1e-10)
    assert (bound + distance).item() == pytest.approx(-0.5 * math.log(4 * math.pi) - 0.25, abs=1e-12)


@pytest.mark.parametrize(
    ("num_samples", "expected"),
    [(1, -1.918939), (2, -1.653474), (5, -1.557411), (50, -1.519199), (500, -1.515877)],
)
def test_importance_weighted_bound_has_its_exact_values(
    num_samples: int, expected: float, source: torch.Generator
) -> None:
    """With the prior as q, the mean bound over images is that of quadrature, within four standard errors."""
    latents = torch.randn(
        (2_000_000 // max(num_samples, 20), num_samples, 1), generator=source, dtype=torch.float64
    )
    log_weights = gaussians.log_prob(torch.ones_like(latents), latents, torch.zeros_like(latents))
    bounds = objectives.importance_weighted_bound(log_weights)
    standard_error = bounds.std().item() / math.sqrt(len(bounds))
    assert bounds.mean().item() == pytest.approx(expected, abs=4 * standard_error)
    assert standard_error < 0.01


def test_importance_weighted_bound_rises_with_samples(source: torch.Generator) -> None:
    """Averages over disjoint parts of one set of weights rise with the size of the parts (Jensen)."""
    log_weights = 2 * torch.randn((50, 64), generator=source, dtype=torch.float64)
    bounds = [
        objectives.importance_weighted_bound(log_weights.view(-1, size)).mean().item() for size in (1, 2, 8, 64)
    ]
    assert all(lower < higher for lower, higher in pairwise(bounds))


def test_log_mean_exp_of_huge_weights_is_finite() -> None:
    """Log weights of -10,000 nats, as images have, neither underflow nor overflow."""
    assert objectives.log_mean_exp(torch.full((1, 8), -10_000.0)).item() == pytest.approx(-10_000)


def test_both_forms_of_the_bound_agree(small_vae: VAE, source: torch.Generator) -> None:
    """Expected log joint + entropy is likelihood - KL, up to rounding, with common noise."""
    small_vae.double()
    data = (torch.rand((6, 1, 2, 2), generator=source) < 0.5).double()
    noise = torch.randn((6, 2), generator=source, dtype=torch.float64)
    second = objectives.elbo(small_vae, data, noise).value
    torch.testing.assert_close(objectives.elbo_joint_form(small_vae, data, noise), second, rtol=0, atol=1e-9)


def test_bound_is_below_the_evidence(small_vae: VAE, source: torch.Generator) -> None:
    """The mean ELBO lies below log p(x), found by brute force over a grid of latents."""
    small_vae.double()
    data = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]], dtype=torch.float64)
    axis = torch.linspace(-7, 7, 281, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    log_joint = small_vae.likelihood(grid).log_prob(data) + gaussians.standard_normal_log_prob(grid)
    evidence = torch.logsumexp(log_joint, 0).item() + 2 * math.log(float(axis[1] - axis[0]))
    noise = torch.randn((20_000, 2), generator=source, dtype=torch.float64)
    bounds = objectives.elbo(small_vae, data.expand(20_000, -1, -1, -1), noise).value
    gap = evidence - bounds.mean().item()
    assert 4 * bounds.std().item() / math.sqrt(20_000) < gap < 1


def test_gradients_reach_both_networks(small_vae: VAE, source: torch.Generator) -> None:
    """Every weight of encoder and decoder is learnable through the bound."""
    noise = torch.randn((4, 2), generator=source)
    torch.autograd.backward(-objectives.elbo(small_vae, torch.ones(4, 1, 2, 2), noise).value.mean())
    gradients = [parameter.grad for parameter in small_vae.parameters()]
    assert all(gradient is not None and bool(gradient.abs().sum() > 0) for gradient in gradients)


def test_several_samples_average_the_bound(linear: LinearGaussian, source: torch.Generator) -> None:
    """M samples give the mean of M bounds of one sample, in both forms."""
    _, data = linear.sample(4, source)
    noise = torch.randn((4, 3, 2), generator=source, dtype=torch.float64)
    singles = torch.stack([objectives.elbo(linear, data, noise[:, sample]).value for sample in range(3)])
    together = objectives.elbo(linear, data, noise).value
    torch.testing.assert_close(together, singles.mean(dim=0), rtol=0, atol=1e-12)
    torch.testing.assert_close(objectives.elbo_joint_form(linear, data, noise), together, rtol=0, atol=1e-9)


def test_evidence_is_bound_plus_gap_for_any_linear_model(linear: LinearGaussian, source: torch.Generator) -> None:
    """Log p(x) = ELBO + KL(q, posterior) to rounding, for random weights, data and q."""
    _, data = linear.sample(8, source)
    mean, log_var = torch.randn((2, 8, 2), generator=source, dtype=torch.float64)
    parts = linear.exact_elbo(data, mean, log_var) + linear.kl_to_posterior(data, mean, log_var)
    torch.testing.assert_close(parts, linear.log_evidence(data), rtol=0, atol=1e-9)


def test_sampled_bound_has_the_exact_mean(linear: LinearGaussian, source: torch.Generator) -> None:
    """Over 40,000 samples the bound is the one done by hand, within five standard errors."""
    _, data = linear.sample(1, source)
    mean, log_var = linear.posterior(data)
    noise = torch.randn((40_000, 2), generator=source, dtype=torch.float64)
    bounds = objectives.elbo(linear, data.expand(40_000, -1), noise).value
    standard_error = bounds.std().item() / 200
    assert bounds.mean().item() == pytest.approx(
        linear.exact_elbo(data, mean, log_var).item(), abs=5 * standard_error
    )


@pytest.mark.parametrize("gradient", ["plain", "sticking-the-landing", "doubly-reparametrised"])
def test_weighted_bound_has_one_value_and_three_gradients(
    gradient: objectives.Gradient, small_vae: VAE, source: torch.Generator
) -> None:
    """The way to differentiate does not change the value, nor the gradient of the decoder; the encoder's does."""
    small_vae.double()
    noise = torch.randn((3, 5, 2), generator=source, dtype=torch.float64)
    data = torch.ones((3, 1, 2, 2), dtype=torch.float64)
    groups = list(small_vae.encoder.parameters()), list(small_vae.decoder.parameters())
    plain = objectives.importance_weighted_elbo(small_vae, data, noise)
    bound = objectives.importance_weighted_elbo(small_vae, data, noise, gradient=gradient)
    torch.testing.assert_close(bound, plain, rtol=0, atol=1e-12)
    differences = []
    for group in groups:
        expected = torch.autograd.grad(plain.sum(), group, retain_graph=True)
        actual = torch.autograd.grad(bound.sum(), group, retain_graph=True)
        pairs = zip(actual, expected, strict=True)
        differences.append(max(float((one - other).abs().max()) for one, other in pairs))
    assert (differences[0] > 1e-4) == (gradient != "plain")
    assert differences[1] < 1e-12


def test_weighted_bound_of_a_model_rises_to_the_evidence(linear: LinearGaussian, source: torch.Generator) -> None:
    """ELBO < L_2 < L_10 < L_100 < log p(x), each by at least five standard errors of the difference."""
    _, data = linear.sample(1, source)
    noise = torch.randn((2_000, 100, 2), generator=source, dtype=torch.float64)
    rows = data.expand(2_000, -1)
    whole = {}
    for size in (1, 2, 10, 100):
        # Disjoint parts of the same samples, so that the bounds are compared on common noise.
        parts = noise.view(2_000, -1, size, 2)
        bounds = objectives.importance_weighted_elbo(
            linear, rows.repeat_interleave(parts.shape[1], 0), parts.flatten(0, 1)
        )
        whole[size] = bounds.view(2_000, -1).mean(dim=1)
    evidence = linear.log_evidence(data).expand(2_000)
    for lower, higher in pairwise([*whole.values(), evidence]):
        gain = higher - lower
        assert gain.mean().item() > 5 * gain.std().item() / math.sqrt(2_000)


def test_score_function_bound_has_the_gradient_of_the_reparametrised_one(
    linear: LinearGaussian, source: torch.Generator
) -> None:
    """Both estimate the gradient of the exact bound, within five standard errors; values agree likewise."""
    _, data = linear.sample(1, source)
    mean, log_var = (parameter.detach().requires_grad_() for parameter in linear.posterior(data))
    exact = torch.autograd.grad(linear.exact_elbo(data, mean, log_var).sum(), (mean, log_var))
    noise = torch.randn((20_000, 4, 2), generator=source, dtype=torch.float64)
    rows = data.expand(20_000, -1)
    means, log_vars = (
        parameter.detach().expand(20_000, -1).clone().requires_grad_() for parameter in (mean, log_var)
    )

    class Fixed(LinearGaussian):
        def posterior(self, data: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG002  q of this test, for any data
            return means, log_vars

    model = Fixed(linear.weight, linear.variance, linear.encoder, linear.encoder_log_var)
    bound = objectives.elbo_by_score_function(model, rows, noise, baseline=estimators.leave_one_out)
    for draws, expected in zip(torch.autograd.grad(bound.sum(), (means, log_vars)), exact, strict=True):
        error = (draws.mean(dim=0) - expected[0]).abs()
        assert bool((error < 5 * draws.std(dim=0) / math.sqrt(20_000)).all())
    value = linear.exact_elbo(data, mean, log_var).item()
    assert bound.mean().item() == pytest.approx(value, abs=5 * bound.std().item() / math.sqrt(20_000))


def test_default_objective_is_the_mean_bound(linear: LinearGaussian, source: torch.Generator) -> None:
    """No hidden weight: without options training maximises the mean ELBO, and beta scales the KL term alone."""
    _, data = linear.sample(6, source)
    noise = torch.randn((6, 2), generator=source, dtype=torch.float64)
    bound = objectives.elbo(linear, data, noise)
    plain = objectives.training_objective(linear, data, noise)
    torch.testing.assert_close(plain, bound.value.mean(), rtol=0, atol=1e-12)
    weighted = objectives.training_objective(linear, data, noise, kl_weight=4)
    torch.testing.assert_close(weighted, plain - 3 * bound.kl.mean(), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("step", "num_warm_up_steps", "beta", "expected"),
    [(0, 10, 1.0, 0.1), (4, 10, 1.0, 0.5), (9, 10, 1.0, 1.0), (500, 10, 1.0, 1.0), (0, 0, 4.0, 4.0), (1, 4, 4, 2)],
)
def test_kl_weight_is_a_line_and_then_constant(
    step: int, num_warm_up_steps: int, beta: float, expected: float
) -> None:
    """The weight reaches beta in the last step of the warm-up and stays there."""
    weight = objectives.kl_weight(step, num_warm_up_steps=num_warm_up_steps, beta=beta)
    assert weight == pytest.approx(expected)


def test_free_bits_hold_the_kl_of_a_weak_dimension(source: torch.Generator) -> None:
    """A dimension below lambda costs lambda and has no gradient; one above is as ever; zero changes nothing."""
    mean = torch.stack((0.1 * torch.ones(4), 2 * torch.randn(4, generator=source) + 3), dim=1).double()
    mean.requires_grad_()
    log_var = torch.zeros_like(mean)
    strong = 0.5 * mean[:, 1].square().mean()
    kl = objectives.free_bits_kl(mean, log_var, 0.5)
    torch.testing.assert_close(kl, 0.5 + strong, rtol=0, atol=1e-12)
    (gradient,) = torch.autograd.grad(kl, mean)
    assert gradient[:, 0].abs().max().item() == 0
    torch.testing.assert_close(gradient[:, 1], mean[:, 1].detach() / 4)
    plain = gaussians.kl_to_standard_normal(mean, log_var).mean()
    torch.testing.assert_close(objectives.free_bits_kl(mean, log_var, 0), plain, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="at least 0"):
        objectives.free_bits_kl(mean, log_var, -1)


def test_gap_has_two_parts(linear: LinearGaussian, source: torch.Generator) -> None:
    """Both parts are known where the best diagonal q is: their sum is KL(q, posterior), neither is negative."""
    _, data = linear.sample(7, source)
    mean, log_var = linear.posterior(data)
    # The best diagonal Gaussian has the exact mean, and the inverse diagonal of the posterior's precision.
    best_log_var = -torch.linalg.inv(linear.exact_covariance).diagonal().log().expand_as(mean)
    refined = linear.exact_elbo(data, linear.exact_posterior_mean(data), best_log_var)
    gap = objectives.inference_gap(linear.log_evidence(data), refined, linear.exact_elbo(data, mean, log_var))
    precision = torch.linalg.inv(linear.exact_covariance)
    best = 0.5 * (precision.diagonal().log().sum() - torch.logdet(precision))
    assert best.item() > 1e-6
    torch.testing.assert_close(gap.approximation, best.expand(7), rtol=0, atol=1e-9)
    assert gap.amortisation.min().item() > 0
    torch.testing.assert_close(gap.total, linear.kl_to_posterior(data, mean, log_var), rtol=0, atol=1e-9)
