"""A run is prepared whole or not at all, and goes on where the folder says."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from training import checkpoint, launch, presets
from training.checkpoint import RunFolder
from training.config import TrainingConfig
from training.data import Dataset
from training.errors import BatchTooLarge, ExtraMissing, InvalidSetup, NotARun, ResumeMismatch, RowsConstant
from training.launch import Execution
from training.trainer import Metrics

from .conftest import SmokeRun

EXECUTION = Execution(device="cpu")


@pytest.fixture
def finished(smoke_run: SmokeRun, tmp_path: Path) -> RunFolder:
    """Return a folder with a finished run in it."""
    folder = tmp_path / "finished"
    shutil.copytree(smoke_run.folder.path, folder)
    (folder / "environment.json").write_text("{}")
    return RunFolder(folder)


@pytest.fixture
def rows(digits: Dataset) -> Dataset:
    """Return the rows of the smoke run."""
    return digits._replace(train=digits.train[:512])


def _content(run: RunFolder) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in run.path.iterdir()}


def test_data_come_with_the_shape_that_was_found(tmp_path: Path, digits: Dataset) -> None:
    """Of the user's own the configuration records the shape; of others nothing changes."""
    config, loaded = launch.load_data(presets.smoke(), EXECUTION)
    assert (config, len(loaded.train)) == (presets.smoke(), 512)
    file = tmp_path / "mine.npy"
    np.save(file, digits.train[:40])
    own = presets.smoke().merge({"data": {"name": "own", "path": str(file)}})
    config, loaded = launch.load_data(own, EXECUTION)
    assert config.data.data_shape == loaded.data_shape == (1, 8, 8)


def test_a_new_run_finds_an_empty_folder(rows: Dataset, tmp_path: Path) -> None:
    """What is recorded before the first step: configuration and environment."""
    run = RunFolder(tmp_path / "new")
    launch.prepare(presets.smoke(), rows, run, EXECUTION, resume="auto")
    assert sorted(_content(run)) == ["config.json", "environment.json"]
    assert TrainingConfig.model_validate_json(run.config.read_text()) == presets.smoke()


def test_a_finished_run_is_found_again(finished: RunFolder, rows: Dataset) -> None:
    """Going on with a finished run does no step; half-written files of a killed process go."""
    partial = finished.path / ".last.pt.123.partial"
    partial.write_bytes(b"half")
    made_at = '{"device_name": "another machine"}'
    finished.environment.write_text(made_at)
    launch.prepare(presets.smoke(), rows, finished, EXECUTION, resume="auto")
    assert not partial.exists()
    assert finished.environment.read_text() == made_at  # it tells where the run was made
    seen: list[Metrics] = []
    result = launch.fit_share(presets.smoke(), rows, finished, EXECUTION, listener=seen.append)
    assert (result.is_finished, result.checkpoint.step, seen) == (True, 16, [])


def test_another_checkpoint_of_the_folder_can_be_the_start(finished: RunFolder, rows: Dataset) -> None:
    """What is named becomes the newest checkpoint, so that every process finds it."""
    best = checkpoint.load(finished.best)
    finished.last.unlink()
    launch.prepare(presets.smoke(), rows, finished, EXECUTION, resume=str(finished.best))
    assert checkpoint.load(finished.last).sha256() == best.sha256()


@pytest.mark.parametrize("resume", ["never", "auto"])
@pytest.mark.parametrize(
    ("assignment", "error"),
    [("optimizer.batch_size=513", BatchTooLarge), ("data.max_train_rows=1", RowsConstant)],
    ids=["batch", "constant"],
)
def test_what_cannot_begin_removes_nothing(
    assignment: str, error: type[InvalidSetup], resume: str, finished: RunFolder, rows: Dataset
) -> None:
    """The run that is in the folder stays as it is."""
    config = presets.smoke().override([assignment])
    if config.data.max_train_rows == 1:
        rows = rows._replace(train=rows.train[:1].repeat(512, axis=0))
    before = _content(finished)
    with pytest.raises(error):
        launch.prepare(config, rows, finished, EXECUTION, resume=resume)
    assert _content(finished) == before


def test_an_absent_extra_removes_nothing(
    finished: RunFolder, rows: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorBoard is asked for before anything is written, and the error says how to get it."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    before = _content(finished)
    execution = EXECUTION.merge({"has_tensorboard": True})
    with pytest.raises(ExtraMissing, match=r"--tensorboard: .*pip install 'vae-serving\[tensorboard\]'"):
        launch.prepare(presets.smoke(), rows, finished, execution, resume="never")
    assert _content(finished) == before


def test_another_configuration_does_not_go_on(finished: RunFolder, rows: Dataset) -> None:
    """The error comes from the preparation, before any process begins."""
    with pytest.raises(ResumeMismatch, match="now seed=4"):
        launch.prepare(presets.smoke().override(["seed=4"]), rows, finished, EXECUTION, resume="auto")


def test_a_run_killed_at_its_first_file_can_begin_again(rows: Dataset, tmp_path: Path) -> None:
    """The environment alone, or half of it, is the sign of a run; a stranger's folder is not."""
    for name in ("environment.json", ".environment.json.77.partial"):
        run = RunFolder(tmp_path / name)
        run.path.mkdir()
        (run.path / name).write_text("{")
        launch.prepare(presets.smoke(), rows, run, EXECUTION, resume="auto")
        assert sorted(_content(run)) == ["config.json", "environment.json"]
    stranger = RunFolder(tmp_path / "stranger")
    stranger.path.mkdir()
    (stranger.path / "thesis.tex").write_text("")
    with pytest.raises(NotARun):
        launch.prepare(presets.smoke(), rows, stranger, EXECUTION, resume="auto")


def test_tensorboard_is_written_on_request(rows: Dataset, tmp_path: Path) -> None:
    """Into a folder of the run, which beginning again removes."""
    run, execution = RunFolder(tmp_path / "run"), EXECUTION.merge({"has_tensorboard": True})
    launch.prepare(presets.smoke(), rows, run, execution, resume="auto")
    seen: list[Metrics] = []
    launch.fit_share(presets.smoke(), rows, run, execution, listener=seen.append)
    assert [line.epoch for line in seen] == [1, 2]
    assert len(list(run.tensorboard.iterdir())) == 1
    launch.prepare(presets.smoke(), rows, run, EXECUTION, resume="never")
    assert not run.tensorboard.exists()
