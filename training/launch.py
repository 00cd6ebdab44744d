"""One run in one of its processes: from the folder as it was found to the fitted model.

The command line calls it in its own process, torchrun starts that command line several times, and Ray Train calls
it in processes of its own; the loop is the same.
"""

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from serving.typed_config import Config
from training import checkpoint
from training import data as datasets
from training.checkpoint import RunFolder, write_atomically
from training.config import TrainingConfig
from training.data import Dataset
from training.distributed import ALONE, Processes
from training.download import Progress
from training.environment import environment_json
from training.tensorboard import TensorBoard
from training.trainer import (
    DeviceName,
    FitResult,
    Metrics,
    Trainer,
    check_setup,
    choose_device,
    load_for_resume,
)


class Execution(Config):
    """How a run is computed, as opposed to what: a resumed run may have another."""

    device: DeviceName = "auto"
    """Where to compute."""

    data_dir: Path | None = None
    """Folder of the official files of data sets; null: the user's cache folder."""

    is_compiled: bool = False
    """Try to make steps faster, see `training.acceleration`."""

    has_tensorboard: bool = False
    """Write for TensorBoard."""


def load_data(
    config: TrainingConfig, execution: Execution, processes: Processes = ALONE, *, progress: Progress | None = None
) -> tuple[TrainingConfig, Dataset]:
    """Return the data, and the configuration with the shape of the user's own filled in.

    What must be downloaded, the first process downloads.
    """
    with processes.first_alone():
        dataset = datasets.load(config.data, data_dir=execution.data_dir, progress=progress)
    if config.data.name == datasets.OWN:
        config = config.merge({"data": {"data_shape": dataset.data_shape}})
    return config, dataset


def prepare(
    config: TrainingConfig,
    dataset: Dataset,
    run: RunFolder,
    execution: Execution,
    *,
    resume: str,
    processes: Processes = ALONE,
) -> None:
    """Leave in the run folder what the run begins with, and nothing that is of another; the first process does it.

    Args:
        config: What to do.
        dataset: The images.
        run: Where.
        execution: How.
        resume: `auto`: go on where the run in the folder is, if there is one; `never`: begin again; else a run
            folder or a checkpoint to go on from.
        processes: Those that share the work; all call this, and go on when the first one is done.

    Raises:
        InvalidSetup: If the run cannot begin; then nothing in the folder was touched.
    """
    check_setup(config, dataset, num_processes=processes.size)
    if execution.has_tensorboard:
        TensorBoard.check_installed()
    device = choose_device(execution.device)
    with processes.first_alone():
        if not processes.is_first:
            return
        _set_start(config, run, resume)
        # The environment first: it is the sign of a run, should this process be killed right here. That of a run
        # which is only read again stays: it says where the run was made.
        if not _is_finished(config, run):
            write_atomically(run.environment, environment_json(seed=config.seed, device=device).encode())
        write_atomically(run.config, config.to_json().encode())


def fit_share(
    config: TrainingConfig,
    dataset: Dataset,
    run: RunFolder,
    execution: Execution,
    *,
    processes: Processes = ALONE,
    should_stop: Callable[[], bool] = lambda: False,
    listener: Callable[[Metrics], None] = lambda _: None,
) -> FitResult:
    """Do this process's share of a prepared run.

    Args:
        config: What to do.
        dataset: The images; all of them, in every process.
        run: Where it was prepared; the first process writes.
        execution: How.
        processes: Those that share the work.
        should_stop: Asked after every step; if true in any process, the state is saved and the fit ends in all.
        listener: Told about every validation, in the first process.
    """
    device = processes.device(choose_device(execution.device))
    trainer = Trainer(config, dataset, run, device=device, processes=processes, is_compiled=execution.is_compiled)
    begins_at = load_for_resume(config, run.last) if run.last.exists() else None
    if begins_at is not None:
        trainer.restore(begins_at)
    if not processes.is_first:
        return trainer.run(should_stop, lambda _: None)
    with ExitStack() as stack:
        listeners = [listener]
        if execution.has_tensorboard:
            first_step = 0 if begins_at is None else begins_at.step
            listeners.append(stack.enter_context(TensorBoard(run, dataset, first_step=first_step)))
        return trainer.run(should_stop, _all(listeners))


def _all(listeners: list[Callable[[Metrics], None]]) -> Callable[[Metrics], None]:
    def tell(metrics: Metrics) -> None:
        for listener in listeners:
            listener(metrics)

    return tell


def _is_finished(config: TrainingConfig, run: RunFolder) -> bool:
    """Return whether all epochs of the run in the folder are done."""
    if not (run.last.exists() and run.environment.exists() and run.metrics.exists()):
        return False
    lines = run.metrics.read_text().splitlines()
    return bool(lines) and json.loads(lines[-1])["epoch"] >= config.optimizer.epochs


def _set_start(config: TrainingConfig, run: RunFolder, resume: str) -> None:
    if resume == "never" or (resume == "auto" and not run.last.exists()):
        run.clear()
        return
    path = run.path if resume == "auto" else Path(resume)
    file = RunFolder(path).last if path.is_dir() else path
    found = load_for_resume(config, file)
    run.sweep()
    if file.resolve() == run.last.resolve():
        return
    if file.parent.resolve() != run.path.resolve():
        run.adopt(RunFolder(file.parent))
    checkpoint.save(found, run.last)
    if not run.best.exists():
        checkpoint.save(found, run.best)
