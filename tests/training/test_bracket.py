"""The bracket holds log p(x): of a model so small that the integral over its latents can be done."""

import math

import pytest
import torch
from torch import Tensor

from training import gaussians, presets
from training.annealed_importance import Annealing
from training.bracket import Bracket, bracket
from training.models.vae import VAE
from training.noise import TrainingStream, generator

STANDARD_ERRORS = 5


def _log_evidence(vae: VAE, data: Tensor) -> Tensor:
    """Return log p(x), by the trapezoidal rule to eight deviations: exact to 1e-5 for so smooth a density."""
    axis = torch.linspace(-8, 8, 321)
    grid = torch.cartesian_prod(axis, axis)
    joint = vae.likelihood(grid).log_prob(data.unsqueeze(1)) + gaussians.standard_normal_log_prob(grid)
    return torch.logsumexp(joint, dim=1) + 2 * math.log(16 / 320)


@pytest.fixture(scope="module")
def model() -> VAE:
    """Return a model of 2x2 pixels whose two latents matter: initial weights of the decoder times eight."""
    config = presets.smoke().model.override(["latent_dim=2", "hidden_dims=[5]"])
    vae = VAE(config, (1, 2, 2), generator(0, TrainingStream.INIT)).requires_grad_(requires_grad=False)
    for parameter in vae.decoder.parameters():
        parameter.mul_(8)
    return vae


@pytest.fixture(scope="module")
def data() -> Tensor:
    """Return six binary images."""
    rows = [[0, 0, 0, 0], [1, 1, 1, 1], [1, 0, 0, 1], [0, 1, 1, 0], [1, 1, 0, 0], [0, 0, 1, 1]]
    return torch.tensor(rows, dtype=torch.float32).view(6, 1, 2, 2)


@pytest.fixture(scope="module")
def found(model: VAE, data: Tensor) -> Bracket:
    """Return the bracket of the six images."""
    annealing = Annealing(num_temperatures=60, num_leapfrog_steps=3)
    return bracket(model, data, torch.zeros(6), seed=4, annealing=annealing, num_chains=200)


def test_estimate_is_the_integral(found: Bracket, model: VAE, data: Tensor) -> None:
    """Within the error that it states of itself."""
    expected = -_log_evidence(model, data).mean().item()
    assert found.chain_standard_error < 0.05
    assert found.nll.value == pytest.approx(expected, abs=STANDARD_ERRORS * found.chain_standard_error)


def test_drawn_images_are_bracketed(found: Bracket) -> None:
    """Forward chains give no less than reverse chains, their errors aside, and with so many hardly more."""
    assert found.drawn_gap.value > -STANDARD_ERRORS * found.drawn_gap.standard_error
    assert found.drawn_gap.value < 0.2
    difference = found.drawn_nll_at_most.value - found.drawn_nll_at_least.value
    # Differences in float32 of numbers around four.
    assert found.drawn_gap.value == pytest.approx(difference, abs=1e-6)


def test_images_are_drawn_from_the_model(found: Bracket, model: VAE) -> None:
    """Their mean NLL is the entropy of p(x), by enumeration of the sixteen images, within its standard error."""
    every = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 4).view(16, 1, 2, 2)
    log_evidence = _log_evidence(model, every)
    assert log_evidence.exp().sum().item() == pytest.approx(1, abs=1e-5)
    entropy = -(log_evidence.exp() * log_evidence).sum().item()
    error = STANDARD_ERRORS * found.drawn_nll_at_most.standard_error
    assert found.drawn_nll_at_most.value == pytest.approx(entropy, abs=error)


def test_conditions_are_recorded_and_repeat(found: Bracket, model: VAE, data: Tensor) -> None:
    """What decides the numbers stands beside them; the same seed gives the same ones, another one others."""
    assert (found.num_images, found.num_chains, found.seed) == (6, 200, 4)
    assert (found.num_temperatures, found.num_leapfrog_steps, found.nll_iwae.value) == (60, 3, 0)
    assert 0 < found.acceptance <= 1
    annealing = Annealing(num_temperatures=4, num_leapfrog_steps=2)

    def again(seed: int) -> Bracket:
        return bracket(model, data, torch.zeros(6), seed=seed, annealing=annealing, num_chains=8)

    assert again(1) == again(1)
    assert again(1).nll != again(2).nll
