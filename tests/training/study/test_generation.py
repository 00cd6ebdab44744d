"""Rows 5 and 26: every check passes on trained models, and fails for what is no distribution or no sampler."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.training.study.sections import assert_shown
from training.coders import Coder
from training.models.autoencoder import Autoencoder
from training.models.vae import VAE
from training.study import generation
from training.study.claims import Section
from training.study.pixel_chain import PixelChain
from training.study.setup import Study

pytestmark = pytest.mark.slow


def failed(section: Section) -> list[str]:
    """Return the names of the checks that do not hold."""
    return [check.name for check in section.checks if not check.passed]


def test_generative_or_latent(image_study: Study) -> None:
    """A chain of pixels generates without latents; an autoencoder has latents and does not generate."""
    assert_shown(generation.generative_or_latent(image_study), 5)


def test_samples(image_study: Study) -> None:
    """Draws from the prior are near images, by two judges."""
    assert_shown(generation.samples(image_study), 26)


def test_what_is_no_distribution_is_found(image_study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """Probabilities that are raised to a power do not sum to one, and do not fit the samples."""
    log_prob = PixelChain.log_prob
    monkeypatch.setattr(PixelChain, "log_prob", lambda chain, data: 0.5 * log_prob(chain, data))
    assert len(failed(generation.generative_or_latent(image_study))) == 2


def test_a_decoder_that_ignores_its_latents_is_found(image_study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean image, whatever the latents are, is far from images and of no class."""
    monkeypatch.setattr(generation, "Coder", Forgetful)
    names = failed(generation.samples(image_study))
    assert len(names) == 2
    assert "Frechet distance" in names[0]
    assert "inception score" in names[1]


class Forgetful(Coder):
    """Decodes everything to the mean of what it would decode."""

    @classmethod
    def of(cls, model: VAE | Autoencoder) -> Coder:
        """Return the two halves of a model, the second one forgetful."""
        coder = Coder.of(model)

        def decode(codes: Tensor) -> Tensor:
            images = coder.decoder(codes)
            return torch.ones_like(images) * images.mean(dim=0)

        return replace(coder, decoder=decode)
