"""The commands do what their help says; expected errors are one line and an exit code, never a traceback."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from training import checkpoint
from training.__main__ import main
from training.cli import app
from training.data import Dataset

from .conftest import ROOT, SmokeRun

LONG = ["--set", "optimizer.epochs=300", "--set", "optimizer.validation_interval_epochs=20"]
"""Some seconds of training with a validation every 0.2 s: time enough to be killed in the middle."""


def _invoke(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)


def _json(*words: object) -> dict[str, Any]:
    result = _invoke(*words, "--json")
    assert result.exit_code == 0
    read: dict[str, Any] = json.loads(result.stdout)
    return read


def _fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    """Run the entry point and return its exit code and what it says."""
    monkeypatch.setattr(sys, "argv", ["vae-train", *map(str, words)])
    with pytest.raises(SystemExit, match=r"\d") as ended:
        main()
    return int(str(ended.value.code)), capsys.readouterr().err


def test_whole_path_from_pixels_to_a_bundle(tmp_path: Path) -> None:
    """fit, evaluate, export and sample work one after the other, with what the former left."""
    run, bundle = tmp_path / "run", tmp_path / "bundle"
    fitted = _json("fit", "smoke", "--output-dir", run)
    assert (fitted["is_finished"], fitted["step"]) == (True, 16)
    figures = _json("evaluate", run, "--max-images", 16, "--num-importance-samples", 5)
    assert (figures["num_images"], figures["num_importance_samples"]) == (16, 5)
    manifest = _json("export", run, bundle, "--name", "first")
    assert (manifest["name"], manifest["metrics"]["n"]) == ("first", 16)
    assert _invoke("sample", run, "--out", tmp_path / "s.png", "--num", 4, "--seed", 2).exit_code == 0
    with Image.open(tmp_path / "s.png") as picture:
        assert picture.size == (118, 118)
    assert sorted(file.name for file in run.iterdir()) == [
        "best.pt",
        "config.json",
        "environment.json",
        "evaluation.json",
        "last.pt",
        "metrics.jsonl",
    ]


def test_export_evaluates_first_if_nobody_did(smoke_run: SmokeRun, tmp_path: Path) -> None:
    """A bundle never goes without figures."""
    for name in ("best.pt", "last.pt"):
        (tmp_path / name).write_bytes((smoke_run.folder.path / name).read_bytes())
    result = _invoke("export", tmp_path, tmp_path / "bundle")
    assert "evaluating first" in result.stderr
    assert "smoke version" in result.stdout
    assert (tmp_path / "evaluation.json").exists()


def test_convolutions_go_the_whole_way(tmp_path: Path) -> None:
    """Fitted, continued, exported behind all gates: parity, batch independence, no random operators."""
    run = tmp_path / "run"
    fitted = _json("fit", "smoke", "--set", "model.channels=[4, 8]", "--output-dir", run)
    assert fitted["is_finished"]
    manifest = _json("export", run, tmp_path / "bundle")
    assert manifest["data_shape"] == [1, 8, 8]
    assert "64 - 4 channels - 8 channels - 32 - 4 and back" in (tmp_path / "bundle/MODEL_CARD.md").read_text()


@pytest.mark.parametrize("shape", [(40, 6, 5, 3), (40, 6, 5), (40, 30)], ids=["colour", "grey", "values"])
def test_own_data_go_the_whole_way(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """Inferred and shown, fitted, measured, exported and drawn, whatever their shape."""
    file = tmp_path / "my.npy"
    np.save(file, np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    run, row = tmp_path / "run", [30] if len(shape) == 2 else [shape[3] if len(shape) == 4 else 1, 6, 5]
    shown = _json("data", file)
    assert (shown["data_shape"], shown["values"]) == (row, "uint8 in [0, 255]")
    _json("fit", "smoke", "--data", file, "--output-dir", run, "--batch-size", 16)
    assert json.loads((run / "config.json").read_text())["data"]["data_shape"] == row
    assert _json("evaluate", run, "--max-images", 4)["num_images"] == 4
    manifest = _json("export", run, tmp_path / "bundle")
    assert (manifest["data_shape"], manifest["dataset"]["name"]) == (row, "own: my.npy")
    assert _invoke("sample", run, "--out", tmp_path / "s.png", "--num", 4).exit_code == 0
    with Image.open(tmp_path / "s.png") as picture:
        assert picture.mode == ("RGB" if len(shape) == 4 else "L")


def test_own_data_that_changed_do_not_continue_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checkpoint remembers the digest of what it was fitted to."""
    file, run = tmp_path / "my.npy", tmp_path / "run"
    pixels = np.random.default_rng(0).integers(0, 256, (40, 6, 5), dtype=np.uint8)
    np.save(file, pixels)
    _json("fit", "smoke", "--data", file, "--output-dir", run, "--batch-size", 16)
    np.save(file, pixels[:, :5])
    code, text = _fails(
        monkeypatch, capsys, "fit", "smoke", "--data", file, "--output-dir", run, "--batch-size", 16
    )
    assert code == 2
    assert "data.data_shape" in text


