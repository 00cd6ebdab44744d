"""`vae-serve plan` says what a load needs, from which numbers, and what is wrong with a question."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from serving.capacity import Capacity, MeasurementError
from serving.plan_command import plan
from serving.planning import TargetBelowFloor
from serving.typed_config import ConfigError
from tests.serving.loadtest.synthetic import report
from tests.serving.test_capacity import example

app = typer.Typer()
app.command()(plan)


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def _json(*arguments: object) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(_run(*arguments, "--json").stdout)
    return result


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    """Return a file of measurements with round numbers."""
    example().write(tmp_path / "capacity.json")
    return tmp_path / "capacity.json"


def test_a_plan_says_replicas_sums_settings_and_assumptions(measured: Path) -> None:
    """For people."""
    shown = _run("--rps", 1000, "--rows", 64, "--p99", "50ms", "--measured", measured).stdout
    for words in (
        "gateway",
        "encoder",
        "processors",
        "GiB of memory",
        "encode:64: p99",
        "Poisson",
        "Inoue",
        "by hand",
    ):
        assert words in shown
    assert "decoder.min_replicas" not in shown
    assert "--set encoder.min_replicas=2 --set encoder.max_replicas=2" in shown


def test_a_plan_for_machines_is_one_object(measured: Path) -> None:
    """The same facts, in seconds and numbers."""
    found = _json("--rps", 1000, "--method", "sample", "--rows", 64, "--p99", "0.05s", "--measured", measured)
    assert found["tiers"]["decoder"]["num_replicas"] == 2
    assert found["num_cpus"] == sum(tier["num_replicas"] for tier in found["tiers"].values())
    assert found["p99_s"]["sample:64"] < 0.05
    assert found["alone_s"]["sample:64"] == pytest.approx(2e-3 + 3.28e-4 + 1.64e-3)
    assert len(found["assumptions"]) > 5
    assert found["num_gpus"] == 0


def test_the_record_of_the_package_is_the_default() -> None:
    """A plan needs nothing else."""
    found = _json("--rps", 50, "--mix", "encode:1=0.5,score:16=0.5", "--p99", "500ms")
    assert set(found["tiers"]) == {"gateway", "encoder", "decoder"}
    assert any(Capacity.recorded().measured_at in line for line in found["assumptions"])


def test_a_bundle_is_measured_here_and_can_be_saved(bundle_dir: Path, tmp_path: Path) -> None:
    """Its graphs are measured, the gateway's part is recorded; the file gives the same plan again."""
    saved = tmp_path / "mine.json"
    question = ("--rps", 20, "--rows", 16, "--p99", "400ms")
    first = _json(*question, "--bundle", bundle_dir, "--seconds", 0.05, "--save", saved)
    again = _json(*question, "--measured", saved)
    assert first["tiers"] == again["tiers"]
    assert first["p99_s"] == again["p99_s"]
    record = Capacity.read(saved)
    assert record.model.startswith("graphs of small")
    assert record.gateway.row_values == 16
    assert record.encoder.points.keys() == {1, 8, 64, 256, 512}


def test_a_load_test_says_how_many_copies(tmp_path: Path) -> None:
    """Of the whole service as it was tested, with its own mix."""
    path = tmp_path / "load.json"
    report().write(path)
    found = _json("--rps", 5000, "--p99", "100ms", "--measured", path)
    assert found["copies"] == 7
    shown = _run("--rps", 5000, "--p99", "100ms", "--measured", path).stdout
    assert "7 copies of the service that was tested" in shown
    with pytest.raises(ConfigError, match="a load test speaks for its own mix"):
        _run("--rps", 5000, "--p99", "100ms", "--measured", path, "--rows", 4)
    with pytest.raises(MeasurementError, match="no stage answered 99 %"):
        _run("--rps", 5000, "--p99", "1ms", "--measured", path)


def test_gpus_need_a_measurement_on_one(tmp_path: Path, measured: Path) -> None:
    """What was measured on a CPU says nothing of a GPU, nor the other way round."""
    question = ("--rps", 1000, "--rows", 64, "--p99", "50ms")
    with pytest.raises(ConfigError, match=r"--gpu: an example was measured on cpu; give --bundle"):
        _run(*question, "--measured", measured, "--gpu")
    path = tmp_path / "gpu.json"
    example(device="cuda").write(path)
    with pytest.raises(ConfigError, match="of a GPU: add --gpu"):
        _run(*question, "--measured", path)
    assert _json(*question, "--measured", path, "--gpu", "--gpu-share", 0.25)["num_gpus"] == 0.5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--p99", "50"), "--p99 '50': expected a number and us, ms or s"),
        (("--p99", "fast"), "--p99 'fast'"),
        (("--p99", "0ms"), "expected a time above 0"),
        (("--p99", "50ms", "--rps", "-1"), "--rps -1"),
        (("--p99", "50ms", "--headroom", "1.5"), "--headroom 1.5"),
        (("--p99", "50ms", "--method", "guess"), "guess:1"),
        (("--p99", "50ms", "--mix", "encode:1=half"), "--mix"),
        (("--p99", "50ms", "--mix", "encode:1", "--rows", "4"), "give --mix, or --method and --rows"),
        (("--p99", "50ms", "--measured", "a.json", "--bundle", "b"), "give --measured or --bundle"),
        (("--p99", "50ms", "--save", "a.json"), "--save needs --bundle"),
        (("--p99", "50ms", "--measured", "none.json"), "none.json: cannot be read"),
    ],
)
def test_a_wrong_question_is_told_what_is_wrong(arguments: tuple[str, ...], words: str) -> None:
    """One line, with the option; what is cheap to check is checked before anything is measured."""
    with pytest.raises(ConfigError, match=words):
        _run("--rps", "10", *arguments)


def test_a_time_below_one_call_alone_is_told_the_floor(measured: Path) -> None:
    """How much there must be."""
    with pytest.raises(TargetBelowFloor, match=r"takes 3\.97 ms"):
        _run("--rps", 1, "--rows", 64, "--p99", "3ms", "--measured", measured)


def test_the_command_line_ends_with_two_for_a_wrong_question() -> None:
    """As every command; the text is on standard error."""
    command = [sys.executable, "-m", "serving", "plan", "--rps", "1", "--p99", "1us"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("vae-serve: --p99 0.001 ms: one call of encode:1 alone takes")


def test_planning_from_a_record_needs_no_heavy_package() -> None:
    """No ONNX Runtime, Ray or gRPC to ask how many replicas."""
    code = "import sys, serving.plan_command; print(*sorted({'ray', 'onnxruntime', 'grpc'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == ""
