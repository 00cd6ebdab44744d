"""What distribution costs: a bare echo, the in-process engine and the Ray engine, alternating in one run.

    python -m tests.benchmarks.engines [--seconds 2] [--rounds 3] [--json FILE]

Each server is a process (or a cluster) of its own; one client process sends ready bytes and compares every
answer with the bytes of the same call made alone, so a wrong status or a wrong row stops the run. Client and
servers share the machine: read the ratios, not the calls per second.
"""

import argparse
import asyncio
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import grpc
import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from protos.vae.v1 import vae_pb2 as pb
from serving.client import VaeClient
from serving.demo import free_port
from serving.tensors import to_message
from tests.bundles import small_bundle

HIDDEN: Final = (512, 512)
LATENT_DIM: Final = 32
DATA_SHAPE: Final = (1, 28, 28)
NUM_REQUESTS: Final = 16
ENGINES: Final = ("echo", "in-process", "ray")
START_TIMEOUT_S: Final = 120


class Workload(NamedTuple):
    """One kind of call at one level of concurrency."""

    method: str
    num_rows: int
    concurrency: int

    @property
    def name(self) -> str:
        """Name in the table."""
        return f"{self.method} {self.num_rows} c{self.concurrency}"


class Result(NamedTuple):
    """Calls per second and median latency of one measurement."""

    calls_per_s: float
    p50_ms: float


WORKLOADS: Final = [
    Workload(method, num_rows, concurrency)
    for method in ("Encode", "Sample")
    for num_rows in (1, 64)
    for concurrency in (1, 128)
]


def requests(workload: Workload) -> list[bytes]:
    """Return serialised requests, different from each other, with fixed seeds."""
    random = np.random.default_rng(0)
    if workload.method == "Sample":
        return [
            pb.SampleRequest(num_samples=workload.num_rows, seed=seed).SerializeToString()
            for seed in range(NUM_REQUESTS)
        ]
    images = random.integers(0, 256, (NUM_REQUESTS, workload.num_rows, *DATA_SHAPE), dtype=np.uint8)
    return [pb.EncodeRequest(data=to_message(image)).SerializeToString() for image in images]


