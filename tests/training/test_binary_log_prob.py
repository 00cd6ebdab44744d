"""The fast sum is the Bernoulli log probability, of any number of pixels, however sure or wrong the decoder is."""

import itertools

import pytest
import torch

from training.binary_log_prob import binary_log_prob
from training.likelihoods import Bernoulli

SINGLE = 3e-6
"""Relative: sums of up to a thousand float32 terms of one sign, each with a few roundings of 6e-8."""


@pytest.mark.parametrize("num_pixels", [1, 2, 3, 15, 16, 17, 64, 784, 1001])
def test_equals_the_formula(num_pixels: int, source: torch.Generator) -> None:
    """In float64, term by term, the general form gives the same, for numbers of pixels with and without halves."""
    logits = 4 * torch.randn(3, 5, num_pixels, generator=source)
    data = torch.bernoulli(torch.full((3, num_pixels), 0.4), generator=source)
    expected = Bernoulli(logits.double()).log_prob(data.double().unsqueeze(1))
    actual = binary_log_prob(Bernoulli(logits), data)
    torch.testing.assert_close(actual.double(), expected, rtol=SINGLE, atol=1e-6)


def test_probabilities_sum_to_one(source: torch.Generator) -> None:
    """Over all sixteen images of four pixels."""
    every = torch.tensor(list(itertools.product((0.0, 1.0), repeat=4)))
    logits = torch.randn(1, 1, 4, generator=source).expand(16, 1, 4)
    assert binary_log_prob(Bernoulli(logits), every).exp().sum().item() == pytest.approx(1, abs=1e-6)


def test_images_keep_their_shape(source: torch.Generator) -> None:
    """Rows, samples, then whatever a row of data looks like; logits are left as they were."""
    logits = torch.randn(2, 3, 1, 4, 5, generator=source)
    data = torch.bernoulli(torch.full((2, 1, 4, 5), 0.5), generator=source)
    before, likelihood = logits.clone(), Bernoulli(logits, event_dims=3)
    torch.testing.assert_close(binary_log_prob(likelihood, data), likelihood.log_prob(data.unsqueeze(1)))
    assert torch.equal(logits, before)


@pytest.mark.parametrize("logit", [30.0, 80.0, 1e4])
def test_absurd_reconstructions_are_still_measured(logit: float) -> None:
    """Beyond what the exponential of float32 holds, certain and wrong costs its logit, certain and right nothing.

    A logit of 80 overflows only where pairs are joined, one of 1e4 at once.
    """
    likelihood = Bernoulli(torch.full((1, 2, 64), logit))
    assert binary_log_prob(likelihood, torch.zeros(1, 64))[0].tolist() == pytest.approx([-64 * logit] * 2)
    # Here the odds are exp(-logit), whose loss is below the float32 resolution of the sum.
    assert binary_log_prob(likelihood, torch.ones(1, 64)).abs().max().item() < 1e-10


def test_small_odds_are_not_lost() -> None:
    """Where every pixel is nearly certain, the sum has its digits: 1 + o is never rounded to one."""
    likelihood = Bernoulli(torch.full((1, 1, 64), -20.0))
    expected = -64 * torch.tensor(-20.0, dtype=torch.float64).exp().log1p().item()
    assert binary_log_prob(likelihood, torch.zeros(1, 64)).item() == pytest.approx(expected, rel=1e-5)
