"""The variational autoencoder: p(z) = N(0, I), p(x | z) by the decoder, q(z | x) by the encoder."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from training.config import ModelConfig
from training.likelihoods import Bernoulli
from training.models.networks import Decoder, Encoder


class Posterior(NamedTuple):
    """A diagonal Gaussian q(z | x); both of shape (batch, latent_dim)."""

    mean: Tensor
    log_var: Tensor


class VAE(nn.Module):
    """A latent variable model of binary data with an amortised posterior.

    Args:
        config: Sizes of the networks.
        data_shape: Shape of one row of data.
        generator: Source of the initial weights.
    """

    def __init__(self, config: ModelConfig, data_shape: tuple[int, ...], generator: torch.Generator) -> None:
        super().__init__()
        self.data_shape, self.latent_dim = data_shape, config.latent_dim
        self.encoder = Encoder(config, data_shape, generator)
        self.decoder = Decoder(config, data_shape, generator)

    def posterior(self, data: Tensor) -> Posterior:
        """Return q(z | x) for data in [0, 1], shape (batch, *data_shape)."""
        return Posterior(*self.encoder(data))

    def likelihood(self, latents: Tensor) -> Bernoulli:
        """Return p(x | z) for latents of shape (..., latent_dim)."""
        logits = self.decoder(latents.reshape(-1, self.latent_dim))
        return Bernoulli(logits.view(*latents.shape[:-1], *self.data_shape), event_dims=len(self.data_shape))
