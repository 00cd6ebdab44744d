"""The parts of the model fit together."""

import torch

from training.models.vae import VAE


def test_likelihood_takes_any_leading_dimensions(small_vae: VAE, source: torch.Generator) -> None:
    """Several samples per image give the same logits as one after the other."""
    latents = torch.randn((3, 4, 2), generator=source)
    together = small_vae.likelihood(latents).logits
    apart = torch.stack([small_vae.likelihood(row).logits for row in latents])
    assert together.shape == (3, 4, 1, 2, 2)
    torch.testing.assert_close(together, apart, rtol=1e-6, atol=1e-6)


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
