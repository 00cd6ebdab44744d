"""The two exact numbers beside an NLL are right: by enumeration, by drawing, and by the published values."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest

from training import data, pixel_bounds
from training.config import DataConfig
from training.data import Dataset, Pixels

EXACT = 1e-12
"""Relative: float64 sums of a few terms."""


def _images(*rows: list[int]) -> Pixels:
    return np.array(rows, np.uint8)


def _probability(bits: tuple[int, ...], ones: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> float:
    """Return the probability of binary pixels."""
    return math.prod(float(p) if bit else float(1 - p) for bit, p in zip(bits, ones, strict=True))


def test_both_equal_their_sums_over_all_binary_images() -> None:
    """Four pixels have sixteen binarisations: the expectation is a sum over them, image by image."""
    train = _images([0, 255, 51, 204], [0, 255, 102, 0], [0, 0, 255, 102])
    pixels = _images([0, 255, 153, 51], [102, 204, 0, 255])
    model = (train.astype(np.float64).sum(axis=0) / 255 + 0.5) / (3 + 1)
    nll, entropy = [], []
    for row in pixels.astype(np.float64) / 255:
        every = [bits for bits in itertools.product((0, 1), repeat=4) if _probability(bits, row) > 0]
        nll.append(-sum(_probability(bits, row) * math.log(_probability(bits, model)) for bits in every))
        entropy.append(-sum(_probability(bits, row) * math.log(_probability(bits, row)) for bits in every))
    measured = pixel_bounds.independent_pixels_nll(train, pixels)
    assert measured.value == pytest.approx(np.mean(nll), rel=EXACT)
    assert measured.standard_error == pytest.approx(np.std(nll, ddof=1) / math.sqrt(2), rel=EXACT)
    assert pixel_bounds.binarisation_entropy(pixels).value == pytest.approx(np.mean(entropy), rel=EXACT)


def test_independent_pixels_cost_what_binarised_digits_cost(digits: Dataset) -> None:
    """Binarised as an evaluation does it, 40 times, the mean NLL of the test split is the closed form.

    The mean over 40 binarisations of 250 images deviates by the deviation of the 40 means over their root.
    """
    ones = (digits.train.sum(axis=0, dtype=np.float64) / 255 + 0.5) / (len(digits.train) + 1)
    means = []
    for seed in range(40):
        bits = data.binarise_rows(digits.test, seed=seed).numpy()
        means.append(-(bits * np.log(ones) + (1 - bits) * np.log1p(-ones)).sum(axis=(1, 2, 3)).mean())
    expected = pixel_bounds.independent_pixels_nll(digits.train, digits.test).value
    assert np.mean(means) == pytest.approx(expected, abs=4 * np.std(means, ddof=1) / math.sqrt(40))


def test_images_do_not_depend_on_pieces(digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large sets are summed piece by piece, of training images and of those that are measured."""
    whole = pixel_bounds.independent_pixels_nll(digits.train, digits.test)
    monkeypatch.setattr(pixel_bounds, "_ROWS_AT_ONCE", 7)
    assert pixel_bounds.independent_pixels_nll(digits.train, digits.test) == pytest.approx(whole, rel=1e-12)


def test_nothing_is_below_the_entropy(digits: Dataset) -> None:
    """Gibbs: not even the mean image of the very images that are measured."""
    entropy = pixel_bounds.binarisation_entropy(digits.test)
    assert 0 < entropy.value < pixel_bounds.independent_pixels_nll(digits.test, digits.test).value


def test_black_and_white_have_no_entropy() -> None:
    """Nothing is drawn where pixels are certain."""
    assert pixel_bounds.binarisation_entropy(_images([0, 255], [255, 255])) == (0, 0)


def test_pixel_that_was_never_lit_costs_a_finite_amount() -> None:
    """The logarithm of one over the number of images, roughly, rather than infinity."""
    train, lit = np.zeros((999, 1), np.uint8), np.full((2, 1), 255, np.uint8)
    assert pixel_bounds.independent_pixels_nll(train, lit).value == pytest.approx(math.log(2000))


@pytest.mark.parametrize(
    ("name", "independent", "entropy"), [("mnist", 205.81, 45.53), ("fashion-mnist", 385.02, 189.86)]
)
def test_published_sets_have_the_known_values(
    name: str, independent: float, entropy: float, idx_folder: Path
) -> None:
    """Of the test split, to the two digits that are quoted."""
    if not (idx_folder / name).is_dir():
        pytest.skip(f"no {name} files in {idx_folder.name}; set VAE_DATA_DIR")
    config = DataConfig.parse({"name": name})
    images = data.load(config, data_dir=idx_folder, mirrors=[])
    assert round(pixel_bounds.independent_pixels_nll(images.train, images.test).value, 2) == independent
    assert round(pixel_bounds.binarisation_entropy(images.test).value, 2) == entropy
