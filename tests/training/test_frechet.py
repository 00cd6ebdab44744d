"""The Frechet distance obeys its closed form and its laws; features are what they say."""

import math

import numpy as np
import pytest
import torch
from scipy import linalg
from torch import Tensor

from training.coders import intensities
from training.data import Dataset
from training.frechet import Moments, PrincipalFeatures, expected_distance, frechet_distance, moments

EXACT = 1e-9
"""Relative: float64 eigenvalues of matrices of a dozen rows."""


def _gaussian(dim: int, source: torch.Generator, *, rank: int | None = None) -> Moments:
    root = torch.randn(dim, rank or dim, generator=source, dtype=torch.float64)
    return Moments(torch.randn(dim, generator=source, dtype=torch.float64), root @ root.T)


def _rotation(dim: int, source: torch.Generator) -> Tensor:
    rotation: Tensor = torch.linalg.qr(torch.randn(dim, dim, generator=source, dtype=torch.float64))[0]
    return rotation


def test_diagonal_gaussians_have_a_closed_form(source: torch.Generator) -> None:
    """Where both covariances are diagonal: squared differences of means and of standard deviations."""
    means = torch.randn(2, 6, generator=source, dtype=torch.float64)
    scales = torch.rand(2, 6, generator=source, dtype=torch.float64)
    first, second = (Moments(mean, torch.diag(scale**2)) for mean, scale in zip(means, scales, strict=True))
    expected = (means[0] - means[1]).square().sum() + (scales[0] - scales[1]).square().sum()
    assert frechet_distance(first, second) == pytest.approx(expected.item(), rel=EXACT)


def test_equals_the_formula_with_a_general_matrix_root(source: torch.Generator) -> None:
    """The usual form, with the root of S1 S2 by Schur decomposition, which is not symmetric, gives the same."""
    first, second = _gaussian(7, source), _gaussian(7, source)
    root = np.real(linalg.sqrtm((first.covariance @ second.covariance).numpy()))
    expected = (first.mean - second.mean).square().sum() + (first.covariance + second.covariance).trace()
    assert frechet_distance(first, second) == pytest.approx(expected.item() - 2 * np.trace(root), rel=1e-8)


def test_distance_is_symmetric_and_zero_for_equal_moments(source: torch.Generator) -> None:
    """Neither set is the reference; nothing is below zero, not even by rounding."""
    first, second = _gaussian(9, source), _gaussian(9, source)
    assert frechet_distance(first, second) == pytest.approx(frechet_distance(second, first), rel=EXACT)
    assert 0 <= frechet_distance(first, first) <= 1e-12 * first.covariance.trace()


def test_distance_survives_a_common_rotation_and_scales_as_a_square(source: torch.Generator) -> None:
    """It depends on where the Gaussians are to each other, not on the coordinates."""
    first, second, rotation = _gaussian(5, source), _gaussian(5, source), _rotation(5, source)
    expected = frechet_distance(first, second)
    rotated = [
        Moments(rotation @ mean, rotation @ covariance @ rotation.T) for mean, covariance in (first, second)
    ]
    tripled = [Moments(3 * mean, 9 * covariance) for mean, covariance in (first, second)]
    assert frechet_distance(*rotated) == pytest.approx(expected, rel=EXACT)
    assert frechet_distance(*tripled) == pytest.approx(9 * expected, rel=EXACT)


def test_root_obeys_the_triangle_inequality(source: torch.Generator) -> None:
    """The distance is the square of a metric, the Wasserstein-2 distance of Gaussians."""
    for _ in range(20):
        a, b, c = (_gaussian(4, source) for _ in range(3))
        sides = [math.sqrt(frechet_distance(*pair)) for pair in ((a, b), (b, c), (a, c))]
        assert sides[2] <= sides[0] + sides[1] + EXACT


def test_covariances_without_full_rank_are_fine(source: torch.Generator) -> None:
    """One image again and again is a point: its distance to a Gaussian is the squared gap plus the variance."""
    spread = _gaussian(6, source, rank=2)
    point = Moments(torch.zeros(6, dtype=torch.float64), torch.zeros(6, 6, dtype=torch.float64))
    expected = spread.mean.square().sum() + spread.covariance.trace()
    assert frechet_distance(point, spread) == pytest.approx(expected.item(), rel=EXACT)
    # Eigenvalues of 1e-16 instead of zero have roots of 1e-8.
    assert frechet_distance(spread, spread) < 1e-6


