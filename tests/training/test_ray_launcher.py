"""Ray Train runs the loop that the command line runs, and its processes go when it ends."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from training import presets, ray_launcher
from training.checkpoint import RunFolder
from training.errors import Diverged, ExtraMissing
from training.launch import Execution
from training.trainer import Metrics

from .conftest import ROOT, SmokeRun

SAME_RUN = 1e-4
"""Nats: what averaging two halves in float32 makes of the bound after sixteen steps."""

TIMEOUT_S = 280.0


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """Return an empty run folder."""
    return RunFolder(tmp_path)


def _lines(run: RunFolder) -> list[Metrics]:
    return [Metrics.model_validate_json(line) for line in run.metrics.read_text().splitlines()]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_S + 20)
def test_two_workers_fit_the_run_of_one_process(smoke_run: SmokeRun, run: RunFolder) -> None:
    """The same bounds to within rounding, told line by line; the local cluster ends with the command."""
    pytest.importorskip("pandas", reason="the extra ray-train is not installed")
    command = [sys.executable, "-m", "training", "fit", "smoke", "--launcher", "ray", "--num-workers", "2"]
    command += ["--output-dir", str(run.path), "--json"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    before = {process.pid for process in psutil.process_iter()}
    result = subprocess.run(
        command,
        cwd=ROOT,
        env=environment | {"RAY_AUTH_MODE": "token"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    shown = json.loads(result.stdout)
    assert (shown["is_finished"], shown["step"]) == (True, 16)
    assert [line[:9] for line in result.stderr.splitlines() if line.startswith("epoch")] == [
        "epoch 1/2",
        "epoch 2/2",
    ]
    for ours, theirs in zip(_lines(smoke_run.folder), _lines(run), strict=True):
        assert theirs.train.elbo == pytest.approx(ours.train.elbo, abs=SAME_RUN)
        assert theirs.validation.elbo == pytest.approx(ours.validation.elbo, abs=SAME_RUN)
    until = time.monotonic() + 30
    while (left := _of_ray(before)) and time.monotonic() < until:
        time.sleep(0.2)
    assert left == []


def _of_ray(before: set[int]) -> list[str]:
    """Return the names of Ray's own processes that were not there before."""
    found = [process.name() for process in psutil.process_iter() if process.pid not in before]
    return [name for name in found if name in {"raylet", "gcs_server"}]


def test_without_the_extra_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written and no cluster starts."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    monkeypatch.setenv("RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH", "1")
    monkeypatch.setitem(sys.modules, "ray.train.torch", None)
    with pytest.raises(ExtraMissing, match=r"--launcher ray: .*pip install 'vae-serving\[ray-train\]'"):
        ray_launcher.check_installed()


def test_a_worker_learns_everything_as_text() -> None:
    """Configuration and execution come back as they were, with paths that do not depend on the working folder."""
    execution = Execution(device="cpu", data_dir=Path("data"), is_compiled=True)
    spec = ray_launcher._spec(presets.smoke(), RunFolder(Path("runs/x")), execution)  # noqa: SLF001  # crosses processes
    assert json.loads(spec["config"]) == json.loads(presets.smoke().to_json())
    assert Execution.parse(json.loads(spec["execution"])) == execution.merge({"data_dir": Path("data").absolute()})
    assert Path(spec["run"]) == Path("runs/x").absolute()


def test_an_error_of_ours_comes_out_of_ray_as_it_was() -> None:
    """The command ends with its line and its exit code; what is not ours is left to Ray's own report."""

    class Wrapped(Exception):
        def __init__(self, inner: Exception) -> None:
            super().__init__("with a traceback")
            self._base_exc = inner

    ours = Diverged(epoch=3, step=25, kept_step=20)
    with pytest.raises(Diverged, match="that of step 20 is kept"):
        ray_launcher._raise_own({0: RuntimeError("peer gone"), 1: Wrapped(ours)})  # noqa: SLF001  # no cluster needed
    ray_launcher._raise_own({0: RuntimeError("peer gone")})  # noqa: SLF001  # no cluster needed


def test_validations_are_told_while_they_are_written(smoke_run: SmokeRun, run: RunFolder) -> None:
    """Each once, half a line not at all, and those that come last too."""
    first, second = smoke_run.folder.metrics.read_text().splitlines(keepends=True)
    seen: list[int] = []
    run.metrics.write_text(first)  # of an earlier attempt, behind the checkpoint: there is none
    with ray_launcher._followed(run, lambda metrics: seen.append(metrics.step)):  # noqa: SLF001  # no cluster needed
        run.metrics.write_text(first + second[:20])
        until = time.monotonic() + 10
        while not seen and time.monotonic() < until:
            time.sleep(0.01)
        assert seen == [8]
        run.metrics.write_text(first + second)
    assert seen == [8, 16]
