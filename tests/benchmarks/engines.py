"""What distribution costs: a bare echo, the in-process engine and the Ray engine, alternating in one run.

    python -m tests.benchmarks.engines [--seconds 2] [--rounds 5] [--record] [--json FILE]

Each server is a process (or a cluster) of its own; one client process sends ready bytes and compares every
answer with the bytes of the same call made alone, so a wrong status or a wrong row stops the run. A bare loop of
`session.run`, one thread as a replica has, shows what the graph alone gives. Client and servers share the machine:
read the ratios, not the calls per second. They are compared with those recorded in `engines.json`; `--record`
replaces these.
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
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, NamedTuple

import grpc
import numpy as np
import onnxruntime as ort
import psutil
from rich.console import Console
from rich.markdown import Markdown

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
BARE: Final = "bare"
RECORD: Final = Path(__file__).with_name("engines.json")
WORSE: Final = 0.85
"""A ratio below so much of the recorded one is called worse: three runs of one state differed by a tenth."""


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
    for method in ("Encode", "Decode", "Sample")
    for num_rows in (1, 64)
    for concurrency in (1, 128)
]

GOALS: Final = {
    "in-process / echo": ({"1 c128"}, 0.8),
    "ray / in-process": ({"1 c128", "64 c128"}, 0.95),
    "p50 ray / in-process": ({"1 c1", "64 c1"}, 2.5),
    "in-process / bare": ({"Decode 64 c128"}, 0.85),
}
"""What is wanted of each ratio, for workloads whose names end so. Of p50 less is better."""


def requests(workload: Workload) -> list[bytes]:
    """Return serialised requests, different from each other, with fixed seeds."""
    random = np.random.default_rng(0)
    if workload.method == "Sample":
        return [
            pb.SampleRequest(num_samples=workload.num_rows, seed=seed).SerializeToString()
            for seed in range(NUM_REQUESTS)
        ]
    if workload.method == "Decode":
        latents = random.standard_normal((NUM_REQUESTS, workload.num_rows, LATENT_DIM)).astype(np.float32)
        return [pb.DecodeRequest(latents=to_message(rows)).SerializeToString() for rows in latents]
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
    methods: dict[str, Any] = {
        name: grpc.unary_unary_rpc_method_handler(echo) for name in ("Encode", "Decode", "Sample")
    }
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


def measure_bare(bundle: Path, seconds: float) -> float:
    """Return rows per second of 64-row decodes in a loop, nothing around them, in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.engines", "--bare", str(bundle), "--seconds", str(seconds)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def run_bare(bundle: Path, seconds: float) -> float:
    """Run 64-row decodes in a loop on one thread; return rows per second."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = ort.InferenceSession(bundle / "decoder.onnx", options, providers=["CPUExecutionProvider"])
    latents = np.random.default_rng(0).standard_normal((64, LATENT_DIM)).astype(np.float32)
    feed = {session.get_inputs()[0].name: latents}
    for _ in range(20):
        session.run(["mean"], feed)
    began, num_runs = time.monotonic(), 0
    while time.monotonic() - began < seconds:
        session.run(["mean"], feed)
        num_runs += 1
    return num_runs * len(latents) / (time.monotonic() - began)


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
    """Measure every workload on every server, round by round; return the medians and the ratios."""
    results: dict[tuple[str, str], list[Result]] = {}
    bare: list[float] = []
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        bundle = small_bundle(Path(folder) / "bundle", data_shape=DATA_SHAPE, latent_dim=LATENT_DIM, hidden=HIDDEN)
        servers = {engine: stack.enter_context(server(engine, bundle)) for engine in ENGINES}
        for number in range(rounds):
            console.print(f"round {number + 1}/{rounds}", highlight=False)
            order = ENGINES if number % 2 == 0 else ENGINES[::-1]
            for workload in WORKLOADS:
                for engine in order:
                    port, _ = servers[engine]
                    result = asyncio.run(measure(port, workload, is_echo=engine == "echo", seconds=seconds))
                    results.setdefault((workload.name, engine), []).append(result)
                if workload.name == "Decode 64 c128":
                    bare.append(measure_bare(bundle, seconds))
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
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "seconds": seconds,
        "rounds": rounds,
        "medians": medians,
        "bare_rows_per_s": statistics.median(bare),
        "ratios": {workload.name: ratios(results, workload, bare) for workload in WORKLOADS},
        "memory_mib": usage,
    }


def ratios(
    results: dict[tuple[str, str], list[Result]], workload: Workload, bare: list[float]
) -> dict[str, float]:
    """Return the ratios of a workload: medians of the ratios of each round, whose parts were measured together."""
    echo, own, ray = (results[workload.name, engine] for engine in ENGINES)

    def median(parts: list[float]) -> float:
        return round(statistics.median(parts), 3)

    found = {
        "in-process / echo": median([a.calls_per_s / b.calls_per_s for a, b in zip(own, echo, strict=True)]),
        "ray / in-process": median([a.calls_per_s / b.calls_per_s for a, b in zip(ray, own, strict=True)]),
        "p50 ray / in-process": median([a.p50_ms / b.p50_ms for a, b in zip(ray, own, strict=True)]),
    }
    if workload.name == "Decode 64 c128":
        found["in-process / bare"] = median(
            [a.calls_per_s * workload.num_rows / rows for a, rows in zip(own, bare, strict=True)]
        )
    return found


def machine() -> dict[str, Any]:
    """Return what was measured on."""
    return {
        "processor": cpu_name(),
        "processors": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("grpcio", "onnxruntime-gpu", "ray", "uvloop")},
    }


def cpu_name() -> str:
    """Return the name of the processor, as Linux has it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def table(report: dict[str, Any]) -> str:
    """Return the medians and ratios as Markdown."""
    lines = [
        f"| calls per second | echo | in-process | Ray | {' | '.join(list(GOALS)[:3])} |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, engines in report["medians"].items():
        rates = " | ".join(f"{engines[engine]['calls_per_s']:,.0f}" for engine in ENGINES)
        found = report["ratios"][name]
        parts = " | ".join(f"{found[key]:.2f}" for key in list(GOALS)[:3])
        lines.append(f"| {name} | {rates} | {parts} |")
    return "\n".join(lines)


def goals(report: dict[str, Any]) -> list[str]:
    """Return what is wanted and what was seen, a line of Markdown each."""
    lines = []
    for key, (endings, wanted) in GOALS.items():
        for name, found in report["ratios"].items():
            if key in found and any(name.endswith(ending) for ending in endings):
                is_reached = found[key] <= wanted if key.startswith("p50") else found[key] >= wanted
                sign = "<=" if key.startswith("p50") else ">="
                word = "reached" if is_reached else "not reached"
                lines.append(f"| {key} | {name} | {sign} {wanted} | {found[key]:.2f} | {word} |")
    return lines


def compare(report: dict[str, Any], recorded: dict[str, Any]) -> list[str]:
    """Return the ratios that are worse than the recorded ones, in words."""
    worse = []
    for name, found in report["ratios"].items():
        for key, value in found.items():
            before = recorded["ratios"].get(name, {}).get(key)
            if before is None:
                continue
            change = before / value if key.startswith("p50") else value / before
            if change < WORSE:
                worse.append(f"{name}: {key} is {value:.2f}, recorded was {before:.2f}")
    return worse


def show(report: dict[str, Any], console: Console) -> bool:
    """Print medians, ratios and what they are beside the recorded ones; return whether none is worse."""
    console.print(Markdown(table(report)))
    console.print(f"bare loop of 64-row decodes, one thread: {report['bare_rows_per_s']:,.0f} rows/s")
    console.print(
        Markdown("\n".join(["| ratio | workload | wanted | seen | |", "|---|---|---|---|---|", *goals(report)]))
    )
    for engine, usage in report["memory_mib"].items():
        shown = ", ".join(f"{name} {size:.0f}" for name, size in sorted(usage.items(), key=lambda item: -item[1]))
        console.print(f"memory, MiB, {engine}: {shown}", highlight=False, soft_wrap=True)
    if not RECORD.exists():
        console.print("nothing is recorded yet: --record does")
        return True
    recorded = json.loads(RECORD.read_text())
    worse = compare(report, recorded)
    for line in worse:
        console.print(f"[red]worse[/red]: {line}", highlight=False)
    if not worse:
        console.print(f"no ratio is below {WORSE:g} of the one recorded on {recorded['date']}", highlight=False)
    return not worse


def main() -> None:
    """Run the benchmark, or what it starts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="length of one measurement")
    parser.add_argument("--rounds", type=int, default=5, help="alternating rounds; medians are shown")
    parser.add_argument("--json", type=Path, help="file for the report")
    parser.add_argument("--record", action="store_true", help="keep this run as what later ones are compared with")
    parser.add_argument("--echo-port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--bare", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.bare:
        print(run_bare(arguments.bare, arguments.seconds))  # noqa: T201 - read by the process that asked
        return
    if arguments.echo_port:
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(serve_echo(arguments.echo_port))
        return
    console = Console()
    report = run(arguments.seconds, arguments.rounds, console)
    is_good = show(report, console)
    for file in filter(None, (arguments.json, RECORD if arguments.record else None)):
        file.write_text(json.dumps(report, indent=1) + "\n")
    sys.exit(0 if is_good or arguments.record else 1)


if __name__ == "__main__":
    main()
