"""The chain of pixels is a distribution: it sums to one, does not look ahead, and its samples follow it."""

import pytest
import torch
from torch import Tensor

from training.data import binarise
from training.study.pixel_chain import PixelChain

NUM_PIXELS = 8

ROUNDING = 1e-12
"""Of 256 probabilities in float64."""


@pytest.fixture
def chain(source: torch.Generator) -> PixelChain:
    """Return a chain with drawn weights, in float64."""
    made = PixelChain((1, 2, 4)).double().requires_grad_(requires_grad=False)
    made.weight.normal_(0, 1.5, generator=source)
    made.bias.normal_(0, 0.5, generator=source)
    return made


@pytest.fixture
def everything() -> Tensor:
    """Return all images of eight pixels."""
    return torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * NUM_PIXELS).view(-1, 1, 2, 4)


def test_probabilities_sum_to_one(chain: PixelChain, everything: Tensor) -> None:
    """By enumeration."""
    assert float(chain.log_prob(everything).exp().sum()) == pytest.approx(1, abs=ROUNDING)


def test_untrained_it_says_nothing(everything: Tensor) -> None:
    """Every image has probability 2^-8."""
    log_prob = PixelChain((1, 2, 4)).double().log_prob(everything)
    torch.testing.assert_close(log_prob.exp(), torch.full_like(log_prob, 2.0**-NUM_PIXELS))


def test_samples_follow_the_probabilities(chain: PixelChain, everything: Tensor, source: torch.Generator) -> None:
    """The frequency of every image is within five standard errors of its probability."""
    num = 50_000
    drawn = chain.sample(torch.rand((num, 1, 2, 4), generator=source, dtype=torch.float64))
    places = drawn.flatten(start_dim=1) @ (2.0 ** torch.arange(NUM_PIXELS - 1, -1, -1, dtype=torch.float64))
    frequency = torch.bincount(places.long(), minlength=len(everything)) / num
    probability = chain.log_prob(everything).exp()
    # A rare image that never came has no spread of its own: one in `num` is added.
    error = (probability * (1 - probability) / num).sqrt() + 1 / num
    assert float(((frequency - probability).abs() / error).max()) < 5


def test_no_pixel_looks_ahead(chain: PixelChain, source: torch.Generator) -> None:
    """Samples with equal noise up to a pixel are equal up to that pixel, whatever noise comes after."""
    noise = torch.rand((100, 1, 2, 4), generator=source, dtype=torch.float64)
    other = noise.clone().flatten(start_dim=1)
    other[:, 5:] = torch.rand((100, 3), generator=source, dtype=torch.float64)
    one, two = (chain.sample(uniform.view(-1, 1, 2, 4)).flatten(start_dim=1) for uniform in (noise, other))
    assert torch.equal(one[:, :5], two[:, :5])
    assert not torch.equal(one, two)


def test_fitting_finds_what_depends_on_what(source: torch.Generator) -> None:
    """Of two pixels that are always equal, one coin: log p goes to log 1/2; independent pixels reach log 1/4."""
    coins = (torch.rand((2000, 1), generator=source) < 0.5).float()
    data = coins.repeat(1, 2)
    chain = PixelChain((2,))
    chain.fit(lambda rows: data[rows], len(data), source, num_steps=600, learning_rate=0.1)
    value = chain.log_prob(data).mean().item()
    # What is left of the logistic function's tail after 600 steps, and the coin's own deviation from a half.
    assert value == pytest.approx(-torch.log(torch.tensor(2.0)).item(), abs=0.02)


def test_a_batch_may_be_binarised_afresh(source: torch.Generator) -> None:
    """The probability of a grey pixel is its brightness."""
    pixels = torch.tensor([[51]], dtype=torch.uint8).repeat(200, 1)
    chain = PixelChain((1,))
    chain.fit(lambda rows: binarise(pixels[rows], source), 200, source, num_steps=500, learning_rate=0.05)
    # 500 batches of 128 with a falling step: four standard errors of the last hundred batches.
    assert chain.bias.sigmoid().item() == pytest.approx(0.2, abs=0.015)
