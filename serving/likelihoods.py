"""p(x | z) on arrays: what a decoder's outputs mean, how likely data are, and how observations are drawn.

One class for each family that a manifest may name. NumPy alone. Rows are m latents, each with its own parameters;
`size` is the number of pixels of one row of data. Data are intensities in [0, 1], and so are observations.
"""

import math
from collections.abc import Mapping
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from serving import noise
from serving.bundle import DecoderOutput, Manifest

Rows = NDArray[Any]
Outputs = tuple[Rows, ...]
Shape = tuple[int, ...]
Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
RowNumbers = noise.Words | tuple[int, int]
"""Numbers of rows in a seed's sequence; or the first number and how many follow it."""

_LOG_TWO_PI: Final = math.log(2 * math.pi)


class Likelihood(Protocol):
    """A family of p(x | z)."""

    @property
    def parameters(self) -> tuple[DecoderOutput, ...]:
        """Outputs of the decoder that `log_prob` takes."""

    @property
    def draws_from(self) -> tuple[DecoderOutput, ...]:
        """Outputs of the decoder that `draw` takes."""

    def log_prob(self, data: Float32, parameters: Outputs) -> Float64:
        """Return log p(x | z) in nats, summed over the pixels, shape (n, k).

        Args:
            data: In [0, 1], shape (n, 1, size).
            parameters: Of k latents for each row of data, n * k rows.
        """

    def draw(self, parameters: Outputs, seed: int, rows: RowNumbers) -> Float32:
        """Return one observation for each row of parameters, in [0, 1], shape (m, *data_shape).

        A row is a function of its parameters, the seed and its number alone.
        """


class Bernoulli:
    """Independent binary pixels, with logits for the sums and their means for drawing."""

    parameters: tuple[DecoderOutput, ...] = ("logits",)
    draws_from: tuple[DecoderOutput, ...] = ("mean",)

    def log_prob(self, data: Float32, parameters: Outputs) -> Float64:
        """Return sum(x l - log(1 + exp(l))) for logits l: it stays finite where the mean rounds to 0 or 1.

        An intensity between zero and one counts as the chance of a one.
        """
        logits = parameters[0].reshape(len(data), -1, data.shape[-1])
        softplus = np.maximum(logits, 0) + np.log1p(np.exp(-np.abs(logits)))
        total: Float64 = (data * logits - softplus).sum(axis=2, dtype=np.float64)
        return total

    def draw(self, parameters: Outputs, seed: int, rows: RowNumbers) -> Float32:
        """Return zeros and ones: a one where uniform noise is below the mean."""
        (mean,) = parameters
        return (_uniform(mean[0].size, seed, rows).reshape(mean.shape) < mean).astype(np.float32)


