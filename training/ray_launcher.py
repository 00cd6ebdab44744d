"""The same loop under Ray Train: processes on the machines of a cluster, or several on this one. An extra.

Ray is imported when a run is launched, for its import starts threads and takes seconds. This is the only module of
training that does.

The run folder and the data must lie where every machine sees them under the same path.
"""

import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from serving import ray_environment
from training import checkpoint as checkpoints
from training import distributed, launch
from training.checkpoint import RunFolder
from training.config import TrainingConfig
from training.errors import ExtraMissing, TrainingError
from training.launch import Execution
from training.trainer import FitResult, Metrics, choose_device, drop_later_metrics

_OBJECT_STORE_BYTES: Final = 128 * 2**20
"""Of a local Ray: its smallest is enough, for no data travel through it."""

_POLL_S: Final = 0.2


def check_installed() -> None:
    """Refuse to begin without the packages that are needed.

    Raises:
        ExtraMissing: If Ray Train cannot be imported.
    """
    ray_environment.prepare()
    try:
        import ray.train.torch  # noqa: F401, PLC0415
    except ImportError as error:
        raise ExtraMissing("--launcher ray", extra="ray-train", problem=str(error)) from None


def fit(
    config: TrainingConfig,
    run: RunFolder,
    execution: Execution,
    *,
    num_workers: int,
    listener: Callable[[Metrics], None] = lambda _: None,
) -> FitResult:
    """Fit a model on Ray's workers, on the cluster of RAY_ADDRESS or a local one, which ends with the fit.

    An interrupted run goes on from its last validation, for a signal does not reach the workers. What they log
    stays in Ray's log files; the validations are read from the run folder.

    Args:
        config: What to do.
        run: Where it was prepared.
        execution: How.
        num_workers: Processes that share every batch.
        listener: Told about every validation.

    Raises:
        ExtraMissing: If Ray Train cannot be imported.
        TrainingError: Whatever ends the loop in a worker.
    """
    check_installed()
    import ray  # noqa: PLC0415
    from ray.train import RunConfig, ScalingConfig, WorkerGroupError  # noqa: PLC0415
    from ray.train.torch import TorchConfig, TorchTrainer  # noqa: PLC0415

    began = time.monotonic()
    has_gpus = choose_device(execution.device).type == "cuda"
    _connect(ray, num_workers)
    try:
        with tempfile.TemporaryDirectory() as storage, _followed(run, listener):
            TorchTrainer(
                _work,
                train_loop_config=_spec(config, run, execution),
                torch_config=TorchConfig(backend="nccl" if has_gpus else "gloo"),
                scaling_config=ScalingConfig(num_workers=num_workers, use_gpu=has_gpus),
                run_config=RunConfig(name=config.name, storage_path=storage),
            ).fit()
    except WorkerGroupError as error:
        _raise_own(error.worker_failures)
        raise
    finally:
        ray.shutdown()
    state = checkpoints.load(run.last)
    return FitResult(state, is_finished=True, seconds=time.monotonic() - began)


def _connect(ray: Any, num_workers: int) -> None:  # noqa: ANN401  # a module that is imported late
    quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    if "RAY_ADDRESS" not in os.environ:
        # Logical processors: a small machine must still place all workers.
        quiet["num_cpus"] = max(os.cpu_count() or 1, num_workers)
        quiet["include_dashboard"] = False
        quiet["object_store_memory"] = _OBJECT_STORE_BYTES
    ray.init(**quiet)


@contextmanager
def _followed(run: RunFolder, listener: Callable[[Metrics], None]) -> Iterator[None]:
    """Tell a listener in this process about the validations that a worker writes, while the block runs."""
    first_step = checkpoints.load(run.last).step if run.last.exists() else 0
    drop_later_metrics(run, first_step)
    is_over = threading.Event()
    thread = threading.Thread(target=_follow, args=(run, listener, first_step, is_over), daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def _follow(run: RunFolder, listener: Callable[[Metrics], None], told_step: int, is_over: threading.Event) -> None:
    is_last_look = False
    while not is_last_look:
        is_last_look = is_over.wait(_POLL_S)
        text = run.metrics.read_text() if run.metrics.exists() else ""
        whole, _, _ = text.rpartition("\n")  # the worker may be in the middle of a line
        for line in whole.splitlines():
            metrics = Metrics.model_validate_json(line)
            if metrics.step > told_step:
                told_step = metrics.step
                listener(metrics)


def _spec(config: TrainingConfig, run: RunFolder, execution: Execution) -> dict[str, str]:
    """Return everything that a worker must know, as text; paths mean the same from any working directory."""
    folder = execution.data_dir
    located = execution.merge({"data_dir": None if folder is None else folder.absolute()})
    return {"config": config.to_json(), "run": str(run.path.absolute()), "execution": located.model_dump_json()}


def _work(spec: dict[str, str]) -> None:
    """Do one worker's share."""
    config = TrainingConfig.parse(json.loads(spec["config"]))
    execution = Execution.parse(json.loads(spec["execution"]))
    run = RunFolder(Path(spec["run"]))
    with distributed.joined(choose_device(execution.device).type) as processes:
        config, dataset = launch.load_data(config, execution, processes)
        launch.fit_share(config, dataset, run, execution, processes=processes)


def _raise_own(failures: dict[int, Exception]) -> None:
    """Raise the error of ours that a worker ended with, if it was one."""
    for failure in failures.values():
        # Ray wraps what the loop raised, to keep its traceback.
        own = getattr(failure, "_base_exc", failure)
        if isinstance(own, TrainingError):
            raise own from None
