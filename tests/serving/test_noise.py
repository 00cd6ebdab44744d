"""Laws and known answers of `serving.noise`."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from serving import noise
from serving.noise import Stream, Words

SEEDS = st.integers(0, noise.MAX_SEED)
FIRST_ROWS = st.one_of(st.integers(0, 1000), st.integers(2**32 - 20, 2**32 + 20), st.integers(0, 2**63))
STREAMS = st.sampled_from(Stream)
P_VALUE = 1e-4
"""Seeds are fixed, so a test of a distribution either always passes or never: one in 10^4 seeds would fail."""

DIGITS = 5e-7
"""Half of the last digit in which the known answers are printed."""


def _word(value: int) -> Words:
    return np.array([value], np.uint64)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_words(
    counter: tuple[int, int, int, int], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    """The known answers of the Random123 distribution hold."""
    c0, c1, c2, c3 = (_word(word) for word in counter)
    words = noise.philox((c0, c1, c2, c3), (_word(key[0]), _word(key[1])))
    assert [int(word[0]) for word in words] == list(expected)


@pytest.mark.parametrize(
    ("seed", "expected"),
    [
        (0, (0.9911377, -0.9246626, -0.6176090, -0.4820686)),
        (1, (0.3804008, -0.2962779, -0.2492334, -1.0038372)),
    ],
)
def test_normal_gives_the_recorded_variates(seed: int, expected: tuple[float, ...]) -> None:
    """The mapping of version 1 never changes: bundles and answers depend on it."""
    np.testing.assert_allclose(noise.normal(seed, 1, 4)[0], expected, rtol=0, atol=DIGITS)


@pytest.mark.parametrize("draw", [noise.normal, noise.uniform])
@given(seed=SEEDS, first_row=FIRST_ROWS, num_rows=st.integers(1, 40), dim=st.integers(1, 33), stream=STREAMS)
@settings(max_examples=60, deadline=None)
def test_a_row_does_not_depend_on_its_batch(
    draw: object, seed: int, first_row: int, num_rows: int, dim: int, stream: Stream
) -> None:
    """Each row of a batch equals the row drawn alone, bit for bit."""
    function = noise.normal if draw is noise.normal else noise.uniform
    batch = function(seed, num_rows, dim, first_row=first_row, stream=stream)
    assert batch.dtype == np.float32
    assert batch.shape == (num_rows, dim)
    assert batch.flags.c_contiguous
    for i in range(num_rows):
        alone = function(seed, 1, dim, first_row=first_row + i, stream=stream)
        assert alone.tobytes() == batch[i].tobytes()


@pytest.mark.parametrize("draw", [noise.normal, noise.uniform])
@given(seed=SEEDS, dims=st.tuples(st.integers(1, 40), st.integers(1, 40)))
@settings(max_examples=60, deadline=None)
def test_a_longer_row_begins_with_the_shorter_one(draw: object, seed: int, dims: tuple[int, int]) -> None:
    """Drawing more dimensions changes none of the first ones."""
    function = noise.normal if draw is noise.normal else noise.uniform
    short, long = min(dims), max(dims)
    assert function(seed, 3, long)[:, :short].tobytes() == function(seed, 3, short).tobytes()


@given(
    draws=st.lists(st.tuples(SEEDS, FIRST_ROWS), min_size=1, max_size=20), dim=st.integers(1, 17), stream=STREAMS
)
@settings(max_examples=60, deadline=None)
def test_rows_of_many_seeds_are_drawn_at_once(draws: list[tuple[int, int]], dim: int, stream: Stream) -> None:
    """A mix of seeds and rows gives each row as its own seed gives it alone, bit for bit."""
    seeds, rows = (np.array(values, np.uint64) for values in zip(*draws, strict=True))
    mixed = noise.normal_at(seeds, rows, dim, stream=stream)
    for (own, row), drawn in zip(draws, mixed, strict=True):
        assert drawn.tobytes() == noise.normal(own, 1, dim, first_row=row, stream=stream).tobytes()


@given(
    draws=st.lists(st.tuples(SEEDS, FIRST_ROWS), min_size=1, max_size=20), dim=st.integers(1, 17), stream=STREAMS
)
@settings(max_examples=60, deadline=None)
def test_uniform_rows_of_many_seeds_are_drawn_at_once(
    draws: list[tuple[int, int]], dim: int, stream: Stream
) -> None:
    """The same holds for uniform noise: rows of any numbers, in any order, of any seeds."""
    seeds, rows = (np.array(values, np.uint64) for values in zip(*draws, strict=True))
    mixed = noise.uniform_at(seeds, rows, dim, stream=stream)
    assert mixed.shape == (len(draws), dim)
    assert mixed.dtype == np.float32
    for (own, row), drawn in zip(draws, mixed, strict=True):
        assert drawn.tobytes() == noise.uniform(own, 1, dim, first_row=row, stream=stream).tobytes()


def test_one_seed_serves_all_rows() -> None:
    """A single seed stands for that of every row."""
    rows = np.array([5, 2**63, 0, 5], np.uint64)
    for draw in (noise.normal_at, noise.uniform_at):
        one, each = (draw(np.full(number, 9, np.uint64), rows, 3) for number in (1, 4))
        assert one.tobytes() == each.tobytes()
        assert one[0].tobytes() == one[3].tobytes() != one[2].tobytes()


def test_streams_differ() -> None:
    """The same seed gives different noise for different purposes, in every pair of streams."""
    rows = {noise.normal(3, 1, 8, stream=stream).tobytes() for stream in Stream}
    assert len(rows) == len(Stream)


@pytest.mark.parametrize("other", [1, 2**31, 2**32, 2**63, noise.MAX_SEED])
def test_every_bit_of_the_seed_counts(other: int) -> None:
    """Seeds that differ in the low or the high word give different noise."""
    assert noise.normal(0, 4, 4).tobytes() != noise.normal(other, 4, 4).tobytes()


@pytest.mark.parametrize("row", [2**32 - 2, 2**32, 2**63, 2**63 + 5, 2**64 - 4])
def test_rows_far_out_are_drawn_like_the_first_ones(row: int) -> None:
    """Rows beyond 2^32 and 2^63 are finite, differ from the first rows, and keep their numbers."""
    far = noise.normal(0, 4, 4, first_row=row)
    assert np.isfinite(far).all()
    assert far.tobytes() != noise.normal(0, 4, 4).tobytes()
    assert far[2:].tobytes() == noise.normal(0, 2, 4, first_row=row + 2).tobytes()


def test_no_two_rows_are_equal(seed: int) -> None:
    """Rows of a long draw are all different."""
    rows = noise.normal(seed, 20_000, 2)
    assert len(np.unique(rows, axis=0)) == len(rows)


def test_normal_is_standard_normal(seed: int) -> None:
    """A Kolmogorov-Smirnov test against N(0, 1), the first two moments, and independence of neighbours hold."""
    rows = noise.normal(seed, 50_000, 4).astype(np.float64)
    assert stats.kstest(rows.ravel(), "norm").pvalue > P_VALUE
    five_sigma = 5 / np.sqrt(rows.size)
    assert abs(rows.mean()) < five_sigma
    assert abs(rows.var() - 1) < five_sigma * np.sqrt(2)  # the variance of a squared normal is two
    correlations = np.corrcoef(rows, rowvar=False) - np.eye(4)
    assert np.abs(correlations).max() < 5 / np.sqrt(len(rows))


def test_uniform_is_uniform(seed: int) -> None:
    """A Kolmogorov-Smirnov test against U(0, 1) holds, and so does the mean."""
    rows = noise.uniform(seed, 50_000, 4).astype(np.float64)
    assert stats.kstest(rows.ravel(), "uniform").pvalue > P_VALUE
    assert abs(rows.mean() - 0.5) < 5 / np.sqrt(12 * rows.size)


def test_uniform_stays_below_one(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest word maps below one, the smallest to zero: an intensity of one always gives one."""
    draws = noise.uniform(seed, 100_000, 4)
    assert draws.min() >= 0
    assert draws.max() < 1
    for word in (0, 0xFFFFFFFF):
        monkeypatch.setattr(
            noise, "philox", lambda counter, _key, w=word: [np.full((1, 1), w, np.uint64)] * len(counter)
        )
        draw = noise.uniform(0, 1, 4)
        assert (draw < 1).all()
        assert (draw >= 0).all()


@pytest.mark.parametrize("word", [0, 1, 0xFFFFFFFF])
def test_normal_is_finite_at_the_ends_of_the_words(word: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The logarithm is finite for the smallest and the largest word."""
    monkeypatch.setattr(noise, "philox", lambda counter, _key: [np.full((1, 1), word, np.uint64)] * len(counter))
    assert np.isfinite(noise.normal(0, 1, 4)).all()
