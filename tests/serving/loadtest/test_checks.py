"""Whether an answer is the right one."""

import re
from typing import Any

import numpy as np
import pytest

from serving.loadtest.checks import difference

RIGHT = np.array([[0.5, -2.0]], np.float32)


@pytest.mark.parametrize(
    "actual",
    [
        {"mean": RIGHT.copy()},
        {"mean": RIGHT, "more": np.zeros(1)},
    ],
)
def test_right_answers(actual: dict[str, Any]) -> None:
    """What must be there is there; more does not count."""
    assert difference({"mean": RIGHT}, actual, 0.0) is None


@pytest.mark.parametrize(
    ("actual", "problem"),
    [
        ({}, r"mean is absent, expected float32 \(1, 2\)"),
        ({"mean": RIGHT.astype(np.float16)}, "mean is float16"),
        ({"mean": RIGHT.ravel()}, r"mean is float32 \(2,\)"),
        ({"mean": np.nextafter(RIGHT, np.float32(9))}, "differs from the right answer by up to"),
        ({"mean": np.full_like(RIGHT, np.nan)}, "differs"),
        ({"mean": "text"}, "mean is absent"),
    ],
)
def test_wrong_answers(actual: dict[str, Any], problem: str) -> None:
    """A missing tensor, another type or shape, and a last bit are seen."""
    found = difference({"mean": RIGHT}, actual, 0.0)
    assert found is not None
    assert re.search(problem, found.problem)


def test_other_values_are_compared_too() -> None:
    """A version or a seed must be equal, whatever the tolerance."""
    assert difference({"seed": 1}, {"seed": 1}, 0.0) is None
    assert difference({"seed": 1}, {"seed": 2}, 1.0) is not None
    assert difference({"model_version": "a"}, {}, 1.0) is not None


def test_a_tolerance_is_absolute_and_relative() -> None:
    """A difference of t + t |a| passes, a little more does not; integers must be equal."""
    tolerance = 1e-3
    for factor, is_right in ((0.99, True), (1.01, False)):
        values = RIGHT + np.float32(factor * tolerance) * (1 + np.abs(RIGHT))
        assert (difference({"x": RIGHT}, {"x": values}, tolerance) is None) == is_right
    levels = np.array([3], np.uint8)
    assert difference({"x": levels}, {"x": levels + np.uint8(1)}, 1.0) is not None


def test_nan_equals_nan() -> None:
    """An answer of NaN that repeats is the same answer; that it is bad says the service's own check."""
    values = np.array([np.nan, 1], np.float32)
    assert difference({"x": values}, {"x": values.copy()}, 0.0) is None
