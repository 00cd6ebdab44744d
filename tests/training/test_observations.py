"""What pixels become depends on the likelihood, and where it is drawn, on the seed and the row alone."""

import numpy as np
import pytest
import torch

from training.config import ModelConfig
from training.data import Dataset, binarise, binarise_rows
from training.likelihoods import level_of
from training.observations import described, marginals, observed, observed_rows

BERNOULLI = ModelConfig()
GAUSSIAN = ModelConfig(likelihood="gaussian")
CATEGORICAL = ModelConfig(likelihood="categorical", num_levels=17)


def test_bernoulli_pixels_are_binarised(digits: Dataset, seed: int) -> None:
    """They are what `training.data` binarises, from the same generator and the same rows."""
    pixels = torch.from_numpy(digits.test[:9])
    sources = [torch.Generator().manual_seed(seed) for _ in range(2)]
    assert torch.equal(observed(BERNOULLI, pixels, sources[0]), binarise(pixels, sources[1]))
    expected = binarise_rows(digits.test[4:9], seed=seed, first_row=4)
    assert torch.equal(observed_rows(BERNOULLI, digits.test[4:9], seed=seed, first_row=4), expected)


@pytest.mark.parametrize("model", [GAUSSIAN, CATEGORICAL])
def test_other_data_are_not_drawn(model: ModelConfig, digits: Dataset, seed: int) -> None:
    """No generator and no seed changes intensities; rows to train on are rows to measure on."""
    pixels, source = torch.from_numpy(digits.test), torch.Generator().manual_seed(seed)
    before = source.get_state()
    data = observed(model, pixels, source)
    assert torch.equal(source.get_state(), before)
    assert torch.equal(observed_rows(model, digits.test, seed=seed), data)
    assert torch.equal(observed_rows(model, digits.test[3:5], seed=seed + 1, first_row=3), data[3:5])
    assert (data.dtype, data.shape) == (torch.float32, pixels.shape)


def test_gaussian_data_are_intensities() -> None:
    """Every pixel value is its 255th, exactly as float32 has it."""
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    expected = torch.arange(256).view(1, 1, 16, 16) / 255
    assert torch.equal(observed_rows(GAUSSIAN, pixels, seed=0), expected)


def test_categorical_data_are_on_levels(digits: Dataset) -> None:
    """The digits have seventeen intensities: none is lost, none is moved by more than the rounding to 255ths."""
    data = observed_rows(CATEGORICAL, digits.test, seed=0)
    assert len(set(data.flatten().tolist())) == 17
    assert (data - torch.from_numpy(digits.test) / 255).abs().max() <= 0.5 / 255 + 1e-6
    assert torch.equal(level_of(data, 17) / 16, data)


def test_marginals_are_means_variance_and_frequencies(digits: Dataset) -> None:
    """Each is computed a second time in a plain way."""
    pixels = digits.train
    unit = pixels.astype(np.float64) / 255
    for model in (BERNOULLI, GAUSSIAN):
        np.testing.assert_allclose(marginals(model, pixels).probabilities, unit.mean(axis=0), rtol=1e-6)
    assert marginals(BERNOULLI, pixels).log_var is None
    expected = np.log(unit.var(axis=0).mean())
    assert marginals(GAUSSIAN, pixels).log_var == pytest.approx(expected, rel=1e-9)
    levels = np.rint(unit * 16)
    frequencies = np.stack([(levels == level).mean(axis=0) for level in range(17)])
    np.testing.assert_allclose(marginals(CATEGORICAL, pixels).probabilities, frequencies, rtol=1e-6)


def test_marginals_of_constant_pixels_are_finite() -> None:
    """Images that are all the same have no variance, and whoever starts there is told a finite logarithm."""
    log_var = marginals(GAUSSIAN, np.full((3, 1, 2, 2), 7, np.uint8)).log_var
    assert log_var is not None
    assert np.isfinite(log_var)


def test_words_say_what_was_done() -> None:
    """A figure's conditions name the binarisation, or that there is none, and units or levels."""
    assert "one with probability pixel / 255" in described(BERNOULLI)
    assert described(GAUSSIAN).startswith("none: ")
    assert "density over [0, 1]^d" in described(GAUSSIAN)
    assert "17 equally spaced intensities" in described(CATEGORICAL)
