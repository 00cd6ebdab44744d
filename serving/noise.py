r"""Noise as a pure function of (seed, row, dimension, stream); NumPy alone.

Philox4x32-10 (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011) turns a counter and a key
into four random words; Box and Muller (1958) turn words into normal variates. Nothing is stored between
calls, so a row of noise does not depend on the batch, the replica or the order in which it is drawn.

Layout: key = (low, high word of the seed); counter = (block, low, high word of the row, stream), where a
block holds four consecutive dimensions.
"""

from enum import IntEnum
from typing import Final

import numpy as np
from numpy.typing import NDArray

ALGORITHM: Final = "philox4x32-10/box-muller/1"
"""Name and version of the mapping; recorded in every bundle."""

MAX_SEED: Final = 2**64 - 1

_WORDS: Final = 4
_ROUNDS: Final = 10
_LOW: Final = np.uint64(0xFFFFFFFF)
_HALF: Final = np.uint64(32)
_MULTIPLIERS: Final = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL: Final = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))

Words = NDArray[np.uint64]


class Stream(IntEnum):
    """What the noise is for; equal seeds in different streams are independent."""

    PRIOR = 0
    POSTERIOR = 1
    OBSERVATION = 2
    GOLDEN = 3


def normal(
    seed: int, num_rows: int, dim: int, *, first_row: int = 0, stream: Stream = Stream.PRIOR
) -> NDArray[np.float32]:
    """Return standard normal noise, shape (num_rows, dim).

    Args:
        seed: In [0, 2^64).
        num_rows: Rows to draw; row i of the answer is row `first_row + i` of the seed's sequence.
        dim: Dimensions of a row. A longer row begins with the shorter one.
        first_row: Number of the first row, in [0, 2^64 - num_rows].
        stream: What the noise is for.

    Example:
        >>> normal(0, 1, 4).astype(np.float64).round(6)
        array([[ 0.991138, -0.924663, -0.617609, -0.482069]])
        >>> bool((normal(7, 5, 3)[2:] == normal(7, 3, 3, first_row=2)).all())
        True
    """
    rows = np.arange(num_rows, dtype=np.uint64) + np.uint64(first_row)
    return normal_at(np.full(1, seed, np.uint64), rows, dim, stream=stream)


def normal_at(seeds: Words, rows: Words, dim: int, *, stream: Stream = Stream.PRIOR) -> NDArray[np.float32]:
    """Return standard normal noise of any rows of any seeds, shape (rows, dim).

    One call for the rows of many requests costs about as much as one call for one row.

    Args:
        seeds: Seed of each row, shape (rows,) or (1,).
        rows: Number of each row in its seed's sequence, shape (rows,).
        dim: Dimensions of a row.
        stream: What the noise is for.

    Example:
        >>> both = normal_at(np.array([7, 8], np.uint64), np.array([2, 5], np.uint64), 3)
        >>> bool((both[1] == normal(8, 1, 3, first_row=5)[0]).all())
        True
    """
    words = _words(seeds, rows, -(-dim // _WORDS), stream)
    unit = (words.astype(np.float64) + 0.5) * 2.0**-32  # open at both ends: the logarithm is finite
    radius = np.sqrt(-2.0 * np.log(unit[..., 0::2]))
    angle = (2.0 * np.pi) * unit[..., 1::2]
    noise = np.empty(unit.shape, np.float32)
    noise[..., 0::2] = radius * np.cos(angle)
    noise[..., 1::2] = radius * np.sin(angle)
    return _cut(noise, dim)


def uniform(
    seed: int, num_rows: int, dim: int, *, first_row: int = 0, stream: Stream = Stream.OBSERVATION
) -> NDArray[np.float32]:
    """Return noise uniform on [0, 1), shape (num_rows, dim). Arguments as for `normal`.

    Only the upper 24 bits of a word are used: float32 holds each of them exactly and never rounds up to one.

    Example:
        >>> uniform(0, 1, 2).astype(np.float64).round(6)
        array([[0.86401 , 0.679529]])
    """
    rows = np.arange(num_rows, dtype=np.uint64) + np.uint64(first_row)
    return uniform_at(np.full(1, seed, np.uint64), rows, dim, stream=stream)


def uniform_at(seeds: Words, rows: Words, dim: int, *, stream: Stream = Stream.OBSERVATION) -> NDArray[np.float32]:
    """Return noise uniform on [0, 1) of any rows of any seeds, shape (rows, dim). Arguments as for `normal_at`.

    Example:
        >>> both = uniform_at(np.array([7, 8], np.uint64), np.array([2, 5], np.uint64), 3)
        >>> bool((both[0] == uniform(7, 1, 3, first_row=2)[0]).all())
        True
    """
    words = _words(seeds, rows, -(-dim // _WORDS), stream)
    return _cut((words >> np.uint64(8)).astype(np.float32) * np.float32(2**-24), dim)


def philox(counter: tuple[Words, Words, Words, Words], key: tuple[Words | int, Words | int]) -> list[Words]:
    """Return the four words of Philox4x32-10 for each counter and key; arrays broadcast.

    Args:
        counter: Four arrays of 32-bit values held in uint64.
        key: Two 32-bit values, or arrays of them held in uint64.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = (np.asarray(half, np.uint64) for half in key)
    m0, m1 = _MULTIPLIERS
    for _ in range(_ROUNDS):
        product0, product1 = m0 * c0, m1 * c2
        c0 = (product1 >> _HALF) ^ c1 ^ k0
        c2 = (product0 >> _HALF) ^ c3 ^ k1
        c1, c3 = product1 & _LOW, product0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return [c0, c1, c2, c3]


def _words(seeds: Words, rows: Words, blocks: int, stream: Stream) -> Words:
    """Return random words, shape (rows, blocks, 4)."""
    seed, row = seeds[:, None], rows[:, None]
    block = np.arange(blocks, dtype=np.uint64)[None, :]
    counter = (block, row & _LOW, row >> _HALF, np.full((1, 1), stream, np.uint64))
    words = np.empty((len(rows), blocks, _WORDS), np.uint64)
    for index, word in enumerate(philox(counter, (seed & _LOW, seed >> _HALF))):
        words[..., index] = word
    return words


def _cut(noise: NDArray[np.float32], dim: int) -> NDArray[np.float32]:
    """Drop what the last block holds beyond `dim`."""
    return np.ascontiguousarray(noise.reshape(noise.shape[0], -1)[:, :dim])
