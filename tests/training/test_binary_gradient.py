"""The fast way has the value and the gradient of the Bernoulli likelihood, whatever the logits."""

import pytest
import torch
from torch import Tensor

from training import binary_gradient
from training.likelihoods import Bernoulli

EXACT = 1e-12
"""Rounding of float64 in sums of some dozens of terms, relative."""

SINGLE = 1e-5
"""Rounding of float32 in a sum of 784 terms, relative: 784 times 6e-8 at worst, less as errors have both signs."""


def _drawn(
    source: torch.Generator, shape: tuple[int, ...], *, scale: float = 3.0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Return logits and binary data."""
    logits = scale * torch.randn(shape, generator=source, dtype=dtype)
    data = (torch.rand(shape, generator=source) < 0.3).to(dtype)
    return logits.requires_grad_(), data


@pytest.mark.parametrize("num_pixels", [1, 15, 16, 64, 97])
def test_value_and_gradient_are_those_of_the_likelihood(num_pixels: int, source: torch.Generator) -> None:
    """In double precision, for numbers of pixels that sixteen divides and others."""
    logits, data = _drawn(source, (5, num_pixels))
    value, expected = binary_gradient.log_prob(logits, data), Bernoulli(logits).log_prob(data)
    torch.testing.assert_close(value, expected, rtol=EXACT, atol=0)
    weights = torch.arange(1.0, 6.0, dtype=torch.float64)
    gradients = [torch.autograd.grad((weights * found).sum(), logits)[0] for found in (value, expected)]
    torch.testing.assert_close(*gradients, rtol=EXACT, atol=EXACT)


def test_gradient_is_the_slope_of_the_value(source: torch.Generator) -> None:
    """By finite differences."""
    logits, data = _drawn(source, (2, 20))
    assert torch.autograd.gradcheck(lambda values: binary_gradient.log_prob(values, data), (logits,))


def test_samples_of_a_row_share_its_data(source: torch.Generator) -> None:
    """Data of one row are broadcast over its latents."""
    logits, data = _drawn(source, (3, 4, 33))
    rows = data[:, :1]
    expected = Bernoulli(logits).log_prob(rows)
    torch.testing.assert_close(binary_gradient.log_prob(logits, rows), expected, rtol=EXACT, atol=0)


def test_single_precision_is_good_enough(source: torch.Generator) -> None:
    """As it is used, float32 and 784 pixels, it agrees with float64."""
    logits, data = _drawn(source, (64, 784), dtype=torch.float32)
    expected = Bernoulli(logits.double()).log_prob(data.double())
    torch.testing.assert_close(binary_gradient.log_prob(logits, data).double(), expected, rtol=SINGLE, atol=0)


def test_absurd_logits_have_a_value_and_a_gradient(source: torch.Generator) -> None:
    """Where the product over sixteen pixels overflows, the sum is taken pixel by pixel."""
    logits, data = _drawn(source, (4, 64), scale=500.0, dtype=torch.float32)
    value = binary_gradient.log_prob(logits, data)
    assert value.isfinite().all()
    assert value.min() < -10_000
    torch.testing.assert_close(value, Bernoulli(logits).log_prob(data), rtol=SINGLE, atol=0)
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    torch.testing.assert_close(gradient, data - torch.sigmoid(logits.detach()), rtol=0, atol=0)
