"""Laws of the bounds, with models whose log p(x) is known as oracles."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from training import gaussians, objectives
from training.models.vae import VAE

LOG_EVIDENCE = -1.5155121235
"""log p(x = 1) of z ~ N(0, 1), x | z ~ N(z, 1): log N(1; 0, 2)."""


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
