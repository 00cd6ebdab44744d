"""The alarm is raised by what the latents carry, and says so."""

import math

import pytest
import torch

from training import gaussians
from training.collapse import Alarm, alarms, described, num_active_units


@pytest.mark.parametrize(
    ("kl", "active_units", "expected"),
    [
        (25.0, 32, ()),
        (1.0, 8, ()),
        (0.99, 32, ("kl",)),
        (25.0, 7, ("active-units",)),
        (0.0, 0, ("kl", "active-units")),
        (math.nan, 32, ("kl",)),
    ],
    ids=["healthy", "at both limits", "KL alone", "units alone", "both", "not a number"],
)
def test_either_sign_raises_the_alarm(kl: float, active_units: int, expected: tuple[Alarm, ...]) -> None:
    """Of 32 dimensions, below one nat or below a quarter active; a KL that is no number is no good sign."""
    assert alarms(kl=kl, active_units=active_units, latent_dim=32) == expected


def test_active_units_may_carry_nothing() -> None:
    """Why the count is not enough: means that vary by 0.02 are all active, and together carry a third of a nat."""
    means = 0.02**0.5 * torch.randn(20_000, 32, generator=torch.Generator().manual_seed(0))
    kl = gaussians.kl_to_standard_normal(means, torch.zeros_like(means)).mean().item()
    assert num_active_units(means) == 32
    assert kl == pytest.approx(32 * 0.01, rel=0.02)
    assert alarms(kl=kl, active_units=32, latent_dim=32) == ("kl",)


def test_units_count_by_the_variance_of_their_mean() -> None:
    """More than 0.01 over the rows, wherever the mean lies."""
    means = torch.tensor([[5.0, 5.0, 0.0], [5.0, 5.19, 0.3]])
    assert num_active_units(means) == 2


def test_alarm_in_words_names_its_reason() -> None:
    """Each sign with its number and its limit, and what to do."""
    text = described(("kl", "active-units"), kl=0.25, active_units=3, latent_dim=32)
    assert "the KL term is 0.25 nats, below 1" in text
    assert "3 of 32 latent dimensions are active, fewer than 25%" in text
    assert "lower optimizer.beta" in text
    assert "active" not in described(("kl",), kl=0.25, active_units=3, latent_dim=32)
