"""Paths are those of the service and end where they must; smoothness has a closed form; neighbours vote."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from serving.gateway.operations import interpolate_latents
from training.coders import Coder
from training.config import ModelConfig
from training.latent_geometry import (
    CodeGaussian,
    Path,
    interpolate,
    interpolate_codes,
    largest_steps,
    neighbour_accuracy,
    smoothness,
)
from training.models.autoencoder import Autoencoder
from training.models.vae import VAE

PATHS: list[Path] = ["linear", "spherical"]

CPU = torch.device("cpu")


def _ends(source: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return pairs of every kind: general, equal, parallel, opposite, with a zero, nearly parallel."""
    start = torch.randn(7, 5, generator=source)
    end = torch.randn(7, 5, generator=source)
    end[1] = start[1]
    end[2] = 3 * start[2]
    end[3] = -start[3]
    end[4] = 0
    end[5] = start[5] + 1e-5 * end[5]
    end[6] = start[6] + 1e-3 * end[6]
    return start, end


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("num_steps", [2, 3, 11])
def test_points_are_those_of_the_service(path: Path, num_steps: int, source: torch.Generator) -> None:
    """A figure shows what the service answers, also where an arc becomes a line; last digit of float32 aside."""
    start, end = _ends(source)
    points = interpolate_codes(start, end, num_steps, path)
    expected = interpolate_latents(start.numpy(), end.numpy(), num_steps, path)
    np.testing.assert_allclose(points.numpy(), expected, rtol=1.2e-7, atol=1e-12)
    assert torch.equal(points[:, 0], start)
    assert torch.equal(points[:, -1], end)


def test_arc_keeps_the_length_and_the_speed(source: torch.Generator) -> None:
    """Between codes of one length all points have it, and neighbours are at one angle."""
    start, end = (torch.nn.functional.normalize(torch.randn(4, 6, generator=source)) for _ in range(2))
    points = interpolate_codes(start, end, 9, "spherical")
    torch.testing.assert_close(points.norm(dim=-1), torch.ones(4, 9))
    cosines = (points[:, 1:] * points[:, :-1]).sum(dim=-1)
    torch.testing.assert_close(cosines, cosines[:, :1].expand(-1, 8), rtol=0, atol=1e-6)


