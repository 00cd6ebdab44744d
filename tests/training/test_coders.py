"""Autoencoder and VAE answer through one interface, without chance and whatever the number of rows."""

import numpy as np
import pytest
import torch

from training.coders import Coder, intensities
from training.config import ModelConfig
from training.models.autoencoder import Autoencoder
from training.models.vae import VAE

CONFIG = ModelConfig(latent_dim=3, hidden_dims=(7,))

SINGLE = 1e-6
"""A few roundings of float32 at one: a matrix product may round otherwise for another number of rows."""


@pytest.fixture(params=[VAE, Autoencoder])
def model(request: pytest.FixtureRequest, source: torch.Generator) -> VAE | Autoencoder:
    """Return a model of either kind, untrained."""
    made: VAE | Autoencoder = request.param(CONFIG, (1, 4, 4), source)
    return made


def test_codes_and_images_are_those_of_the_model(model: VAE | Autoencoder, source: torch.Generator) -> None:
    """The code of a VAE is the posterior mean, its image the mean of p(x given z); no gradient is kept."""
    data, coder = torch.rand(5, 1, 4, 4, generator=source), Coder.of(model)
    codes, images = coder.encode(data), coder.reconstruct(data)
    if isinstance(model, VAE):
        expected = model.posterior(data).mean
        torch.testing.assert_close(images, model.likelihood(expected).mean)
    else:
        expected = model.encode(data)
        torch.testing.assert_close(images, model.reconstruct(data))
    torch.testing.assert_close(codes, expected)
    assert not codes.requires_grad
    assert not images.requires_grad
    assert (codes.shape, images.shape, coder.latent_dim) == ((5, 3), data.shape, 3)


def test_many_rows_are_taken_in_pieces(model: VAE | Autoencoder, source: torch.Generator) -> None:
    """A row has the same code among thousands as alone, and nothing is drawn."""
    data, coder = torch.rand(4500, 1, 4, 4, generator=source), Coder.of(model)
    codes = coder.encode(data)
    assert torch.equal(coder.encode(data), codes)
    torch.testing.assert_close(coder.encode(data[4400:4401]), codes[4400:4401], rtol=0, atol=SINGLE)


def test_intensities_are_255ths() -> None:
    """Black is zero, white is one, and read-only pixels are fine."""
    pixels = np.frombuffer(bytes([0, 51, 255]), np.uint8)
    assert intensities(pixels).tolist() == pytest.approx([0, 0.2, 1])
