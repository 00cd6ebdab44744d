"""What a change costs: this checkout against another one, both in-process, alternating in one run.

    python -m tests.benchmarks.against FOLDER [--key] [--rounds 7] [--seconds 1.5]

FOLDER is a checkout of an earlier state, such as `git worktree add` makes. With `--key` the new service asks for
an API key and the old one does not, so that the ratio holds the price of identity too. Every answer is compared
between the two. Client and servers share the machine: read the ratios.
"""

import argparse
import asyncio
import contextlib
import hashlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import grpc
import psutil
from rich.console import Console
from rich.table import Table

from serving.client import VaeClient
from serving.demo import free_port
from tests.benchmarks.engines import DATA_SHAPE, HIDDEN, LATENT_DIM, NUM_REQUESTS, Workload, requests
from tests.bundles import small_bundle

HERE: Final = Path(__file__).parents[2]
KEY: Final = "vae_benchmark-key-0123456789abcdefghijklmnop"
WORKLOADS: Final = [Workload(method, 1, calls) for method in ("Encode", "Sample") for calls in (1, 16, 128)]
Metadata = tuple[tuple[str, str], ...]


class Result(NamedTuple):
    """Calls per second, and processor time of the server per call, microseconds."""

    calls_per_s: float
    cpu_us: float


class Server(NamedTuple):
    """A running service of one checkout, and the metadata that it wants."""

    port: int
    process: psutil.Process
    metadata: Metadata


@contextlib.contextmanager
def server(folder: Path, bundle: Path, *, has_key: bool) -> Iterator[Server]:
    """Start the service of a checkout; stop it at the end."""
    port = free_port()
    command = [sys.executable, "-m", "serving", "up", "--bundle", str(bundle), "--engine", "in-process"]
    environment = dict(os.environ)
    environment.pop("VAE_API_KEYS", None)
    if has_key:
        environment["VAE_API_KEYS"] = f"bench:{hashlib.sha256(KEY.encode()).hexdigest()}"
    process = subprocess.Popen(
        [*command, "--port", str(port)], cwd=folder, env=environment, stdout=subprocess.DEVNULL
    )
    try:
        with VaeClient(f"127.0.0.1:{port}", api_key=KEY if has_key else None) as client:
            client.get_model(timeout_s=60)
        metadata = (("authorization", f"Bearer {KEY}"),) if has_key else ()
        yield Server(port, psutil.Process(process.pid), metadata)
    finally:
        process.terminate()
        process.wait(timeout=60)


async def answers_of(target: Server, workload: Workload) -> list[bytes]:
    """Return the answers to every request of a workload."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{target.port}") as channel:
        call: Any = channel.unary_unary(f"/vae.v1.VaeService/{workload.method}")
        return [await call(body, metadata=target.metadata) for body in requests(workload)]


async def measure(target: Server, workload: Workload, expected: list[bytes], seconds: float) -> Result:
    """Keep so many calls in flight for some seconds; check every answer."""
    bodies = requests(workload)
    num_calls = 0
    async with grpc.aio.insecure_channel(f"127.0.0.1:{target.port}") as channel:
        call: Any = channel.unary_unary(f"/vae.v1.VaeService/{workload.method}")
        await call(bodies[0], metadata=target.metadata)
        before, began = target.process.cpu_times(), time.monotonic()

        async def caller(index: int) -> None:
            nonlocal num_calls
            while time.monotonic() < began + seconds:
                if (
                    await call(bodies[index % NUM_REQUESTS], metadata=target.metadata)
                    != expected[index % NUM_REQUESTS]
                ):
                    raise AssertionError(f"{workload.name}: the answers differ")
                index += 1
                num_calls += 1

        await asyncio.gather(*(caller(index) for index in range(workload.concurrency)))
        elapsed, after = time.monotonic() - began, target.process.cpu_times()
    used_s = after.user + after.system - before.user - before.system
    return Result(num_calls / elapsed, used_s / num_calls * 1e6)


def main() -> None:
    """Compare, and print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="checkout of the earlier state")
    parser.add_argument("--key", action="store_true", help="the new service asks for an API key")
    parser.add_argument("--rounds", type=int, default=7, help="alternating rounds; medians are shown")
    parser.add_argument("--seconds", type=float, default=1.5, help="length of one measurement")
    arguments = parser.parse_args()
    results: dict[tuple[str, str], list[Result]] = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        bundle = small_bundle(Path(folder) / "bundle", data_shape=DATA_SHAPE, latent_dim=LATENT_DIM, hidden=HIDDEN)
        servers = {
            "old": stack.enter_context(server(arguments.folder, bundle, has_key=False)),
            "new": stack.enter_context(server(HERE, bundle, has_key=arguments.key)),
        }
        for number in range(arguments.rounds):
            for workload in WORKLOADS:
                expected = asyncio.run(answers_of(servers["old"], workload))
                for name in ("old", "new") if number % 2 else ("new", "old"):
                    result = asyncio.run(measure(servers[name], workload, expected, arguments.seconds))
                    results.setdefault((workload.name, name), []).append(result)
    show(results, arguments.rounds)


def show(results: dict[tuple[str, str], list[Result]], rounds: int) -> None:
    """Print medians and ratios."""
    table = Table(title=f"medians of {rounds} alternating rounds", title_justify="left")
    for heading in ("workload", "old calls/s", "new calls/s", "new / old", "old CPU us", "new CPU us"):
        table.add_column(heading, justify="left" if heading == "workload" else "right")
    for workload in WORKLOADS:
        old, new = (
            Result(*(statistics.median(values) for values in zip(*results[workload.name, name], strict=True)))
            for name in ("old", "new")
        )
        ratio = new.calls_per_s / old.calls_per_s
        shown = (old.calls_per_s, new.calls_per_s, ratio, old.cpu_us, new.cpu_us)
        table.add_row(workload.name, *(f"{value:,.2f}" if value < 10 else f"{value:,.0f}" for value in shown))
    Console().print(table)


if __name__ == "__main__":
    main()