async def measure(port: int, workload: Workload, *, is_echo: bool, seconds: float) -> Result:
    """Keep `concurrency` calls in flight for some seconds; check every answer."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call: Any = channel.unary_unary(f"/vae.v1.VaeService/{workload.method}")
        bodies = requests(workload)
        expected = bodies if is_echo else [await call(body) for body in bodies]
        latencies: list[float] = []
        stop_at = time.monotonic() + seconds

        async def caller(index: int) -> None:
            while (began := time.monotonic()) < stop_at:
                answer = await call(bodies[index % NUM_REQUESTS])
                latencies.append(time.monotonic() - began)
                if answer != expected[index % NUM_REQUESTS]:
                    raise AssertionError(f"{workload.name}: an answer differs from the same call made alone")
                index += 1

        began = time.monotonic()
        await asyncio.gather(*(caller(index) for index in range(workload.concurrency)))
        elapsed = time.monotonic() - began
    return Result(len(latencies) / elapsed, statistics.median(latencies) * 1000)


async def serve_echo(port: int) -> None:
    """Run the floor: a grpc.aio server that answers with the bytes it got."""

    async def echo(body: bytes, _context: object) -> bytes:
        return body

    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    methods: dict[str, Any] = {name: grpc.unary_unary_rpc_method_handler(echo) for name in ("Encode", "Sample")}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("vae.v1.VaeService", methods),))
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await server.wait_for_termination()


@contextlib.contextmanager
def server(engine: str, bundle: Path) -> Iterator[tuple[int, psutil.Process]]:
    """Start one server; stop it at the end."""
    port = free_port()
    command = (
        [sys.executable, "-m", "tests.benchmarks.engines", "--echo-port", str(port)]
        if engine == "echo"
        else [
            sys.executable,
            "-m",
            "serving",
            "up",
            "--bundle",
            str(bundle),
            "--engine",
            engine,
            "--port",
            str(port),
        ]
    )
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        if engine == "echo":
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                grpc.channel_ready_future(channel).result(timeout=START_TIMEOUT_S)
        else:
            with VaeClient(f"127.0.0.1:{port}") as client:
                client.get_model(timeout_s=START_TIMEOUT_S)
        yield port, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(timeout=60)


def memory(root: psutil.Process) -> dict[str, float]:
    """Return the resident memory of a process and what it started, MiB, by name."""
    usage: dict[str, float] = {}
    for process in [root, *root.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            name = process.name() if process.pid != root.pid else "main"
            title = " ".join(process.cmdline()[:1]) if name.startswith("ray::") else name
            usage[f"{title} ({process.pid})"] = process.memory_info().rss / 2**20
    return usage


def run(seconds: float, rounds: int, console: Console) -> dict[str, Any]:
    """Measure every workload on every server, round by round; return the medians."""
    results: dict[tuple[str, str], list[Result]] = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        bundle = small_bundle(Path(folder) / "bundle", data_shape=DATA_SHAPE, latent_dim=LATENT_DIM, hidden=HIDDEN)
        servers = {engine: stack.enter_context(server(engine, bundle)) for engine in ENGINES}
        for number in range(rounds):
            for workload in WORKLOADS:
                for engine in ENGINES:
                    console.print(f"round {number + 1}/{rounds}: {workload.name} on {engine}", highlight=False)
                    port, _ = servers[engine]
                    result = asyncio.run(measure(port, workload, is_echo=engine == "echo", seconds=seconds))
                    results.setdefault((workload.name, engine), []).append(result)
        usage = {engine: memory(process) for engine, (_, process) in servers.items()}
    medians = {
        workload.name: {
            engine: Result(
                *(statistics.median(values) for values in zip(*results[workload.name, engine], strict=True))
            )._asdict()
            for engine in ENGINES
        }
        for workload in WORKLOADS
    }
    machine = {"processors": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()}
    return {"machine": machine, "seconds": seconds, "rounds": rounds, "medians": medians, "memory_mib": usage}


def show(report: dict[str, Any], console: Console) -> None:
    """Print the medians and their ratios."""
    table = Table(
        title=f"medians of {report['rounds']} rounds, {report['seconds']:g} s each", title_justify="left"
    )
    table.add_column("workload")
    for engine in ENGINES:
        table.add_column(f"{engine}\ncalls/s", justify="right")
    for heading in ("in-proc\n/ echo", "ray /\nin-proc", "p50 ray /\nin-proc"):
        table.add_column(heading, justify="right")
    for name, engines in report["medians"].items():
        rate = {engine: engines[engine]["calls_per_s"] for engine in ENGINES}
        latency = engines["ray"]["p50_ms"] / engines["in-process"]["p50_ms"]
        table.add_row(
            name,
            *(f"{rate[engine]:,.0f}" for engine in ENGINES),
            f"{rate['in-process'] / rate['echo']:.2f}",
            f"{rate['ray'] / rate['in-process']:.2f}",
            f"{latency:.2f}",
        )
    console.print(table)
    for engine, usage in report["memory_mib"].items():
        shown = ", ".join(f"{name} {size:.0f}" for name, size in sorted(usage.items(), key=lambda item: -item[1]))
        console.print(f"memory, MiB, {engine}: {shown}", highlight=False, soft_wrap=True)


def main() -> None:
    """Run the benchmark, or the echo server that it starts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0, help="length of one measurement")
    parser.add_argument("--rounds", type=int, default=3, help="alternating rounds; medians are shown")
    parser.add_argument("--json", type=Path, help="file for the report")
    parser.add_argument("--echo-port", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.echo_port:
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(serve_echo(arguments.echo_port))
        return
    console = Console()
    report = run(arguments.seconds, arguments.rounds, console)
    show(report, console)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