def test_moments_are_those_of_numpy(source: torch.Generator) -> None:
    """Unbiased covariance, float64, float32 rows included."""
    rows = torch.randn(50, 4, generator=source)
    mean, covariance = moments(rows)
    np.testing.assert_allclose(covariance, np.cov(rows.double().numpy().T), rtol=1e-12)
    np.testing.assert_allclose(mean, rows.double().mean(dim=0), rtol=1e-12)


@pytest.mark.parametrize("variances", [[1.0, 1.0, 1.0, 1.0], [4.0, 1.0, 0.5, 0.1]])
def test_finite_samples_are_as_far_apart_as_predicted(variances: list[float], source: torch.Generator) -> None:
    """The mean distance of 400 pairs of samples from one Gaussian is the first-order formula, within 5 %.

    Each distance deviates by about its own mean over the root of a dozen degrees of freedom, so the mean of 400 by
    1.5 %; the terms that the formula leaves out are of relative order d / n = 2 %.
    """
    num_rows, scale = 200, torch.tensor(variances, dtype=torch.float64).sqrt()
    draws = scale * torch.randn(400, 2, num_rows, 4, generator=source, dtype=torch.float64)
    mean = np.mean([frechet_distance(moments(first), moments(second)) for first, second in draws])
    assert mean == pytest.approx(expected_distance(torch.tensor(variances), num_rows), rel=0.05)


def test_features_are_uncorrelated_and_in_order(digits: Dataset) -> None:
    """Their covariance over the images is diagonal and falling; its sum is the explained share of the variance."""
    images = intensities(digits.train)
    features = PrincipalFeatures.fit(images, num_components=10)
    covariance = moments(features(images)).covariance
    torch.testing.assert_close(covariance, torch.diag(features.variances), rtol=0, atol=1e-9)
    assert (features.variances.diff() < 0).all()
    total = images.flatten(start_dim=1).double().var(dim=0).sum()
    assert features.explained == pytest.approx((features.variances.sum() / total).item(), rel=EXACT)
    # 64 pixels, of which three are black in every image.
    assert (features.rank, PrincipalFeatures.fit(images).num_components) == (61, 61)
    assert features.described().startswith("10 principal components of the training images, not whitened, 73")


def test_whitened_features_all_weigh_alike(digits: Dataset) -> None:
    """Unit covariance; so one image repeated is at the number of components, plus its own squared distance."""
    images = intensities(digits.train)
    features = PrincipalFeatures.fit(images, num_components=10, is_whitened=True)
    torch.testing.assert_close(
        moments(features(images)).covariance, torch.eye(10, dtype=torch.float64), rtol=0, atol=1e-9
    )
    repeated = images[:1].expand(100, -1, -1, -1)
    expected = 10 + features(images[:1]).square().sum().item()
    assert features.distance(repeated, images) == pytest.approx(expected, rel=1e-6)
    assert features.expected_distance(1000) == pytest.approx((2 * 10 + 55) / 1000)


def test_distance_does_not_depend_on_the_coordinates_of_pixels(digits: Dataset, source: torch.Generator) -> None:
    """All components, not whitened, keep lengths: the distance is that of the pixels themselves."""
    images = intensities(digits.train)
    first, second = images[:600], images[600:1200].clamp(0.2, 0.9)
    features = PrincipalFeatures.fit(images + 0.01 * torch.randn(images.shape, generator=source))
    direct = frechet_distance(moments(first.flatten(1)), moments(second.flatten(1)))
    assert features.num_components == 64
    assert features.distance(first, second) == pytest.approx(direct, rel=1e-6)


@pytest.mark.parametrize(
    ("images", "num_components", "message"),
    [
        (torch.ones(5, 2, 2), None, "all are equal, there are no components"),
        (torch.eye(3), 3, r"num_components: 3, these images have 2; ask for 1 to 2"),
        (torch.eye(3), 0, r"num_components: 0, these images have 2"),
        (torch.tensor([[0.0], [math.nan]]), None, "a value is not finite"),
        (torch.ones(1, 4), None, "1 rows have no covariance"),
    ],
    ids=["constant", "too many", "none", "NaN", "one image"],
)
def test_images_without_features_are_refused(images: Tensor, num_components: int | None, message: str) -> None:
    """The error says what the images have."""
    with pytest.raises(ValueError, match=message):
        PrincipalFeatures.fit(images, num_components=num_components)


def test_different_features_are_refused(source: torch.Generator) -> None:
    """Distances between coordinates of different kinds mean nothing."""
    with pytest.raises(ValueError, match="moments of 3 and of 4 features"):
        frechet_distance(_gaussian(3, source), _gaussian(4, source))
