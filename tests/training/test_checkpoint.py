"""A checkpoint is what was saved, whole, or it is refused."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from training import checkpoint
from training.checkpoint import Checkpoint, RunFolder
from training.config import TrainingConfig
from training.errors import CheckpointDamaged, NotARun, RunNotFound


@pytest.fixture
def saved(source: torch.Generator) -> Checkpoint:
    """Return a small checkpoint."""
    weights = {"layer.weight": torch.randn((3, 2), generator=source)}
    return Checkpoint(
        config=TrainingConfig(),
        step=7,
        weights=weights,
        averaged_weights={name: weight + 1 for name, weight in weights.items()},
        optimizer={"state": {0: {"step": torch.tensor(7.0)}}, "param_groups": [{"betas": (0.9, 0.999)}]},
        sums=torch.tensor([1.0, 2.0, 3.0]).double(),
        num_summed=3,
        best_bound=-math.inf,
        validation_bound=-1.5,
        has_collapsed=False,
        saved="2026-01-01T00:00:00+00:00",
    )


def test_checkpoint_survives_its_file(saved: Checkpoint, tmp_path: Path) -> None:
    """Everything comes back, the configuration as a configuration."""
    checkpoint.save(saved, tmp_path / "last.pt")
    read = checkpoint.load(tmp_path / "last.pt")
    assert read.sha256() == saved.sha256()
    assert read.config == saved.config
    assert read.optimizer["param_groups"] == [{"betas": (0.9, 0.999)}]
    assert torch.equal(read.weights["layer.weight"], saved.weights["layer.weight"])


def test_saving_leaves_nothing_else(saved: Checkpoint, tmp_path: Path) -> None:
    """The temporary file is gone, also when an older checkpoint is replaced."""
    for step in (1, 2):
        checkpoint.save(dataclasses.replace(saved, step=step), tmp_path / "last.pt")
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]
    assert checkpoint.load(tmp_path / "last.pt").step == 2


def test_failed_write_keeps_the_old_file(
    saved: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash before the renaming, such as a full disk, does not cost the last checkpoint."""
    checkpoint.save(saved, tmp_path / "last.pt")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(dataclasses.replace(saved, step=8), tmp_path / "last.pt")
    assert checkpoint.load(tmp_path / "last.pt").step == 7


@pytest.mark.parametrize(
    "change",
    [{"step": 8}, {"has_collapsed": True}, {"sums": torch.zeros(2)}, {"config": TrainingConfig(seed=1)}],
    ids=["step", "flag", "tensor", "config"],
)
def test_digest_covers_every_field(change: dict[str, object], saved: Checkpoint) -> None:
    """No value can change without changing the digest."""
    assert dataclasses.replace(saved, **change).sha256() != saved.sha256()  # type: ignore[arg-type]


def test_changed_weight_is_refused(saved: Checkpoint, tmp_path: Path) -> None:
    """One flipped bit in a weight is found, though the file is still a valid archive to PyTorch."""
    path = tmp_path / "last.pt"
    checkpoint.save(saved, path)
    content = bytearray(path.read_bytes())
    place = content.index(saved.weights["layer.weight"].numpy().tobytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointDamaged, match="does not have the digest that it states"):
        checkpoint.load(path)


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04 cut"])
def test_file_that_is_no_checkpoint_is_refused(content: bytes, tmp_path: Path) -> None:
    """The error names the file and the way out."""
    (tmp_path / "last.pt").write_bytes(content)
    with pytest.raises(CheckpointDamaged, match=r"last\.pt: it cannot be read .*--resume never"):
        checkpoint.load(tmp_path / "last.pt")


def test_truncated_checkpoint_is_refused(saved: Checkpoint, tmp_path: Path) -> None:
    """Half a file is not half a model."""
    path = tmp_path / "last.pt"
    checkpoint.save(saved, path)
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(CheckpointDamaged, match="cannot be read"):
        checkpoint.load(path)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    """A file with a pickled object other than tensors and plain values is refused."""
    torch.save({"content": Path("x"), "sha256": ""}, tmp_path / "last.pt")
    with pytest.raises(CheckpointDamaged, match="cannot be read"):
        checkpoint.load(tmp_path / "last.pt")


def test_checkpoint_of_other_software_is_refused(tmp_path: Path) -> None:
    """Plain weights are not a checkpoint of ours."""
    torch.save({"weight": torch.zeros(1)}, tmp_path / "last.pt")
    with pytest.raises(CheckpointDamaged, match="content"):
        checkpoint.load(tmp_path / "last.pt")


def test_absent_checkpoint_names_the_folder(tmp_path: Path) -> None:
    """The error says what is missing and who makes it."""
    with pytest.raises(RunNotFound, match=r"there is no best\.pt; give the folder that vae-train fit wrote"):
        checkpoint.load(RunFolder(tmp_path).best)


def test_clearing_removes_our_files_alone(tmp_path: Path) -> None:
    """Beginning again keeps what somebody else put into the folder."""
    for name in ("config.json", "metrics.jsonl", "last.pt", "best.pt", "evaluation.json", "notes.txt"):
        (tmp_path / name).write_text("x")
    RunFolder(tmp_path).clear()
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_a_folder_of_somebody_else_is_not_cleared(tmp_path: Path) -> None:
    """Without a sign of a run in it, nothing of a folder is removed, whatever its files are called."""
    (tmp_path / "config.json").write_text("theirs")
    with pytest.raises(NotARun, match="not empty and not a run folder"):
        RunFolder(tmp_path).clear()
    assert (tmp_path / "config.json").read_text() == "theirs"


def test_half_written_files_of_a_killed_process_are_swept(saved: Checkpoint, tmp_path: Path) -> None:
    """They are ours by their name, whole files and those of others stay."""
    run = RunFolder(tmp_path)
    checkpoint.save(saved, run.last, run.best)
    for name in (".last.pt.12.partial", ".metrics.jsonl.99999.partial", ".thesis.tex.12.partial"):
        (tmp_path / name).write_text("half")
    run.sweep()
    assert sorted(file.name for file in tmp_path.iterdir()) == [".thesis.tex.12.partial", "best.pt", "last.pt"]


def test_a_folder_with_nothing_but_a_half_written_file_is_free(tmp_path: Path) -> None:
    """Killed while it wrote its very first file, a run can begin again there."""
    (tmp_path / ".environment.json.12.partial").write_text("{")
    RunFolder(tmp_path).clear()
    assert list(tmp_path.iterdir()) == []


def test_the_same_checkpoint_can_have_two_names(saved: Checkpoint, tmp_path: Path) -> None:
    """Both files hold the same bytes."""
    run = RunFolder(tmp_path)
    checkpoint.save(saved, run.best, run.last)
    assert run.best.read_bytes() == run.last.read_bytes()
    assert checkpoint.load(run.best).sha256() == saved.sha256()
