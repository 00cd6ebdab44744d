"""Checks of sampled numbers pass for what was sampled, and fail for anything else."""

import math

import pytest
import torch

from training.study import sampled

NUM_DRAWS = 10_000


def test_standard_error_of_normal_draws(source: torch.Generator) -> None:
    """One over the root of n, within the four standard errors that a deviation has itself."""
    found = float(sampled.standard_error(sampled.noise(source, NUM_DRAWS)))
    assert found == pytest.approx(1 / math.sqrt(NUM_DRAWS), rel=4 / math.sqrt(2 * NUM_DRAWS))


@pytest.mark.parametrize(("shift", "passes"), [(0.0, True), (0.1, False), (-0.1, False)])
def test_a_mean_is_held_against_its_own_standard_error(
    shift: float, source: torch.Generator, *, passes: bool
) -> None:
    """A tenth is ten standard errors of ten thousand draws."""
    draws = 3 + sampled.noise(source, NUM_DRAWS)
    assert sampled.mean_is("x", draws, 3 + shift, source="law").passed == passes


@pytest.mark.parametrize(("shift", "passes"), [(0.0, True), (0.1, False)])
def test_the_worst_of_several_means_decides(shift: float, source: torch.Generator, *, passes: bool) -> None:
    """One wrong component of three is enough to fail."""
    draws = sampled.noise(source, NUM_DRAWS, 3)
    check = sampled.means_are("x", draws, torch.tensor([0.0, 0.0, shift]).double(), source="law")
    assert check.passed == passes
    assert check.unit == "standard errors"


def test_not_a_number_fails() -> None:
    """A computation that broke never passes."""
    assert not sampled.within_standard_errors("x", math.nan, source="law").passed
    assert not sampled.mean_is("x", torch.tensor([math.nan, 1.0]), 0.0, source="law").passed
