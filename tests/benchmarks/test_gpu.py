"""The GPU benchmark runs where there is no GPU, checks what it measures, and says what it leaves out."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.benchmarks import gpu
from tests.bundles import small_bundle

SHORT = ["--rounds", "1", "--seconds", "0.01", "--batches", "1", "256"]


@pytest.mark.parametrize("has_bundle", [False, True])
def test_on_a_cpu_everything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], *, has_bundle: bool
) -> None:
    """Raw runs, bound runs and the runtime class, with our graphs or a bundle's; no verdict on a CPU's ratios."""
    record = tmp_path / "gpu.json"
    options = ["--bundle", str(small_bundle(tmp_path / "bundle"))] if has_bundle else []
    gpu.main(["--device", "cpu", "--service", "none", "--json", str(record), *SHORT, *options])
    report = json.loads(record.read_text())
    assert set(report["medians"]) == {"encoder 1", "encoder 256", "decoder 1", "decoder 256"}
    for figures in report["medians"].values():
        assert set(figures) == {"plain", "bound", "device only", "runtime", "runtime, two at once"}
        assert all(value > 0 for value in figures.values())
    assert report["environment"]["provider"] == "CPUExecutionProvider"
    assert report["environment"]["onnxruntime"]
    assert report["reports"]["encoder"]["runtime"]["provider"] == "CPUExecutionProvider"
    assert "reached" not in " ".join(report["verdicts"])
    assert "no number to reach on a CPU" in capsys.readouterr().out


def test_a_wrong_answer_ends_the_benchmark() -> None:
    """No figure is printed of a contestant that computes something else."""
    graph = gpu.own_graphs()[1]
    truth = gpu.first_answers(graph, 8)
    wrong = gpu.Contestant("wrong", lambda _rows: [values + np.float32(0.01) for values in truth])
    with pytest.raises(SystemExit, match=r"decoder: wrong of 8 rows is off by 0\.01"):
        gpu.contest(graph, [wrong], 8, rounds=1, seconds=0.01, tolerance=1e-3)


def test_without_our_dependencies_raw_figures_come_and_what_to_install(tmp_path: Path) -> None:
    """A machine with NumPy and ONNX Runtime alone: every other import fails, and the script says what it wants."""
    program = f"""
import importlib.abc, runpy, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {sorted({*gpu.RUNTIME_NEEDS, *gpu.SERVICE_NEEDS, "ray", "onnx", "torch"})}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
sys.argv[1:] = {["--device", "cpu", "--json", str(tmp_path / "gpu.json"), *SHORT]}
runpy.run_module("tests.benchmarks.gpu", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "runtime class left out: pip install pydantic pyyaml fsspec" in done.stdout
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert set(report["medians"]["encoder 256"]) == {"plain", "bound", "device only"}
    assert "grpcio" in report["service"]["left_out"]


@pytest.mark.parametrize(("asked", "word"), [("auto", "CUDA skipped"), ("cuda", "CUDA cannot be used")])
def test_without_a_gpu_the_reason_is_told(
    asked: str, word: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`auto` goes on with the CPU and says why; `cuda` ends."""
    monkeypatch.setattr(gpu, "why_no_cuda", lambda: "there is no driver")
    if asked == "auto":
        assert gpu.choose_device("auto") == "cpu"
        assert capsys.readouterr().out == f"{word}: there is no driver\n"
    else:
        with pytest.raises(SystemExit, match=f"{word}: there is no driver"):
            gpu.choose_device("cuda")


@pytest.mark.slow
def test_the_whole_service_is_measured_and_its_answers_checked() -> None:
    """Calls of 256 rows through gRPC, in-process engine: all answered, with the bits of a call made alone."""
    graphs = gpu.own_graphs()
    arguments = argparse.Namespace(service="in-process", bundle=None, precision="fp32", rounds=1, seconds=0.2)
    found = gpu.measure_service(arguments, "cpu", graphs)
    assert found["engine"] == "in-process"
    for name in ("encoder", "decoder"):
        assert found["calls"][name]["answered"] >= gpu.SERVICE_CALLS
        assert found["calls"][name]["other_bits_than_alone"] == 0
        assert found["rows_per_s"][name] > 0
        assert found["ratios"][name] > 0
