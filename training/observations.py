"""Pixels -> what the likelihood of a model takes for data, to train on, to measure on, and to start from.

| likelihood | data |
|---|---|
| Bernoulli | zeros and ones; a pixel is one with probability pixel / 255 |
| Gaussian | intensities, pixel / 255; nothing is added to them |
| categorical | the nearest of `num_levels` equally spaced intensities |
"""

from typing import Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from training.config import ModelConfig
from training.data import MAX_PIXEL, Pixels, binarise, binarise_rows
from training.likelihoods import level_of, quantised

_ROWS_AT_ONCE: Final = 1000


class Marginals(NamedTuple):
    """Distribution of each pixel over the training data: what `Decoder.start_at` takes."""

    probabilities: Tensor
    """Mean intensity, shape data_shape; for a categorical likelihood frequencies, (num_levels, *data_shape)."""

    log_var: float | None = None
    """Logarithm of the variance around the mean, averaged over the pixels; for a Gaussian likelihood."""


def observed(model: ModelConfig, pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Return data to train on, float32, shape of the pixels.

    Args:
        model: Whose likelihood decides.
        pixels: uint8, on the device of the generator.
        generator: Source of the binarisation of a Bernoulli; the other likelihoods draw nothing.
    """
    return binarise(pixels, generator) if model.likelihood == "bernoulli" else _intensities(model, pixels)


def observed_rows(model: ModelConfig, pixels: Pixels, *, seed: int, first_row: int = 0) -> Tensor:
    """Return data to measure on, float32, a function of the seed and the index of each row alone.

    Args:
        model: Whose likelihood decides.
        pixels: uint8, shape (n, *data_shape).
        seed: Seed of the binarisation of a Bernoulli; the other likelihoods draw nothing.
        first_row: Index of the first row in its split.
    """
    if model.likelihood == "bernoulli":
        return binarise_rows(pixels, seed=seed, first_row=first_row)
    return _intensities(model, torch.from_numpy(pixels))


def described(model: ModelConfig) -> str:
    """Return how pixels become data, in words."""
    return {
        "bernoulli": "pixel is one with probability pixel / 255; one draw per image",
        "gaussian": "none: data are intensities, pixel / 255; log p is of a density over [0, 1]^d",
        "categorical": f"none: data are the nearest of {model.num_levels} equally spaced intensities",
    }[model.likelihood]


def marginals(model: ModelConfig, pixels: Pixels) -> Marginals:
    """Return the distribution of each pixel over data, uint8, shape (n, *data_shape)."""
    if model.likelihood == "categorical":
        return Marginals(_level_frequencies(pixels, model.num_levels))
    mean = pixels.mean(axis=0) / MAX_PIXEL
    probabilities = torch.from_numpy(mean).float()
    if model.likelihood == "bernoulli":
        return Marginals(probabilities)
    squares = np.square(pixels, dtype=np.uint16).mean(axis=0, dtype=np.float64) / MAX_PIXEL**2
    variance = float((squares - mean**2).mean())
    return Marginals(probabilities, float(np.log(max(variance, np.finfo(np.float64).tiny))))


def _intensities(model: ModelConfig, pixels: Tensor) -> Tensor:
    data = pixels.float() / MAX_PIXEL
    return quantised(data, model.num_levels) if model.likelihood == "categorical" else data


def _level_frequencies(pixels: Pixels, num_levels: int) -> Tensor:
    """Return the share of rows in which each pixel is on each level, shape (num_levels, *data_shape)."""
    num_rows, *data_shape = pixels.shape
    size = int(np.prod(data_shape))
    counts = torch.zeros(num_levels * size, dtype=torch.int64)
    places = torch.arange(size)
    for first in range(0, num_rows, _ROWS_AT_ONCE):
        rows = torch.from_numpy(pixels[first : first + _ROWS_AT_ONCE].reshape(-1, size))
        levels = level_of(rows.float() / MAX_PIXEL, num_levels)
        counts += torch.bincount((levels * size + places).flatten(), minlength=len(counts))
    frequencies: Tensor = counts / num_rows
    return frequencies.float().view(num_levels, *data_shape)
