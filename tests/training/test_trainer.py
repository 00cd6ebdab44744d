"""The loop learns, repeats itself, resumes bit for bit, and says when something is wrong."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from training import checkpoint, presets
from training.checkpoint import RunFolder
from training.config import TrainingConfig
from training.data import Dataset
from training.errors import BatchTooLarge, DeviceUnavailable, Diverged, ResumeMismatch, RowsConstant
from training.trainer import FitResult, Metrics, choose_device, fit, load_for_resume

from .conftest import CPU, SmokeRun


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """Return an empty run folder."""
    return RunFolder(tmp_path)


def _config(*assignments: str) -> TrainingConfig:
    """Return a run of eight epochs of twenty steps, validated at every second epoch."""
    return presets.smoke().override(
        ["optimizer.epochs=8", "optimizer.validation_interval_epochs=2", "data.max_train_rows=null", *assignments]
    )


def _stop_at(step: int) -> Callable[[], bool]:
    """Return what asks the loop to stop after a step; it is asked once after each."""
    answers = iter([False] * (step - 1) + [True])
    return lambda: next(answers)


def _folder(path: Path) -> RunFolder:
    """Make an empty run folder."""
    path.mkdir()
    return RunFolder(path)


def _lines(run: RunFolder) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    for line in lines:
        del line["seconds"]
    return lines


def _same_state(first: FitResult, second: FitResult) -> bool:
    states = [dataclasses.replace(result.checkpoint, saved="") for result in (first, second)]
    return states[0].sha256() == states[1].sha256()


def test_bound_rises(digits: Dataset, run: RunFolder) -> None:
    """A few seconds of training lift the validation ELBO by more than a nat, and the latents are used."""
    seen: list[Metrics] = []
    config = _config("optimizer.epochs=40", "optimizer.learning_rate=4e-3")
    result = fit(config, digits, run, device=CPU, listener=seen.append)
    assert result.is_finished
    assert seen[-1].validation.elbo > seen[0].validation.elbo + 1
    assert seen[-1].validation.kl > 1
    assert not seen[-1].has_collapsed


OBJECTIVES = {
    "samples": ["num_samples=4"],
    "free bits": ["free_nats=0.5"],
    "sticking": ["gradient=sticking-the-landing"],
    "score": ["gradient=score-function", "num_samples=3", "baseline=leave-one-out"],
    "weighted": ["bound=importance-weighted", "num_samples=3", "warm_up_fraction=0"],
    "doubly": [
        "bound=importance-weighted",
        "num_samples=3",
        "warm_up_fraction=0",
        "gradient=doubly-reparametrised",
    ],
    "bfloat16": ["precision=bfloat16"],
    "stages": ["schedule=stages", "final_learning_rate=1e-4"],
    "epsilon": ["adam_epsilon=1e-3"],
    "no average": ["ema_decay=0"],
}


@pytest.mark.parametrize("settings", OBJECTIVES.values(), ids=OBJECTIVES)
def test_other_settings_change_the_run_and_it_resumes(
    settings: list[str], digits: Dataset, tmp_path: Path
) -> None:
    """Each setting matters, and an interrupted run still equals one that was left alone."""
    setting = [f"optimizer.{assignment}" for assignment in settings]
    plain = fit(_config(), digits, _folder(tmp_path / "plain"), device=CPU)
    config, whole, parts = _config(*setting), _folder(tmp_path / "whole"), _folder(tmp_path / "parts")
    alone = fit(config, digits, whole, device=CPU)
    assert not _same_state(alone, plain)
    fit(config, digits, parts, device=CPU, should_stop=_stop_at(33))
    resumed = fit(config, digits, parts, device=CPU, resume_from=load_for_resume(config, parts.last))
    assert _same_state(resumed, alone)


@pytest.mark.parametrize(
    "changes",
    [
        ["model.likelihood=gaussian"],
        ["model.likelihood=categorical", "model.num_levels=17", "optimizer.learning_rate=4e-3"],
    ],
    ids=["gaussian", "categorical"],
)
def test_other_likelihoods_are_fitted_and_resumed(changes: list[str], digits: Dataset, tmp_path: Path) -> None:
    """The bound rises, the variance is learned with it, and an interrupted run equals one that was left alone."""
    seen: list[Metrics] = []
    config, whole, parts = _config(*changes), _folder(tmp_path / "whole"), _folder(tmp_path / "parts")
    alone = fit(config, digits, whole, device=CPU, listener=seen.append)
    assert seen[-1].validation.elbo > seen[0].validation.elbo + 1
    fit(config, digits, parts, device=CPU, should_stop=_stop_at(33))
    resumed = fit(config, digits, parts, device=CPU, resume_from=load_for_resume(config, parts.last))
    assert _same_state(resumed, alone)
    assert _lines(parts) == _lines(whole)


def test_a_gaussian_density_may_exceed_one_and_has_a_bound(digits: Dataset, tmp_path: Path) -> None:
    """Pixels that never vary drive the variance to its bound and no further; every number stays finite."""
    flat = digits._replace(
        train=np.zeros_like(digits.train[:128]), validation=np.zeros_like(digits.validation[:32])
    )
    flat.train[0, 0, 0, 0] = 1  # images that are all the same are refused
    seen: list[Metrics] = []
    config = _config(
        "model.likelihood=gaussian",
        "model.noise_log_var_min=-6",
        "optimizer.learning_rate=0.05",
        "optimizer.epochs=100",
    )
    result = fit(config, flat, _folder(tmp_path / "flat"), device=CPU, listener=seen.append)
    # Without any residual each of 64 pixels has the density of N(0, exp(-6)) at its mean, log of which is 2.08.
    largest = 32 * (6 - math.log(2 * math.pi))
    assert 0.9 * largest < seen[-1].validation.log_likelihood <= largest
    assert result.checkpoint.weights["decoder.excess_log_var"].isfinite()


def test_free_bits_keep_the_latents_in_use(digits: Dataset, tmp_path: Path) -> None:
    """With two nats free in each of four dimensions, the KL soon is above what the plain bound has by then."""
    seen: dict[str, list[Metrics]] = {"0": [], "2": []}
    for free_nats, metrics in seen.items():
        config = _config(f"optimizer.free_nats={free_nats}")
        fit(config, digits, _folder(tmp_path / free_nats), device=CPU, listener=metrics.append)
    assert seen["2"][-1].validation.kl > seen["0"][-1].validation.kl + 1


def test_metrics_add_up(smoke_run: SmokeRun) -> None:
    """Every line holds the ELBO and its two terms apart, for training and validation."""
    lines = [Metrics.model_validate_json(line) for line in smoke_run.folder.metrics.read_text().splitlines()]
    assert [line.epoch for line in lines] == [1, 2]
    for terms in (terms for line in lines for terms in (line.train, line.validation)):
        assert terms.elbo == pytest.approx(terms.log_likelihood - terms.kl)
        assert terms.kl >= 0
        assert terms.log_likelihood < 0


def test_run_repeats_itself(digits: Dataset, tmp_path: Path) -> None:
    """The same seed gives the same weights to the last bit, another seed gives others."""
    results = []
    for number, seed in enumerate((3, 3, 4)):
        run = RunFolder(tmp_path / f"{number}")
        run.path.mkdir()
        results.append(fit(_config(f"seed={seed}"), digits, run, device=CPU))
    assert _same_state(results[0], results[1])
    assert results[0].checkpoint.weights_sha256() != results[2].checkpoint.weights_sha256()


@pytest.mark.parametrize("step", [1, 27, 40, 95], ids=["first step", "mid-epoch", "at a validation", "late"])
def test_resumed_run_equals_the_uninterrupted_one(step: int, digits: Dataset, tmp_path: Path) -> None:
    """Stopping at any step and continuing changes neither a weight nor a line of metrics."""
    whole, halved = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "halved")
    whole.path.mkdir()
    halved.path.mkdir()
    uninterrupted = fit(_config(), digits, whole, device=CPU)
    stopped = fit(_config(), digits, halved, device=CPU, should_stop=_stop_at(step))
    assert (stopped.is_finished, stopped.checkpoint.step) == (False, step)
    resumed = fit(_config(), digits, halved, device=CPU, resume_from=load_for_resume(_config(), halved.last))
    assert resumed.is_finished
    assert _same_state(uninterrupted, resumed)
    assert _lines(halved) == _lines(whole)
    assert checkpoint.load(halved.best).weights_sha256() == checkpoint.load(whole.best).weights_sha256()


def test_metrics_after_the_checkpoint_are_made_again(digits: Dataset, run: RunFolder) -> None:
    """A crash between the line and the checkpoint leaves no line twice."""
    fit(_config(), digits, run, device=CPU)
    expected = _lines(run)
    fit(_config("optimizer.epochs=8"), digits, run, device=CPU, resume_from=_early(run, digits))
    assert _lines(run) == expected


def _early(run: RunFolder, digits: Dataset) -> checkpoint.Checkpoint:
    """Return the checkpoint after four of eight epochs."""
    folder = RunFolder(run.path / "early")
    folder.path.mkdir()
    return fit(_config(), digits, folder, device=CPU, should_stop=_stop_at(80)).checkpoint


def test_best_checkpoint_is_that_of_the_best_validation(digits: Dataset, run: RunFolder) -> None:
    """best.pt holds the highest validation ELBO of the metrics."""
    fit(_config(), digits, run, device=CPU)
    lines = [Metrics.model_validate_json(line) for line in run.metrics.read_text().splitlines()]
    best = max(lines, key=lambda line: line.validation.elbo)
    assert checkpoint.load(run.best).step == best.step
    assert checkpoint.load(run.best).validation_bound == best.validation.elbo


def test_averaged_weights_lag_behind(digits: Dataset, run: RunFolder) -> None:
    """The moving average is neither the raw weights nor the initial ones."""
    state = fit(_config(), digits, run, device=CPU).checkpoint
    raw, averaged = state.weights["encoder.head.weight"], state.averaged_weights["encoder.head.weight"]
    assert 0 < (raw - averaged).abs().max() < raw.abs().max()


def test_average_without_memory_is_the_weights(digits: Dataset, run: RunFolder) -> None:
    """What is validated, evaluated and exported are then the weights themselves."""
    state = fit(_config("optimizer.ema_decay=0"), digits, run, device=CPU).checkpoint
    for name, weight in state.weights.items():
        assert torch.equal(state.averaged_weights[name], weight)


def test_importance_weighted_bound_is_recorded_beside_the_elbo(digits: Dataset, run: RunFolder) -> None:
    """Both terms of the ELBO as ever; the bound of five samples is above it, and chooses the best checkpoint."""
    seen: list[Metrics] = []
    settings = ["bound=importance-weighted", "num_samples=5", "warm_up_fraction=0", "learning_rate=4e-3"]
    config = _config("optimizer.epochs=20", *(f"optimizer.{setting}" for setting in settings))
    fit(config, digits, run, device=CPU, listener=seen.append)
    for terms in (terms for line in seen for terms in (line.train, line.validation)):
        assert terms.elbo == pytest.approx(terms.log_likelihood - terms.kl)
        assert terms.importance_weighted is not None
        assert terms.climbed == terms.importance_weighted > terms.elbo
    assert checkpoint.load(run.best).best_bound == max(line.validation.climbed for line in seen)
    (last,) = [line for line in _lines(run) if line["epoch"] == 20]
    assert last["validation"] == seen[-1].validation.model_dump()


def test_other_bounds_are_not_mentioned_where_the_elbo_is_climbed(smoke_run: SmokeRun) -> None:
    """A line of metrics holds what there is, and no nulls."""
    lines = smoke_run.folder.metrics.read_text().splitlines()
    assert all(set(json.loads(line)["train"]) == {"elbo", "log_likelihood", "kl"} for line in lines)


def test_last_checkpoint_can_be_the_result(digits: Dataset, tmp_path: Path) -> None:
    """Without a choice on the validation split, best.pt is of the last validation even where that is a bad one."""
    # A step size that grows: the bound falls in the end.
    growing = ["optimizer.learning_rate=1e-3", "optimizer.final_learning_rate=3", "optimizer.ema_decay=0"]
    chosen, last = _folder(tmp_path / "chosen"), _folder(tmp_path / "last")
    seen: list[Metrics] = []
    fit(_config(*growing), digits, chosen, device=CPU)
    fit(_config(*growing, "optimizer.selection=last"), digits, last, device=CPU, listener=seen.append)
    assert checkpoint.load(chosen.best).step < 160
    assert checkpoint.load(last.best).step == 160
    assert all(line.is_best for line in seen)
    assert checkpoint.load(last.best).best_bound == max(line.validation.elbo for line in seen)


def test_collapse_is_recorded_and_not_before_the_warm_up_ends(digits: Dataset, run: RunFolder) -> None:
    """A KL weight of 50 empties the latents: the alarm rises, and is part of the checkpoint."""
    seen: list[Metrics] = []
    config = _config("optimizer.beta=50", "optimizer.warm_up_fraction=0.5")
    result = fit(config, digits, run, device=CPU, listener=seen.append)
    assert result.checkpoint.has_collapsed
    assert [line.has_collapsed for line in seen] == [False, False, True, True]


def test_divergence_ends_the_run_and_keeps_the_last_checkpoint(digits: Dataset, run: RunFolder) -> None:
    """Not-a-number is an error at the next validation, never a saved model."""
    saved = fit(_config(), digits, run, device=CPU, should_stop=_stop_at(45)).checkpoint
    before = run.last.read_bytes()
    poisoned = {name: torch.full_like(weight, math.nan) for name, weight in saved.weights.items()}
    expected = r"epoch 4: .* lower optimizer\.learning_rate \(first in step 46; .* that of step 45 is kept\)"
    with pytest.raises(Diverged, match=expected):
        fit(
            _config(),
            digits,
            run,
            device=CPU,
            resume_from=dataclasses.replace(saved, weights=poisoned),
        )
    assert run.last.read_bytes() == before


def test_other_configuration_is_not_continued(smoke_run: SmokeRun) -> None:
    """The error names what differs."""
    other = smoke_run.config.override(["model.latent_dim=5", "seed=2"])
    with pytest.raises(ResumeMismatch, match=r"now seed=2, model\.latent_dim=5;.*--resume never"):
        load_for_resume(other, smoke_run.folder.last)


def test_more_epochs_may_be_asked_for(smoke_run: SmokeRun, digits: Dataset, run: RunFolder) -> None:
    """A finished run can be prolonged."""
    longer = smoke_run.config.override(["optimizer.epochs=3", "data.max_train_rows=512"])
    start = load_for_resume(longer, smoke_run.folder.last)
    train = digits._replace(train=digits.train[:512])
    result = fit(longer, train, run, device=CPU, resume_from=start)
    assert (start.step, result.checkpoint.step) == (16, 24)


def test_batch_larger_than_the_data_is_refused(digits: Dataset, run: RunFolder) -> None:
    """A smaller batch than was asked for would be another run; the error says what is possible."""
    config = _config("optimizer.batch_size=1298")
    with pytest.raises(
        BatchTooLarge, match=r"batch_size is 1298 and there are 1297 training rows; .* at most 1297"
    ):
        fit(config, digits, run, device=CPU)
    whole = _config("optimizer.batch_size=1297", "optimizer.epochs=2")
    assert fit(whole, digits, run, device=CPU).checkpoint.step == 2


def test_rows_that_are_all_the_same_are_refused(digits: Dataset, run: RunFolder) -> None:
    """There is nothing to learn, however different the pixels of the one row are; one other row is enough."""
    constant = digits.train[:1].repeat(100, axis=0)
    config = _config("optimizer.epochs=1")
    with pytest.raises(RowsConstant, match="digits: all 100 training rows are the same"):
        fit(config, digits._replace(train=constant), run, device=CPU)
    constant[-1] = digits.train[1]
    assert fit(config, digits._replace(train=constant), run, device=CPU).is_finished


def test_device_that_is_absent_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking for a GPU never falls back in silence; auto does."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == CPU
    with pytest.raises(DeviceUnavailable, match=r"device 'cuda'.*--device cpu"):
        choose_device("cuda")


def test_figures_after_more_epochs_are_those_of_one_run(digits: Dataset, tmp_path: Path) -> None:
    """The last epoch of a run validates outside the interval; what is summed begins anew there."""
    short, whole = RunFolder(tmp_path / "short"), RunFolder(tmp_path / "whole")
    for folder in (short, whole):
        folder.path.mkdir()
    # A constant schedule: then the steps do not depend on how many are to come.
    constant = ("optimizer.final_learning_rate=1e-3", "optimizer.warm_up_fraction=0")
    fit(_config("optimizer.epochs=1", *constant), digits, short, device=CPU)
    longer = _config("optimizer.epochs=2", *constant)
    fit(longer, digits, short, device=CPU, resume_from=load_for_resume(longer, short.last))
    every_epoch = longer.override(["optimizer.validation_interval_epochs=1"])
    fit(every_epoch, digits, whole, device=CPU)
    assert _lines(short)[-1]["train"] == _lines(whole)[-1]["train"]


def test_an_interrupt_saves_no_state_that_cannot_go_on(digits: Dataset, run: RunFolder) -> None:
    """A run that has diverged says so when it is stopped, and keeps the checkpoint from before."""
    with pytest.raises(Diverged):
        fit(_config("optimizer.learning_rate=1e18"), digits, run, device=CPU, should_stop=_stop_at(6))
    assert not run.last.exists()


def test_half_a_line_of_metrics_is_made_again(digits: Dataset, run: RunFolder) -> None:
    """A crash may leave half a line; the run goes on all the same."""
    config = _config("optimizer.epochs=4")
    fit(config, digits, run, device=CPU, should_stop=_stop_at(45))
    with run.metrics.open("a") as file:
        file.write('{"epoch": 4, "st')
    fit(config, digits, run, device=CPU, resume_from=load_for_resume(config, run.last))
    assert [line["epoch"] for line in _lines(run)] == [2, 4]
