"""The parts of the model fit together."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from training import objectives, presets
from training.likelihoods import Bernoulli, Gaussian, Likelihood
from training.models.vae import VAE


def test_likelihood_takes_any_leading_dimensions(small_vae: VAE, source: torch.Generator) -> None:
    """Several samples per image give the same logits as one after the other."""
    latents = torch.randn((3, 4, 2), generator=source)
    together = small_vae.likelihood(latents)
    assert isinstance(together, Bernoulli)
    apart = torch.stack([_logits(small_vae.likelihood(row)) for row in latents])
    assert together.logits.shape == (3, 4, 1, 2, 2)
    torch.testing.assert_close(together.logits, apart, rtol=1e-6, atol=1e-6)


def _logits(likelihood: Likelihood) -> Tensor:
    assert isinstance(likelihood, Bernoulli)
    return likelihood.logits


@pytest.mark.parametrize("change", ["likelihood=gaussian", "likelihood=categorical"])
def test_every_likelihood_takes_any_leading_dimensions(change: str, source: torch.Generator) -> None:
    """Several samples per image give the same log-likelihoods and means as one after the other."""
    config = presets.smoke().model.override([change, "latent_dim=2", "hidden_dims=[5]"])
    vae, latents = VAE(config, (1, 2, 2), source), torch.randn((3, 4, 2), generator=source)
    data = torch.rand((3, 1, 2, 2), generator=source)
    together = vae.likelihood(latents)
    apart = [vae.likelihood(row) for row in latents]
    assert together.mean.shape == (3, 4, 1, 2, 2)
    torch.testing.assert_close(together.mean, torch.stack([one.mean for one in apart]), rtol=1e-6, atol=1e-6)
    expected = torch.stack([one.log_prob(row) for one, row in zip(apart, data, strict=True)])
    torch.testing.assert_close(together.log_prob(data.unsqueeze(1)), expected, rtol=1e-5, atol=1e-5)


def test_likelihood_sums_over_one_image(small_vae: VAE, source: torch.Generator) -> None:
    """There is one log-likelihood per row of latents."""
    likelihood = small_vae.likelihood(torch.randn((3, 4, 2), generator=source))
    assert likelihood.log_prob(torch.zeros(1, 2, 2)).shape == (3, 4)


def test_posterior_names_its_parameters(small_vae: VAE, source: torch.Generator) -> None:
    """The posterior is what the encoder answers, by name."""
    data = torch.rand((5, 1, 2, 2), generator=source)
    posterior = small_vae.posterior(data)
    mean, log_var = small_vae.encoder(data)
    assert torch.equal(posterior.mean, mean)
    assert torch.equal(posterior.log_var, log_var)


def _all_images() -> Tensor:
    """Return the sixteen binary images of 2x2 pixels."""
    return torch.tensor(list(itertools.product((0.0, 1.0), repeat=4)), dtype=torch.float64).view(-1, 1, 2, 2)


def _exact_log_prob(vae: VAE) -> Tensor:
    """Return log p(x) of every image by the midpoint rule over the two latents."""
    axis = -9 + 0.1 * (torch.arange(180, dtype=torch.float64) + 0.5)
    latents = torch.cartesian_prod(axis, axis)
    log_prior = -0.5 * latents.square().sum(dim=1) - math.log(2 * math.pi)
    log_likelihood = vae.likelihood(latents).log_prob(_all_images().unsqueeze(1))
    return (log_likelihood + log_prior).logsumexp(dim=1) + 2 * math.log(0.1)


def _sharp(vae: VAE) -> VAE:
    """Return the model in float64 with larger weights, so that the latents matter."""
    with torch.no_grad():
        for parameter in vae.double().parameters():
            parameter.mul_(2)
    return vae


@torch.no_grad()
def test_estimate_of_log_prob_is_the_integral(small_vae: VAE, source: torch.Generator) -> None:
    """Many samples give log p(x) within five standard errors of the mean weight, and single ones the ELBO."""
    vae, data, num = _sharp(small_vae), _all_images(), 20_000
    exact = _exact_log_prob(vae)
    assert abs(exact.exp().sum().item() - 1) < 1e-9
    noise = torch.randn((16, num, 2), generator=source, dtype=torch.float64)
    estimate = vae.log_prob(data, noise)
    singles = vae.log_prob(data.repeat_interleave(num, dim=0), noise.view(-1, 1, 2)).view(16, num)
    ratios = (singles - exact.unsqueeze(1)).exp()
    standard_error = ratios.std(dim=1) / math.sqrt(num)
    assert bool(((estimate - exact).expm1().abs() < 5 * standard_error).all())
    bound_error = 5 * singles.std(dim=1) / math.sqrt(num)
    assert bool(((singles.mean(dim=1) - vae.elbo(data, noise)).abs() < 2 * bound_error).all())
    assert bool((vae.elbo(data, noise) < exact).all())


@torch.no_grad()
def test_bound_is_that_of_the_objectives(small_vae: VAE, source: torch.Generator) -> None:
    """The model's own methods and the training objectives are one formula."""
    data, noise = _all_images().float(), torch.randn((16, 3, 2), generator=source)
    torch.testing.assert_close(small_vae.elbo(data, noise), objectives.elbo(small_vae, data, noise).value)
    expected = objectives.importance_weighted_elbo(small_vae, data, noise)
    torch.testing.assert_close(small_vae.log_prob(data, noise), expected)


@torch.no_grad()
def test_samples_are_as_frequent_as_the_integral_says(small_vae: VAE, source: torch.Generator, seed: int) -> None:
    """Each of the sixteen images comes as often as p(x) says, within five standard errors; the seed decides."""
    vae, num = _sharp(small_vae), 40_000
    draws = vae.sample(num, source)
    assert draws.shape == (num, 1, 2, 2)
    numbers = (draws.flatten(1) @ torch.tensor([8.0, 4.0, 2.0, 1.0], dtype=torch.float64)).long()
    shares = torch.bincount(numbers, minlength=16) / num
    exact = _exact_log_prob(vae).exp()
    assert bool(((shares - exact).abs() < 5 * (exact * (1 - exact) / num).sqrt()).all())
    first, second = (vae.sample(3, torch.Generator().manual_seed(seed)) for _ in range(2))
    assert torch.equal(first, second)


def test_samples_of_a_gaussian_likelihood_scatter_by_its_variance(source: torch.Generator, seed: int) -> None:
    """Draws come with the noise of their likelihood: grey values, different for each draw, the same for a seed."""
    config = presets.smoke().model.override(["likelihood=gaussian", "latent_dim=2", "hidden_dims=[5]"])
    vae = VAE(config, (1, 2, 2), source)
    first, second = (vae.sample(5000, torch.Generator().manual_seed(seed)) for _ in range(2))
    assert torch.equal(first, second)
    latents = torch.randn((5000, 2), generator=source)
    likelihood = vae.likelihood(latents)
    assert isinstance(likelihood, Gaussian)
    variance = likelihood.mean.var(dim=0) + likelihood.log_var.exp().mean(dim=0)
    # Both sides are measured on 5000 draws: two relative errors of sqrt(2 / 5000), five of them.
    torch.testing.assert_close(first.var(dim=0), variance.detach(), rtol=0.15, atol=0)
