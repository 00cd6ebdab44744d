"""Rows 16 and 24: what is learnt and by which objective; the checks fail where a term is wrong."""

from pathlib import Path

import pytest
import torch

from tests.training.study.sections import assert_shown
from training import gaussians, objectives, presets
from training.config import TrainingConfig
from training.models.vae import VAE
from training.study import image_models, vae_objective
from training.study.setup import Study
from training.study.vae_objective import BOTH, ENCODER_ALONE, EXPECTED
from training.trainer import Metrics, Terms

DATA = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]], [[[0.0, 0.0], [1.0, 1.0]]]])


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    """Return a quick study whose models are trained for a moment."""

    def smoke(_: Study) -> TrainingConfig:
        return presets.smoke()

    def course(_: Study) -> TrainingConfig:
        return presets.smoke().override(["name=smoke-history", "optimizer.epochs=4"])

    monkeypatch.setattr(vae_objective, "main_config", smoke)
    monkeypatch.setattr(image_models, "history_config", course)
    return Study(tmp_path)


def test_learnt_parts(study: Study) -> None:
    """Which term moves which part, and the counts for MNIST."""
    assert_shown(vae_objective.learnt_parts(study), 16)


def test_objective(study: Study) -> None:
    """Known values, both forms on images, and the record of a run."""
    assert_shown(vae_objective.objective(study), 24)


def test_a_term_that_moves_the_wrong_part_is_found(
    small_vae: VAE, source: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With samples that are constants the likelihood does not move the encoder any more."""
    noise = torch.randn((2, 2), generator=source)
    assert vae_objective.gradients_by_term(small_vae, DATA, noise) == EXPECTED
    rsample = gaussians.rsample
    monkeypatch.setattr(gaussians, "rsample", lambda *values: rsample(*values).detach())
    found = vae_objective.gradients_by_term(small_vae, DATA, noise)
    assert list(found.values()) == [(False, True), ENCODER_ALONE, ENCODER_ALONE, ENCODER_ALONE]
    assert EXPECTED[next(iter(found))] == BOTH


def test_rows_outside_of_the_batch_stay(small_vae: VAE, source: torch.Generator) -> None:
    """One q per image: the batch is moved, the others are not."""
    assert vae_objective.stored_parameters_moved(small_vae, DATA, source) == (True, False)


def test_a_wrong_divergence_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the entropy of q the divergence of the objective is another number."""
    assert all(check.passed for check in vae_objective.known_values())
    monkeypatch.setattr(gaussians, "kl_to_standard_normal", lambda mean, log_var: 0.5 * (mean**2 + log_var.exp()))
    assert [check.passed for check in vae_objective.known_values()] == [False, True, True, True]


def test_forms_that_differ_are_found(
    small_vae: VAE, source: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A form A that forgets the entropy, and a closed form that is not the mean of the sampled one."""
    right = vae_objective.forms_on_images(small_vae, DATA, 2_000, source)
    assert all(check.passed for check in vae_objective.form_checks(right))
    joint = objectives.elbo_joint_form

    def forgetful(vae: VAE, data: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return joint(vae, data, noise) - gaussians.entropy(vae.posterior(data)[1])

    monkeypatch.setattr(objectives, "elbo_joint_form", forgetful)
    wrong = vae_objective.forms_on_images(small_vae, DATA, 2_000, source)
    shifted = wrong._replace(kl_difference=torch.tensor([1.0, 1.1]))
    assert [check.passed for check in vae_objective.form_checks(shifted)] == [False, False]


def test_all_forms_have_a_scatter(small_vae: VAE, source: torch.Generator) -> None:
    """Three of them, none without noise."""
    found = vae_objective.forms_on_images(small_vae, DATA, 100, source)
    assert len(found.deviations) == 3
    assert min(found.deviations.values()) > 0


@pytest.mark.parametrize(
    ("last", "failed"),
    [
        ((-25.0, -20.0, 5.0), []),
        ((-24.0, -20.0, 5.0), ["largest difference of the recorded bound and its two terms"]),
        ((-25.0, -26.0, -1.0), ["smallest recorded KL"]),
        ((-27.0, -22.0, 5.0), ["rise of the validation bound from the first to the last record"]),
    ],
)
def test_a_record_that_does_not_add_up_is_found(last: tuple[float, float, float], failed: list[str]) -> None:
    """Bound = likelihood term - KL, KL at least zero, and a bound that rises."""
    metrics = (_metrics(1, (-26.0, -24.0, 2.0)), _metrics(2, last))
    assert [check.name for check in vae_objective.course_checks(metrics) if not check.passed] == failed


def test_records_out_of_order_are_found() -> None:
    """A run that was continued must not have its lines twice."""
    metrics = (_metrics(2, (-26.0, -24.0, 2.0)), _metrics(1, (-25.0, -20.0, 5.0)))
    failed = [check.name for check in vae_objective.course_checks(metrics) if not check.passed]
    assert failed == ["records are in order of the steps"]


def _metrics(epoch: int, found: tuple[float, float, float]) -> Metrics:
    elbo, log_likelihood, kl = found
    terms = Terms(elbo=elbo, log_likelihood=log_likelihood, kl=kl)
    return Metrics(
        epoch=epoch,
        step=10 * epoch,
        train=terms,
        validation=terms,
        learning_rate=1e-3,
        beta=1.0,
        is_best=True,
        has_collapsed=False,
        seconds=1.0,
    )
