"""Which models of images the study trains, and that each is trained once."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from training import presets
from training.coders import intensities
from training.config import TrainingConfig
from training.study import image_models
from training.study.setup import Study

PIXELS = 64
"""Of an 8x8 digit."""


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """Return a quick study in an empty folder."""
    return Study(tmp_path)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> TrainingConfig:
    """Let the measured model be one of a second."""
    config = presets.smoke()
    monkeypatch.setattr(image_models, "main_config", lambda _: config)
    return config


def configs(study: Study) -> list[TrainingConfig]:
    """Return all configurations of a study."""
    main = (image_models.main_config(study), image_models.plane_config(study))
    others = (image_models.history_config(study), image_models.collapsed_config(study))
    second = image_models.second_config(study)
    return [*main, *others, *([] if second is None else [second])]


def test_every_model_has_a_folder_of_its_own(study: Study) -> None:
    """A quick and a full study may share a folder, too: no two runs have one name."""
    names = [config.name for of in (study, replace(study, is_full=True)) for config in configs(of)]
    assert len(set(names)) == len(names) == 9


def test_variants_are_the_measured_model_but_for_what_they_vary(study: Study) -> None:
    """Two latents in the plane, a heavy KL term in the collapsed one; the data are the same."""
    main = image_models.main_config(study)
    assert main.model.latent_dim > 2
    assert image_models.plane_config(study).model == main.model.override(["latent_dim=2"])
    assert image_models.collapsed_config(study).model == main.model
    assert image_models.collapsed_config(study).optimizer.beta == image_models.COLLAPSING_BETA
    assert {config.data for config in configs(study)} == {main.data}


def test_the_full_study_is_on_mnist_and_fashion_mnist(study: Study) -> None:
    """The presets as they are, so that recorded results compare."""
    full = replace(study, is_full=True)
    assert image_models.main_config(full) == presets.mnist_mlp()
    assert image_models.second_config(full) == presets.fashion_mlp()
    assert image_models.second_config(study) is None


def test_the_seed_of_the_study_is_that_of_its_models(study: Study) -> None:
    """Another seed trains other models."""
    seeds = {config.seed for config in configs(replace(study, seed=7))}
    assert seeds == {7}


def test_an_autoencoder_is_fitted_once(study: Study, tiny: TrainingConfig) -> None:
    """The second asking returns the same weights and fits nothing; another configuration fits anew."""
    said: list[str] = []
    first = image_models.autoencoder(replace(study, say=said.append), tiny)
    assert len(said) == 1
    again = image_models.autoencoder(replace(study, say=lambda line: pytest.fail(f"fitted again: {line}")), tiny)
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name])
    image_models.autoencoder(replace(study, say=said.append), tiny.override(["model.latent_dim=3"]))
    assert len(said) == 2


def test_the_autoencoder_is_frozen_and_has_learnt(study: Study, tiny: TrainingConfig) -> None:
    """It reconstructs better than the mean image, and nothing of it asks for a gradient."""
    config = tiny.override(["optimizer.epochs=20"])
    model = image_models.autoencoder(study, config)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    images = intensities(study.dataset(config).test)
    error = (model.reconstruct(images) - images).square().mean()
    assert error < 0.8 * images.var(dim=0, correction=0).mean()


@pytest.mark.usefixtures("tiny")
def test_history_begins_before_training_and_goes_by_powers_of_two(study: Study) -> None:
    """Each snapshot is another model; asked again, the same ones are read."""
    snapshots = image_models.history(study)
    assert [snapshot.epoch for snapshot in snapshots] == [0, 4, 8, 16, 32, 64]
    heads = [snapshot.vae.decoder.head.weight for snapshot in snapshots]
    assert all(not torch.equal(one, other) for one, other in pairwise(heads))
    again = image_models.history(replace(study, say=lambda line: pytest.fail(f"fitted again: {line}")))
    assert all(torch.equal(one, new.vae.decoder.head.weight) for one, new in zip(heads, again, strict=True))


def test_binary_images_are_the_same_each_time(study: Study) -> None:
    """Zeros and ones that depend on the place of an image alone."""
    pixels = study.dataset(image_models.main_config(study)).test
    data = image_models.binary(pixels)
    assert bool(((data == 0) | (data == 1)).all())
    assert torch.equal(image_models.binary(pixels[:10]), data[:10])
    # Of 250 x 64 pixels the share of ones is the mean brightness: four standard errors of 0.004 at most.
    assert float(data.mean()) == pytest.approx(pixels.mean() / 255, abs=0.016)


def test_parameters_are_counted() -> None:
    """Weights and biases of a layer."""
    assert image_models.num_parameters(torch.nn.Linear(PIXELS, 3)) == 3 * PIXELS + 3
