"""Several processes climb what one climbs on the joined batch, agree when to stop, and one of them writes."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from training import checkpoint, distributed
from training.checkpoint import RunFolder
from training.data import Dataset
from training.distributed import ALONE, STEPS_BETWEEN_AGREEMENTS, Processes
from training.errors import BatchUneven
from training.trainer import Metrics, fit

from .conftest import CPU, ROOT, SmokeRun
from .gradient_worker import SETTINGS, gradients

JOINED = 1e-6
"""Absolute, gradients of order one: the mean of two halves' sums in float32 instead of one sum."""

SAME_RUN = 1e-4
"""Nats: what that rounding makes of the bound after sixteen steps."""

TIMEOUT_S = 120.0


def _environment(rank: int, port: int) -> dict[str, str]:
    """Return what torchrun would give the first or second of two processes."""
    given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return os.environ | {name: str(value) for name, value in given.items()} | {"OMP_NUM_THREADS": "1"}


@contextmanager
def _pair(*words: object) -> Iterator[list[subprocess.Popen[str]]]:
    """Start two processes of one group; none of them outlives the block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", *map(str, words)]
    pipe = subprocess.PIPE
    processes = [
        subprocess.Popen(command, cwd=ROOT, env=_environment(rank, port), stdout=pipe, stderr=pipe, text=True)
        for rank in range(2)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def _lines(folder: Path) -> list[Metrics]:
    return [Metrics.model_validate_json(line) for line in RunFolder(folder).metrics.read_text().splitlines()]


def test_a_process_alone_has_every_row_and_waits_for_nobody() -> None:
    """Without torchrun nothing is joined, and nothing of torch.distributed is touched."""
    with distributed.joined("cpu") as processes:
        assert processes is ALONE
        assert processes.rows(7) == slice(0, 7)
        assert processes.agree(is_wanted=True)
        assert not processes.agree(is_wanted=False)
        values = torch.ones(3)
        assert processes.joined_mean(values) is values
        module = torch.nn.Linear(1, 1)
        assert processes.divided(module, CPU) is module
        assert processes.device(CPU) == CPU


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_rows_are_divided_without_rest_or_overlap(size: int) -> None:
    """Every row of the joined batch has exactly one process."""
    rows = torch.arange(12)
    shares = [rows[Processes(rank=rank, size=size).rows(12)] for rank in range(size)]
    assert torch.equal(torch.cat(shares), rows)
    assert {len(share) for share in shares} == {12 // size}


def test_an_uneven_batch_is_refused() -> None:
    """A mean of means over different numbers of rows is not the mean."""
    with pytest.raises(
        BatchUneven, match=r"batch_size is 12, which 5 processes cannot share equally; take a multiple"
    ):
        Processes(size=5).rows(12)


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one_on_the_joined_batch(tmp_path: Path) -> None:
    """For every objective, both end with the gradient of the whole batch; what the first fetched, both find.

    No thread of theirs outlives the group: it could end the process with SIGABRT after its work was done.
    """
    with _pair("tests.training.gradient_worker", tmp_path) as processes:
        for process in processes:
            threads, said = process.communicate(timeout=TIMEOUT_S)
            assert process.returncode == 0, said
            assert threads == ""
    found: list[dict[str, dict[str, torch.Tensor]]] = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name, settings in SETTINGS.items():
        expected = gradients(settings, ALONE)
        assert len(expected) == 8
        # The half alone is something else: the comparison can fail.
        half = gradients(settings, _HalfAlone())
        assert max(float((half[key] - expected[key]).abs().max()) for key in expected) > 100 * JOINED, name
        for rank in range(2):
            torch.testing.assert_close(found[rank][name], expected, rtol=0, atol=JOINED)


class _HalfAlone(Processes):
    """The first half of a batch, with nobody to average with."""

    def rows(self, batch_size: int) -> slice:
        """Return the first half."""
        return slice(0, batch_size // 2)


@pytest.mark.slow
def test_torchrun_fits_the_run_of_one_process(smoke_run: SmokeRun, tmp_path: Path) -> None:
    """The same bounds to within rounding; one result on standard output; files of one writer."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "training", "fit", "smoke", "--output-dir", str(tmp_path), "--json"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert result.returncode == 0, result.stderr
    (line,) = result.stdout.splitlines()
    assert json.loads(line)["step"] == 16
    assert len(re.findall("^epoch ", result.stderr, flags=re.MULTILINE)) == 2
    expected = _lines(smoke_run.folder.path)
    for one, two in zip(expected, _lines(tmp_path), strict=True):
        for ours, theirs in ((one.train, two.train), (one.validation, two.validation)):
            assert theirs.elbo == pytest.approx(ours.elbo, abs=SAME_RUN)
            assert theirs.kl == pytest.approx(ours.kl, abs=SAME_RUN)
    weights = checkpoint.load(tmp_path / "last.pt")
    assert weights.step == 16
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_and_the_run_goes_on(digits: Dataset, tmp_path: Path) -> None:
    """Both end at the same step with the code of the signal; one process finishes what two began."""
    long = ["--set", "optimizer.epochs=200", "--set", "optimizer.validation_interval_epochs=20"]
    with _pair("training", "fit", "smoke", *long, "--output-dir", tmp_path) as processes:
        until = time.monotonic() + TIMEOUT_S
        while not (tmp_path / "metrics.jsonl").exists() and time.monotonic() < until:
            time.sleep(0.01)
        processes[1].send_signal(signal.SIGTERM)
        said = [process.communicate(timeout=TIMEOUT_S)[1] for process in processes]
    assert [process.returncode for process in processes] == [143, 143]
    state = checkpoint.load(tmp_path / "last.pt")
    assert 0 < state.step < 1600
    assert state.step % STEPS_BETWEEN_AGREEMENTS == 0
    assert f"interrupted; saved at step {state.step}" in said[0]
    assert "interrupted" not in said[1]
    train = digits._replace(train=digits.train[:512])
    result = fit(state.config, train, RunFolder(tmp_path), device=CPU, resume_from=state)
    assert result.is_finished


@pytest.mark.slow
def test_a_batch_that_processes_cannot_share_is_said_once(tmp_path: Path) -> None:
    """Exit code 2 in both processes, one line from the first, and nothing in the folder."""
    with _pair("training", "fit", "smoke", "--batch-size", 65, "--output-dir", tmp_path) as processes:
        said = [process.communicate(timeout=TIMEOUT_S)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    assert "batch_size is 65, which 2 processes cannot share equally" in said[0]
    assert "vae-train" not in said[1]
    assert list(tmp_path.iterdir()) == []
