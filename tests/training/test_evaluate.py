"""Figures are right, repeatable, independent of batches, and tied to their checkpoint."""

import copy
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from training import checkpoint, gaussians, objectives
from training.checkpoint import RunFolder
from training.config import EvaluationConfig
from training.data import Dataset, binarise_rows
from training.evaluate import Evaluation, evaluate, evaluate_run, recorded_evaluation, terms
from training.noise import normal_per_row

from .conftest import CPU, SmokeRun

SINGLE = 1e-4
"""Float32 sums of 64 pixels and a few hundred samples, around 30 nats."""


def _config(*, num_samples: int = 60, max_images: int = 45, seed: int = 5) -> EvaluationConfig:
    return EvaluationConfig(num_importance_samples=num_samples, max_images=max_images, seed=seed)


def _evaluate(run: SmokeRun, digits: Dataset, config: EvaluationConfig) -> Evaluation:
    return evaluate(run.vae, digits.test, config, split="test", checkpoint_sha256="0" * 64)


@torch.inference_mode()
def test_streamed_bound_equals_the_formula(smoke_run: SmokeRun, digits: Dataset) -> None:
    """All weights at once, through the definition, give the same bound and the same ELBO."""
    config, rows = _config(num_samples=130), digits.test[:6]
    data = binarise_rows(rows, seed=config.seed)
    mean, log_var = smoke_run.vae.posterior(data)
    mean, log_var = mean.unsqueeze(1), log_var.unsqueeze(1)
    latents = gaussians.rsample(mean, log_var, normal_per_row(config.seed, 6, 130, mean.shape[-1]))
    log_likelihood = smoke_run.vae.likelihood(latents).log_prob(data.unsqueeze(1))
    prior = gaussians.standard_normal_log_prob(latents)
    log_weights = log_likelihood + prior - gaussians.log_prob(latents, mean, log_var)
    actual = terms(smoke_run.vae, rows, config, first_row=0)
    expected = objectives.importance_weighted_bound(log_weights).double()
    torch.testing.assert_close(actual.iwae, expected, rtol=0, atol=SINGLE)
    torch.testing.assert_close(actual.log_likelihood, log_likelihood.mean(dim=1).double(), rtol=0, atol=SINGLE)


def test_figures_do_not_depend_on_the_batch(smoke_run: SmokeRun, digits: Dataset) -> None:
    """An image has the same figures alone and among others."""
    together = terms(smoke_run.vae, digits.test[:8], _config(), first_row=0)
    alone = terms(smoke_run.vae, digits.test[5:6], _config(), first_row=5)
    for whole, single in zip(together, alone, strict=True):
        torch.testing.assert_close(whole[5:6], single, rtol=0, atol=SINGLE)


def test_bounds_are_in_order(smoke_run: SmokeRun, digits: Dataset) -> None:
    """ELBO <= importance-weighted bound, which tightens with k; all are below zero for binary data.

    The posterior is made too narrow, so that the gaps are far larger than the noise of 250 images.
    """
    vae = copy.deepcopy(smoke_run.vae)
    vae.encoder.head.bias[vae.latent_dim :] -= 2
    figures = [
        _evaluate(smoke_run._replace(vae=vae), digits, _config(num_samples=k, max_images=250))
        for k in (1, 10, 200)
    ]
    bounds = [-figure.nll_iwae.value for figure in figures]
    assert figures[-1].elbo.value < bounds[-1] < 0
    assert all(lower < higher for lower, higher in pairwise(bounds))


def test_terms_add_up(evaluation: Evaluation) -> None:
    """ELBO = log-likelihood - KL."""
    assert evaluation.elbo.value == pytest.approx(evaluation.log_likelihood.value - evaluation.kl.value)
    assert evaluation.kl.value >= 0


def test_figures_repeat(smoke_run: SmokeRun, digits: Dataset) -> None:
    """The same settings give the same numbers, another seed gives others within the standard error."""
    first, second = (_evaluate(smoke_run, digits, _config()) for _ in range(2))
    other = _evaluate(smoke_run, digits, _config(seed=6))
    assert first == second
    assert other.elbo != first.elbo
    assert abs(other.elbo.value - first.elbo.value) < 5 * first.elbo.standard_error


def test_standard_error_is_that_of_a_mean(smoke_run: SmokeRun, digits: Dataset) -> None:
    """Standard deviation over the images, divided by the root of their number."""
    single = terms(smoke_run.vae, digits.test[:45], _config(), first_row=0)
    expected = (single.log_likelihood - single.kl).numpy().std(ddof=1) / np.sqrt(45)
    actual = _evaluate(smoke_run, digits, _config()).elbo.standard_error
    assert actual == pytest.approx(expected, abs=SINGLE)


def test_untrained_latents_are_not_active(digits: Dataset, smoke_run: SmokeRun) -> None:
    """A unit counts as active only if its posterior mean follows the data."""
    vae = copy.deepcopy(smoke_run.vae)
    vae.encoder.head.weight.zero_()
    vae.encoder.head.weight[0, :] = 1
    assert _evaluate(smoke_run._replace(vae=vae), digits, _config()).active_units == 1


def test_recorded_figures_are_found(smoke_run: SmokeRun, evaluation: Evaluation) -> None:
    """What evaluate writes is what export reads, digest of the checkpoint included."""
    assert recorded_evaluation(smoke_run.folder) == evaluation
    assert evaluation.checkpoint_sha256 == checkpoint.load(smoke_run.folder.best).sha256()


def test_stale_figures_are_not_used(smoke_run: SmokeRun, digits: Dataset, tmp_path: Path) -> None:
    """Figures of another checkpoint, of another split, or damaged ones count as absent."""
    folder = RunFolder(tmp_path)
    folder.best.write_bytes(smoke_run.folder.best.read_bytes())
    assert recorded_evaluation(folder) is None
    evaluate_run(folder, digits, _config(), split="validation", device=CPU)
    assert recorded_evaluation(folder) is None
    current = evaluate_run(folder, digits, _config(), device=CPU)
    assert recorded_evaluation(folder) == current
    folder.evaluation.write_text(folder.evaluation.read_text().replace(current.checkpoint_sha256, "0" * 64))
    assert recorded_evaluation(folder) is None
    folder.evaluation.write_text("{")
    assert recorded_evaluation(folder) is None
