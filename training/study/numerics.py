r"""Integrals and minima to rounding: the exact values that bounds and estimates are held against.

Integrals are sums over a grid: the midpoint rule converges faster than any power of the step for smooth functions
that vanish at both ends, such as densities: a few hundred points give twelve digits.
"""

import math
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor

_LOG_TIME_STEP: Final = 0.05
_LOG_TIME_ENDS: Final = (-45.0, 105.0)
"""Both integrands of `expected_log_means` are below 1e-19 outside; a weight may be as small as e^-100 with all its
probability before this is wrong."""


class Grid(NamedTuple):
    """Points in the middle of equal cells."""

    points: Tensor
    """Shape (n, dim), float64."""

    volume: float
    """Of one cell, in units of the points to the power of dim."""

    def log_integral(self, log_values: Tensor) -> Tensor:
        """Return the logarithm of the integral of exp(log_values), shape (..., n), without underflow.

        Example:
            >>> rule = grid(-10, 10, 200)
            >>> round(rule.log_integral(-0.5 * rule.points.square().sum(dim=1)).exp().square().item() / math.pi, 9)
            2.0
        """
        return log_values.logsumexp(dim=-1) + math.log(self.volume)

    def expectation(self, log_density: Tensor, values: Tensor) -> Tensor:
        """Return the integral of a density times values, both of shape (..., n); 0 times infinity counts as 0."""
        density = log_density.exp()
        terms = torch.where(density > 0, density * values, torch.zeros_like(density))
        return terms.sum(dim=-1) * self.volume


def grid(low: float, high: float, num: int, *, dim: int = 1) -> Grid:
    """Return a grid over the cube [low, high]^dim with num cells along each side.

    Args:
        low: Where what is integrated has vanished.
        high: The same on the other side.
        num: Cells along a side.
        dim: Number of dimensions; there are num^dim points.
    """
    step = (high - low) / num
    axis = low + step * (torch.arange(num, dtype=torch.float64) + 0.5)
    return Grid(torch.cartesian_prod(*[axis] * dim).view(-1, dim), step**dim)


def expected_log_means(log_weights: Tensor, probabilities: Tensor, nums: Sequence[int]) -> list[float]:
    r"""Return the expected logarithm of the mean of k independent positive weights, exactly, for several k.

    .. math:: E\left[\log \frac1k \sum_j w_j\right] = \int_0^\infty \frac{e^{-t} - M(t)^k}{t} \, dt - \log k,
        \quad M(t) = E\left[e^{-t w}\right]

    The integral is Frullani's with Laplace transforms: many weights cost no more than one. In log t the integrand
    is smooth and the midpoint rule exact to rounding.

    Args:
        log_weights: log w of every state of one weight, shape (n,).
        probabilities: Of the states, with sum one, shape (n,).
        nums: The k, each at least 1.

    Example:
        >>> [exact] = expected_log_means(torch.tensor([2.0]).double(), torch.tensor([1.0]).double(), [7])
        >>> round(exact, 9)
        2.0
    """
    low, high = _LOG_TIME_ENDS
    rule = grid(low, high, round((high - low) / _LOG_TIME_STEP))
    log_times = rule.points.squeeze(1)
    log_transform = torch.cat([_log_laplace(part, log_weights, probabilities) for part in log_times.chunk(8)])
    decay = (-log_times.exp()).exp()
    integrals = [float((decay - (num * log_transform).exp()).sum()) * rule.volume for num in nums]
    return [integral - math.log(num) for integral, num in zip(integrals, nums, strict=True)]


def _log_laplace(log_times: Tensor, log_weights: Tensor, probabilities: Tensor) -> Tensor:
    """Return log E[e^(-t w)]; near t = 0 that is the logarithm of one minus little, whose digits expm1 keeps."""
    exponents = (log_times.unsqueeze(1) + log_weights).exp()
    return torch.log1p(torch.expm1(-exponents) @ probabilities)


def minimise(loss: Callable[[], Tensor], parameters: list[Tensor], *, num_steps: int = 500) -> float:
    """Minimise a smooth deterministic loss in place by L-BFGS, to rounding; return its last value.

    Args:
        loss: A scalar, from the parameters as they are.
        parameters: Leaves that require gradients.
        num_steps: Largest number of passes.
    """
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=num_steps,
        max_eval=num_steps,
        tolerance_grad=1e-10,
        tolerance_change=0,
        history_size=50,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        optimizer.zero_grad()
        value = loss()
        torch.autograd.backward(value)
        return value.item()

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        return loss().item()
