"""Checks of numbers that were sampled: what they may be off by follows from their own standard errors."""

import math
from typing import Final

import torch
from torch import Tensor

from training.study import claims
from training.study.claims import Check

STANDARD_ERRORS: Final = 4
"""Tolerance of a sampled number: it is further from its expectation once in sixteen thousand measurements."""


def noise(source: torch.Generator, *shape: int) -> Tensor:
    """Return standard normal values in float64."""
    return torch.randn(shape, generator=source, dtype=torch.float64)


def standard_error(draws: Tensor) -> Tensor:
    """Return the standard error of the mean of independent draws along the first dimension."""
    return draws.std(dim=0) / math.sqrt(len(draws))


def mean_is(name: str, draws: Tensor, expected: float, *, source: str) -> Check:
    """Require the mean of independent draws, shape (n,), to be a number within four standard errors."""
    tolerance = STANDARD_ERRORS * float(standard_error(draws))
    return claims.close(name, float(draws.mean()), expected, within=tolerance, source=source, unit="")


def means_are(name: str, draws: Tensor, expected: Tensor, *, source: str) -> Check:
    """Require each mean of independent draws, shape (n, d), to be its number, shape (d,); show the worst."""
    errors = (draws.mean(dim=0) - expected).abs() / standard_error(draws)
    return within_standard_errors(name, float(errors.max()), source=source)


def within_standard_errors(name: str, error: float, *, source: str) -> Check:
    """Require an error that is measured in standard errors to be four at most."""
    return claims.at_most(name, error, STANDARD_ERRORS, source=source, unit="standard errors")