def test_points_of_a_line_are_equidistant(source: torch.Generator) -> None:
    """Differences between neighbours are all the same."""
    start, end = torch.randn(2, 3, 4, generator=source)
    steps = interpolate_codes(start, end, 6, "linear").diff(dim=1)
    torch.testing.assert_close(steps, ((end - start) / 5).unsqueeze(1).expand(-1, 5, -1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", [VAE, Autoencoder])
def test_ends_are_the_reconstructions_bit_for_bit(
    path: Path, kind: type[VAE | Autoencoder], source: torch.Generator
) -> None:
    """What is shown at the ends of a path is exactly what is shown as reconstruction."""
    coder = Coder.of(kind(ModelConfig(latent_dim=3, hidden_dims=(7,)), (1, 4, 4), source))
    start, end = torch.rand(2, 5, 1, 4, 4, generator=source)
    decoded = interpolate(coder, start, end, num_steps=4, path=path)
    assert decoded.images.shape == (5, 4, 1, 4, 4)
    assert torch.equal(decoded.images[:, 0], coder.reconstruct(start))
    assert torch.equal(decoded.images[:, -1], coder.reconstruct(end))
    assert torch.equal(decoded.images[:, 1], coder.decode(decoded.codes[:, 1]))


def test_bad_ends_are_refused() -> None:
    """The error says what is wrong with the path."""
    with pytest.raises(ValueError, match=r"shapes \(1, 2\) and \(2, 2\)"):
        interpolate_codes(torch.zeros(1, 2), torch.zeros(2, 2), 3, "linear")
    with pytest.raises(ValueError, match="at least 2, got 1"):
        interpolate_codes(torch.zeros(1, 2), torch.zeros(1, 2), 1, "linear")


def test_largest_step_tells_a_walk_from_a_jump() -> None:
    """Even steps have the smallest possible value, one jump has 1, a detour more; equal ends have none."""
    even, jump = torch.linspace(0, 1, 6), torch.tensor([0.0, 0, 0, 1, 1, 1])
    detour, still = torch.tensor([0.0, 3, 1, 1, 1, 1]), torch.zeros(6)
    images = torch.stack((even, jump, detour, still))[..., None, None]
    sizes = largest_steps(images)
    torch.testing.assert_close(sizes[:3], torch.tensor([0.2, 1.0, 3.0]))
    assert sizes[3].isnan()


def _threshold_model() -> Coder:
    """Return a model of one latent whose image is the code itself."""
    return Coder(lambda data: data, lambda codes: codes, 1, CPU)


def test_smoothness_has_its_closed_form() -> None:
    """Two classes divided at zero: a code mu keeps its side with probability Phi(|mu| / (tau s)).

    20,000 codes and 3 seeds; the share deviates by its standard error, of which four are allowed.
    """
    mu, deviation = 0.7, 1.9
    codes = torch.full((20_000, 1), mu)
    deviations = torch.tensor([deviation])
    measured = smoothness(
        _threshold_model(), lambda images: images[:, 0] > 0, codes, deviations, taus=(0.25, 1.0, 2.0)
    )
    for item in measured:
        expected = 0.5 * (1 + math.erf(mu / (item.tau * deviation) / math.sqrt(2)))
        assert item.share == pytest.approx(expected, abs=4 * item.standard_error)
        # Of a mean over images; the three seeds of an image are independent here.
        exact = math.sqrt(expected * (1 - expected) / 60_000)
        assert item.standard_error == pytest.approx(exact, rel=0.05)


def test_unmoved_codes_keep_their_class(source: torch.Generator) -> None:
    """At no distance, and along dimensions that never vary, nothing changes; the seeds decide the directions."""
    coder, codes = _threshold_model(), torch.randn(50, 1, generator=source)

    def share(deviation: float, tau: float, seeds: tuple[int, ...]) -> float:
        deviations = torch.tensor([deviation])
        (item,) = smoothness(coder, lambda images: images[:, 0] > 0, codes, deviations, taus=(tau,), seeds=seeds)
        return item.share

    assert share(1.0, 0.0, (0, 1)) == share(0.0, 2.0, (0, 1)) == 1
    assert share(1.0, 2.0, (0,)) == share(1.0, 2.0, (0,))
    assert share(1.0, 2.0, (0,)) != share(1.0, 2.0, (5,))


def test_neighbours_of_separate_clusters_vote_right(source: torch.Generator) -> None:
    """Far clusters are told apart always; codes that know nothing of the class as often as by chance.

    Of 1000 votes between two classes a share deviates from one half by 0.016; five of that are allowed.
    """
    labels = torch.arange(2000) % 2
    noise = torch.randn(2000, 3, generator=source)
    apart = noise + 20 * labels.unsqueeze(1)
    assert neighbour_accuracy(apart[:1000], labels[:1000], apart[1000:], labels[1000:]) == 1
    chance = neighbour_accuracy(noise[:1000], labels[:1000], noise[1000:], labels[1000:])
    assert chance == pytest.approx(0.5, abs=0.08)


def test_gaussian_of_codes_has_their_moments(source: torch.Generator) -> None:
    """Mean and covariance of 50,000 samples are those of the codes, a dimension without variance included.

    An entry of the covariance deviates by at most sqrt(2 / 50,000) of the largest variance; five times is allowed.
    """
    mixing = torch.randn(4, 4, generator=source)
    codes = torch.randn(500, 4, generator=source) @ mixing + torch.tensor([1.0, -2, 0, 3])
    codes[:, 2] = 0.5
    fitted = CodeGaussian(codes)
    samples = fitted.sample(50_000, seed=3)
    assert samples.dtype == torch.float32
    largest = codes.var(dim=0).max().item()
    allowed = 5 * (largest / 50_000) ** 0.5, 5 * largest * (2 / 50_000) ** 0.5
    torch.testing.assert_close(samples.mean(dim=0), codes.mean(dim=0), rtol=0, atol=allowed[0])
    torch.testing.assert_close(samples.T.cov(), codes.T.cov(), rtol=0, atol=allowed[1])
    # The root of an eigenvalue that rounding leaves at 1e-16.
    torch.testing.assert_close(samples[:, 2], torch.full((50_000,), 0.5), rtol=0, atol=1e-6)
    assert torch.equal(fitted.sample(7, seed=3), samples[:7])


def test_one_code_has_no_spread() -> None:
    """The error asks for more."""
    with pytest.raises(ValueError, match="1 codes have no covariance"):
        CodeGaussian(torch.zeros(1, 2))
