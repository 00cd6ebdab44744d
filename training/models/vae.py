"""The variational autoencoder: p(z) = N(0, I), p(x | z) by the decoder, q(z | x) by the encoder."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from training import estimators, gaussians
from training.config import ModelConfig
from training.estimators import GaussianLatents
from training.likelihoods import Likelihood
from training.models.networks import Decoder, Encoder


class Posterior(NamedTuple):
    """A diagonal Gaussian q(z | x); both of shape (batch, latent_dim)."""

    mean: Tensor
    log_var: Tensor


class VAE(nn.Module):
    """A latent variable model of images with an amortised posterior.

    Args:
        config: Sizes of the networks, and the likelihood.
        data_shape: Shape of one row of data.
        generator: Source of the initial weights.
    """

    def __init__(self, config: ModelConfig, data_shape: tuple[int, ...], generator: torch.Generator) -> None:
        super().__init__()
        self.config, self.data_shape, self.latent_dim = config, data_shape, config.latent_dim
        self.encoder = Encoder(config, data_shape, generator)
        self.decoder = Decoder(config, data_shape, generator)

    def posterior(self, data: Tensor) -> Posterior:
        """Return q(z | x) for data in [0, 1], shape (batch, *data_shape)."""
        return Posterior(*self.encoder(data))

    def likelihood(self, latents: Tensor) -> Likelihood:
        """Return p(x | z) for latents of shape (..., latent_dim)."""
        answer = self.decoder(latents.reshape(-1, self.latent_dim))
        return self.decoder.distribution(answer.view(*latents.shape[:-1], *self.decoder.parameter_shape))

    def log_prob(self, data: Tensor, noise: Tensor) -> Tensor:
        """Return the importance-weighted estimate of log p(x), nats, shape (batch,): below it on average.

        Args:
            data: As the likelihood has them, shape (batch, *data_shape).
            noise: Standard normal, shape (batch, k, latent_dim); the estimate tightens with k.
        """

        def log_joint(latents: Tensor) -> Tensor:
            log_likelihood = self.likelihood(latents).log_prob(data.unsqueeze(1))
            return log_likelihood + gaussians.standard_normal_log_prob(latents)

        return estimators.importance_weighted(log_joint, GaussianLatents(*self.posterior(data)), noise)

    def elbo(self, data: Tensor, noise: Tensor) -> Tensor:
        """Return the bound of each row, nats, shape (batch,); `training.objectives.elbo` gives its two terms.

        Args:
            data: As the likelihood has them, shape (batch, *data_shape).
            noise: Standard normal, shape (batch, M, latent_dim), for M samples of each row.
        """
        q = GaussianLatents(*self.posterior(data))
        log_likelihood = estimators.reparametrised(
            lambda latents: self.likelihood(latents).log_prob(data.unsqueeze(1)), q, noise
        )
        return log_likelihood - gaussians.kl_to_standard_normal(q.mean, q.log_var)

    @torch.no_grad()
    def sample(self, num: int, generator: torch.Generator) -> Tensor:
        """Return draws from p(x): z from the prior, then x from the likelihood; shape (num, *data_shape).

        Args:
            num: How many, at least 1.
            generator: Source of both, on the device of the weights.
        """
        like = next(self.parameters()).new_empty
        latents = like((num, self.latent_dim)).normal_(generator=generator)
        likelihood, noise = self.likelihood(latents), like((num, *self.data_shape))
        if likelihood.noise == "uniform":
            return likelihood.sample(noise.uniform_(generator=generator))
        return likelihood.sample(noise.normal_(generator=generator))
