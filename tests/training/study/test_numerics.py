"""Integrals and minima that serve as exact values: against closed forms, and against enumeration."""

import itertools
import math

import pytest
import torch

from training.study import numerics

ROUNDING = 1e-12


def test_midpoint_rule_is_exact_for_a_gaussian() -> None:
    """Mass, mean square and fourth moment of a Gaussian in the plane, to rounding."""
    plane = numerics.grid(-12, 12, 240, dim=2)
    log_density = -0.5 * plane.points.square().sum(dim=1) - math.log(2 * math.pi)
    squares = plane.points[:, 0].square()
    assert plane.points.shape == (240**2, 2)
    assert plane.log_integral(log_density).item() == pytest.approx(0, abs=ROUNDING)
    assert plane.expectation(log_density, squares).item() == pytest.approx(1, abs=ROUNDING)
    assert plane.expectation(log_density, squares.square()).item() == pytest.approx(3, abs=ROUNDING)


def test_integral_of_what_underflows_is_finite() -> None:
    """Logarithms far below those of the smallest float add up, and nothing times infinity is nothing."""
    line = numerics.grid(0, 2, 4)
    assert line.log_integral(torch.full((4,), -1e5, dtype=torch.float64)).item() == pytest.approx(
        -1e5 + math.log(2)
    )
    log_density = torch.tensor([-math.inf, 0.0, 0.0, -math.inf], dtype=torch.float64)
    values = torch.tensor([math.inf, 1.0, 3.0, -math.inf], dtype=torch.float64)
    assert line.expectation(log_density, values).item() == pytest.approx(2)


@pytest.mark.parametrize("num", [1, 2, 5])
def test_expected_log_mean_is_the_enumerated_one(num: int) -> None:
    """Three states of a weight: all 3^k outcomes by hand, and one integral."""
    log_weights = torch.tensor([-30.0, 0.5, 2.0], dtype=torch.float64)
    probabilities = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    expected = 0.0
    for states in itertools.product(range(3), repeat=num):
        chosen = list(states)
        log_mean = (log_weights[chosen].logsumexp(dim=0) - math.log(num)).item()
        expected += probabilities[chosen].prod().item() * log_mean
    [found] = numerics.expected_log_means(log_weights, probabilities, [num])
    assert found == pytest.approx(expected, abs=1e-11)


def test_minimum_of_a_valley_is_found_to_rounding() -> None:
    """Rosenbrock's function, whose minimum lies in a bent valley, at (1, 1)."""
    point = torch.tensor([-1.2, 1.0], dtype=torch.float64, requires_grad=True)

    def loss() -> torch.Tensor:
        return (1 - point[0]).square() + 100 * (point[1] - point[0].square()).square()

    assert numerics.minimise(loss, [point]) == pytest.approx(0, abs=1e-20)
    torch.testing.assert_close(point.detach(), torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-9)
