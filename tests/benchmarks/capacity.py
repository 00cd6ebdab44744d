"""What calls and runs cost, for `vae-serve plan`: graphs by size, processes by processor time under load.

    python -m tests.benchmarks.capacity [--seconds 2] [--rounds 3] [--record]

The demo's size of model (784-512-512-32). Processor times rather than the clock, because what else the machine
does stretches the latter, and the least of some rounds, because it slows the former too. Only the floor of one
call alone, hops and wake-ups, needs the clock, and takes the
tenth percentile. `--record` writes the file that comes with the package.
"""

import argparse
import asyncio
import functools
import json
import os
import platform
import tempfile
import time
import urllib.request
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import grpc
import numpy as np
import onnxruntime
import psutil
from google.protobuf.message import Message
from rich.console import Console

import serving
from protos.vae.v1 import vae_pb2 as pb
from serving import bundle as bundles
from serving.capacity import RECORDED, Capacity, Cost, Gateway, Run
from serving.demo import free_port
from serving.planning import DECODES, ENCODES
from serving.run_costs import of_graph
from serving.tensors import to_message
from tests.benchmarks.engines import DATA_SHAPE, HIDDEN, LATENT_DIM
from tests.bundles import small_bundle
from tests.end_to_end.service import Service, running

METHODS: Final = ("Encode", "Decode", "Sample", "Reconstruct", "Score")
SIZES: Final = (1, 64)
CONCURRENCY: Final = 32
NUM_REQUESTS: Final = 16
IDLE_S: Final = 3.0
MIB: Final = 2**20
HOW: Final = (
    "python -m tests.benchmarks.capacity: graphs by the thread's processor time, medians; gateway and replicas by "
    f"their processes' time, less what they use idle, with {CONCURRENCY} calls of {SIZES[0]} or {SIZES[1]} rows "
    "in flight, the least of some rounds; the floor is the tenth percentile of one call of a row alone, less its "
    "parts"
)
Engine = Literal["ray", "in-process"]


class Usage(NamedTuple):
    """What has been used so far: processor seconds by process, runs and rows by graph."""

    cpu_s: Mapping[str, float]
    runs: Mapping[str, float]
    rows: Mapping[str, float]

    def since(self, before: "Usage") -> "Usage":
        """Return what was used between two looks."""
        return Usage(*({key: now[key] - was[key] for key in now} for now, was in zip(self, before, strict=True)))

    def less(self, idle: Mapping[str, float], seconds: float) -> "Usage":
        """Return what was used beyond what the processes use when nobody calls."""
        cpu_s = {name: max(used - idle[name] * seconds, 0.0) for name, used in self.cpu_s.items()}
        return self._replace(cpu_s=cpu_s)


class Measured(NamedTuple):
    """One kind of call under load."""

    method: str
    num_rows: int
    num_calls: int
    used: Usage


def requests(method: str, num_rows: int) -> list[bytes]:
    """Return serialised requests, different from each other, with fixed seeds."""
    random = np.random.default_rng(0)
    bodies = []
    for seed in range(NUM_REQUESTS):
        data = to_message(random.integers(0, 256, (num_rows, *DATA_SHAPE), dtype=np.uint8))
        latents = to_message(random.standard_normal((num_rows, LATENT_DIM), dtype=np.float32))
        request: Message = {
            "Encode": pb.EncodeRequest(data=data),
            "Decode": pb.DecodeRequest(latents=latents),
            "Sample": pb.SampleRequest(num_samples=num_rows, seed=seed),
            "Reconstruct": pb.ReconstructRequest(data=data),
            "Score": pb.ScoreRequest(data=data, seed=seed),
        }[method]
        bodies.append(request.SerializeToString())
    return bodies


