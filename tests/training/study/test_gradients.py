"""Rows 19 to 21 on known functions: every check passes, and fails where an estimator or a formula is broken."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.training.study.sections import assert_shown
from training import estimators
from training.study import gradients
from training.study.gradients import CELLS, LEAVE_ONE_OUT, LEAVE_ONE_OUT_SAMPLES, PATH, SCALE, SCORE, Cell
from training.study.setup import Study
from training.variance_probe import Measurement


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """Return a quick study."""
    return Study(tmp_path)


def test_score_function(study: Study) -> None:
    """Unbiased with every baseline, and for a step that has no slope."""
    assert_shown(gradients.score_function(study), 19)


def test_reparametrised(study: Study) -> None:
    """The same mean as the score function, variance divided by M."""
    assert_shown(gradients.reparametrised(study), 20)


@pytest.mark.slow
def test_variance_in_closed_form(study: Study) -> None:
    """Every known ratio within five percent, 1/M, and the growth with the dimension."""
    assert_shown(gradients.variance_in_closed_form(study), 21)


def test_sine_counterexample(study: Study) -> None:
    """Both variances are the known ones, and the score function wins at w = 5."""
    assert_shown(gradients.sine_counterexample(study), 21)


def test_a_sign_error_in_the_score_function_is_found(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """The surrogate with its sign turned round has the wrong mean gradient."""
    monkeypatch.setattr(estimators, "score_function", _scaled(estimators.score_function, -1))
    assert not any(check.passed for check in gradients.score_function(study).checks)


def test_a_baseline_that_sees_its_sample_is_found(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean over all samples, own one included, is a biased baseline."""
    monkeypatch.setattr(estimators, "leave_one_out", lambda values: values.mean(dim=-1, keepdim=True))
    failed = [check.name for check in gradients.score_function(study).checks if not check.passed]
    assert failed == ["largest error of the mean gradient, leave one out"]


def test_a_scaled_path_is_found(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine tenths of the pathwise gradient is neither the right mean nor the right variance."""
    monkeypatch.setattr(estimators, "reparametrised", _scaled(estimators.reparametrised, 0.9))
    failed = {check.name for check in gradients.reparametrised(study).checks if not check.passed}
    assert failed >= {"mean gradient, reparametrised", "mean difference on common noise"}
    assert any(name.startswith("variance") for name in failed)


def test_a_wrong_formula_of_the_sine_is_found(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its last term the variance is not the measured one."""
    monkeypatch.setattr(gradients, "sine_path_variance", lambda frequency: torch.as_tensor(frequency**2 / 2))
    failed = [check.name for check in gradients.sine_counterexample(study).checks if not check.passed]
    assert "variance at $w = 1$, reparametrised" in failed
    assert "largest error of a measured variance, reparametrised" in failed


def test_the_sine_variances_cross_where_they_are_said_to() -> None:
    """Equal there, in another order on either side."""
    crossing = gradients.sine_crossing()
    path, score = (
        function(torch.tensor([crossing - 0.1, crossing, crossing + 0.1], dtype=torch.float64))
        for function in (gradients.sine_path_variance, gradients.sine_score_variance)
    )
    assert float(path[1]) == pytest.approx(float(score[1]), abs=1e-12)
    assert path[0] < score[0]
    assert path[2] > score[2]


def test_the_table_passes_with_the_closed_forms_themselves() -> None:
    """The checks of the table know the formulas by heart."""
    assert all(check.passed for check in gradients.ratio_checks(_table()))


@pytest.mark.parametrize("name", [SCORE, LEAVE_ONE_OUT, PATH])
def test_a_variance_that_is_six_percent_off_fails(name: str) -> None:
    """In a single cell, of any estimator."""
    table = _table()
    row = table[CELLS[0]][name]
    table[CELLS[0]][name] = row._replace(variance=1.06 * row.variance)
    failed = [check.name for check in gradients.ratio_checks(table) if not check.passed]
    assert f"largest relative error of a variance in the table, {gradients.SHORT[name]}" in failed


def test_a_wrong_formula_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table's closed forms are held against ratios that were computed by hand, the measurements apart."""
    table, right = _table(), gradients.exact_ratios
    monkeypatch.setattr(gradients, "exact_ratios", lambda cell: right(cell) | {SCORE: (cell.dim + 2) ** 2 / 4})
    failed = [check.name for check in gradients.ratio_checks(table) if not check.passed]
    assert "largest error of the formulas against ratios that were computed by hand" in failed


def test_a_mean_gradient_that_is_off_fails() -> None:
    """By five standard errors, in a single cell."""
    table = _table()
    row = table[CELLS[5]][PATH]
    table[CELLS[5]][PATH] = row._replace(mean=row.mean + 5 * row.mean_standard_error)
    failed = [check.name for check in gradients.ratio_checks(table) if not check.passed]
    assert failed == ["largest error of a mean gradient in the table"]


def test_the_slope_of_a_power_is_its_exponent() -> None:
    """Exact on exact powers; the error is that of the least-squares line."""
    rows = [_row(SCORE, Cell(1, 0.0), 7.0 * size**-1.5)._replace(num_samples=size) for size in (1, 2, 4, 8)]
    slope, error = gradients.log_log_slope([1, 2, 4, 8], rows)
    assert slope == pytest.approx(-1.5)
    # Errors of one percent in each point, at distances -3/2, -1/2, 1/2, 3/2 of log 2 from the middle.
    assert error == pytest.approx(0.01 / (math.sqrt(5) * math.log(2)))


def _scaled(estimator: Callable[..., Tensor], factor: float) -> Callable[..., Tensor]:
    """Return an estimator whose gradient, and value, is multiplied."""
    return lambda *arguments, **options: factor * estimator(*arguments, **options)


def _table() -> dict[Cell, dict[str, Measurement]]:
    """Return what the probe would find had it no error at all."""
    return {
        cell: {name: _row(name, cell, ratio * SCALE**2) for name, ratio in gradients.exact_ratios(cell).items()}
        for cell in CELLS
    }


def _row(name: str, cell: Cell, variance: float) -> Measurement:
    num_samples = LEAVE_ONE_OUT_SAMPLES if name == LEAVE_ONE_OUT else 1
    return Measurement(
        estimator=name,
        dim=cell.dim,
        num_samples=num_samples,
        num_draws=1000,
        mean=-cell.shift * SCALE,
        mean_standard_error=0.01,
        variance=variance / num_samples,
        variance_standard_error=0.01 * variance / num_samples,
    )
