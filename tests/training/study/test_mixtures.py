"""Rows 2 and 3: clusters and conditional mixtures meet their known limits, and broken ones are seen."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.training.study.sections import assert_shown
from training.models.gaussian_mixture import GaussianMixture, MixtureFit, three_clusters
from training.models.mixture_density import inverse_problem
from training.study import mixtures
from training.study.claims import Check
from training.study.mixtures import Nll
from training.study.setup import Study


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """Return a quick study."""
    return Study(tmp_path)


def _failed(checks: tuple[Check, ...]) -> list[str]:
    return [check.name for check in checks if not check.passed]


def test_three_clusters_found(study: Study) -> None:
    """Known expectations, a held-out fit at the truth, and EM beside gradient ascent."""
    assert_shown(mixtures.three_clusters_found(study), 2)


def test_a_step_that_loses_likelihood_is_found(source: torch.Generator) -> None:
    """A bound that is not the density, a loss of likelihood, another end and a fit cut short fail one by one."""
    paths = mixtures.Paths.of(three_clusters().sample(300, source).data, source)
    _, bounds = mixtures.steps_of_em(paths)
    assert not _failed(mixtures.path_checks(paths, bounds))
    em = paths.em.log_likelihoods
    assert _failed(mixtures.path_checks(paths, [em[0] + 1e-6])) == [
        "bound after a step on $q$ and log p: largest difference"
    ]
    lost = paths._replace(em=paths.em._replace(log_likelihoods=(*em, em[-1] - 1e-9)))
    elsewhere = paths._replace(gradient=paths.gradient._replace(log_likelihoods=em[:-8]))
    cut_short = paths._replace(gradient=paths.gradient._replace(is_converged=False))
    assert _failed(mixtures.path_checks(lost, bounds)) == ["smallest gain of an EM step"]
    assert _failed(mixtures.path_checks(elsewhere, bounds)) == ["mean log p by gradient"]
    assert _failed(mixtures.path_checks(cut_short, bounds)) == ["both stopped by themselves"]


def test_a_mixture_in_the_wrong_place_is_found(source: torch.Generator) -> None:
    """Means moved by a third of a deviation fail the held-out check and that of the means."""
    truth = three_clusters()
    moved = GaussianMixture(truth.weights, truth.means + 0.3, truth.covariances)
    train = truth.sample(5000, source)
    found = mixtures.Clusters(train, MixtureFit(moved, (), is_converged=True, floored=()), [0, 1, 2])
    failed = _failed(mixtures.fit_checks(found, truth.sample(5000, source).data))
    assert "largest error of a mean" in failed
    assert "held-out log p of the fit, 5000 points" in failed


@pytest.mark.slow
def test_mixture_density(study: Study) -> None:
    """The limits to six decimals, the network between them, and three ways to add up a latent variable."""
    assert_shown(mixtures.mixture_density(study), 3)


def test_limits_of_the_inverse_problem_by_brute_force() -> None:
    """A million t, sorted by the curve: each x gets the count, mean and variance of what lies near it."""
    targets = (np.arange(1_000_000) + 0.5) / 1_000_000
    curve = targets + 0.3 * np.sin(2 * np.pi * targets)
    order = np.argsort(curve)
    curve, targets = curve[order], targets[order]
    sums = np.concatenate(([0.0], np.cumsum(targets)))
    squares = np.concatenate(([0.0], np.cumsum(targets**2)))
    inputs = -0.1 + 1.2 * (np.arange(100_000) + 0.5) / 100_000
    first, last = np.searchsorted(curve, inputs - 0.1), np.searchsorted(curve, inputs + 0.1)
    count = last - first
    is_possible = count > 1
    first, last, count = first[is_possible], last[is_possible], count[is_possible]
    variance = (squares[last] - squares[first]) / count - ((sums[last] - sums[first]) / count) ** 2
    density = count / 1_000_000 / 0.2 * 1.2 / 100_000
    entropy, single = mixtures.inverse_problem_limits()
    # Counting and the midpoint rule leave some millionths; variances near the ends lose digits by cancellation.
    assert density @ np.log(count / 1_000_000) == pytest.approx(entropy, abs=3e-6)
    logs = np.log(2 * np.pi * np.e * np.maximum(variance, 1e-14))
    assert density @ logs / 2 == pytest.approx(single, abs=2e-5)
    assert density.sum() == pytest.approx(1, abs=1e-5)


def test_true_ranges_hold_every_row(source: torch.Generator) -> None:
    """Each t lies in a range of its own x, and the ends of ranges are where the noise ends."""
    rows = inverse_problem(5000, source, dtype=torch.float64)
    low, high = mixtures.true_ranges(rows.inputs.squeeze(1))
    assert bool(((low <= rows.targets) & (rows.targets <= high)).any(dim=1).all())
    inside = (low > 1e-9) & (high < 1 - 1e-9) & (high > low)
    middle = mixtures.inverse_curve(0.5 * (low + high)) - rows.inputs
    assert bool((middle.abs()[inside] < 0.1).all())
    assert bool((high >= low).all())


@pytest.mark.parametrize(
    ("mixture", "single", "name"),
    [
        (Nll(-1.05, 0.01), Nll(-0.5, 0.01), "MDN: negative log-likelihood of new rows"),
        (Nll(-1.32, 0.01), Nll(-0.5, 0.01), "MDN: not better than possible"),
        (Nll(-1.20, 0.01), Nll(-0.69, 0.01), "single Gaussian: not better than possible"),
        (Nll(-1.11, 0.03), Nll(-0.72, 0.03), "what the mixture gains over the single Gaussian"),
    ],
)
def test_losses_beyond_their_limits_are_found(mixture: Nll, single: Nll, name: str) -> None:
    """A network that is too bad, or better than anything can be, fails."""
    assert not _failed(mixtures.nll_checks(Nll(-1.15, 0.01), Nll(-0.55, 0.01)))
    assert _failed(mixtures.nll_checks(mixture, single)) == [name]


def test_sums_over_a_latent_variable(source: torch.Generator) -> None:
    """Every sum is right under its independence and wrong without; a wrong one in the right place fails."""
    errors = mixtures.decomposition_errors(source)
    assert not _failed(mixtures.decomposition_checks(errors))
    first = next(iter(errors))
    kind = next(iter(errors[first]))
    spoilt = {**errors, first: {**errors[first], kind: 1e-6}}
    assert _failed(mixtures.decomposition_checks(spoilt)) == ["largest error where the sum must be right"]


def test_expectations_of_the_clusters_depend_on_the_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster in another place has other expectations, and both checks of known values see it."""
    moved = three_clusters()
    other: Tensor = moved.means + torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, 0.5]], dtype=torch.float64)
    monkeypatch.setattr(
        mixtures, "three_clusters", lambda: GaussianMixture(moved.weights, other, moved.covariances)
    )
    assert len(_failed(mixtures.known_value_checks())) == 2
    assert math.isfinite(mixtures.known_value_checks()[0].value)