async def call_for(port: int, method: str, num_rows: int, *, concurrency: int, seconds: float) -> list[float]:
    """Keep calls in flight for some seconds; return their times. Any status but OK stops the benchmark."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call: Any = channel.unary_unary(f"/vae.v1.VaeService/{method}")
        bodies, times = requests(method, num_rows), []
        stop_at = time.monotonic() + seconds

        async def caller(index: int) -> None:
            while (began := time.monotonic()) < stop_at:
                await call(bodies[index % NUM_REQUESTS], timeout=30)
                times.append(time.monotonic() - began)
                index += 1

        await asyncio.gather(*(caller(index) for index in range(concurrency)))
    return times


def usage(processes: Mapping[str, psutil.Process], metrics_port: int) -> Usage:
    """Look at processes and at the gateway's metrics."""
    cpu_s = {}
    for name, process in processes.items():
        times = process.cpu_times()
        cpu_s[name] = times.user + times.system
    with urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))

    def of(what: str) -> dict[str, float]:
        return {
            graph: float(values.get(f'vae_batch_rows_{what}{{graph="{graph}"}}', 0))
            for graph in ("encoder", "decoder")
        }

    return Usage(cpu_s, of("count"), of("sum"))


def idle_shares(processes: Mapping[str, psutil.Process], metrics_port: int) -> dict[str, float]:
    """Return the processor seconds per second that processes use when nobody calls."""
    before = usage(processes, metrics_port)
    time.sleep(IDLE_S)
    return {name: used / IDLE_S for name, used in usage(processes, metrics_port).since(before).cpu_s.items()}


def processes_of(service: Service, engine: Engine) -> dict[str, psutil.Process]:
    """Return the processes whose time counts."""
    if engine == "in-process":
        return {"gateway": service.process}
    return {name: service.replica(name.capitalize()) for name in ("gateway", "encoder", "decoder")}


def measure(
    bundle: Path, engine: Engine, seconds: float, rounds: int, console: Console
) -> tuple[list[Measured], float, dict[str, float]]:
    """Return kinds of calls under load, the time of one Encode alone, and memory by process in MiB."""
    metrics_port = free_port()
    with running(bundle, "--engine", engine, "--metrics-port", str(metrics_port)) as service:
        processes = processes_of(service, engine)
        idle = idle_shares(processes, metrics_port)
        found = []
        for _ in range(rounds):
            for method in METHODS:
                for num_rows in SIZES:
                    load = functools.partial(call_for, service.port, method, num_rows, concurrency=CONCURRENCY)
                    asyncio.run(load(seconds=0.3))
                    before, began = usage(processes, metrics_port), time.monotonic()
                    times = asyncio.run(load(seconds=seconds))
                    used = usage(processes, metrics_port).since(before).less(idle, time.monotonic() - began)
                    found.append(Measured(method.lower(), num_rows, len(times), used))
                    shares = {name: f"{1e6 * cpu_s / len(times):.0f}" for name, cpu_s in used.cpu_s.items()}
                    line = f"{engine}: {method} {num_rows}: {len(times)} calls, us per call {shares}"
                    console.print(line, highlight=False)
        alone = asyncio.run(call_for(service.port, "Encode", 1, concurrency=1, seconds=seconds))
        memory = {name: process.memory_info().rss / MIB for name, process in processes.items()}
        family = {process.pid: process for process in [service.process, *service.process.children(recursive=True)]}
        for process in processes.values():
            family.pop(process.pid, None)
        memory["shared"] = sum(process.memory_info().rss for process in family.values()) / MIB
        service.stop()
    return found, float(np.quantile(alone, 0.1)), memory


