"""The probe finds the variances that are known in closed form, within the standard errors that it states."""

import math

import pytest
import torch
from torch import Tensor

from training import variance_probe
from training.estimators import GaussianLatents
from training.variance_probe import Measurement

STANDARD_ERRORS = 5


def _vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _by_name(rows: list[Measurement]) -> dict[str, Measurement]:
    return {row.estimator: row for row in rows}


@pytest.mark.parametrize(
    ("mean", "scale", "ratio"),
    [
        (_vector(0), 1, 3.75),
        (torch.zeros(2), 0.7, 6),
        (torch.zeros(10), 1, 42),
        (torch.zeros(50), 1, 702),
        (_vector(0.5), 0.5, 7.5),
        (_vector(1.5), 0.5, 55.5),
        (torch.ones(10), 0.5, 726),
    ],
)
def test_published_ratios_without_baseline(mean: Tensor, scale: float, ratio: float) -> None:
    """The closed form gives the variance of the score function in units of the reparametrised one's."""
    variance = variance_probe.score_function_variance(mean.double(), scale)
    expected = ratio * variance_probe.reparametrised_variance(scale)
    torch.testing.assert_close(variance, torch.full_like(variance, expected))


@pytest.mark.parametrize(("dim", "with_mean", "with_best"), [(1, 2.5, 1.5), (2, 3, 2), (10, 7, 6), (50, 27, 26)])
def test_published_ratios_with_baseline(dim: int, with_mean: float, with_best: float) -> None:
    """At the top of the quadratic a constant baseline brings the growth from D^2 down to D."""
    mean = torch.zeros(dim, dtype=torch.float64)
    for baseline, expected in (
        (variance_probe.quadratic_expectation(mean, 2.0), with_mean),
        (variance_probe.best_constant_baseline(mean, 2.0), with_best),
    ):
        variance = variance_probe.score_function_variance(mean, 2.0, baseline=baseline)
        assert variance[0].item() / 4 == pytest.approx(expected)


@pytest.mark.parametrize("num_samples", [1, 2, 5])
@pytest.mark.parametrize(
    ("mean", "scale"), [(_vector(0), 1.0), (_vector(0.4, -1, 0.7), 0.6), (torch.zeros(10).double(), 1.0)]
)
def test_probe_finds_the_closed_forms(
    mean: Tensor, scale: float, num_samples: int, source: torch.Generator
) -> None:
    """Mean and variance of all four estimators are exact within five standard errors, at 1/M."""
    log_var = torch.full_like(mean, 2 * math.log(scale))
    noise = torch.randn((60_000, num_samples, len(mean)), generator=source, dtype=torch.float64)
    expectation = variance_probe.quadratic_expectation(mean, scale)
    candidates = variance_probe.standard_estimators(expectation)
    expected = {
        "score function": variance_probe.score_function_variance(mean, scale, num_samples=num_samples),
        "score function, mean baseline": variance_probe.score_function_variance(
            mean, scale, baseline=expectation, num_samples=num_samples
        ),
        "reparametrised": _vector(variance_probe.reparametrised_variance(scale, num_samples)),
    }
    if num_samples > 1:
        expected["score function, leave one out"] = variance_probe.leave_one_out_variance(mean, scale, num_samples)
    else:
        del candidates["score function, leave one out"]
    rows = variance_probe.measure(candidates, variance_probe.quadratic, GaussianLatents(mean, log_var), noise)
    assert {row.estimator for row in rows} == set(expected)
    for row in rows:
        assert row.mean == pytest.approx(-float(mean.mean()), abs=STANDARD_ERRORS * row.mean_standard_error)
        exact = float(expected[row.estimator].mean())
        assert row.variance == pytest.approx(exact, abs=STANDARD_ERRORS * row.variance_standard_error)
        # The law of large numbers at work: a probe with enough draws to tell the estimators apart.
        assert row.variance_standard_error < 0.05 * exact


@pytest.mark.parametrize(("frequency", "path", "score"), [(1.0, 0.20, 0.34), (5.0, 12.5, 0.50)])
def test_reparametrisation_is_not_always_better(
    frequency: float, path: float, score: float, source: torch.Generator
) -> None:
    """For f = sin(w z) under N(0, 1) the score function wins at w = 5; both variances are known exactly."""
    square = frequency**2
    shrunk = square * math.exp(-square)
    exact_path = square / 2 * (1 + math.exp(-2 * square)) - shrunk
    exact_score = 0.5 * (1 - (1 - 4 * square) * math.exp(-2 * square)) - shrunk
    assert exact_path == pytest.approx(path, abs=5e-3)
    assert exact_score == pytest.approx(score, abs=5e-3)
    noise = torch.randn((200_000, 1, 1), generator=source, dtype=torch.float64)
    candidates = variance_probe.standard_estimators(0.0)
    del candidates["score function, leave one out"]
    rows = _by_name(
        variance_probe.measure(
            candidates,
            lambda latents: torch.sin(frequency * latents).squeeze(-1),
            GaussianLatents(_vector(0), _vector(0)),
            noise,
        )
    )
    for name, exact in (("reparametrised", exact_path), ("score function", exact_score)):
        row = rows[name]
        assert row.variance == pytest.approx(exact, abs=STANDARD_ERRORS * row.variance_standard_error)


def test_table_has_every_estimator_of_every_cell(source: torch.Generator) -> None:
    """One row per estimator, dimension and number of samples; leave-one-out only where two samples are."""
    table = variance_probe.quadratic_table((1, 4), (1, 3), num_draws=2_000, source=source)
    cells = {(row.estimator, row.dim, row.num_samples) for row in table}
    assert len(cells) == len(table) == 2 * (3 + 4)
    assert all(row.num_draws == 2_000 and row.variance > 0 for row in table)


def test_one_draw_has_no_variance() -> None:
    """The probe refuses what it cannot measure."""
    with pytest.raises(ValueError, match="at least two draws"):
        variance_probe.measure(
            {}, variance_probe.quadratic, GaussianLatents(_vector(0), _vector(0)), torch.ones(1, 1, 1)
        )
