r"""Measures mean and variance of gradient estimators on common noise, beside closed forms for a quadratic.

The closed forms are for f(z) = -|z|^2 / 2 and q = N(mean, scale^2 I), per coordinate i of the mean and for M
samples. The exact gradient is -mean.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor

from training import estimators
from training.estimators import Function, GaussianLatents

Estimator = Callable[[Function, GaussianLatents, Tensor], Tensor]
"""(function, latents, noise) to a surrogate, one value per row."""

_DRAWS_AT_ONCE: Final = 10_000


class Measurement(NamedTuple):
    """One estimator at one number of dimensions and samples; averages over the coordinates of the mean of q."""

    estimator: str
    dim: int
    num_samples: int
    num_draws: int
    mean: float
    """Mean gradient."""
    mean_standard_error: float
    variance: float
    """Variance of a coordinate of the gradient."""
    variance_standard_error: float


def standard_estimators(baseline: Tensor | float) -> dict[str, Estimator]:
    """Return the estimators of the gradient of E_q[f(z)].

    Args:
        baseline: E_q[f(z)], or a guess that does not depend on the noise, for the mean baseline.
    """
    return {
        "score function": estimators.score_function,
        "score function, mean baseline": lambda function, latents, noise: estimators.score_function(
            function, latents, noise, baseline=estimators.constant(baseline)
        ),
        "score function, leave one out": lambda function, latents, noise: estimators.score_function(
            function, latents, noise, baseline=estimators.leave_one_out
        ),
        "reparametrised": estimators.reparametrised,
    }


def elbo_estimators() -> dict[str, Estimator]:
    """Return the estimators of the gradient of the ELBO; the function that they are given is log p(x, z)."""
    return {
        "score function": estimators.score_function_elbo,
        "score function, leave one out": lambda function, latents, noise: estimators.score_function_elbo(
            function, latents, noise, baseline=estimators.leave_one_out
        ),
        "reparametrised, closed-form entropy": estimators.entropy_elbo,
        "reparametrised, total derivative": estimators.total_derivative,
        "sticking the landing": estimators.sticking_the_landing,
    }


def importance_weighted_estimators() -> dict[str, Estimator]:
    """Return the estimators of the gradient of the importance-weighted bound; the function is log p(x, z)."""
    return {
        "importance-weighted": estimators.importance_weighted,
        "importance-weighted, sticking the landing (biased)": estimators.importance_weighted_sticking,
        "doubly reparametrised": estimators.doubly_reparametrised,
    }


def gradients(estimator: Estimator, function: Function, latents: GaussianLatents, noise: Tensor) -> Tensor:
    """Return independent gradient estimates for the mean of q, shape (num_draws, dim).

    Args:
        estimator: Which one.
        function: f.
        latents: One q, parameters of shape (dim,).
        noise: Standard normal, shape (num_draws, num_samples, dim).
    """
    pieces: list[Tensor] = []
    for piece in torch.split(noise, _DRAWS_AT_ONCE):
        rows = (len(piece), latents.mean.shape[-1])
        # A copy of q for each draw: one backward pass gives the gradients of all, apart.
        mean = latents.mean.detach().expand(rows).clone().requires_grad_()
        surrogate = estimator(function, GaussianLatents(mean, latents.log_var.detach().expand(rows)), piece)
        pieces += torch.autograd.grad(surrogate.sum(), mean)
    return torch.cat(pieces)


def measure(
    candidates: Mapping[str, Estimator], function: Function, latents: GaussianLatents, noise: Tensor
) -> list[Measurement]:
    """Return mean and variance of every estimator on the same noise.

    Args:
        candidates: By name. Those with a leave-one-out baseline need two samples.
        function: f, on latents of shape (num_draws, num_samples, dim).
        latents: One q, parameters of shape (dim,).
        noise: Standard normal, shape (num_draws, num_samples, dim).

    Raises:
        ValueError: If there are fewer than two draws.
    """
    num_draws, num_samples, dim = noise.shape
    if num_draws <= 1:
        raise ValueError(f"a variance needs at least two draws, the noise has {num_draws}")
    rows = []
    for name, estimator in candidates.items():
        found = gradients(estimator, function, latents, noise).double()
        across = found.mean(dim=1)
        squares = (found - found.mean(dim=0)).square().mean(dim=1) * num_draws / (num_draws - 1)
        rows.append(
            Measurement(
                estimator=name,
                dim=dim,
                num_samples=num_samples,
                num_draws=num_draws,
                mean=float(across.mean()),
                mean_standard_error=float(across.std() / num_draws**0.5),
                variance=float(squares.mean()),
                variance_standard_error=float(squares.std() / num_draws**0.5),
            )
        )
    return rows


def quadratic(latents: Tensor) -> Tensor:
    """Return f(z) = -|z|^2 / 2, the target whose variances are known."""
    return -0.5 * latents.square().sum(dim=-1)


def quadratic_table(
    dims: Sequence[int], num_samples: Sequence[int], *, num_draws: int, source: torch.Generator
) -> list[Measurement]:
    """Return the four estimators on the quadratic at q = N(0, I), for every dimension and number of samples.

    Args:
        dims: Numbers of latent dimensions.
        num_samples: Samples in a gradient; a single one leaves the leave-one-out baseline out.
        num_draws: Gradients per measurement.
        source: Where the noise comes from.
    """
    rows = []
    for dim in dims:
        zero = torch.zeros(dim, dtype=torch.float64)
        for samples in num_samples:
            noise = torch.randn((num_draws, samples, dim), generator=source, dtype=torch.float64)
            candidates = standard_estimators(quadratic_expectation(zero, 1.0))
            if samples == 1:
                del candidates["score function, leave one out"]
            rows += measure(candidates, quadratic, GaussianLatents(zero, zero), noise)
    return rows


def quadratic_expectation(mean: Tensor, scale: float) -> float:
    r"""Return E_q[f].

    .. math:: -\tfrac12 (r^2 + D \sigma^2), \quad r^2 = |\mu|^2
    """
    return -0.5 * (float(mean.square().sum()) + len(mean) * scale**2)


def best_constant_baseline(mean: Tensor, scale: float) -> float:
    r"""Return the constant that makes the variance of the score function least.

    .. math:: b^* = E[f \epsilon_i^2] = -\tfrac12 (r^2 + (D + 2) \sigma^2)
    """
    return -0.5 * (float(mean.square().sum()) + (len(mean) + 2) * scale**2)


def reparametrised_variance(scale: float, num_samples: int = 1) -> float:
    r"""Return the variance of a coordinate of the reparametrised gradient.

    .. math:: \sigma^2 / M
    """
    return scale**2 / num_samples


def score_function_variance(mean: Tensor, scale: float, *, baseline: float = 0.0, num_samples: int = 1) -> Tensor:
    r"""Return the variance of each coordinate of the score-function gradient with a constant baseline b.

    .. math:: \frac{1}{M \sigma^2} \left[ \frac{r^4 + 2 \sigma^2 r^2 (D+4) + 4 \sigma^2 \mu_i^2
        + \sigma^4 (D+2)(D+4)}{4} + b^2 + b \left( r^2 + (D+2) \sigma^2 \right) \right]

    Args:
        mean: mu, shape (D,).
        scale: sigma.
        baseline: b.
        num_samples: M.
    """
    dim, square, variance = len(mean), mean.square().sum(), scale**2
    without = (
        square.square()
        + 2 * variance * square * (dim + 4)
        + 4 * variance * mean.square()
        + variance**2 * (dim + 2) * (dim + 4)
    ) / 4
    return (without + baseline**2 + baseline * (square + (dim + 2) * variance)) / (variance * num_samples)


def leave_one_out_variance(mean: Tensor, scale: float, num_samples: int) -> Tensor:
    r"""Return the variance of each coordinate of the score-function gradient with leave-one-out baseline.

    The estimator is the sample covariance of f and the score, so its variance is known from their moments:

    .. math:: \frac1M \left[ V_i + \frac{\mu_i^2 + r^2 + \sigma^2 D / 2}{M - 1} \right]

    with V_i the variance of one sample under the mean baseline b = E_q[f].
    """
    with_mean = score_function_variance(mean, scale, baseline=quadratic_expectation(mean, scale))
    spread = mean.square() + mean.square().sum() + scale**2 * len(mean) / 2
    return (with_mean + spread / (num_samples - 1)) / num_samples
