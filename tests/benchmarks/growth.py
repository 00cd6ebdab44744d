"""What growth costs: throughput per replica with 1 to 16 replicas, alternating in one run.

    python -m tests.benchmarks.growth [--seconds 2] [--rounds 3] [--replicas 1,2,4] [--ray 1,2,4] [--json FILE]

The replicas sleep instead of computing, a fixed time per run and a time per row, so that more of them than there
are processors can be shown; everything before them is real: checks, batcher, and, with `--ray`, the Ray engine on
real Serve replicas. The load grows with the replicas. Every answer is compared with the rows it is for. The ratios
say what sharing a gateway costs; the processor time of this process, gateway and callers in one, says where that
is the limit rather than the replicas. gRPC's own cost per call, which more gateways share, is left out.
"""

import argparse
import asyncio
import contextlib
import functools
import itertools
import json
import logging
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from serving import bundle, ray_environment
from serving.bundle import DecoderOutput, Graph, Manifest
from serving.config import BatchingConfig, ServingConfig
from serving.direct.server import DirectServer
from serving.engine.protocol import Engine, Posterior, Providers, Rows
from serving.gateway.operations import Operations
from serving.runtime import LoadReport
from serving.tickets import Ticket
from tests.bundles import LATENT_DIM, small_bundle

RUN_S: Final = 0.02
ROW_S: Final = 1e-4
"""Times of a run and of each of its rows, seconds: a full batch of 512 rows takes 71 ms."""

CONNECT_S: Final = 0.3
"""Time for connections to replicas to be made, seconds."""

MAX_LOSS: Final = 0.1
"""Loss of throughput per replica that is accepted from one replica to four."""


class Workload(NamedTuple):
    """Calls of one size; so many of them for each replica at any time."""

    num_rows: int
    callers_each: int

    @property
    def name(self) -> str:
        """Name in the table."""
        return f"{self.callers_each} x {self.num_rows} rows"


WORKLOADS: Final = (Workload(64, 16), Workload(1, 64))


def answer(data: Rows) -> tuple[Rows, Rows]:
    """Return what a sleeping encoder makes of data: outputs that tell whose rows they are."""
    mean = data.reshape(len(data), -1)[:, :LATENT_DIM].astype(np.float32)
    return mean, -mean


class Result(NamedTuple):
    """One measurement."""

    rows_per_s: float
    busy: float
    """Processor time of this process per time."""


class SleepingEngine:
    """Replicas in this process, each of which sleeps through one run at a time."""

    def __init__(self, num_replicas: int) -> None:
        self._num_replicas = num_replicas
        self._free = asyncio.Semaphore(num_replicas)

    @property
    def num_slots(self) -> int:
        """One for each replica."""
        return 1

    def num_replicas(self, _graph: Graph) -> int:
        """As many as it was made with."""
        return self._num_replicas

    def num_answering(self, _graph: Graph) -> int:
        """As many as it was made with."""
        return self._num_replicas

    async def encode(self, data: Rows, _timeout_s: float) -> Posterior:
        """Sleep on the first replica that is free."""
        async with self._free:
            await asyncio.sleep(RUN_S + ROW_S * len(data))
        return Posterior(*answer(data))

    async def decode(
        self, latents: Rows, _timeout_s: float, _outputs: Sequence[DecoderOutput] = ("mean",)
    ) -> tuple[Rows, ...]:
        """Do not: only Encode is measured."""
        raise NotImplementedError

    async def check(self) -> Providers:
        """Say that all is well."""
        return Providers("sleep", "sleep")

    async def close(self) -> None:
        """Do nothing."""


class SleepingReplica:
    """The same as a Serve deployment."""

    async def __init__(self, version: str) -> None:  # type: ignore[misc]  # Ray Serve awaits a constructor
        from ray import serve  # noqa: PLC0415 - reads the environment when it is imported

        self._version = version
        self._free = asyncio.Semaphore(1)
        name = serve.get_replica_context().replica_id.unique_id
        self._direct = DirectServer(self.run, replica=name, host="127.0.0.1")
        await self._direct.start()

    async def run(self, rows: Rows, *_: object) -> tuple[str, tuple[Rows, ...]]:
        """Sleep, one run at a time."""
        async with self._free:
            await asyncio.sleep(RUN_S + ROW_S * len(rows))
        return self._version, answer(rows)

    async def describe(self) -> Any:  # noqa: ANN401 - its type is in a module that imports Ray
        """Say that all is well."""
        from serving.engine.ray_engine import ReplicaReport  # noqa: PLC0415 - imports Ray

        report = LoadReport(version=self._version, provider="sleep", threads=1, load_s=0.0)
        return ReplicaReport(report, self._direct.address)


async def measure(
    engine: Engine, manifest: Manifest, num_replicas: int, workload: Workload, seconds: float
) -> Result:
    """Keep the replicas busy for some seconds; check every answer."""
    await engine.check()  # counts the replicas, and connects to them
    await asyncio.sleep(CONNECT_S)
    operations = Operations(engine, manifest, ServingConfig(batching=BatchingConfig(max_queue_rows=2**20)))
    rows = np.random.default_rng(0).integers(0, 256, (64, workload.num_rows, *manifest.data_shape), np.uint8)
    expected = [answer(data)[0] for data in rows]
    num_done = 0
    began, busy_s = time.monotonic(), time.process_time()
    warm_at, stop_at = began + seconds / 4, began + seconds * 5 / 4

    async def caller(index: int) -> None:
        nonlocal num_done
        for number in itertools.count(index):
            if (now := time.monotonic()) > stop_at:
                return
            found = await operations.encode(rows[number % len(rows)], ticket=Ticket(now + 60, client=""))
            if not np.array_equal(found.mean, expected[number % len(rows)]):
                raise AssertionError("an answer is not of the rows that were asked for")
            if warm_at < time.monotonic() <= stop_at:
                num_done += workload.num_rows

    async with asyncio.TaskGroup() as callers:
        for index in range(workload.callers_each * num_replicas):
            callers.create_task(caller(index))
    await operations.close()
    await engine.close()
    return Result(num_done / seconds, (time.process_time() - busy_s) / (time.monotonic() - began))


