"""Annealed importance sampling is unbiased; linear models and brute force are oracles."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tests.training.test_objectives import LinearGaussian
from training import annealed_importance, gaussians
from training.annealed_importance import AnnealedEstimate, Annealing
from training.models.vae import VAE

STANDARD_ERRORS = 5


@pytest.fixture
def linear(source: torch.Generator) -> LinearGaussian:
    """Return a linear model whose posterior is correlated."""
    return LinearGaussian.drawn(source)


def _assert_mean_is_one(ratios: Tensor) -> None:
    standard_error = ratios.std().item() / math.sqrt(ratios.numel())
    assert ratios.mean().item() == pytest.approx(1, abs=STANDARD_ERRORS * standard_error)
    assert standard_error < 0.05


@pytest.mark.parametrize(
    "annealing",
    [
        Annealing(num_temperatures=2, num_leapfrog_steps=3, step_size=0.3, has_pilot=False),
        Annealing(num_temperatures=8, num_leapfrog_steps=2, step_size=0.7, has_pilot=False),
        Annealing(num_temperatures=8, num_leapfrog_steps=3),
    ],
    ids=["two temperatures", "coarse steps", "pilot"],
)
def test_mean_weight_is_the_evidence(
    annealing: Annealing, linear: LinearGaussian, source: torch.Generator
) -> None:
    """However badly the chains move, E[w] = p(x), within five standard errors of 40,000 chains."""
    _, data = linear.sample(1, source)
    found = annealed_importance.estimate(
        linear, data, latent_dim=2, num_chains=40_000, source=source, annealing=annealing
    )
    _assert_mean_is_one((found.log_weights[0] - linear.log_evidence(data)).exp())


def test_one_temperature_is_importance_sampling_from_the_prior(linear: LinearGaussian, seed: int) -> None:
    """Without anything between prior and posterior a weight is p(x | z) at a draw from the prior."""
    _, data = linear.sample(3, torch.Generator().manual_seed(seed))
    first = torch.Generator().manual_seed(seed)
    found = annealed_importance.estimate(
        linear,
        data,
        latent_dim=2,
        num_chains=7,
        source=first,
        annealing=Annealing(num_temperatures=1, has_pilot=False),
    )
    latents = torch.randn((3, 7, 2), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    expected = linear.likelihood(latents).log_prob(data.unsqueeze(1))
    torch.testing.assert_close(found.log_weights, expected, rtol=0, atol=1e-12)


def test_many_temperatures_find_the_evidence(linear: LinearGaussian, source: torch.Generator) -> None:
    """With 200 temperatures every row's log p(x) is found within five of its standard errors, which are small."""
    _, data = linear.sample(8, source)
    annealing = Annealing(num_temperatures=200)
    found = annealed_importance.estimate(
        linear, data, latent_dim=2, num_chains=50, source=source, annealing=annealing
    )
    error = (found.log_evidence - linear.log_evidence(data)).abs()
    assert bool((error < STANDARD_ERRORS * found.standard_error).all())
    assert found.standard_error.max().item() < 0.2
    assert found.effective_sample_size.min().item() > 20
    # The pilot's aim is 0.65; its steps are a tenth, and shares of 50 chains are noisy.
    assert bool(((found.acceptance > 0.5) & (found.acceptance < 0.85)).all())


def test_more_temperatures_make_better_weights(linear: LinearGaussian, source: torch.Generator) -> None:
    """The effective sample size rises with the number of temperatures on the same data."""
    _, data = linear.sample(5, source)
    sizes = [
        annealed_importance.estimate(
            linear,
            data,
            latent_dim=2,
            num_chains=200,
            source=source,
            annealing=Annealing(num_temperatures=number),
        )
        .effective_sample_size.mean()
        .item()
        for number in (1, 10, 100)
    ]
    assert all(lower < higher for lower, higher in pairwise(sizes))


