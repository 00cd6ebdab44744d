"""The whole benchmark: everybody who is here takes part, in every setting, and the report says who is not."""

import json
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.training.conftest import ROOT
from training.bench import contest, plan, tables
from training.bench.report import OURS, BenchReport

QUICK = ["--quick", "--rounds", "1", "--threads", "1", "--json"]


def _bench(*words: object) -> tuple[dict[str, Any], str]:
    """Run the command; return its result and what it told the person."""
    command = [sys.executable, "-m", "training", "bench", *QUICK, *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


@pytest.mark.slow
def test_bench_runs_everybody_and_records(peers_folder: Path, tmp_path: Path) -> None:
    """Every contestant in a row, the same work for all, equal bounds; page and figures are where they belong."""
    page = tmp_path / "record.md"
    found, told = _bench("--peers", peers_folder, "--record", page)
    names = [result["contestant"] for result in found["training"]]
    assert names == [entry.name for entry in contest.TRAINERS]
    assert names[0] == OURS
    assert all(result["is_comparable"] for result in found["training"]), found["training"]
    assert len({result["num_parameters"] for result in found["training"]}) == 1
    assert [result["contestant"] for result in found["evaluation"]] == [OURS, "get_nll by 100"]
    assert all(result["agrees"] for result in found["evaluation"]), found["evaluation"]
    assert all(len(result["timing"]["seconds"]) == 1 for result in found["training"])
    assert found["absent"] == []
    assert {"pythae", "pyro-ppl", "torch"} <= found["versions"].keys()
    assert "time / ours: pythae" in told
    report = BenchReport.parse(json.loads((tmp_path / "record.json").read_text()))
    assert report.model_dump(mode="json") == found
    assert page.read_text() == tables.markdown(report)


@pytest.mark.slow
def test_bench_without_peers_says_how_to_get_them(tmp_path: Path) -> None:
    """What needs nothing takes part; the others are named with the way to have them."""
    found, _ = _bench("--peers", tmp_path)
    assert [result["contestant"] for result in found["training"]] == [OURS, "tutorial loop"]
    assert [result["contestant"] for result in found["evaluation"]] == [OURS]
    assert {"pythae", "Pyro, DataLoader", "Pyro, tensors", "get_nll by 100"} == set(found["absent"])
    lines = tables.verdicts(BenchReport.parse(found))
    assert sum("`make training-peers`" in line for line in lines) == 4


def test_work_of_every_contestant_can_be_sent_to_another_process() -> None:
    """Pickling finds each function by its name."""
    for entry in (*contest.TRAINERS, *contest.evaluators(plan.full())):
        assert repr(pickle.loads(pickle.dumps(entry.work))) == repr(entry.work)  # noqa: S301 - our own bytes


def test_evaluators_are_pythae_at_its_default_and_at_its_fastest() -> None:
    """One chunk of all samples is the least work that `get_nll` can be asked for."""
    names = [entry.name for entry in contest.evaluators(plan.full())]
    assert names == [OURS, "get_nll by 100", "get_nll by 500"]


def test_version_is_found_in_the_environment_or_in_the_folder(tmp_path: Path) -> None:
    """And nowhere else; nothing is imported for it."""
    made = tmp_path / "made_up-1.2.dist-info"
    made.mkdir()
    (made / "METADATA").write_text("Metadata-Version: 2.1\nName: made-up\nVersion: 1.2\n")
    assert contest.version("made-up", tmp_path) == "1.2"
    assert contest.version("made-up") is None
    assert contest.version("numpy", tmp_path) == np.__version__


def test_synthetic_images_look_like_mnist() -> None:
    """Shape and type of MNIST, mostly dark, all different, a function of the seed."""
    images = contest.synthetic_images(50, 20, seed=4)
    again = contest.synthetic_images(50, 20, seed=4)
    assert images.train.shape == (50, 1, 28, 28)
    assert images.test.shape == (20, 1, 28, 28)
    assert images.train.dtype == np.uint8
    np.testing.assert_array_equal(images.train, again.train)
    assert len(np.unique(np.concatenate([images.train, images.test]).reshape(70, -1), axis=0)) == 70
    # MNIST has 19 % of pixels above zero and a mean of 33.
    assert 10 < images.train.mean() < 60
    assert images.train.max() > 200


def test_machine_names_its_processor() -> None:
    """And how busy it was: timings without them say nothing."""
    machine = contest.machine()
    assert machine["processor"]
    assert int(machine["cores"]) >= 1
    assert float(machine["load before"]) >= 0


def test_packages_of_the_peers_are_pinned() -> None:
    """The recorded page is of the versions that `make training-peers` fetches."""
    pinned = dict(re.findall(r"^(\S+)==(\S+)$", (ROOT / ".ci/training-peers.txt").read_text(), re.MULTILINE))
    needed = {entry.package for entry in (*contest.TRAINERS, *contest.evaluators(plan.full())) if entry.package}
    assert needed <= pinned.keys()
    folder = Path(sys.prefix) / "training-peers"
    assert all(contest.version(name, folder) in {None, pinned[name]} for name in needed)
