"""What being observed costs: the same service with and without metrics, with and without a line for each call.

    python -m tests.benchmarks.observing [--rounds 15] [--seconds 1] [--json FILE]

Three in-process services alternate in one run. `bare` counts nothing and has no port to scrape; `metrics` counts
all, and is scraped once a second; `log` writes the line of each call to a file besides. The client compares every
answer. Client and server share the machine, so processor time of the server per call is the figure to read.
"""

import argparse
import asyncio
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, NamedTuple

import psutil
from rich.console import Console

from serving.client import VaeClient
from serving.demo import free_port
from tests.benchmarks.engines import DATA_SHAPE, HIDDEN, LATENT_DIM, Workload, machine, measure
from tests.bundles import small_bundle

WORKLOADS: Final = [Workload("Encode", 1, 128), Workload("Encode", 1, 16), Workload("Decode", 64, 16)]
KINDS: Final = ("bare", "metrics", "log")
WANTED: Final = 1.03
"""Most that metrics may cost, as processor time per call with and without."""

_START_TIMEOUT_S: Final = 60
_UNCOUNTED: Final = """
import sys
from serving.gateway import interceptors, server
interceptors._count = lambda call, total_s: None
server._observe_rows = lambda max_rows, graph, report: None
from serving.__main__ import main
sys.exit(main())
"""


class Result(NamedTuple):
    """Calls per second, and processor time of the server per call, microseconds."""

    calls_per_s: float
    cpu_us: float


@contextlib.contextmanager
def service(kind: str, folder: Path) -> Iterator[tuple[int, psutil.Process]]:
    """Start a service of one kind; stop it at the end."""
    port, metrics_port = free_port(), free_port()
    command = [sys.executable, "-c", _UNCOUNTED] if kind == "bare" else [sys.executable, "-m", "serving"]
    command += ["up", "--bundle", str(folder / "bundle"), "--engine", "in-process", "--port", str(port)]
    command += ["--set", f"gateway.access_log={'all' if kind == 'log' else 'none'}"]
    if kind != "bare":
        command += ["--metrics-port", str(metrics_port)]
    is_over = threading.Event()
    with (folder / f"{kind}.log").open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log)
        try:
            with VaeClient(f"127.0.0.1:{port}") as client:
                client.get_model(timeout_s=_START_TIMEOUT_S)
            if kind != "bare":
                threading.Thread(target=_scrape, args=(metrics_port, is_over), daemon=True).start()
            yield port, psutil.Process(process.pid)
        finally:
            is_over.set()
            process.terminate()
            process.wait(timeout=_START_TIMEOUT_S)


def _scrape(port: int, is_over: threading.Event) -> None:
    while not is_over.wait(1.0):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
            response.read()


def run(rounds: int, seconds: float, console: Console) -> dict[str, Any]:
    """Measure each kind in turn, round by round; return medians, and medians of the ratios of each round."""
    results: dict[tuple[str, str], list[Result]] = {}
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        small_bundle(folder / "bundle", data_shape=DATA_SHAPE, latent_dim=LATENT_DIM, hidden=HIDDEN)
        services = {kind: stack.enter_context(service(kind, folder)) for kind in KINDS}
        for number in range(rounds):
            console.print(f"round {number + 1}/{rounds}", highlight=False)
            for workload in WORKLOADS:
                for kind in KINDS if number % 2 == 0 else KINDS[::-1]:
                    port, process = services[kind]
                    before = _cpu_s(process)
                    result = asyncio.run(measure(port, workload, is_echo=False, seconds=seconds))
                    num_calls = result.calls_per_s * seconds
                    cpu_us = 1e6 * (_cpu_s(process) - before) / num_calls
                    results.setdefault((workload.name, kind), []).append(Result(result.calls_per_s, cpu_us))
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "rounds": rounds,
        "seconds": seconds,
        "workloads": {workload.name: _summary(workload, results) for workload in WORKLOADS},
    }


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _summary(workload: Workload, results: dict[tuple[str, str], list[Result]]) -> dict[str, float]:
    bare, metrics, log = (results[workload.name, kind] for kind in KINDS)

    def ratio(ours: list[Result], theirs: list[Result], field: str) -> float:
        parts: list[float] = [getattr(a, field) / getattr(b, field) for a, b in zip(ours, theirs, strict=True)]
        return round(statistics.median(parts), 3)

    return {
        "cpu_us_bare": round(statistics.median(result.cpu_us for result in bare), 1),
        "cpu metrics / bare": ratio(metrics, bare, "cpu_us"),
        "calls metrics / bare": ratio(metrics, bare, "calls_per_s"),
        "cpu log / metrics": ratio(log, metrics, "cpu_us"),
        "calls log / metrics": ratio(log, metrics, "calls_per_s"),
    }


def table(report: dict[str, Any]) -> str:
    """Return a report as Markdown."""
    names = ["cpu metrics / bare", "calls metrics / bare", "cpu log / metrics", "calls log / metrics"]
    lines = [f"| workload | bare, us of processor per call | {' | '.join(names)} |", "|---|---|---|---|---|---|"]
    for name, found in report["workloads"].items():
        ratios = " | ".join(f"{found[key]:.2f}" for key in names)
        lines.append(f"| {name} | {found['cpu_us_bare']:.0f} | {ratios} |")
    return "\n".join(lines)


def main() -> int:
    """Measure, print, and write what was asked for; 1 if metrics cost more than is wanted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    console = Console()
    report = run(arguments.rounds, arguments.seconds, console)
    console.print(table(report), highlight=False)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    worst = max(found["cpu metrics / bare"] for found in report["workloads"].values())
    console.print(f"metrics cost at most {worst:.3f} of the processor time without; wanted {WANTED}")
    return int(worst > WANTED)


if __name__ == "__main__":
    sys.exit(main())
