"""Randomness without state: the noise of `serving.noise` as tensors, and seeds of training's own streams.

Evaluation and figures use the first kind, so that they show what the service answers. Training uses the
second: torch generators, faster on the device, each made anew from (seed, stream, counter), so that a run
which resumes at step n draws what the uninterrupted run drew at step n.
"""

import math
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

# Philox4x32-10 as `serving.noise` has it.
_WORDS: Final = 4
_ROUNDS: Final = 10
_HALF: Final = 32
_LOW: Final = 0xFFFFFFFF
_MULTIPLIERS: Final = (0xD2511F53, 0xCD9E8D57)
_WEYL: Final = (0x9E3779B9, 0xBB67AE85)


class TrainingStream(IntEnum):
    """What a generator of the training loop is for. Disjoint from `serving.noise.Stream`."""

    INIT = 16
    SHUFFLE = 17
    BINARISE = 18
    POSTERIOR = 19
    VALIDATION = 20
    STUDY = 21
    ANNEALING = 22


def normal(seed: int, num_rows: int, dim: int, *, first_row: int = 0, stream: Stream) -> Tensor:
    """Return standard normal noise, shape (num_rows, dim); arguments as for `serving.noise.normal`."""
    return torch.from_numpy(noise.normal(seed, num_rows, dim, first_row=first_row, stream=stream))


def uniform(seed: int, num_rows: int, dim: int, *, first_row: int = 0, stream: Stream) -> Tensor:
    """Return noise uniform on [0, 1), shape (num_rows, dim); arguments as for `serving.noise.uniform`."""
    return torch.from_numpy(noise.uniform(seed, num_rows, dim, first_row=first_row, stream=stream))


def normal_per_row(
    seed: int,
    num_rows: int,
    num_samples: int,
    dim: int,
    *,
    first_row: int = 0,
    first_sample: int = 0,
    device: torch.device | None = None,
) -> Tensor:
    """Return posterior noise, shape (num_rows, num_samples, dim), a function of row and sample number alone.

    The values are those of `serving.noise.normal`, made where they are needed. Some thousand rows and samples in
    one call cost a seventh of what they cost in calls for fifty.

    Args:
        seed: In [0, 2^64).
        num_rows: Images.
        num_samples: Samples of each; `first_sample + num_samples` is at most 2^20.
        dim: Latent dimensions.
        first_row: Index of the first image.
        first_sample: Number of the first sample.
        device: Where to make it; the CPU unless given. Another kind of device may round the last digit otherwise.

    Example:
        >>> whole = normal_per_row(3, 2, 8, 4)
        >>> bool((normal_per_row(3, 1, 5, 4, first_row=1, first_sample=2) == whole[1:, 2:7]).all())
        True
    """
    images = torch.arange(first_row, first_row + num_rows, device=device).unsqueeze(1) * _SAMPLES_PER_ROW
    rows = images + torch.arange(first_sample, first_sample + num_samples, device=device)
    num_blocks = -(-dim // _WORDS)
    words = _philox(seed, rows.flatten(), num_blocks, Stream.POSTERIOR)
    # Words 0 and 2 make radii, words 1 and 3 angles: those of a pair stand side by side in a row.
    unit = words.double().add_(0.5).mul_(2.0**-32)
    radius, angle = unit[0].log_().mul_(-2).sqrt_(), unit[1].mul_(2 * math.pi)
    made = torch.empty(len(words[0, 0]), num_blocks, 2, 2, dtype=torch.float32, device=device)
    made[..., 0] = (torch.cos(angle) * radius).permute(1, 2, 0)
    made[..., 1] = angle.sin_().mul_(radius).permute(1, 2, 0)
    return made.view(num_rows, num_samples, -1)[..., :dim]


def _philox(seed: int, rows: Tensor, num_blocks: int, stream: Stream) -> Tensor:
    """Return the random words of `serving.noise`, int64, shape (2, 2, rows, blocks): word 2 j + i at [i, j].

    The four words of a counter move in two pairs, so that a round is eight operations on large tensors.
    """
    shape = (2, len(rows), num_blocks)
    words = torch.empty((2, *shape), dtype=torch.int64, device=rows.device)
    even, odd, product = words[0], words[1], torch.empty(shape, dtype=torch.int64, device=rows.device)
    even[0], even[1] = torch.arange(num_blocks, device=rows.device), (rows >> _HALF).unsqueeze(1)
    odd[0], odd[1] = (rows & _LOW).unsqueeze(1), int(stream)
    for number in range(_ROUNDS):
        # Two's complement wraps as unsigned words do; only the shift must not carry the sign along.
        torch.mul(even[0], _MULTIPLIERS[0], out=product[1])
        torch.mul(even[1], _MULTIPLIERS[1], out=product[0])
        torch.bitwise_right_shift(product, _HALF, out=even)
        even.bitwise_and_(_LOW).bitwise_xor_(odd)
        even[0].bitwise_xor_((seed + number * _WEYL[0]) & _LOW)
        even[1].bitwise_xor_(((seed >> _HALF) + number * _WEYL[1]) & _LOW)
        torch.bitwise_and(product, _LOW, out=odd)
    return words


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
