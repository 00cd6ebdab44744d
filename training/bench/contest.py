"""Who takes part, and the whole benchmark: every setting, every contestant, one report."""

import os
import platform
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from training.bench import own_contestants, peers
from training.bench.plan import EVALUATION_TARGET, TRAINING_TARGET, TUTORIAL_TARGET, BenchPlan, Setting
from training.bench.processes import Lap, Work, Worker, alternate, workers
from training.bench.report import OURS, BenchReport, EvaluationResult, TrainingResult
from training.bench.tasks import (
    EndRound,
    EvaluationTask,
    Fitted,
    Measured,
    Outcome,
    Task,
    TrainingTask,
    Weights,
    fitted,
    held_out_elbo,
)
from training.data import MAX_PIXEL, Pixels
from training.environment import processor
from training.models.vae import VAE

_DATA_SHAPE: Final = (1, 28, 28)


class Images(NamedTuple):
    """What is fitted to and measured on; uint8, shape (n, *data_shape)."""

    description: str
    train: Pixels
    test: Pixels


class Entry(NamedTuple):
    """A contestant."""

    name: str
    work: Work
    target: float
    """Least ratio of its time to ours that we want to see."""
    package: str | None = None
    """Distribution that must be installed."""


def _fit(train: Callable[[TrainingTask, EndRound], VAE], task: TrainingTask, end_round: EndRound) -> Outcome:
    return fitted(train(task, end_round), task)


def _measure(
    evaluate: Callable[[EvaluationTask, EndRound], NDArray[np.float64]], task: EvaluationTask, end_round: EndRound
) -> Outcome:
    return Measured(evaluate(task, end_round))


TRAINERS: Final = (
    Entry(OURS, partial(_fit, own_contestants.train_ours), 1),
    Entry("pythae", partial(_fit, peers.train_pythae), TRAINING_TARGET, "pythae"),
    Entry("Pyro, DataLoader", partial(_fit, peers.train_pyro), TRAINING_TARGET, "pyro-ppl"),
    Entry("Pyro, tensors", partial(_fit, peers.train_pyro_tensors), TRAINING_TARGET, "pyro-ppl"),
    Entry("tutorial loop", partial(_fit, own_contestants.train_like_tutorial), TUTORIAL_TARGET),
)
"""Ours first: the others are compared with it."""

DEFAULT_CHUNK: Final = 100
"""Samples that pythae's `get_nll` computes at once unless told otherwise."""


def evaluators(plan: BenchPlan) -> tuple[Entry, ...]:
    """Return who evaluates; pythae with its default, and as fast as its one setting makes it."""
    k = plan.num_importance_samples
    return (
        Entry(OURS, partial(_measure, own_contestants.evaluate_ours), 1),
        *(
            Entry(
                f"get_nll by {chunk}",
                partial(_measure, partial(peers.evaluate_pythae, chunk=chunk)),
                EVALUATION_TARGET,
                "pythae",
            )
            for chunk in dict.fromkeys((DEFAULT_CHUNK, k))
        ),
    )


def version(package: str, folder: Path | None = None) -> str | None:
    """Return the version of a package of this environment, or of a folder beside it; None if it is in neither."""
    places = sys.path if folder is None else [*sys.path, str(folder)]
    return next((str(found.version) for found in metadata.distributions(name=package, path=places)), None)


def synthetic_images(num_train: int, num_test: int, *, seed: int) -> Images:
    """Return made-up images of MNIST's shape: three soft spots each, at places that the seed decides."""
    random = np.random.default_rng(seed)
    num = num_train + num_test
    rows, columns = np.arange(_DATA_SHAPE[1])[:, None], np.arange(_DATA_SHAPE[2])
    intensity = np.zeros((num, *_DATA_SHAPE[1:]), dtype=np.float32)
    for _ in range(3):
        top, left = random.uniform(6, 22, (2, num, 1, 1)).astype(np.float32)
        np.maximum(intensity, np.exp(-((rows - top) ** 2 + (columns - left) ** 2) / 8), out=intensity)
    pixels = np.rint(intensity * MAX_PIXEL).astype(np.uint8).reshape(num, *_DATA_SHAPE)
    return Images("synthetic spots, 28x28", pixels[:num_train], pixels[num_train:])


