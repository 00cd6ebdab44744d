"""Rows 7, 8 and 18: every check passes on trained models, and fails where the algorithm is broken."""

from collections.abc import Callable

import pytest
from torch import Tensor

from tests.training.study.sections import assert_shown
from training import per_datapoint
from training.per_datapoint import Ascent, PosteriorTable
from training.study import inference
from training.study.claims import Section
from training.study.setup import Study

pytestmark = pytest.mark.slow


def failed(section: Section) -> list[str]:
    """Return the names of the checks that do not hold."""
    return [check.name for check in section.checks if not check.passed]


def test_one_q_for_each_image(image_study: Study) -> None:
    """The bound rises, ends above the encoder's, and one sample estimates the gradient without bias."""
    assert_shown(inference.inference_for_each_image(image_study), 7)


def test_what_it_costs(image_study: Study) -> None:
    """3,840,000 numbers against 339,664, and a search against a look."""
    assert_shown(inference.cost_of_one_q_for_each_image(image_study), 8)


def test_amortised_inference(image_study: Study) -> None:
    """An encoder answers for images that it never saw."""
    assert_shown(inference.amortised_inference(image_study), 18)


def test_steps_in_the_wrong_direction_are_found(image_study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """A q step that goes downhill neither raises the bound nor reaches the encoder's."""
    monkeypatch.setattr(PosteriorTable, "ascend", downhill(PosteriorTable.ascend))
    assert [name.split(":")[0] for name in failed(inference.inference_for_each_image(image_study))] == [
        "rise of the ELBO from the first to the last pass of the alternation",
        "same model",
    ]


def test_a_refinement_that_loses_is_found(image_study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """If what should be the best q is worse than the encoder's, the amortisation gap is negative."""
    refine = per_datapoint.refine

    def shifted(*arguments: object, **options: object) -> tuple[Tensor, Tensor]:
        mean, log_var = refine(*arguments, **options)  # type: ignore[arg-type]  # handed on as they came
        return mean + 1, log_var

    monkeypatch.setattr(per_datapoint, "refine", shifted)
    assert "amortisation gap, mean over images" in failed(inference.amortised_inference(image_study))


def downhill(ascend: Callable[..., None]) -> Callable[..., None]:
    """Return the step with the sign of its gradients turned round."""

    def step(
        table: PosteriorTable, rows: Tensor, gradient_mean: Tensor, gradient_log_var: Tensor, ascent: Ascent
    ) -> None:
        ascend(table, rows, -gradient_mean, -gradient_log_var, ascent)

    return step
