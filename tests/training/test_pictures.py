"""Pictures show what the model answers, and equal pictures are equal files."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from serving import noise as service_noise
from training import pictures
from training.data import Dataset

from .conftest import SmokeRun


def _read(content: bytes) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.asarray(Image.open(io.BytesIO(content)))


def test_grid_places_images_row_by_row() -> None:
    """The second image is to the right of the first, the third below it."""
    images = torch.tensor([0.0, 0.5, 1.0]).view(3, 1, 1, 1).expand(3, 1, 60, 60)
    grid = _read(pictures.png(images, num_columns=2))
    assert grid.shape == (2 * 62 + 2, 2 * 62 + 2)
    assert (grid[30, 30], grid[30, 92], grid[92, 30]) == (0, 128, 255)


def test_small_images_are_enlarged_by_whole_pixels() -> None:
    """An 8x8 digit becomes 56 pixels high, without blur."""
    image = torch.zeros(1, 1, 8, 8)
    image[0, 0, 0, 0] = 1
    grid = _read(pictures.png(image))
    assert grid.shape == (60, 60)
    assert (grid[2:9, 2:9] == 255).all()
    assert (grid[9:58, 9:58] == 0).all()


def test_samples_decode_the_latents_of_the_service(smoke_run: SmokeRun, seed: int) -> None:
    """The picture of a seed is the picture of what Sample answers for it; temperature scales the latents."""
    vae = smoke_run.vae
    latents = torch.from_numpy(service_noise.normal(seed, 3, vae.latent_dim))
    for temperature in (1.0, 0.5):
        expected = torch.sigmoid(vae.decoder(temperature * latents))
        actual = pictures.prior_samples(vae, 3, seed=seed, temperature=temperature)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


def test_equal_pictures_are_equal_files(smoke_run: SmokeRun) -> None:
    """A bundle can be exported twice to the same bytes."""
    first, second = (pictures.png(pictures.prior_samples(smoke_run.vae, 9, seed=1)) for _ in range(2))
    assert first == second


def test_reconstructions_stand_below_their_images(smoke_run: SmokeRun, digits: Dataset) -> None:
    """The first half is the data itself, the second its decoded posterior mean."""
    pairs = pictures.reconstructions(smoke_run.vae, digits.test[:4])
    assert pairs.shape == (2, 4, 1, 8, 8)
    np.testing.assert_allclose(pairs[0].numpy() * 255, digits.test[:4], atol=1e-4)
    assert 0 <= pairs[1].min().item() <= pairs[1].max().item() <= 1
    assert (pairs[1] - pairs[0]).abs().mean().item() == pytest.approx(0.2, abs=0.15)
