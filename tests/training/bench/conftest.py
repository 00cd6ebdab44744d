"""Small tasks, and the peers' packages where they are."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from training.bench import contest, plan
from training.bench.plan import BenchPlan, Setting
from training.bench.tasks import EvaluationTask, TrainingTask, weights_of

SETTING = Setting(latent_dim=4, batch_size=32, num_threads=1)


@pytest.fixture
def small_plan() -> BenchPlan:
    """Return a plan of two rounds of three steps."""
    return plan.quick().merge({"num_rounds": 2, "num_rows": 96, "batch_sizes": (32,)})


@pytest.fixture
def training_task(small_plan: BenchPlan) -> TrainingTask:
    """Return three rounds of three steps on made-up images."""
    images = contest.synthetic_images(96, 64, seed=1)
    return TrainingTask(small_plan.training(SETTING), images.train, images.test, num_threads=1)


@pytest.fixture
def evaluation_task(small_plan: BenchPlan, training_task: TrainingTask) -> EvaluationTask:
    """Return two rounds of an untrained model."""
    return EvaluationTask(
        weights_of(training_task.start()),
        training_task.config.model,
        training_task.held_out[:16],
        small_plan.evaluation(),
        num_rounds=2,
        num_threads=1,
    )


@pytest.fixture
def peers_folder() -> Path:
    """Return the folder that `make training-peers` fills."""
    folder = Path(sys.prefix) / "training-peers"
    if contest.version("pythae", folder) is None or contest.version("pyro-ppl", folder) is None:
        pytest.skip("no peers; run make training-peers")
    return folder


@pytest.fixture
def _peers(peers_folder: Path) -> Iterator[None]:
    """Make the peers' packages importable; at the end of the path, where nothing of ours is hidden."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path, str(peers_folder)])
        yield
