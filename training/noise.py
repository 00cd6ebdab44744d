"""Randomness without state: the noise of `serving.noise` as tensors, and seeds of training's own streams.

Evaluation and figures use the first kind, so that they show what the service answers. Training uses the
second: torch generators, faster on the device, each made anew from (seed, stream, counter), so that a run
which resumes at step n draws what the uninterrupted run drew at step n.
"""

from enum import IntEnum
from typing import Final

import numpy as np
import torch
from torch import Tensor

from serving import noise
from serving.noise import Stream

__all__ = ["Stream", "TrainingStream", "generator", "normal", "normal_per_row", "uniform"]

_SAMPLES_PER_ROW: Final = 2**20
"""Distance between the posterior samples of two images in the counter, so that no two of them meet."""


class TrainingStream(IntEnum):
    """What a generator of the training loop is for. Disjoint from `serving.noise.Stream`."""

    INIT = 16
    SHUFFLE = 17
    BINARISE = 18
    POSTERIOR = 19
    VALIDATION = 20


def normal(seed: int, num_rows: int, dim: int, *, first_row: int = 0, stream: Stream) -> Tensor:
    """Return standard normal noise, shape (num_rows, dim); arguments as for `serving.noise.normal`."""
    return torch.from_numpy(noise.normal(seed, num_rows, dim, first_row=first_row, stream=stream))


def uniform(seed: int, num_rows: int, dim: int, *, first_row: int = 0, stream: Stream) -> Tensor:
    """Return noise uniform on [0, 1), shape (num_rows, dim); arguments as for `serving.noise.uniform`."""
    return torch.from_numpy(noise.uniform(seed, num_rows, dim, first_row=first_row, stream=stream))


def normal_per_row(
    seed: int, num_rows: int, num_samples: int, dim: int, *, first_row: int = 0, first_sample: int = 0
) -> Tensor:
    """Return posterior noise, shape (num_rows, num_samples, dim), a function of row and sample number alone.

    Args:
        seed: In [0, 2^64).
        num_rows: Images.
        num_samples: Samples of each; `first_sample + num_samples` is at most 2^20.
        dim: Latent dimensions.
        first_row: Index of the first image.
        first_sample: Number of the first sample.

    Example:
        >>> whole = normal_per_row(3, 2, 8, 4)
        >>> bool((normal_per_row(3, 1, 5, 4, first_row=1, first_sample=2) == whole[1:, 2:7]).all())
        True
    """
    rows = [
        noise.normal(
            seed,
            num_samples,
            dim,
            first_row=row * _SAMPLES_PER_ROW + first_sample,
            stream=Stream.POSTERIOR,
        )
        for row in range(first_row, first_row + num_rows)
    ]
    return torch.from_numpy(np.stack(rows))


def generator(
    seed: int, stream: TrainingStream, counter: int = 0, *, device: torch.device | None = None
) -> torch.Generator:
    """Return a fresh generator that is a function of its arguments.

    Args:
        seed: Seed of the run, in [0, 2^64).
        stream: What it is for.
        counter: Epoch or step.
        device: Where it draws; the CPU unless given. Draws differ between kinds of device.
    """
    words = noise.philox(
        (
            np.array(0, np.uint64),
            np.array(counter & 0xFFFFFFFF, np.uint64),
            np.array(counter >> 32, np.uint64),
            np.array(int(stream), np.uint64),
        ),
        (seed & 0xFFFFFFFF, seed >> 32),
    )
    made = torch.Generator(device=device or torch.device("cpu"))
    made.manual_seed(int(words[0]) | int(words[1]) << 32)
    return made
