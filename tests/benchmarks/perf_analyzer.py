"""NVIDIA's perf_analyzer, unmodified, against the Open Inference Protocol: a sweep over concurrency, recorded.

    python -m tests.benchmarks.perf_analyzer [--window-s 1] [--out FOLDER]

The binary is the last one that runs with glibc 2.36; it is in the wheel of tritonclient 2.51.0, and needs two
libraries that this script obtains too. Everything lies in `.venv/perf-analyzer`. Linux on x86-64, with apt unless
libb64 is installed. The tool and the server share the machine: read the ratios, not the calls per second.
"""

import argparse
import csv
import ctypes
import json
import os
import platform
import subprocess
import sys
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from tests.benchmarks.engines import DATA_SHAPE, HIDDEN, LATENT_DIM, server
from tests.bundles import small_bundle

ROOT: Final = Path(__file__).parents[2]
CACHE: Final = ROOT / ".venv/perf-analyzer"
VERSION: Final = "2.51.0"
WHEELS: Final = (f"tritonclient=={VERSION}", "nvidia-cuda-runtime-cu12==12.9.79")
BINARY: Final = CACHE / f"tritonclient-{VERSION}.data/data/bin/perf_analyzer"
LIBRARIES: Final = (CACHE / "nvidia/cuda_runtime/lib", CACHE / "usr/lib/x86_64-linux-gnu")
SHOWN: Final = {
    "Concurrency": "concurrency",
    "Inferences/Second": "rows/s",
    "p50 latency": "p50 us",
    "p99 latency": "p99 us",
    "Server Queue": "queue us",
    "Server Compute Input": "input us",
    "Server Compute Infer": "graph us",
    "Server Compute Output": "output us",
}
"""Columns of the tool's report, and their names in ours."""


class Sweep(NamedTuple):
    """One run of the tool."""

    model: str
    concurrency: str = "1:16:5"
    options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name in the report."""
        return " ".join((self.model, *self.options))


SEED: Final = ("--request-parameter", "seed:7:int")
SWEEPS: Final = [
    Sweep("encoder"),
    Sweep("decoder"),
    Sweep("prior", options=SEED),
    Sweep("encoder", options=("-b", "16")),
    Sweep("prior", options=("--streaming", "--async", *SEED)),
]


def obtain() -> None:
    """Put the binary and its libraries into the cache, unless they are there.

    Raises:
        SystemExit: If there is no binary for this machine.
    """
    if BINARY.exists():
        return
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise SystemExit("perf_analyzer: the binary is for Linux on x86-64")
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--quiet", "--no-deps", "--dest", folder]
        # Without dependencies: the tool needs none, and other definitions of the messages must stay out of here.
        subprocess.run([*pip, *WHEELS], check=True)
        for wheel in sorted(Path(folder).glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(CACHE)
        try:
            ctypes.CDLL("libb64.so.0d")
        except OSError:
            subprocess.run(["apt-get", "download", "--quiet", "libb64-0d"], cwd=folder, check=True)
            for package in Path(folder).glob("*.deb"):
                subprocess.run(["dpkg", "-x", package, CACHE], check=True)
    BINARY.chmod(0o755)


def write_inputs(folder: Path) -> None:
    """Write rows of each model, as the tool reads them: without the batch dimension."""
    random = np.random.default_rng(0)
    images = random.random((16, int(np.prod(DATA_SHAPE))), dtype=np.float32)
    latents = random.standard_normal((16, LATENT_DIM)).astype(np.float32)
    inputs: dict[str, tuple[str, Any, list[int]]] = {
        "encoder": ("data", images, list(DATA_SHAPE)),
        "decoder": ("latents", latents, [LATENT_DIM]),
        "prior": ("row", np.arange(16)[:, None], [1]),
    }
    for model, (name, rows, shape) in inputs.items():
        steps = [{name: {"content": row.tolist(), "shape": shape}} for row in rows]
        (folder / f"{model}.json").write_text(json.dumps({"data": steps}))


def run(sweep: Sweep, port: int, folder: Path, window_s: float) -> list[dict[str, float]]:
    """Run one sweep; return the tool's figures for each level of concurrency."""
    report = folder / "report.csv"
    report.unlink(missing_ok=True)
    target = ["-m", sweep.model, "-i", "grpc", "-u", f"127.0.0.1:{port}"]
    load = ["--concurrency-range", sweep.concurrency, "--input-data", str(folder / f"{sweep.model}.json")]
    # Other work on the machine moves single windows: three in a row within 30 % are a result.
    windows = ["-p", str(round(window_s * 1000)), "-s", "30", "-r", "20"]
    subprocess.run(
        [BINARY, *target, *load, *windows, *sweep.options, "-f", report],
        check=True,
        env=os.environ | {"LD_LIBRARY_PATH": os.pathsep.join(map(str, LIBRARIES))},
    )
    with report.open(newline="") as file:
        rows = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
    return sorted(rows, key=lambda row: row["Concurrency"])


def measure(window_s: float) -> dict[str, Any]:
    """Run every sweep against one server; return the report."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder)
        bundle = small_bundle(folder / "bundle", data_shape=DATA_SHAPE, latent_dim=LATENT_DIM, hidden=HIDDEN)
        with server("in-process", bundle) as (port, _):
            sweeps = {sweep.name: run(sweep, port, folder, window_s) for sweep in SWEEPS}
    versions = {name: metadata.version(name) for name in ("vae-serving", "grpcio", "protobuf", "numpy")}
    return {
        "tool": f"perf_analyzer {VERSION}",
        "versions": versions,
        "machine": {
            "processors": os.cpu_count(),
            "machine": platform.machine(),
            "python": platform.python_version(),
        },
        "engine": "in-process",
        "model": {"data_shape": DATA_SHAPE, "latent_dim": LATENT_DIM, "hidden": HIDDEN},
        "window_s": window_s,
        "sweeps": sweeps,
    }


def as_markdown(report: dict[str, Any]) -> str:
    """Return the report as tables."""
    machine, versions = report["machine"], report["versions"]
    lines = [
        "# perf_analyzer: a recorded run",
        "",
        f"{report['tool']}, unmodified, against `vae-serve up --engine {report['engine']}`, both on one machine",
        f"with {machine['processors']} processors ({machine['machine']}, Python {machine['python']}): read the",
        "ratios. Made by `make perf-analyzer`; all figures are in the JSON file beside this one.",
        "",
        ", ".join(f"{name} {version}" for name, version in versions.items()),
        "",
        f"| sweep | {' | '.join(SHOWN.values())} |",
        f"|---|{'---:|' * len(SHOWN)}",
    ]
    for name, rows in report["sweeps"].items():
        lines += [f"| {name} | {' | '.join(f'{row[column]:,.0f}' for column in SHOWN)} |" for row in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Obtain the tool, run it, write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--window-s", type=float, default=1.0, help="length of one window of the tool, seconds")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of the report")
    arguments = parser.parse_args()
    obtain()
    report = measure(arguments.window_s)
    (arguments.out / "perf_analyzer.json").write_text(json.dumps(report, indent=2) + "\n")
    (arguments.out / "perf_analyzer.md").write_text(as_markdown(report))


if __name__ == "__main__":
    main()