@contextlib.contextmanager
def ray_engines(counts: Sequence[int], manifest: Manifest) -> Iterator[dict[int, Callable[[], Engine]]]:
    """Run a deployment with each number of replicas, at once so that they can take turns; yield makers of engines.

    Connections belong to an event loop, so each measurement makes an engine of its own.
    """
    ray_environment.prepare()
    import ray  # noqa: PLC0415 - reads the environment when it is imported
    from ray import serve  # noqa: PLC0415 - as above

    from serving.engine.ray_engine import RayEngine  # noqa: PLC0415 - as above

    ray.init(
        address="local", num_cpus=2, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False
    )
    try:
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        serve.start(proxy_location="Disabled")
        engines: dict[int, Callable[[], Engine]] = {}
        for count in counts:
            deployment = serve.deployment(
                name="Encoder",
                num_replicas=count,
                max_ongoing_requests=256,
                ray_actor_options={"num_cpus": 0},
            )(SleepingReplica)
            handle: Any = serve.run(deployment.bind(manifest.version), name=f"growth-{count}", route_prefix=None)
            engines[count] = functools.partial(RayEngine, handle, handle, manifest, ServingConfig())
        yield engines
    finally:
        ray.shutdown()


def run(
    seconds: float, rounds: int, counts: Sequence[int], ray_counts: Sequence[int], console: Console
) -> dict[str, Any]:
    """Measure each workload with each number of replicas, round by round; return the medians."""
    found: dict[str, dict[str, dict[int, list[Result]]]] = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        manifest = bundle.read(str(small_bundle(Path(folder) / "bundle"))).manifest
        on_ray = stack.enter_context(ray_engines(ray_counts, manifest)) if ray_counts else {}
        for number, workload in itertools.product(range(rounds), WORKLOADS):
            kinds = [("sleep here", count) for count in counts] + [("Ray", count) for count in ray_counts]
            for kind, count in kinds:
                console.print(f"round {number + 1}/{rounds}: {workload.name}, {count} replicas, {kind}")

                async def one(kind: str = kind, count: int = count, workload: Workload = workload) -> Result:
                    engine: Engine = on_ray[count]() if kind == "Ray" else SleepingEngine(count)
                    return await measure(engine, manifest, count, workload, seconds)

                rates = found.setdefault(workload.name, {}).setdefault(kind, {})
                rates.setdefault(count, []).append(asyncio.run(one()))
    medians = {
        name: {
            kind: {count: _median(results)._asdict() for count, results in rates.items()}
            for kind, rates in kinds.items()
        }
        for name, kinds in found.items()
    }
    machine = {"processors": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()}
    return {"machine": machine, "seconds": seconds, "rounds": rounds, "medians": medians}


def _median(results: Sequence[Result]) -> Result:
    return Result(*(statistics.median(values) for values in zip(*results, strict=True)))


def show(report: dict[str, Any], console: Console) -> None:
    """Print rows per second and replica, and how much of it is left with more replicas."""
    table = Table(
        title=f"medians of {report['rounds']} rounds, {report['seconds']:g} s each", title_justify="left"
    )
    for heading in ("calls each", "replicas", "number", "rows/s", "rows/s each", "/ first", "processor"):
        table.add_column(heading, justify="left" if heading in {"calls each", "replicas"} else "right")
    for name, kinds in report["medians"].items():
        for kind, results in kinds.items():
            each = {count: result["rows_per_s"] / count for count, result in results.items()}
            first = next(iter(each.values()))
            for count, result in results.items():
                rates = f"{result['rows_per_s']:,.0f}", f"{each[count]:,.0f}", f"{each[count] / first:.2f}"
                table.add_row(name, kind, str(count), *rates, f"{result['busy']:.2f}")
    console.print(table)
    for name, kinds in report["medians"].items():
        for kind, results in kinds.items():
            if {1, 4} <= set(results):
                loss = 1 - results[4]["rows_per_s"] / 4 / results[1]["rows_per_s"]
                verdict = "reached" if loss < MAX_LOSS else "not reached"
                console.print(f"{name}, {kind}: {loss:.1%} less per replica from 1 to 4; below 10 % {verdict}")


def numbers(text: str) -> list[int]:
    """Return the numbers of a list separated by commas."""
    return [int(part) for part in text.split(",") if part]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="length of one measurement")
    parser.add_argument("--rounds", type=int, default=3, help="alternating rounds; medians are shown")
    parser.add_argument("--replicas", type=numbers, default=[1, 2, 4, 8, 16], help="numbers in this process")
    parser.add_argument("--ray", type=numbers, default=[1, 2, 4], help="numbers on Ray; empty: no Ray")
    parser.add_argument("--json", type=Path, help="file for the report")
    arguments = parser.parse_args()
    console = Console(highlight=False)
    report = run(arguments.seconds, arguments.rounds, arguments.replicas, arguments.ray, console)
    show(report, console)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