class Gaussian:
    """Independent pixels N(mean, exp(log_var)): a density over intensities."""

    parameters: tuple[DecoderOutput, ...] = ("mean", "log_var")
    draws_from: tuple[DecoderOutput, ...] = ("mean", "log_var")

    def log_prob(self, data: Float32, parameters: Outputs) -> Float64:
        """Return the logarithm of the density; it is positive where the density exceeds one."""
        mean, log_var = (values.reshape(len(data), -1, math.prod(values.shape[1:])) for values in parameters)
        precision = np.exp(-log_var.astype(np.float64))
        # Squares in float32, sums in float64: the difference of two intensities has no more digits than they have.
        squares = np.square(data - mean) * precision
        widths = log_var.sum(axis=2, dtype=np.float64) * (data.shape[-1] // log_var.shape[-1])
        total: Float64 = -0.5 * (squares.sum(axis=2) + widths + data.shape[-1] * _LOG_TWO_PI)
        return total

    def draw(self, parameters: Outputs, seed: int, rows: RowNumbers) -> Float32:
        """Return mean + exp(log_var / 2) * noise, clipped to [0, 1], where intensities are."""
        mean, log_var = parameters
        standard = _normal(mean[0].size, seed, rows).reshape(mean.shape)
        return np.clip(mean + np.exp(np.float32(0.5) * log_var) * standard, np.float32(0), np.float32(1))


class Categorical:
    """Independent pixels, each on one of equally spaced levels; the levels come before the pixels.

    Args:
        num_levels: How many; level v stands for the intensity v / (num_levels - 1).
    """

    parameters: tuple[DecoderOutput, ...] = ("logits",)
    draws_from: tuple[DecoderOutput, ...] = ("logits",)

    def __init__(self, num_levels: int) -> None:
        self._last = num_levels - 1

    def log_prob(self, data: Float32, parameters: Outputs) -> Float64:
        """Return the sum of the log probabilities of the levels that are nearest to the data."""
        (logits,) = parameters
        size = data.shape[-1]
        logits = logits.reshape(len(data), -1, self._last + 1, size)
        levels = np.rint(data * np.float32(self._last)).astype(np.int64)[:, :, None]
        chosen = np.take_along_axis(logits, np.broadcast_to(levels, (*logits.shape[:2], 1, size)), axis=2)
        weights, largest = _weights(logits, axis=2)
        totals = np.log(weights.sum(axis=2, dtype=np.float64))
        total: Float64 = ((chosen - largest)[:, :, 0] - totals).sum(axis=2)
        return total

    def draw(self, parameters: Outputs, seed: int, rows: RowNumbers) -> Float32:
        """Return the level whose part of [0, 1), cut up by probability, holds uniform noise."""
        (logits,) = parameters
        weights, _ = _weights(logits.reshape(len(logits), self._last + 1, -1), axis=1)
        edges = weights.cumsum(axis=1, dtype=np.float64)
        at = _uniform(edges.shape[-1], seed, rows)[:, None] * edges[:, -1:]
        levels = (edges[:, :-1] <= at).sum(axis=1)
        drawn: Float32 = levels.astype(np.float32) / np.float32(self._last)
        return drawn.reshape(len(logits), *logits.shape[2:])


def of(manifest: Manifest) -> Likelihood:
    """Return the family that a manifest names."""
    if manifest.num_levels is not None:
        return Categorical(manifest.num_levels)
    return Gaussian() if manifest.likelihood == "gaussian" else Bernoulli()


def row_shapes(manifest: Manifest) -> Mapping[str, tuple[Shape, ...]]:
    """Return the shapes that one row of each output of the decoder may have; all of these outputs are needed."""
    shape = manifest.data_shape
    if manifest.likelihood == "gaussian":
        return {"mean": (shape,), "log_var": (shape, (1,) * len(shape))}
    levels = () if manifest.num_levels is None else (manifest.num_levels,)
    return {"mean": (shape,), "logits": ((*levels, *shape),)}


def num_parameters(manifest: Manifest) -> int:
    """Return about how many numbers p(x | z) has for one row of latents."""
    return (manifest.num_levels or 1) * manifest.data_size


def _weights(logits: Rows, *, axis: int) -> tuple[Rows, Rows]:
    """Return probabilities of the levels up to a factor, none above one, and the largest logit of each pixel."""
    largest = logits.max(axis=axis, keepdims=True)
    return np.exp(logits - largest), largest


def _uniform(size: int, seed: int, rows: RowNumbers) -> Float32:
    """Return uniform noise for observations, shape (rows, size)."""
    return noise.uniform_at(np.full(1, seed, np.uint64), _words(rows), size)


def _normal(size: int, seed: int, rows: RowNumbers) -> Float32:
    """Return standard normal noise for observations, shape (rows, size)."""
    return noise.normal_at(np.full(1, seed, np.uint64), _words(rows), size, stream=noise.Stream.OBSERVATION)


def _words(rows: RowNumbers) -> noise.Words:
    if not isinstance(rows, tuple):
        return rows
    first, number = rows
    return np.arange(number, dtype=np.uint64) + np.uint64(first)
