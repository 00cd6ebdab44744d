"""p(x | z) on arrays: right against independent formulas, and a draw depends on seed, row and pixel alone."""

import itertools
import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import special, stats

from serving import likelihoods
from serving.bundle import Bundle, Manifest
from serving.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood

SIZE = 12
SHAPE = (1, 3, 4)
NUM_LEVELS = 5
ROUNDING = 2e-6
"""Relative to the sum of terms that float32 holds with seven digits."""


def _parameters(family: Likelihood, num_rows: int, seed: int) -> dict[str, NDArray[np.float32]]:
    """Return random outputs of a decoder for latents."""
    random = np.random.default_rng(seed)
    if isinstance(family, Categorical):
        return {"logits": (2 * random.standard_normal((num_rows, NUM_LEVELS, *SHAPE))).astype(np.float32)}
    logits = random.standard_normal((num_rows, *SHAPE)).astype(np.float32)
    values = {"logits": logits, "mean": special.expit(logits)}
    if isinstance(family, Gaussian):
        values["log_var"] = random.uniform(-5, -2, (num_rows, 1, 1, 1)).astype(np.float32)
    return values


def _pick(values: dict[str, NDArray[np.float32]], names: tuple[str, ...]) -> tuple[NDArray[np.float32], ...]:
    return tuple(values[name] for name in names)


FAMILIES: tuple[Likelihood, ...] = (Bernoulli(), Gaussian(), Categorical(NUM_LEVELS))
each_family = pytest.mark.parametrize("family", FAMILIES, ids=["bernoulli", "gaussian", "categorical"])


