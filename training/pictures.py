"""Grids of images as PNG files, drawn with the noise that the service draws."""

import io
import math
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from training.data import MAX_PIXEL, Pixels
from training.models.vae import VAE
from training.noise import Stream, normal

_MIN_SIDE: Final = 56
"""Images smaller than this, pixels, are enlarged by a whole factor."""

_GAP: Final = 2
_PAPER: Final = 96


@torch.inference_mode()
def prior_samples(vae: VAE, num_samples: int, *, seed: int, temperature: float = 1.0) -> Tensor:
    """Return decoded means of draws from the prior, in [0, 1], shape (num_samples, *data_shape).

    Args:
        vae: The model.
        num_samples: How many.
        seed: The service's Sample with this seed decodes the same latents.
        temperature: Factor on the latents; below 1 samples are more typical and less varied.
    """
    device = next(vae.parameters()).device
    latents = normal(seed, num_samples, vae.latent_dim, stream=Stream.PRIOR).to(device)
    return vae.likelihood(temperature * latents).mean.cpu()


@torch.inference_mode()
def reconstructions(vae: VAE, pixels: Pixels) -> Tensor:
    """Return images above their reconstructions, in [0, 1], shape (2, n, *data_shape).

    A reconstruction is the decoded posterior mean of the grey image.
    """
    device = next(vae.parameters()).device
    data = torch.from_numpy(pixels.astype(np.float32) / MAX_PIXEL)
    mean, _ = vae.posterior(data.to(device))
    return torch.stack((data, vae.likelihood(mean).mean.cpu()))


def png(images: Tensor, *, num_columns: int | None = None) -> bytes:
    """Return a grid of images, row by row, as a PNG file; equal images give equal bytes.

    Args:
        images: In [0, 1], shape (n, channels, height, width) with 1 or 3 channels; or rows of values, (n, values),
            each drawn as a line.
        num_columns: Images in a row; default: a square.
    """
    pixels = _pixels(images)
    factor = -(-_MIN_SIDE // max(pixels.shape[1:3]))
    pixels = pixels.repeat(factor, axis=1).repeat(factor, axis=2)
    num_images, height, width, num_channels = pixels.shape
    columns = min(num_columns or math.ceil(math.sqrt(num_images)), num_images)
    lines = -(-num_images // columns)
    size = lines * (height + _GAP) + _GAP, columns * (width + _GAP) + _GAP
    paper = np.full((*size, num_channels), _PAPER, np.uint8)
    for number, image in enumerate(pixels):
        line, column = divmod(number, columns)
        top, left = _GAP + line * (height + _GAP), _GAP + column * (width + _GAP)
        paper[top : top + height, left : left + width] = image
    buffer = io.BytesIO()
    Image.fromarray(paper[..., 0] if num_channels == 1 else paper).save(buffer, format="PNG", optimize=False)
    return buffer.getvalue()


def _pixels(images: Tensor) -> NDArray[np.uint8]:
    """Return images as bytes, channels last."""
    if images.ndim == 2:  # noqa: PLR2004 - rows and values
        images = images[:, None, None]
    scaled: NDArray[np.uint8] = (images * MAX_PIXEL).round().to(torch.uint8).numpy()
    return np.moveaxis(scaled, 1, 3)