def test_reverse_weight_is_the_inverse_of_the_evidence(source: torch.Generator) -> None:
    """From exact posterior samples, E[1 / w] = 1 / p(x), within five standard errors of 20,000 chains."""
    linear = LinearGaussian.drawn(source, is_orthogonal=True).with_exact_encoder()
    _, data = linear.sample(1, source)
    rows = data.expand(20_000, -1)
    noise = torch.randn((20_000, 2), generator=source, dtype=torch.float64)
    latents = gaussians.rsample(*linear.posterior(rows), noise)
    annealing = Annealing(num_temperatures=8, num_leapfrog_steps=2)
    sizes = torch.full((8, 20_000), 0.5, dtype=torch.float64)
    found = annealed_importance.reverse_estimate(
        linear, rows, latents, sizes, num_chains=1, source=source, annealing=annealing
    )
    _assert_mean_is_one((linear.log_evidence(data) - found.log_weights[:, 0]).exp())


def test_both_directions_bracket_the_evidence_of_simulated_data(
    linear: LinearGaussian, source: torch.Generator
) -> None:
    """On data that the model made: forward mean < log p(x) < reverse mean, and the bracket closes with T."""
    latents, data = linear.sample(400, source)
    exact = linear.log_evidence(data)
    widths = []
    for number in (5, 60):
        annealing = Annealing(num_temperatures=number)
        forward = annealed_importance.estimate(
            linear, data, latent_dim=2, num_chains=4, source=source, annealing=annealing
        )
        reverse = annealed_importance.reverse_estimate(
            linear, data, latents, forward.step_sizes, num_chains=4, source=source, annealing=annealing
        )
        for gap in (exact - forward.log_evidence, reverse.log_evidence - exact):
            assert gap.mean().item() > -STANDARD_ERRORS * gap.std().item() / math.sqrt(400)
        widths.append((reverse.log_evidence - forward.log_evidence).mean().item())
    assert widths[0] > 4 * widths[1] > 0
    assert widths[1] < 0.5


def test_decoder_agrees_with_brute_force(small_vae: VAE, source: torch.Generator) -> None:
    """For four pixels and two latents the estimate is the sum over a grid, within five standard errors."""
    small_vae.double()
    with torch.no_grad():
        # An untrained decoder hardly depends on z; this one has a posterior that differs from the prior.
        small_vae.decoder.head.weight.mul_(8)
    data = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]], [[[1.0, 1.0], [1.0, 0.0]]]], dtype=torch.float64)
    axis = torch.linspace(-7, 7, 281, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        log_joint = small_vae.likelihood(grid).log_prob(data.unsqueeze(1)) + gaussians.standard_normal_log_prob(
            grid
        )
    exact = torch.logsumexp(log_joint, 1) + 2 * math.log(float(axis[1] - axis[0]))
    found = annealed_importance.estimate(
        small_vae,
        data,
        latent_dim=2,
        num_chains=200,
        source=source,
        annealing=Annealing(num_temperatures=50),
    )
    assert bool(((found.log_evidence - exact).abs() < STANDARD_ERRORS * found.standard_error).all())
    assert found.standard_error.max().item() < 0.05
    assert all(parameter.grad is None for parameter in small_vae.parameters())


@pytest.mark.parametrize(
    ("log_weights", "expected"), [([[-900.0, -900.0, -900.0]], 3.0), ([[0.0, -2000.0, -2000.0]], 1.0)]
)
def test_effective_sample_size_counts_the_weights_that_matter(
    log_weights: list[list[float]], expected: float
) -> None:
    """Equal weights count all, a single dominating one counts one; weights of any size."""
    found = AnnealedEstimate(torch.tensor(log_weights), torch.ones(1), torch.ones(1, 1))
    assert found.effective_sample_size.item() == pytest.approx(expected, rel=1e-4)


def test_schedule_is_a_symmetric_rise_from_zero_to_one() -> None:
    """The inverse temperatures begin at 0, end at 1, rise, and are dense at both ends."""
    betas = annealed_importance.sigmoid_schedule(100)
    steps = betas.diff()
    assert (betas[0].item(), betas[-1].item()) == (0, 1)
    assert steps.min().item() > 0
    assert steps[0].item() < 0.2 * steps[50].item()
    torch.testing.assert_close(steps, steps.flip(0))
    with pytest.raises(ValueError, match="at least 1"):
        annealed_importance.sigmoid_schedule(0)
