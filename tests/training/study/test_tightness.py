"""Row 15: every check passes on trained models, and fails where a bound or an integral is broken."""

import pytest
import torch
from torch import Tensor

from tests.training.study.sections import assert_shown
from training import annealed_importance, gaussians, objectives
from training.study import tightness
from training.study.claims import Section
from training.study.setup import Study

pytestmark = pytest.mark.slow


def failed(section: Section) -> list[str]:
    """Return the names of the checks that do not hold."""
    return [check.name for check in section.checks if not check.passed]


def test_the_exact_gap(image_study: Study) -> None:
    """The identity log p = ELBO + KL, by three independent integrals."""
    assert_shown(tightness.exact_gap_in_the_plane(image_study), 15)


def test_the_two_parts_of_the_gap(image_study: Study) -> None:
    """Both positive, and together what the bound misses."""
    assert_shown(tightness.two_parts_of_the_gap(image_study), 15)


def test_more_samples(image_study: Study) -> None:
    """L_k rises towards the exact log p(x), and the gap follows the training."""
    assert_shown(tightness.bound_against_samples(image_study), 15)


def test_annealed_bounds(image_study: Study) -> None:
    """From both sides of the exact value."""
    assert_shown(tightness.annealed_bounds(image_study), 15)


def test_a_wrong_divergence_is_found(image_study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """A KL term with half of its value makes the identity fail, and nothing else."""
    divergence = gaussians.kl_to_standard_normal
    monkeypatch.setattr(gaussians, "kl_to_standard_normal", lambda *q: 0.5 * divergence(*q))
    names = failed(tightness.exact_gap_in_the_plane(image_study))
    assert "largest |log p - (ELBO + KL)|, encoder's q" in names


def test_a_bound_that_forgets_to_average_is_found(image_study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """The logarithm of the sum of weights, not of their mean, is above log p(x)."""
    monkeypatch.setattr(objectives, "importance_weighted_bound", lambda weights: torch.logsumexp(weights, dim=-1))
    names = failed(tightness.bound_against_samples(image_study))
    assert "two latents: share of the gap of L_1 that is left at the largest k" in names


def test_a_chain_that_stops_half_way_is_found(image_study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are collected up to half of the likelihood are no estimate of p(x)."""
    schedule = annealed_importance.sigmoid_schedule

    def halved(num_temperatures: int, **options: float) -> Tensor:
        return 0.5 * schedule(num_temperatures, **options)

    monkeypatch.setattr(annealed_importance, "sigmoid_schedule", halved)
    names = failed(tightness.annealed_bounds(image_study))
    assert "two latents: annealed log p from below, less the exact one" in names
