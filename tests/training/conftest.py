"""Data, a finished smoke run and a bundle of it, shared by the tests of training."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from training import checkpoint, data, presets
from training.checkpoint import RunFolder
from training.config import DataConfig, TrainingConfig
from training.data import Dataset
from training.evaluate import Evaluation, evaluate_run
from training.export import export
from training.graphs import Graph, decoder_graph, encoder_graph
from training.models.vae import VAE
from training.noise import TrainingStream, generator
from training.trainer import fit

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


class SmokeRun(NamedTuple):
    """A finished run of the smoke preset."""

    folder: RunFolder
    config: TrainingConfig
    vae: VAE


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Compute on one thread, here and in processes that tests start.

    Bit-equality holds for equal numbers of threads, and small steps crawl when threads wait for a busy core.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(before)


@pytest.fixture
def seed() -> int:
    """Return the seed of whatever a test draws."""
    return 1312


@pytest.fixture
def source(seed: int) -> torch.Generator:
    """Return a generator of the test's own."""
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="session")
def digits() -> Dataset:
    """Return the digits data set."""
    return data.load(DataConfig(name="digits"))


@pytest.fixture(scope="session")
def smoke_run(digits: Dataset, tmp_path_factory: pytest.TempPathFactory) -> SmokeRun:
    """Return a finished smoke run; do not write into its folder."""
    config = presets.smoke()
    folder = RunFolder(tmp_path_factory.mktemp("run"))
    train = digits._replace(train=digits.train[: config.data.max_train_rows])
    fit(config, train, folder, device=CPU)
    return SmokeRun(folder, config, checkpoint.averaged_model(checkpoint.load(folder.best), (1, 8, 8), CPU))


@pytest.fixture(scope="session")
def evaluation(smoke_run: SmokeRun, digits: Dataset) -> Evaluation:
    """Return the figures of the smoke run."""
    return evaluate_run(smoke_run.folder, digits, smoke_run.config.evaluation, device=CPU)


@pytest.fixture(scope="session")
def bundle_folder(
    smoke_run: SmokeRun, evaluation: Evaluation, digits: Dataset, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Return the smoke run's bundle; do not write into it."""
    folder = tmp_path_factory.mktemp("bundles") / "smoke"
    export(smoke_run.folder, digits, evaluation, folder)
    return folder


@pytest.fixture
def small_vae() -> VAE:
    """Return an untrained model of 2x2 pixels with two latent dimensions."""
    config = presets.smoke().model.override(["latent_dim=2", "hidden_dims=[5]"])
    return VAE(config, (1, 2, 2), generator(0, TrainingStream.INIT))


@pytest.fixture
def idx_folder() -> Path:
    """Return the folder of the official IDX files: $VAE_DATA_DIR, or ../shared/data beside the repository."""
    folder = Path(os.environ.get("VAE_DATA_DIR", ROOT.parent / "shared" / "data"))
    if not (folder / "mnist").is_dir():
        pytest.skip(f"no MNIST files in {folder.name}/mnist; set VAE_DATA_DIR")
    return folder


@pytest.fixture(scope="session")
def smoke_graphs(smoke_run: SmokeRun) -> tuple[Graph, Graph]:
    """Return encoder and decoder of the smoke run."""
    return encoder_graph(smoke_run.vae), decoder_graph(smoke_run.vae)