def bench(
    plan: BenchPlan,
    images: Images,
    *,
    peers_folder: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> BenchReport:
    """Return what the benchmark finds.

    Args:
        plan: What to measure.
        images: What to fit to and measure on; only the first rows are used.
        peers_folder: Where the packages of peers are, unless they are in this environment.
        say: Told about each setting.

    Raises:
        ContestantFailed: If one does not come to the end.
    """
    trainers, measurers = present(TRAINERS, peers_folder), present(evaluators(plan), peers_folder)
    everybody = (*TRAINERS, *evaluators(plan))
    here = {entry.name for entry in (*trainers, *measurers)}
    images = images._replace(train=images.train[: plan.num_rows], test=images.test[: plan.num_held_out])
    where = machine()  # before our own processes make it busy
    training: list[TrainingResult] = []
    evaluation: list[EvaluationResult] = []
    with workers(max(len(trainers), len(measurers)), peers_folder) as field:
        for setting in plan.settings():
            results, weights = _train(plan, setting, images, trainers, field)
            training += results
            say(_line(setting, [(result.contestant, result.timing.ratio.median) for result in results]))
            if setting.latent_dim == plan.latent_dims[0]:
                chosen = setting, weights
        for num_threads in plan.threads:
            setting = chosen[0].merge({"num_threads": num_threads})
            found = _evaluate(plan, setting, chosen[1], images, (measurers, field))
            evaluation += found
            say(_line(setting, [(result.contestant, result.timing.ratio.median) for result in found]))
    return BenchReport(
        date=datetime.now(UTC).date().isoformat(),
        machine=where,
        versions=_versions(everybody, peers_folder),
        data=images.description,
        plan=plan,
        absent=tuple(entry.name for entry in everybody if entry.name not in here),
        training=tuple(training),
        evaluation=tuple(evaluation),
    )


def present(entries: Sequence[Entry], folder: Path | None) -> list[Entry]:
    """Return the entries whose packages are here."""
    return [entry for entry in entries if entry.package is None or version(entry.package, folder)]


def machine() -> dict[str, str]:
    """Return what a reader must know of this machine."""
    return {
        "processor": processor(),
        "cores": str(os.cpu_count()),
        "system": platform.system(),
        "load before": f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown",
    }


def _train(
    plan: BenchPlan, setting: Setting, images: Images, entries: Sequence[Entry], field: Sequence[Worker]
) -> tuple[list[TrainingResult], Weights]:
    """Return the results of one setting, and the weights that ours fitted."""
    num_images = len(images.train) // setting.batch_size * setting.batch_size
    task = TrainingTask(plan.training(setting), images.train[:num_images], images.test, setting.num_threads)
    start_elbo = held_out_elbo(task.start(), task.held_out, seed=plan.seed)
    outcomes, laps = _contest(entries, field, task)
    fits = [outcome for outcome in outcomes if isinstance(outcome, Fitted)]
    results = [
        TrainingResult.of(
            entry.name,
            fit,
            lap,
            ours=(fits[0], laps[0]),
            setting=setting,
            target=entry.target,
            start_elbo=start_elbo,
            num_images=num_images,
        )
        for entry, fit, lap in zip(entries, fits, laps, strict=True)
    ]
    return results, fits[0].weights


def _evaluate(
    plan: BenchPlan,
    setting: Setting,
    weights: Weights,
    images: Images,
    entrants: tuple[Sequence[Entry], Sequence[Worker]],
) -> list[EvaluationResult]:
    entries, field = entrants
    task = EvaluationTask(
        weights,
        plan.training(setting).model,
        images.test[: plan.max_images],
        plan.evaluation(),
        plan.num_rounds + 1,
        setting.num_threads,
    )
    outcomes, laps = _contest(entries, field, task)
    found = [outcome for outcome in outcomes if isinstance(outcome, Measured)]
    return [
        EvaluationResult.of(
            entry.name, measured, lap, ours=(found[0], laps[0]), setting=setting, target=entry.target
        )
        for entry, measured, lap in zip(entries, found, laps, strict=True)
    ]


def _contest(
    entries: Sequence[Entry], field: Sequence[Worker], task: Task
) -> tuple[list[Outcome], list[list[Lap]]]:
    """Let all do one task in turns; return what came of it and how long the rounds took."""
    field = field[: len(entries)]
    for entry, worker in zip(entries, field, strict=True):
        worker.begin(entry.name, entry.work, task)
    laps = alternate(field, task.num_rounds)
    return [worker.outcome() for worker in field], laps


def _versions(entries: Sequence[Entry], folder: Path | None) -> dict[str, str]:
    packages = dict.fromkeys(["vae-serving", "numpy", *(entry.package for entry in entries if entry.package)])
    found = {package: version(package, folder) for package in packages}
    here = {package: number for package, number in found.items() if number is not None}
    return {"Python": platform.python_version(), "torch": torch.__version__} | here


def _line(setting: Setting, ratios: Sequence[tuple[str, float]]) -> str:
    others = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios if name != OURS)
    where = f"latents {setting.latent_dim}, batch {setting.batch_size}, threads {setting.num_threads}"
    return f"{where}: time / ours: {others or 'no peer is here'}"