def test_bernoulli_log_prob_is_that_of_scipy(seed: int) -> None:
    """Zeros and ones have the probabilities of the means."""
    values = _parameters(FAMILIES[0], 6, seed)
    data = np.random.default_rng(seed).integers(0, 2, (3, 1, SIZE)).astype(np.float32)
    mean = special.expit(values["logits"].astype(np.float64)).reshape(3, 2, SIZE)
    expected = np.sum(stats.bernoulli.logpmf(data.astype(int), mean), axis=2)
    actual = FAMILIES[0].log_prob(data, (values["logits"],))
    np.testing.assert_allclose(actual, expected, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("per_pixel", [False, True])
def test_gaussian_log_prob_is_that_of_scipy(seed: int, *, per_pixel: bool) -> None:
    """The density of each pixel, with one variance for a row or one for each pixel."""
    values = _parameters(FAMILIES[1], 6, seed)
    log_var = values["log_var"] if not per_pixel else np.random.default_rng(1).uniform(-5, 0, (6, *SHAPE))
    data = np.random.default_rng(seed).random((3, 1, SIZE), np.float32)
    scale = np.exp(0.5 * np.broadcast_to(log_var, (6, *SHAPE)).astype(np.float64)).reshape(3, 2, SIZE)
    mean = values["mean"].reshape(3, 2, SIZE)
    expected = np.sum(stats.norm.logpdf(data.astype(np.float64), mean, scale), axis=2)
    actual = FAMILIES[1].log_prob(data, (values["mean"], log_var.astype(np.float32)))
    # The largest square is (1 / scale)^2 = exp(5), and float32 has its seven digits.
    np.testing.assert_allclose(actual, expected, rtol=ROUNDING, atol=SIZE * math.exp(5) * ROUNDING)
    at_mean = FAMILIES[1].log_prob(values["mean"].reshape(6, 1, SIZE), (values["mean"], values["log_var"]))
    assert at_mean.min() > 0  # a density, not a probability


def test_a_variance_for_a_row_and_for_each_of_its_pixels_are_the_same(seed: int) -> None:
    """What is broadcast may as well be spread out, for the density and for draws."""
    values = _parameters(FAMILIES[1], 6, seed)
    spread = np.ascontiguousarray(np.broadcast_to(values["log_var"], values["mean"].shape))
    data = np.random.default_rng(seed).random((3, 1, SIZE), np.float32)
    one, each = (FAMILIES[1].log_prob(data, (values["mean"], log_var)) for log_var in (values["log_var"], spread))
    np.testing.assert_allclose(one, each, rtol=1e-12)
    draws = [FAMILIES[1].draw((values["mean"], log_var), seed, (0, 6)) for log_var in (values["log_var"], spread)]
    assert draws[0].tobytes() == draws[1].tobytes()


def test_probabilities_of_all_levels_sum_to_one(seed: int) -> None:
    """It is a distribution over images whose pixels are on levels."""
    logits = np.random.default_rng(seed).standard_normal((1, 4, 3)).astype(np.float32)
    images = np.array(list(itertools.product(np.linspace(0, 1, 4), repeat=3)), np.float32)[:, None]
    family = Categorical(4)
    total = sum(math.exp(family.log_prob(image[None], (logits,))[0, 0]) for image in images)
    assert total == pytest.approx(1, abs=1e-6)


def test_categorical_log_prob_is_a_softmax(seed: int) -> None:
    """In float64, from the definition, with the levels that are nearest to the data."""
    logits = _parameters(FAMILIES[2], 6, seed)["logits"]
    data = np.random.default_rng(seed).random((3, 1, SIZE), np.float32)
    table = special.log_softmax(logits.astype(np.float64).reshape(3, 2, NUM_LEVELS, SIZE), axis=2)
    grid = np.linspace(0, 1, NUM_LEVELS)
    nearest = np.abs(data[:, 0, :, None].astype(np.float64) - grid).argmin(axis=2)
    expected = np.array(
        [[sum(table[n, k, nearest[n, j], j] for j in range(SIZE)) for k in range(2)] for n in range(3)]
    )
    np.testing.assert_allclose(FAMILIES[2].log_prob(data, (logits,)), expected, rtol=ROUNDING, atol=ROUNDING)


@each_family
def test_sure_decoders_give_finite_numbers(family: Likelihood) -> None:
    """Logits of +-200, and a variance at its usual lower bound: right or wrong, the logarithm is finite."""
    sign = np.where(np.arange(SIZE) % 2, 1.0, -1.0).reshape(1, *SHAPE)
    values = {"logits": 200 * sign, "mean": special.expit(200 * sign), "log_var": np.full((1, 1, 1, 1), -13.5)}
    if isinstance(family, Categorical):
        values["logits"] = 200 * sign[:, None] * np.linspace(-1, 1, NUM_LEVELS).reshape(1, -1, 1, 1, 1)
    parameters = tuple(values[name].astype(np.float32) for name in family.parameters)
    data = (sign > 0).astype(np.float32).reshape(1, 1, SIZE)
    right, wrong = family.log_prob(data, parameters), family.log_prob(1 - data, parameters)
    assert np.isfinite([right, wrong]).all()
    assert right > wrong + 1000
    drawn = family.draw(tuple(values[name].astype(np.float32) for name in family.draws_from), 1, (0, 1))
    np.testing.assert_allclose(drawn.ravel(), data.ravel(), atol=5 * math.exp(-13.5 / 2))


@each_family
@pytest.mark.parametrize("first_row", [0, 2**32 - 2, 2**63])
def test_a_draw_is_a_function_of_seed_row_and_parameters(family: Likelihood, seed: int, first_row: int) -> None:
    """Rows drawn apart, picked out, or by their numbers have the bytes that they have in one draw."""
    parameters = _pick(_parameters(family, 9, seed), family.draws_from)
    whole = family.draw(parameters, seed, (first_row, 9))
    assert (whole.shape, whole.dtype) == ((9, *SHAPE), np.dtype(np.float32))
    parts = [
        family.draw(tuple(values[start:stop] for values in parameters), seed, (first_row + start, stop - start))
        for start, stop in ((0, 1), (1, 6), (6, 9))
    ]
    assert b"".join(part.tobytes() for part in parts) == whole.tobytes()
    picked = np.array([8, 3, 3])
    rows = picked.astype(np.uint64) + np.uint64(first_row)
    by_number = family.draw(tuple(values[picked] for values in parameters), seed, rows)
    assert by_number.tobytes() == np.ascontiguousarray(whole[picked]).tobytes()
    assert family.draw(parameters, seed + 1, (first_row, 9)).tobytes() != whole.tobytes()
    assert ((whole >= 0) & (whole <= 1)).all()


NUM_DRAWS = 20_000


def _draws(family: Likelihood, parameters: tuple[NDArray[np.float32], ...], seed: int) -> NDArray[np.float32]:
    """Draw many rows of the same parameters; return them as (rows, pixels)."""
    many = tuple(np.repeat(values, NUM_DRAWS, axis=0) for values in parameters)
    return family.draw(many, seed, (0, NUM_DRAWS)).reshape(NUM_DRAWS, -1)


def test_gaussian_draws_are_normal_and_clipped(seed: int) -> None:
    """Far from the ends they have mean and variance of the density; at an end half of them are at it."""
    mean = np.array([0.0, 0.4, 0.6, 1.0], np.float32).reshape(1, 1, 2, 2)
    drawn = _draws(FAMILIES[1], (mean, np.full((1, 1, 1, 1), 2 * math.log(0.05), np.float32)), seed)
    five_sigma = 5 / math.sqrt(NUM_DRAWS)
    np.testing.assert_allclose(drawn[:, 1:3].mean(axis=0), [0.4, 0.6], atol=0.05 * five_sigma)
    np.testing.assert_allclose(drawn[:, 1:3].std(axis=0), 0.05, rtol=five_sigma / math.sqrt(2))
    for pixel, end in ((0, 0.0), (3, 1.0)):
        assert abs((drawn[:, pixel] == end).mean() - 0.5) < 0.5 * five_sigma
    assert drawn.min() == 0.0
    assert drawn.max() == 1.0


def test_categorical_draws_have_its_probabilities(seed: int) -> None:
    """Levels come as often as they should, five standard errors at most; an impossible one never comes."""
    logits = np.array([[0.0, 1.0, -300.0, -1.0, 0.5], [-300.0, -300.0, 2.0, 0.0, -300.0]], np.float32)
    drawn = _draws(FAMILIES[2], (np.ascontiguousarray(logits.T)[None],), seed)
    levels = np.rint(drawn * 4).astype(int)
    np.testing.assert_array_equal(drawn, levels.astype(np.float32) / np.float32(4))
    for pixel, probabilities in enumerate(special.softmax(logits, axis=1)):
        shares = np.bincount(levels[:, pixel], minlength=5) / NUM_DRAWS
        np.testing.assert_allclose(shares, probabilities, atol=2.5 / math.sqrt(NUM_DRAWS))
        assert set(levels[:, pixel]) == set(np.flatnonzero(probabilities > 1e-6))


def test_256_levels_are_the_255ths(seed: int) -> None:
    """A draw as uint8 is the number of its level, and scored it has the logarithm of that level's probability."""
    family, random = Categorical(256), np.random.default_rng(seed)
    logits = random.standard_normal((4, 256, 6)).astype(np.float32)
    drawn = family.draw((logits,), seed, (0, 4))
    pixels = np.rint(drawn * np.float32(255)).astype(np.uint8)
    np.testing.assert_array_equal(pixels.astype(np.float32) / np.float32(255), drawn)
    table = special.log_softmax(logits.astype(np.float64), axis=1)
    expected = [sum(table[row, pixels[row, j], j] for j in range(6)) for row in range(4)]
    np.testing.assert_allclose(family.log_prob(drawn[:, None], (logits,))[:, 0], expected, rtol=ROUNDING)


def test_bernoulli_draws_use_the_same_noise_as_ever(small: Bundle, seed: int) -> None:
    """Seeds that callers keep go on meaning the same images: uniform noise below the mean is a one."""
    from serving import noise  # noqa: PLC0415 - for this second computation alone

    mean = _parameters(FAMILIES[0], 5, seed)["mean"]
    expected = noise.uniform(seed, 5, SIZE, first_row=7).reshape(mean.shape) < mean
    drawn = likelihoods.of(small.manifest).draw((mean,), seed, (7, 5))
    np.testing.assert_array_equal(drawn, expected.astype(np.float32))


def test_a_manifest_decides_family_shapes_and_size(small: Bundle) -> None:
    """What a decoder must give follows from the manifest; only a Gaussian's variance may be broadcast."""

    def manifest(**changes: object) -> Manifest:
        return Manifest.parse(small.manifest.model_dump() | changes)

    assert isinstance(likelihoods.of(manifest()), Bernoulli)
    gaussian = manifest(likelihood="gaussian")
    categorical = manifest(likelihood="categorical", num_levels=7)
    assert isinstance(likelihoods.of(gaussian), Gaussian)
    assert isinstance(likelihoods.of(categorical), Categorical)
    assert likelihoods.row_shapes(manifest()) == {"mean": ((1, 4, 4),), "logits": ((1, 4, 4),)}
    assert likelihoods.row_shapes(gaussian)["log_var"] == ((1, 4, 4), (1, 1, 1))
    assert likelihoods.row_shapes(categorical)["logits"] == ((7, 1, 4, 4),)
    sizes = [likelihoods.num_parameters(each) for each in (manifest(), gaussian, categorical)]
    assert sizes == [16, 16, 7 * 16]