def test_short_options_are_overrides(tmp_path: Path) -> None:
    """What the run folder records has every option applied, the last word being the option's."""
    words = ["--epochs", 1, "--seed", 9, "--batch-size", 100, "--lr", 0.002, "--set", "model.latent_dim=3"]
    _json("fit", "smoke", "--output-dir", tmp_path, *words)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["seed"] == 9
    assert config["model"]["latent_dim"] == 3
    optimizer = config["optimizer"]
    assert (optimizer["epochs"], optimizer["batch_size"], optimizer["learning_rate"]) == (1, 100, 0.002)


def test_threads_are_recorded(tmp_path: Path) -> None:
    """Bit-equality holds for equal numbers of threads, so the number is part of the record."""
    _json("fit", "smoke", "--output-dir", tmp_path, "--threads", 1)
    assert json.loads((tmp_path / "environment.json").read_text())["num_threads"] == 1


def test_smoke_shortens_any_preset(tmp_path: Path) -> None:
    """Two epochs of the real networks."""
    assert _json("fit", "digits", "--smoke", "--output-dir", tmp_path)["step"] == 16


def test_finished_run_is_not_repeated(tmp_path: Path) -> None:
    """The same command again does nothing, and --resume never begins again."""
    first = _json("fit", "smoke", "--output-dir", tmp_path)
    before = (tmp_path / "last.pt").read_bytes()
    second = _json("fit", "smoke", "--output-dir", tmp_path)
    assert second["weights_sha256"] == first["weights_sha256"]
    assert (tmp_path / "last.pt").read_bytes() == before
    other = _json("fit", "smoke", "--output-dir", tmp_path, "--resume", "never", "--seed", 1)
    assert other["weights_sha256"] != first["weights_sha256"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("what", ["", "last.pt"], ids=["folder", "checkpoint"])
def test_run_can_be_continued_elsewhere(what: str, tmp_path: Path, smoke_run: SmokeRun) -> None:
    """--resume PATH begins where another run ended and leaves that run alone."""
    start, run = smoke_run.folder.path / what, tmp_path / "longer"
    result = _json("fit", "smoke", "--epochs", 3, "--output-dir", run, "--resume", start)
    assert (result["is_finished"], result["step"]) == (True, 24)
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 3
    assert checkpoint.load(run / "best.pt").best_bound == result["best_validation_bound"]
    assert checkpoint.load(smoke_run.folder.last).step == 16


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the digest of the weights that the long run ends with."""
    digest: str = _json("fit", "smoke", *LONG, "--output-dir", tmp_path_factory.mktemp("long"))["weights_sha256"]
    return digest


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=str
)
def test_killed_run_continues_bit_for_bit(
    number: signal.Signals, code: int, uninterrupted: str, tmp_path: Path
) -> None:
    """Killed in the middle and started again, the run ends with the weights of one that was left alone."""
    command = [sys.executable, "-m", "training", "fit", "smoke", *LONG, "--output-dir", str(tmp_path), "--json"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "metrics.jsonl"
    until = time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2) and time.monotonic() < until:
        time.sleep(0.005)
    os.kill(process.pid, number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in said
    stopped = checkpoint.load(tmp_path / "last.pt").step
    assert 0 < stopped < 2400
    if number != signal.SIGKILL:
        assert f"interrupted; saved at step {stopped}" in said
    assert _json("fit", "smoke", *LONG, "--output-dir", tmp_path)["weights_sha256"] == uninterrupted


@pytest.mark.slow
def test_run_killed_at_random_moments_continues_bit_for_bit(uninterrupted: str, tmp_path: Path, seed: int) -> None:
    """Killed again and again, wherever it just is, the run ends with the weights of one that was left alone."""
    command = [sys.executable, "-m", "training", "fit", "smoke", *LONG, "--output-dir", str(tmp_path), "--json"]
    moments = random.Random(seed)  # noqa: S311  # no secret
    num_killed, steps = 0, [0]
    while num_killed < 4:
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            # From its imports to the end of the run: some are killed before the first step.
            _wait_for_life(process, tmp_path)
            time.sleep(moments.uniform(0, 0.5))
            process.kill()
        num_killed += process.returncode == -signal.SIGKILL
        last = tmp_path / "last.pt"
        steps.append(checkpoint.load(last).step if last.exists() else 0)
        if steps[-1] == 2400:
            break
    assert steps == sorted(steps)
    assert num_killed >= 1
    assert _json("fit", "smoke", *LONG, "--output-dir", tmp_path)["weights_sha256"] == uninterrupted
    assert not list(tmp_path.glob(".*"))


def _wait_for_life(process: subprocess.Popen[bytes], run: Path) -> None:
    """Return when a process has touched the run folder or ended; a kill before that would try nothing."""
    began = time.time()
    until = time.monotonic() + 60
    file = run / "environment.json"
    while process.poll() is None and time.monotonic() < until:
        if file.exists() and file.stat().st_mtime > began:
            return
        time.sleep(0.005)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fit", "nope"], "vae-train: preset 'nope' does not exist; known: digits"),
        (["fit", "smoke", "--set", "optimizer.epoch=1"], "vae-train: override 'optimizer.epoch': no such key"),
        (["fit", "smoke", "--lr", "nan"], "vae-train: optimizer.learning_rate: Input should be a finite number"),
        (["fit", "smoke", "--epochs", "0"], "vae-train: optimizer.epochs: Input should be greater than"),
        (["evaluate", "nowhere"], "vae-train: nowhere: there is no best.pt"),
        (["export", "nowhere", "bundle"], "vae-train: nowhere: there is no best.pt"),
        (["data", "cifar"], "vae-train: data set 'cifar' does not exist"),
        (["fit", "smoke", "--device", "tpu"], "tpu"),
        (["fit", "smoke", "--batch-size", "513"], "batch_size is 513 and there are 512 training rows"),
        (["fit", "smoke", "--set", "optimizer.bound=importance-weighted"], "set warm_up_fraction=0"),
        (
            ["fit", "smoke", "--launcher", "ray", "--num-workers", "3"],
            "64, which 3 processes cannot share equally",
        ),
        (["fit", "smoke", "--resume", "nowhere.pt"], "there is no nowhere.pt"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_explained_in_one_line(
    words: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """Exit code 2, the message, no traceback, and nothing written."""
    monkeypatch.chdir(tmp_path)
    code, said = _fails(monkeypatch, capsys, *words)
    assert code == 2
    assert message in said
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


def test_changed_configuration_does_not_continue_a_run(
    smoke_run: SmokeRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run in the folder is left as it was."""
    before = smoke_run.folder.last.read_bytes()
    words = ["fit", "smoke", "--seed", 5, "--output-dir", smoke_run.folder.path]
    code, said = _fails(monkeypatch, capsys, *words)
    assert code == 2
    assert "now seed=5" in said
    assert smoke_run.folder.last.read_bytes() == before


def test_failed_gate_has_its_own_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Divergence is not the fault of the command's form: 3."""
    words = ["fit", "smoke", "--lr", 1e30, "--output-dir", tmp_path]
    code, said = _fails(monkeypatch, capsys, *words)
    assert code == 3
    assert "the ELBO is not finite" in said


def test_data_without_a_name_lists_what_there_is() -> None:
    """Names, shapes and splits, as a table and as JSON."""
    assert _json("data")["mnist"]["num_rows"] == [50_000, 10_000, 10_000]
    assert "fashion-mnist" in _invoke("data").stdout


def test_rows_can_be_written_for_other_programs(tmp_path: Path, digits: Dataset) -> None:
    """An .npy file of uint8 rows of the asked split."""
    out = tmp_path / "rows.npy"
    shown = _json("data", "digits", "--split", "validation", "--out", out, "--max-rows", 7)
    assert shown["num_rows"] == {"train": 1297, "validation": 250, "test": 250}
    written = np.load(out)
    assert written.dtype == np.uint8
    np.testing.assert_array_equal(written, digits.validation[:7])


def test_convention_of_the_literature_has_a_short_form(smoke_run: SmokeRun, tmp_path: Path) -> None:
    """--full means k = 5000 on up to 10,000 images; what is said beside it holds."""
    (tmp_path / "best.pt").write_bytes(smoke_run.folder.best.read_bytes())
    figures = _json("evaluate", tmp_path, "--full", "--max-images", 4)
    assert (figures["num_importance_samples"], figures["num_images"]) == (5000, 4)
    assert (figures["sample_quality"], figures["geometry"], figures["bracket"]) == ([], None, None)


def test_samples_of_own_data_are_compared_without_classes(tmp_path: Path) -> None:
    """Distances only, and a word about why; as a table and in the record."""
    file, run = tmp_path / "my.npy", tmp_path / "run"
    np.save(file, np.random.default_rng(0).integers(0, 256, (60, 6, 5), dtype=np.uint8))
    _json("fit", "smoke", "--data", file, "--output-dir", run, "--batch-size", 16)
    shown = _invoke("evaluate", run, "--max-images", 4, "--sample-quality", "--num-samples", 9)
    assert "the data have no labels; nothing is said of classes" in shown.stderr
    assert "expected images against grey ones, n = 9 each" in " ".join(shown.stdout.split())
    assert "draws of zeros and ones" in shown.stdout
    recorded = json.loads((run / "evaluation.json").read_text())
    assert [quality["num_samples"] for quality in recorded["sample_quality"]] == [9, 9]
    assert recorded["sample_quality"][0]["held_out_accuracy"] is None


def test_one_image_is_no_bracket(smoke_run: SmokeRun) -> None:
    """A mean of one has no standard error: refused before anything is computed."""
    refused = CliRunner().invoke(app, ["evaluate", str(smoke_run.folder.path), "--ais", "1"])
    assert refused.exit_code == 2
    assert "give at least two" in refused.output


def test_figures_are_shown_as_a_table(smoke_run: SmokeRun, tmp_path: Path) -> None:
    """People see the figures with their standard errors and conditions."""
    (tmp_path / "best.pt").write_bytes(smoke_run.folder.best.read_bytes())
    shown = _invoke("evaluate", tmp_path, "--split", "validation", "--max-images", 20).stdout
    assert "validation, n = 20, nats per image" in shown
    assert "IWAE bound, k = 20" in shown
    assert "of 4" in shown


def test_official_data_are_verified(idx_folder: Path) -> None:
    """The command that fetches a data set also checks one that is there."""
    assert _json("data", "fashion-mnist", "--data-dir", idx_folder)["num_rows"]["test"] == 10_000
