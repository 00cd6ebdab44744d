"""What an autoencoder and a VAE have in common: a code for every row of data, and an image for every code.

Neither draws anything: the code of a VAE is the posterior mean, its image the expected one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from training.data import MAX_PIXEL, Pixels
from training.models.autoencoder import Autoencoder
from training.models.vae import VAE

_ROWS_AT_ONCE: Final = 2000


@dataclass(frozen=True)
class Coder:
    """An encoder and a decoder as functions without gradient; answers are on the CPU.

    Args:
        encoder: Data (n, *data_shape) to codes (n, latent_dim).
        decoder: Codes to images in [0, 1], shape (n, *data_shape).
        latent_dim: Dimensions of a code.
        device: Where the two compute.
    """

    encoder: Callable[[Tensor], Tensor]
    decoder: Callable[[Tensor], Tensor]
    latent_dim: int
    device: torch.device

    @classmethod
    def of(cls, model: VAE | Autoencoder) -> "Coder":
        """Return the two halves of a model."""
        device = next(model.parameters()).device
        if isinstance(model, VAE):
            return cls(
                lambda data: model.posterior(data).mean,
                lambda codes: model.likelihood(codes).mean,
                model.latent_dim,
                device,
            )
        return cls(model.encode, model.decode, model.latent_dim, device)

    def encode(self, data: Tensor) -> Tensor:
        """Return codes, shape (n, latent_dim), of data in [0, 1], shape (n, *data_shape)."""
        return self._in_pieces(self.encoder, data)

    def decode(self, codes: Tensor) -> Tensor:
        """Return images in [0, 1], shape (n, *data_shape), of codes of shape (n, latent_dim)."""
        return self._in_pieces(self.decoder, codes)

    def reconstruct(self, data: Tensor) -> Tensor:
        """Return decode(encode(data)); the same every time."""
        return self.decode(self.encode(data))

    @torch.inference_mode()
    def _in_pieces(self, half: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        return torch.cat([half(piece.to(self.device)).cpu() for piece in torch.split(rows, _ROWS_AT_ONCE)])


def intensities(pixels: Pixels) -> Tensor:
    """Return pixels as float32 in [0, 1], the same shape: what the service feeds to an encoder.

    Example:
        >>> import numpy as np
        >>> intensities(np.array([[0, 255]], np.uint8))
        tensor([[0., 1.]])
    """
    # Unlike a copy of the array, the tensor may be written to, and torch does not warn about that.
    return torch.tensor(pixels, dtype=torch.float32) / MAX_PIXEL
