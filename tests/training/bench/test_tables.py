"""What a person reads is what was measured, and says so where a comparison does not hold."""

import pytest

from training.bench import plan, tables
from training.bench.plan import Setting
from training.bench.processes import Lap
from training.bench.report import OURS, BenchReport, EvaluationResult, Spread, Timing, TrainingResult


def _timing(ratio: float) -> Timing:
    return Timing.of([Lap(9, 9), Lap(2 * ratio, 3)], [Lap(9, 9), Lap(2, 2)])


def _training(contestant: str, ratio: float, batch_size: int = 128, **changes: object) -> TrainingResult:
    values: dict[str, object] = {
        "setting": Setting(latent_dim=20, batch_size=batch_size, num_threads=2),
        "contestant": contestant,
        "target": 1.5,
        "timing": _timing(ratio),
        "images_per_second": 12345.6,
        "num_parameters": 652_824,
        "elbo": -115.16,
        "climb": 1.0,
        "is_comparable": True,
    }
    return TrainingResult.parse(values | changes)


def _evaluation(contestant: str, ratio: float, *, agrees: bool = True) -> EvaluationResult:
    return EvaluationResult(
        setting=Setting(latent_dim=20, batch_size=128, num_threads=1),
        contestant=contestant,
        target=3,
        timing=_timing(ratio),
        nll=106.24,
        standard_error=2.1,
        difference=0.0123,
        difference_standard_error=0.05,
        agrees=agrees,
    )


def _report(training: list[TrainingResult], evaluation: list[EvaluationResult]) -> BenchReport:
    return BenchReport(
        date="2026-11-27",
        machine={"processor": "x", "cores": "2"},
        versions={"torch": "2.13.0"},
        data="MNIST",
        plan=plan.quick(),
        absent=("Pyro, tensors",),
        training=tuple(training),
        evaluation=tuple(evaluation),
    )


def test_rows_hold_the_figures() -> None:
    """Setting, who, images per second, ratio with its range, ratio of processor time, ELBO."""
    report = _report([_training("pythae", 1.75)], [_evaluation("get_nll", 3.5)])
    expected = ["20, 128, 2", "pythae", "12,346", "1.75 (1.75-1.75)", "1.50", "-115.2"]
    assert tables.training_rows(report) == [expected]
    # 16 images of the quick plan in 7 seconds.
    expected = ["1", "get_nll", "2", "3.50 (3.50-3.50)", "1.50", "106.240 +- 2.100", "+0.012 +- 0.050"]
    assert tables.evaluation_rows(report) == [expected]


def test_rows_are_as_wide_as_their_heads() -> None:
    """A column that is added is named."""
    report = _report([_training(OURS, 1)], [_evaluation(OURS, 1)])
    assert {len(row) for row in tables.training_rows(report)} == {len(tables.TRAINING_COLUMNS)}
    assert {len(row) for row in tables.evaluation_rows(report)} == {len(tables.EVALUATION_COLUMNS)}


def test_a_comparison_that_does_not_hold_is_marked() -> None:
    """In the row itself: nobody quotes the ratio without seeing it."""
    report = _report([_training("x", 9, is_comparable=False)], [_evaluation("y", 9, agrees=False)])
    assert tables.training_rows(report)[0][-1] == "-115.2 OTHER WORK"
    assert tables.evaluation_rows(report)[0][-1].endswith("DISAGREES")


@pytest.mark.parametrize(
    ("ratios", "word"),
    [((1.6, 2.0), "reached"), ((1.4, 2.0), "reached in some settings"), ((1.1, 1.4), "missed")],
)
def test_verdict_is_of_all_settings(ratios: tuple[float, float], word: str) -> None:
    """A target is reached where the median of every setting reaches it."""
    training = [
        _training(name, ratio, batch_size)
        for ratio, batch_size in zip(ratios, (128, 256), strict=True)
        for name, ratio in ((OURS, 1.0), ("pythae", ratio))
    ]
    line, absent = tables.verdicts(_report(training, [_evaluation(OURS, 1)]))
    spread = Spread.of(ratios)
    assert line == f"training, pythae: {spread} times our time, target 1.5: {word}"
    assert absent == "Pyro, tensors: absent; `make training-peers` fetches its package"


def test_page_holds_every_row_and_verdict() -> None:
    """The recorded page and the terminal say the same."""
    report = _report([_training(OURS, 1), _training("pythae", 1.7)], [_evaluation(OURS, 1)])
    page = tables.markdown(report)
    for row in (*tables.training_rows(report), *tables.evaluation_rows(report)):
        assert f"| {' | '.join(row)} |" in page
    assert all(f"- {line}\n" in page for line in tables.verdicts(report))
    assert "{" not in page