def capacity(
    engine: Engine,
    points: Mapping[str, dict[int, float]],
    bundle: Path,
    console: Console,
    *,
    seconds: float,
    rounds: int,
) -> Capacity:
    """Return the record of one engine."""
    found, alone_s, memory = measure(bundle, engine, seconds, rounds, console)
    graphs = {name: Cost.fit(list(times), list(times.values())) for name, times in points.items()}
    runs = {
        name: Run(
            graph=graphs[name],
            overhead_s=overhead(found, name, graphs[name]) if engine == "ray" else 0.0,
            points=points[name],
            memory_mib=round(memory.get(name, 0.0), 1),
        )
        for name in graphs
    }
    costs = gateway_costs(found, graphs if engine == "in-process" else {})
    floor_s = alone_s - costs["encode"].seconds(1) - runs["encoder"].cost.seconds(1)
    return Capacity(
        engine=engine,
        device="cpu",
        model=f"an MLP {'-'.join(map(str, (int(np.prod(DATA_SHAPE)), *HIDDEN, LATENT_DIM)))}",
        measured_at=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
        machine=machine(),
        method=HOW,
        encoder=runs["encoder"],
        decoder=runs["decoder"],
        gateway=Gateway(costs=costs, row_values=int(np.prod(DATA_SHAPE)), memory_mib=round(memory["gateway"], 1)),
        floor_s=max(floor_s, 0.0),
        shared_memory_mib=round(memory["shared"], 1),
    )


def overhead(found: list[Measured], graph: str, cost: Cost) -> float:
    """Return what a replica's process adds to a run, seconds, not below zero: the median over kinds of calls."""
    least: dict[tuple[str, int], float] = {}
    for one in found:
        if one.method in (ENCODES if graph == "encoder" else DECODES) and (runs := one.used.runs[graph]):
            added = (one.used.cpu_s[graph] - computed_s(one, {graph: cost})) / runs
            least[one.method, one.num_rows] = min(added, least.get((one.method, one.num_rows), added))
    return max(float(np.median(list(least.values()))), 0.0)


def gateway_costs(found: list[Measured], graphs: Mapping[str, Cost]) -> dict[str, Cost]:
    """Return the gateway's processor time per call and row, less the graphs that ran in its process."""
    least: dict[str, dict[int, float]] = {}
    for one in found:
        times = least.setdefault(one.method, {})
        each_s = max(one.used.cpu_s["gateway"] - computed_s(one, graphs), 1e-9) / one.num_calls
        times[one.num_rows] = min(each_s, times.get(one.num_rows, each_s))
    return {method: Cost.fit(list(times), list(times.values())) for method, times in least.items()}


def computed_s(one: Measured, graphs: Mapping[str, Cost]) -> float:
    """Return the time of the runs themselves, seconds."""
    return sum(
        one.used.runs[name] * cost.per_call_s + one.used.rows[name] * cost.per_row_s
        for name, cost in graphs.items()
    )


def machine() -> dict[str, str]:
    """Return what the numbers depend on."""
    return {
        "processors": str(os.cpu_count()),
        "load average": f"{os.getloadavg()[1]:.1f}",  # who was there besides: a number far above one disturbs
        "architecture": platform.machine(),
        "system": platform.system(),
        "python": platform.python_version(),
        "grpcio": grpc.__version__,
        "onnxruntime": onnxruntime.__version__,
    }


def main() -> None:
    """Measure both engines; print, and record if told to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0, help="length of one measurement")
    parser.add_argument("--rounds", type=int, default=3, help="the least of them counts")
    parser.add_argument("--record", action="store_true", help="write the file of the package")
    arguments = parser.parse_args()
    console = Console(soft_wrap=True)
    with tempfile.TemporaryDirectory() as folder:
        path = small_bundle(Path(folder) / "bundle", data_shape=DATA_SHAPE, latent_dim=LATENT_DIM, hidden=HIDDEN)
        verified = bundles.read(str(path))
        points = {
            graph: of_graph(verified, graph, device="cpu", threads=1, seconds=arguments.seconds)
            for graph in ("encoder", "decoder")
        }
        records = {
            engine: capacity(
                engine, points, path, console, seconds=arguments.seconds, rounds=arguments.rounds
            ).model_dump()
            for engine in ("in-process", "ray")
        }
    text = json.dumps(records, indent=1)
    console.print(text, highlight=False, markup=False)
    if arguments.record:
        Path(serving.__file__).with_name("recorded").mkdir(exist_ok=True)
        Path(serving.__file__).parent.joinpath(RECORDED).write_text(text + "\n")


if __name__ == "__main__":
    main()
