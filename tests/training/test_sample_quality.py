"""Samples are judged beside references, all alike; on digits the judgement is the one that theory gives.

The claims are those about an autoencoder and a VAE of the same networks, the same data and number of steps.
"""

import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch

from training import data, objectives, sample_quality
from training.coders import Coder, intensities
from training.config import DataConfig, ModelConfig
from training.data import Dataset, SplitLabels
from training.models.autoencoder import Autoencoder
from training.models.vae import VAE
from training.sample_quality import Geometry, ImageSet, Quality, independent_pixels

CONFIG = ModelConfig(latent_dim=8, hidden_dims=(128,))
NUM_STEPS = 1000
BATCH_SIZE = 128


@pytest.fixture(scope="module")
def coders(digits: Dataset) -> Mapping[str, Coder]:
    """Return an autoencoder and a VAE of the digits."""
    train = intensities(digits.train)
    autoencoder = Autoencoder(CONFIG, (1, 8, 8), torch.Generator().manual_seed(0))
    autoencoder.fit(train, torch.Generator().manual_seed(1), num_steps=NUM_STEPS, batch_size=BATCH_SIZE)
    vae, source = VAE(CONFIG, (1, 8, 8), torch.Generator().manual_seed(0)), torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-3)
    for _ in range(NUM_STEPS):
        grey = train[torch.randint(len(train), (BATCH_SIZE,), generator=source)]
        noise = torch.randn((BATCH_SIZE, CONFIG.latent_dim), generator=source)
        binary = torch.bernoulli(grey, generator=source)
        optimizer.zero_grad()
        torch.autograd.backward(-objectives.elbo(vae, binary, noise).value.mean())
        optimizer.step()
    return {"VAE": Coder.of(vae), "autoencoder": Coder.of(autoencoder)}


@pytest.fixture(scope="module")
def labels() -> SplitLabels:
    """Return the classes of the digits."""
    return data.load_labels(DataConfig(name="digits"))


@pytest.fixture(scope="module")
def quality(coders: Mapping[str, Coder], digits: Dataset, labels: SplitLabels) -> Quality:
    """Return what expected images of the two are worth."""
    return sample_quality.measure(coders, digits, labels)


@pytest.fixture(scope="module")
def geometry(coders: Mapping[str, Coder], digits: Dataset, labels: SplitLabels) -> tuple[Geometry, ...]:
    """Return what lies around the codes of the two."""
    return sample_quality.measure_geometry(coders, digits, labels)


def _named(quality: Quality) -> dict[str, ImageSet]:
    return {found.name: found for found in (*quality.references, *quality.samples)}


def test_samples_of_a_vae_are_images_and_those_of_an_autoencoder_are_not(quality: Quality) -> None:
    """Under N(0, I) the VAE is between images and independent pixels, the autoencoder beyond the latter.

    A Gaussian fitted to its codes makes the autoencoder a sampler; and it reconstructs better, for nothing else
    was asked of it.
    """
    found = _named(quality)
    held_out, independent = found["held-out images"].frechet, found["independent pixels"].frechet
    vae, autoencoder = found["VAE, N(0, I)"].frechet, found["autoencoder, N(0, I)"].frechet
    assert held_out < vae < independent < autoencoder
    assert found["autoencoder, Gaussian fitted to its codes"].frechet < vae
    assert quality.reconstruction_errors["autoencoder"] < quality.reconstruction_errors["VAE"]


def test_references_are_in_order(quality: Quality) -> None:
    """Two halves of the training images are about the predicted bias apart; a linear model is worse."""
    found = _named(quality)
    halves = found["training images, the other half"].frechet
    # Features of images have heavier tails than the Gaussian of the prediction, and fewer effective dimensions.
    assert halves == pytest.approx(quality.bias, rel=0.5)
    linear = found["probabilistic PCA, 8 latent dimensions"].frechet
    assert halves < linear < found["independent pixels"].frechet


def test_classifier_tells_images_from_noise(quality: Quality) -> None:
    """Images are of a clear class and of all classes; samples lie between them and independent pixels."""
    found = _named(quality)
    assert (quality.held_out_accuracy or 0) > 0.95
    scores = [found[name].inception_score for name in ("held-out images", "VAE, N(0, I)", "independent pixels")]
    assert all(score is not None for score in scores)
    assert scores == sorted(scores, key=lambda score: -(score or 0))
    images = found["held-out images"]
    assert images.diversity == pytest.approx(math.log(10), abs=0.02)
    assert 1 < (images.inception_score or 0) <= 10
    assert (images.confidence or 0) > max(found["VAE, N(0, I)"].confidence or 0, 0.9)


