"""Rows 27 and 28: every check passes on trained models, and fails where the two models are exchanged."""

from collections.abc import Mapping

import pytest
from torch import Tensor

from tests.training.study.sections import assert_shown
from training import latent_geometry, sample_quality
from training.coders import Coder
from training.sample_quality import Geometry
from training.study import autoencoders
from training.study.claims import Section
from training.study.setup import Study, Trained

pytestmark = pytest.mark.slow


def failed(section: Section) -> list[str]:
    """Return the names of the checks that do not hold."""
    return [check.name for check in section.checks if not check.passed]


@pytest.fixture
def exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give each model the name of the other."""
    coders = autoencoders._coders  # noqa: SLF001 - the one place where names are given

    def swapped(study: Study, trained: Trained) -> dict[str, Coder]:
        right = coders(study, trained)
        return dict(zip(right, reversed(right.values()), strict=True))

    monkeypatch.setattr(autoencoders, "_coders", swapped)


def test_what_each_can_generate(image_study: Study) -> None:
    """The VAE from N(0, I), the autoencoder from a Gaussian fitted to its codes."""
    assert_shown(autoencoders.autoencoder_against_vae(image_study), 27)


def test_smoothness(image_study: Study) -> None:
    """The VAE leads in two dimensions."""
    assert_shown(autoencoders.smoothness(image_study), 27)


def test_codes_in_the_plane(image_study: Study) -> None:
    """Distributions around zero, and points anywhere."""
    assert_shown(autoencoders.codes_in_the_plane(image_study), 27, 26)


def test_interpolation(image_study: Study) -> None:
    """Gradual, with ends that are the reconstructions."""
    assert_shown(autoencoders.interpolation(image_study), 28)


@pytest.mark.usefixtures("exchanged")
def test_exchanged_models_are_found(image_study: Study) -> None:
    """An autoencoder under the name of the VAE samples worse, reconstructs better, jumps, and spreads."""
    assert len(failed(autoencoders.autoencoder_against_vae(image_study))) == 4
    assert len(failed(autoencoders.smoothness(image_study))) == 2
    assert len(failed(autoencoders.codes_in_the_plane(image_study))) == 1


def test_ends_that_are_only_nearly_right_are_found(image_study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path whose ends are off by a little is not bit for bit the reconstructions."""
    exact = latent_geometry.interpolate_codes

    def moved(start: Tensor, end: Tensor, num_steps: int, path: latent_geometry.Path) -> Tensor:
        return exact(start, end, num_steps, path) + 1e-4

    monkeypatch.setattr(latent_geometry, "interpolate_codes", moved)
    assert failed(autoencoders.interpolation(image_study)) == [
        "both ends of every path equal the reconstructions, bit for bit"
    ]


@pytest.mark.parametrize("share", [0.1, 0.9])
def test_the_words_follow_the_numbers(image_study: Study, monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    """Where the VAE does not lead, the text says so and why; where it leads, it does not."""

    def measured(coders: Mapping[str, Coder], *_: object, **__: object) -> tuple[Geometry, ...]:
        shares = dict(zip(coders, (share, 0.5), strict=True))
        return tuple(geometry(name, shares[name]) for name in coders)

    monkeypatch.setattr(sample_quality, "measure_geometry", measured)
    blocks = autoencoders.smoothness(image_study).blocks
    text = " ".join(block for block in blocks if isinstance(block, str))
    assert ("does not lead everywhere" in text) == (share < 0.5)


def geometry(model: str, share: float) -> Geometry:
    """Return what a model would have that keeps such a share of classes at every distance."""
    shares = {f"{tau:g}": share for tau in latent_geometry.TAUS}
    return Geometry(
        model=model,
        smoothness=shares,
        smoothness_standard_error=dict.fromkeys(shares, 0.01),
        largest_step={"linear": 0.2, "spherical": 0.2},
        neighbour_accuracy=0.9,
    )
