"""Whether an answer is the right one."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Difference(NamedTuple):
    """What is not as it should be in an answer."""

    problem: str


def difference(expected: Mapping[str, Any], actual: Mapping[str, Any], tolerance: float) -> Difference | None:
    """Return how an answer differs from the right one, or None.

    Args:
        expected: What must be there; what is there beside it does not count.
        actual: What is there.
        tolerance: Largest difference of two numbers a and b, as t + t |a|. Zero: the same bits, but for NaN.
    """
    for name, right in expected.items():
        value = actual.get(name)
        if not isinstance(right, np.ndarray):
            if value != right:
                return Difference(f"{name} is {value!r}, expected {right!r}")
            continue
        if not isinstance(value, np.ndarray) or (value.shape, value.dtype) != (right.shape, right.dtype):
            return Difference(f"{name} is {_kind(value)}, expected {_kind(right)}")
        if not _are_close(right, value, tolerance):
            return Difference(f"{name} differs from the right answer by up to {_distance(right, value):.3g}")
    return None


def _are_close(right: NDArray[Any], value: NDArray[Any], tolerance: float) -> bool:
    if not tolerance or right.dtype.kind != "f":
        return np.array_equal(right, value, equal_nan=right.dtype.kind == "f")
    return np.allclose(value, right, rtol=tolerance, atol=tolerance, equal_nan=True)


def _distance(right: NDArray[Any], value: NDArray[Any]) -> float:
    return float(np.abs(right.astype(np.float64) - value.astype(np.float64)).max())


def _kind(value: object) -> str:
    return f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else "absent"