def test_conditions_are_stated(quality: Quality) -> None:
    """500 held-out digits are the smallest set, so every set has 500; features and their number are named."""
    assert (quality.kind, quality.num_samples, quality.num_components, quality.seed) == ("means", 500, 61, 0)
    assert quality.features == (
        "61 principal components of the training images, not whitened, 100.0% of the variance"
    )
    assert Quality.model_validate_json(quality.model_dump_json()) == quality


def test_draws_are_compared_with_binarised_images(
    coders: Mapping[str, Coder], digits: Dataset, labels: SplitLabels, quality: Quality
) -> None:
    """A VAE is a model of binary images: its draws are closer to those than its expectations are to grey ones.

    Relative to independent pixels, which have the right pixels in both kinds.
    """
    draws = sample_quality.measure(coders, digits, labels, kind="draws")

    def relative(of: Quality) -> float:
        found = _named(of)
        return found["VAE, N(0, I)"].frechet / found["independent pixels"].frechet

    assert draws.kind == "draws"
    assert relative(draws) < relative(quality)
    assert draws.reconstruction_errors == quality.reconstruction_errors


def test_measurement_repeats_and_needs_no_labels(coders: Mapping[str, Coder], digits: Dataset) -> None:
    """The same seed gives the same numbers; no labels, no word of classes; fewer samples on request."""
    first, second = (sample_quality.measure(coders, digits, None, num_samples=40, seed=3) for _ in range(2))
    assert first == second
    assert (first.num_samples, first.held_out_accuracy) == (40, None)
    assert all(found.confidence is None for found in _named(first).values())
    other = sample_quality.measure(coders, digits, None, num_samples=40, seed=4)
    assert other.samples[0].frechet != first.samples[0].frechet


def test_few_images_of_few_pixels_are_measured(coders: Mapping[str, Coder], digits: Dataset) -> None:
    """Where images vary in one direction only there is no linear model of them, and still an answer."""
    line = np.arange(12, dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 8), np.uint8)
    few = digits._replace(train=line, validation=line[:2], test=line[2:6])
    measured = sample_quality.measure(coders, few, None, num_components=None)
    assert (measured.num_samples, measured.num_components) == (6, 1)
    assert not any("PCA" in found.name for found in measured.references)


def test_independent_pixels_know_nothing_of_each_other(source: torch.Generator) -> None:
    """Each pixel keeps its own distribution, and correlations vanish; binary images stay binary.

    Of 40,000 samples a mean of a binary pixel deviates by 0.0025, a correlation by 0.005; five of each is allowed.
    """
    first = torch.bernoulli(torch.full((5000, 1), 0.3), generator=source)
    images = torch.cat((first, first, 1 - first, torch.zeros(5000, 1)), dim=1).view(5000, 1, 2, 2)
    mixed = independent_pixels(images, 40_000, source)
    assert mixed.shape == (40_000, 1, 2, 2)
    assert set(mixed.flatten().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(mixed.mean(dim=0), images.mean(dim=0), rtol=0, atol=0.0125)
    assert mixed.flatten(start_dim=1)[:, :3].T.corrcoef().triu(diagonal=1).abs().max() < 0.025


def test_smoothness_falls_with_distance(geometry: tuple[Geometry, ...]) -> None:
    """Of both models: most codes keep their class after a small move, few after a large one."""
    for found in geometry:
        shares = list(found.smoothness.values())
        assert shares == sorted(shares, reverse=True)
        assert list(found.smoothness) == ["0.25", "0.5", "0.75", "1", "1.5", "2"]
        assert shares[0] > 0.85
        assert shares[-1] < 0.5
        assert all(0 < error < 0.05 for error in found.smoothness_standard_error.values())


def test_paths_and_neighbours_are_measured_for_both(geometry: tuple[Geometry, ...]) -> None:
    """No path jumps, ten steps cover the way; neighbours know the class in both: that is no smoothness."""
    assert [found.model for found in geometry] == ["VAE", "autoencoder"]
    for found in geometry:
        assert 0.1 < found.largest_step["linear"] < 0.3
        assert 0.1 < found.largest_step["spherical"] < 0.4
        assert found.neighbour_accuracy > 0.9
        assert Geometry.model_validate_json(found.model_dump_json()) == found
