"""Laws of diagonal Gaussians, with torch.distributions, Monte Carlo and closed-form values as oracles."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from training import gaussians

EXACT = 1e-12
"""Float64 rounding of a handful of operations on numbers near one."""

FLOATS = st.floats(-3, 3)


def _column(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        (gaussians.kl_to_standard_normal(_column(1), _column(math.log(0.25))), 0.8181472),
        (gaussians.kl(_column(0), _column(0), _column(1), _column(math.log(0.25))), 2.8068528),
        (gaussians.entropy(_column(math.log(0.25))), 0.7257913),
    ],
    ids=["KL to the prior", "KL from the prior", "entropy"],
)
def test_published_values(actual: Tensor, expected: float) -> None:
    """The closed forms give the values computed by hand (seven digits)."""
    assert actual.item() == pytest.approx(expected, abs=1e-7)


@given(mean=FLOATS, log_var=FLOATS, other_mean=FLOATS, other_log_var=FLOATS)
def test_kl_equals_that_of_torch_distributions(
    mean: float, log_var: float, other_mean: float, other_log_var: float
) -> None:
    """An independent implementation agrees, and a divergence is never negative."""
    first = Normal(_column(mean)[0], (0.5 * _column(log_var)[0]).exp())
    second = Normal(_column(other_mean)[0], (0.5 * _column(other_log_var)[0]).exp())
    actual = gaussians.kl(_column(mean), _column(log_var), _column(other_mean), _column(other_log_var))
    torch.testing.assert_close(actual, kl_divergence(first, second), rtol=1e-9, atol=EXACT)
    assert actual.item() >= -EXACT


@given(mean=FLOATS, log_var=FLOATS)
def test_kl_to_the_prior_is_the_special_case(mean: float, log_var: float) -> None:
    """The short formula is the long one at N(0, 1)."""
    short = gaussians.kl_to_standard_normal(_column(mean), _column(log_var))
    long = gaussians.kl(_column(mean), _column(log_var), _column(0), _column(0))
    torch.testing.assert_close(short, long, rtol=1e-9, atol=EXACT)


def test_kl_is_zero_exactly_at_the_prior_and_precise_beside_it() -> None:
    """A nearly unused dimension keeps its digits in float32: KL is v^2 / 4 for a small log variance v."""
    at = gaussians.kl_to_standard_normal(torch.zeros(1, 3), torch.zeros(1, 3))
    beside = gaussians.kl_to_standard_normal(torch.zeros(1, 1), torch.full((1, 1), 1e-2))
    assert at.item() == 0
    # exp(x) - x - 1 in float32 would be off by 6e-8 / 5e-5: a thousandth.
    assert beside.item() == pytest.approx(2.5083e-5, rel=4e-4)


def test_kl_agrees_with_monte_carlo(source: torch.Generator) -> None:
    """The mean of log q - log p over draws from q is the divergence, within four standard errors."""
    mean, log_var = _column(0.7, -1.2), _column(-1.0, 0.5)
    noise = torch.randn((100_000, 2), generator=source, dtype=torch.float64)
    latents = gaussians.rsample(mean, log_var, noise)
    draws = gaussians.log_prob(latents, mean, log_var) - gaussians.standard_normal_log_prob(latents)
    standard_error = draws.std().item() / math.sqrt(len(draws))
    exact = gaussians.kl_to_standard_normal(mean, log_var).item()
    assert draws.mean().item() == pytest.approx(exact, abs=4 * standard_error)


@given(mean=FLOATS, log_var=FLOATS, latents=FLOATS)
def test_densities_equal_those_of_torch_distributions(mean: float, log_var: float, latents: float) -> None:
    """Log density and entropy agree with an independent implementation."""
    oracle = Normal(_column(mean)[0], (0.5 * _column(log_var)[0]).exp())
    actual = gaussians.log_prob(_column(latents), _column(mean), _column(log_var))
    expected = oracle.log_prob(_column(latents)[0])  # type: ignore[no-untyped-call]
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=EXACT)
    spread = oracle.entropy()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(gaussians.entropy(_column(log_var)), spread, rtol=1e-9, atol=EXACT)


def test_standard_normal_is_the_gaussian_at_zero_and_one() -> None:
    """The prior's density is the general one with mean 0 and log variance 0."""
    latents = _column(0.3, -2.0)
    zero = torch.zeros_like(latents)
    torch.testing.assert_close(
        gaussians.standard_normal_log_prob(latents), gaussians.log_prob(latents, zero, zero), rtol=0, atol=EXACT
    )


def test_gradient_of_the_expected_prior_density() -> None:
    """The gradient of E_q[log p(z)] is (-mean, -scale), and autograd through the closed form finds it."""
    mean = _column(0.4, -1.5).requires_grad_()
    scale = _column(0.5, 2.0).requires_grad_()
    torch.autograd.backward(gaussians.expected_standard_normal_log_prob(mean, 2 * scale.log()).sum())
    torch.testing.assert_close(mean.grad, -mean.detach())
    torch.testing.assert_close(scale.grad, -scale.detach())


def test_expected_prior_density_agrees_with_monte_carlo(source: torch.Generator) -> None:
    """The closed form is the mean of log p(z) over draws, within four standard errors."""
    mean, log_var = _column(0.7), _column(-1.0)
    noise = torch.randn((100_000, 1), generator=source, dtype=torch.float64)
    draws = gaussians.standard_normal_log_prob(gaussians.rsample(mean, log_var, noise))
    standard_error = draws.std().item() / math.sqrt(len(draws))
    exact = gaussians.expected_standard_normal_log_prob(mean, log_var).item()
    assert draws.mean().item() == pytest.approx(exact, abs=4 * standard_error)


def test_gradients_flow_through_reparametrised_samples() -> None:
    """D z / d mean is 1 and d z / d scale is the noise."""
    mean, scale = _column(0.2).requires_grad_(), _column(1.5).requires_grad_()
    torch.autograd.backward(gaussians.rsample(mean, 2 * scale.log(), _column(-0.7)).sum())
    assert mean.grad is not None
    assert scale.grad is not None
    assert mean.grad.item() == pytest.approx(1)
    assert scale.grad.item() == pytest.approx(-0.7)
