"""A mean carries its standard error, in float64."""

import math

import pytest
import torch

from training.mean_estimate import Estimate


def test_standard_error_is_that_of_a_mean(source: torch.Generator) -> None:
    """Standard deviation over the images, divided by the root of their number."""
    values = 3 + 2 * torch.randn(500, generator=source)
    measured = Estimate.of(values)
    assert measured.value == pytest.approx(values.double().mean().item(), rel=1e-12)
    assert measured.standard_error == pytest.approx(values.double().std().item() / math.sqrt(500), rel=1e-12)


def test_many_large_values_keep_their_digits() -> None:
    """A million float32 values around 100 nats: summed in float32 the mean would be off in the fifth digit."""
    values = torch.full((1_000_000,), 100.1)
    assert Estimate.of(values).value == pytest.approx(values[0].item(), rel=1e-12)
