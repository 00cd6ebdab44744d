"""Row 25: every check passes on trained models, and fails for a model that has learnt nothing."""

import pytest

from tests.training.study.sections import assert_shown
from training import evaluate
from training.study import image_models, quality
from training.study.claims import Section
from training.study.setup import Study

pytestmark = pytest.mark.slow


def failed(section: Section) -> list[str]:
    """Return the names of the checks that do not hold."""
    return [check.name for check in section.checks if not check.passed]


def test_trained_models(image_study: Study) -> None:
    """Between what is impossible and what is useless, and nothing else is as probable as images."""
    assert_shown(quality.trained_models(image_study), 25)


def test_the_collapsed_model(image_study: Study) -> None:
    """A heavy KL term leaves independent pixels, and the alarm says so."""
    assert_shown(quality.collapsed_model(image_study), 25)


def test_a_model_that_has_learnt_nothing_is_found(image_study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """The collapsed model in place of the measured one is no better than independent pixels."""
    monkeypatch.setattr(quality, "main_config", image_models.collapsed_config)
    names = failed(quality.trained_models(image_study))
    assert [name.split(": ")[1] for name in names] == ["NLL of test images", "ELBO of test images"]


def test_an_alarm_that_stays_silent_is_found(image_study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """A good model in place of the collapsed one raises no alarm."""
    monkeypatch.setattr(quality, "collapsed_config", image_models.main_config)
    assert len(failed(quality.collapsed_model(image_study))) == 3


def test_what_was_measured_is_not_measured_again(image_study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted study goes on with the figures in the run's folder."""
    first = quality.trained_models(image_study)
    monkeypatch.setattr(evaluate, "evaluate_run", lambda *_, **__: pytest.fail("measured again"))
    assert quality.trained_models(image_study).checks == first.checks
