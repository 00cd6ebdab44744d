"""Figures are right, repeatable, independent of batches, and tied to their checkpoint."""

import copy
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from training import checkpoint, gaussians, objectives, pixel_bounds, presets
from training import evaluate as evaluate_module
from training.binary_log_prob import binary_log_prob
from training.checkpoint import RunFolder
from training.config import DataConfig, EvaluationConfig
from training.data import Dataset, binarise_rows, load_labels
from training.errors import EntropyUndercut
from training.evaluate import (
    Evaluation,
    Extras,
    evaluate,
    evaluate_run,
    recorded_evaluation,
    terms,
    with_extras,
)
from training.likelihoods import quantised
from training.models.ppca import ProbabilisticPCA
from training.models.vae import VAE
from training.noise import TrainingStream, generator, normal_per_row
from training.observations import marginals
from training.trainer import fit

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


@pytest.mark.parametrize("changes", [["likelihood=gaussian"], ["likelihood=categorical", "num_levels=17"]])
@torch.inference_mode()
def test_bounds_of_other_likelihoods_equal_the_formula(changes: list[str], digits: Dataset) -> None:
    """Nothing is binarised, and the text says so: all weights at once, on intensities or levels, agree."""
    model = presets.smoke().model.override(changes)
    vae = VAE(model, (1, 8, 8), generator(0, TrainingStream.INIT))
    vae.decoder.start_at(*marginals(model, digits.train))
    config, rows = _config(num_samples=70, max_images=6), digits.test[:6]
    data = torch.from_numpy(rows).float() / 255
    data = data if vae.decoder.num_levels is None else quantised(data, 17)
    mean, log_var = (parameter.unsqueeze(1) for parameter in vae.posterior(data))
    latents = gaussians.rsample(mean, log_var, normal_per_row(config.seed, 6, 70, vae.latent_dim))
    log_likelihood = vae.likelihood(latents).log_prob(data.unsqueeze(1))
    prior = gaussians.standard_normal_log_prob(latents)
    log_weights = log_likelihood + prior - gaussians.log_prob(latents, mean, log_var)
    actual = terms(vae, rows, config, first_row=0)
    expected = objectives.importance_weighted_bound(log_weights).double()
    # Sums of 64 terms of about a nat: float32 rounds each at 1e-7.
    torch.testing.assert_close(actual.iwae, expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(actual.log_likelihood, log_likelihood.mean(dim=1).double(), rtol=1e-5, atol=1e-4)
    evaluation = evaluate(vae, rows, config, split="test", checkpoint_sha256="0" * 64)
    assert evaluation.binarisation.startswith("none: ")


@pytest.mark.slow
def test_a_gaussian_vae_leaves_ppca_behind(digits: Dataset, tmp_path: Path) -> None:
    """With eight latents its bound on the test digits lies above pPCA's exact log p(x), far beyond the noise.

    Both are densities of the same intensities in [0, 1], with one variance for all pixels: comparable to the nat.
    """
    config = presets.digits().override(
        [
            "model.likelihood=gaussian",
            "model.latent_dim=8",
            "model.hidden_dims=[256]",
            "optimizer.epochs=100",
            "optimizer.learning_rate=2e-3",
            "optimizer.validation_interval_epochs=20",
        ]
    )
    fit(config, digits, RunFolder(tmp_path), device=CPU)
    evaluation = evaluate_run(RunFolder(tmp_path), digits, config.evaluation, device=CPU)
    train, test = (torch.from_numpy(rows).double().flatten(1) / 255 for rows in (digits.train, digits.test))
    exact = ProbabilisticPCA.fit(train, 8).log_prob(test).mean().item()
    # 28.4 against 14.4 nats where this was written: half of the distance is asked for.
    assert -evaluation.nll_iwae.value > exact + 7 + 5 * evaluation.nll_iwae.standard_error
    assert evaluation.elbo.value > exact + 7


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


@pytest.mark.parametrize("num_samples", [1, 6, 7, 8, 29, 60])
def test_pieces_do_not_show(
    num_samples: int, smoke_run: SmokeRun, digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples of one image in several runs, several images in one, noise in other pieces: the same figures."""
    config = _config(num_samples=num_samples)
    whole = terms(smoke_run.vae, digits.test[:5], config, first_row=3)
    monkeypatch.setattr(evaluate_module, "_ROWS_AT_ONCE", {"cpu": 7})
    monkeypatch.setattr(evaluate_module, "_NOISE_AT_ONCE", {"cpu": 15})
    for expected, actual in zip(whole, terms(smoke_run.vae, digits.test[:5], config, first_row=3), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=SINGLE)


def test_limits_of_the_nll_are_stated(evaluation: Evaluation, smoke_run: SmokeRun, digits: Dataset) -> None:
    """Of the rows that were measured: no model is below the one, a collapsed one at the other."""
    limits = evaluation.pixel_bounds
    assert limits is not None
    rows = digits.test[: evaluation.num_images]
    assert limits.binarisation_entropy.value == pixel_bounds.binarisation_entropy(rows).value
    train = pixel_bounds.independent_pixels_nll(digits.train, rows)
    assert limits.independent_pixels.value == pytest.approx(train.value)
    assert limits.binarisation_entropy.value < evaluation.nll_iwae.value
    assert _evaluate(smoke_run, digits, _config()).pixel_bounds is None


def test_collapse_raises_the_alarm(smoke_run: SmokeRun, digits: Dataset) -> None:
    """A posterior that is the prior whatever the image: no KL, no active unit, and the record says both."""
    vae = copy.deepcopy(smoke_run.vae)
    vae.encoder.head.weight.zero_()
    vae.encoder.head.bias.zero_()
    collapsed = _evaluate(smoke_run._replace(vae=vae), digits, _config())
    assert (collapsed.alarms, collapsed.has_collapsed) == (("kl", "active-units"), True)
    # Wide apart, one unit of four active is just enough; a KL of more than a nat too.
    vae.encoder.head.weight[0, :] = 1
    assert not _evaluate(smoke_run._replace(vae=vae), digits, _config()).has_collapsed


def test_impossible_figures_are_refused(
    smoke_run: SmokeRun, digits: Dataset, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Below the entropy of the binarisation no NLL is one: the error says so, and nothing is recorded."""
    folder = RunFolder(tmp_path)
    folder.best.write_bytes(smoke_run.folder.best.read_bytes())
    monkeypatch.setattr(evaluate_module, "binary_log_prob", lambda *given: binary_log_prob(*given) / 4)
    with pytest.raises(EntropyUndercut, match=r"NLL of .* lies below .* entropy of .* nothing was recorded"):
        evaluate_run(folder, digits, _config(), device=CPU)
    assert not folder.evaluation.exists()


def test_figures_recorded_before_there_were_alarms_are_read(evaluation: Evaluation) -> None:
    """A folder of an older version exports as it did: what it does not say is unknown, not wrong."""
    newer = {"alarms", "pixel_bounds", "sample_quality", "geometry", "bracket"}
    older = {key: value for key, value in json.loads(evaluation.to_json()).items() if key not in newer}
    read = Evaluation.parse(older)
    assert read.metrics() == evaluation.metrics()
    assert (read.alarms, read.pixel_bounds, read.sample_quality) == ((), None, ())


def test_extras_are_recorded_beside_the_same_figures(smoke_run: SmokeRun, digits: Dataset, tmp_path: Path) -> None:
    """Samples of both kinds, latents and a bracket are read back; what an export needs does not change."""
    folder = RunFolder(tmp_path)
    folder.best.write_bytes(smoke_run.folder.best.read_bytes())
    plain = evaluate_run(folder, digits, _config(), device=CPU)
    labels = load_labels(DataConfig(name="digits"))
    extras = Extras(num_samples=50, labels=labels, num_annealed=2, num_temperatures=5)
    whole = evaluate_run(folder, digits, _config(), device=CPU, extras=extras)
    assert recorded_evaluation(folder) == whole
    assert whole.metrics() == plain.metrics()
    assert [quality.kind for quality in whole.sample_quality] == ["means", "draws"]
    assert whole.sample_quality[0].num_samples == 50
    assert whole.geometry is not None
    assert whole.bracket is not None
    expected = terms(smoke_run.vae, digits.test[:2], _config(), first_row=0).iwae.mean().item()
    assert whole.bracket.nll_iwae.value == pytest.approx(-expected)


def test_extras_of_other_likelihoods_are_grey(digits: Dataset) -> None:
    """A Gaussian likelihood binarises nothing: no limits, no draws; without labels no word of classes."""
    model = presets.smoke().model.override(["likelihood=gaussian"])
    vae = VAE(model, (1, 8, 8), generator(0, TrainingStream.INIT)).requires_grad_(requires_grad=False)
    measured = evaluate(vae, digits.test, _config(), split="test", checkpoint_sha256="0" * 64, train=digits.train)
    assert measured.pixel_bounds is None
    quality = with_extras(measured, vae, digits, _config(), Extras(num_samples=40))
    assert [found.kind for found in quality.sample_quality] == ["means"]
    assert (quality.geometry, quality.bracket) == (None, None)


def test_a_record_says_which_weights_were_measured(
    smoke_run: SmokeRun, evaluation: Evaluation, digits: Dataset, tmp_path: Path
) -> None:
    """Averaged or raw, the best of the validation or the last: as the configuration has it."""
    assert evaluation.weights == "exponential moving average, best validation ELBO"
    best = checkpoint.load(smoke_run.folder.best)
    config = best.config.override(["optimizer.ema_decay=0", "optimizer.selection=last"])
    raw = RunFolder(tmp_path)
    checkpoint.save(replace(best, config=config), raw.best)
    assert evaluate_run(raw, digits, config.evaluation, device=CPU).weights == "raw, last epoch"
