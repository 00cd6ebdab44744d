"""How fast large answers travel: Decode of 64 to 4,096 rows, in-process, as float32 and as uint8.

    python -m tests.benchmarks.big_messages [--seconds 2] [--rounds 3] [--json FILE]

Graphs with one narrow hidden layer, so that the way of the bytes shows and not the product of matrices: MNIST's
1x28x28, and 3x64x64 images as a convolutional decoder makes them. Two calls are in flight. One answer of each kind
is compared with the graph's own; all others with its bytes. Beside them, what a copy in memory moves on this
machine at the same time, and the bare graph: rows that no service could exceed.
"""

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Final, NamedTuple

import grpc
import numpy as np
from rich.console import Console
from rich.table import Table

from protos.vae.v1 import vae_pb2 as pb
from serving import bundle as bundles
from serving.runtime import GraphRuntime
from serving.tensors import from_message, to_message, to_output
from tests.benchmarks.engines import machine, server
from tests.bundles import small_bundle

LATENT_DIM: Final = 16
CONCURRENCY: Final = 2
SHAPES: Final[dict[str, tuple[int, ...]]] = {"1x28x28": (1, 28, 28), "3x64x64": (3, 64, 64)}
ROWS: Final = {"1x28x28": (64, 512, 4096), "3x64x64": (64, 512, 1024)}
TYPES: Final = {"float32": pb.DATA_TYPE_FLOAT32, "uint8": pb.DATA_TYPE_UINT8}
UNLIMITED: Final = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


class Rate(NamedTuple):
    """What one measurement found."""

    rows_per_s: float
    megabytes_per_s: float


async def measure(port: int, body: bytes, expected: bytes, num_rows: int, seconds: float) -> Rate:
    """Keep calls in flight for some seconds; check every answer."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", UNLIMITED) as channel:
        call: Any = channel.unary_unary("/vae.v1.VaeService/Decode")
        num_done, began = 0, time.monotonic()

        async def caller() -> None:
            nonlocal num_done
            while time.monotonic() - began < seconds:
                if await call(body) != expected:
                    raise AssertionError("an answer differs from the same call made alone")
                num_done += 1

        await asyncio.gather(*(caller() for _ in range(CONCURRENCY)))
        elapsed = time.monotonic() - began
    return Rate(num_done * num_rows / elapsed, num_done * len(expected) / elapsed / 1e6)


async def ask(port: int, body: bytes) -> bytes:
    """Make one call alone."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", UNLIMITED) as channel:
        call: Any = channel.unary_unary("/vae.v1.VaeService/Decode")
        answer: bytes = await call(body)
        return answer


def copy_rate(seconds: float) -> float:
    """Return what copies of 64 MiB move, megabytes per second."""
    source = np.ones(2**26, np.uint8)
    target = np.empty_like(source)
    began, num_copies = time.monotonic(), 0
    while time.monotonic() - began < seconds:
        np.copyto(target, source)
        num_copies += 1
    return num_copies * source.nbytes / (time.monotonic() - began) / 1e6


def graph_rate(graph: GraphRuntime, latents: np.ndarray, seconds: float) -> float:
    """Return rows per second of the graph alone."""
    began, num_runs = time.monotonic(), 0
    while time.monotonic() - began < seconds:
        graph.run(latents, ["mean"])
        num_runs += 1
    return num_runs * len(latents) / (time.monotonic() - began)


def run(seconds: float, rounds: int, console: Console) -> dict[str, Any]:
    """Measure each shape, number of rows and type, round by round; return the medians."""
    results: dict[tuple[str, int, str], list[Rate]] = {}
    bare: dict[tuple[str, int], list[float]] = {}
    copies: list[float] = []
    for name, shape in SHAPES.items():
        with tempfile.TemporaryDirectory() as folder:
            bundle = small_bundle(Path(folder) / "bundle", data_shape=shape, latent_dim=LATENT_DIM, hidden=(32,))
            graph = GraphRuntime(bundles.read(str(bundle)), "decoder", device="cpu", threads=1)
            with server("in-process", bundle) as (port, _):
                for number in range(rounds):
                    copies.append(copy_rate(seconds / 4))
                    for num_rows in ROWS[name]:
                        console.print(f"{name}, round {number + 1}/{rounds}: {num_rows} rows", highlight=False)
                        latents = (
                            np.random.default_rng(0).standard_normal((num_rows, LATENT_DIM)).astype(np.float32)
                        )
                        bare.setdefault((name, num_rows), []).append(graph_rate(graph, latents, seconds / 4))
                        for kind, number_of in TYPES.items():
                            request = pb.DecodeRequest(latents=to_message(latents), output_type=number_of)
                            body = request.SerializeToString()
                            expected = asyncio.run(ask(port, body))
                            _check(expected, graph, latents, number_of)
                            rate = asyncio.run(measure(port, body, expected, num_rows, seconds))
                            results.setdefault((name, num_rows, kind), []).append(rate)
    rows = [
        {
            "shape": name,
            "rows": num_rows,
            "type": kind,
            **Rate(*(statistics.median(values) for values in zip(*rates, strict=True)))._asdict(),
            "of_the_bare_graph": statistics.median(
                [rate.rows_per_s / alone for rate, alone in zip(rates, bare[name, num_rows], strict=True)]
            ),
        }
        for (name, num_rows, kind), rates in results.items()
    ]
    return {"machine": machine(), "copy_megabytes_per_s": statistics.median(copies), "rows": rows}


def _check(answer: bytes, graph: GraphRuntime, latents: np.ndarray, output_type: int) -> None:
    found = from_message(
        pb.DecodeResponse.FromString(answer).reconstruction,
        field="reconstruction",
        accept=frozenset(TYPES.values()),
    )
    (means,) = graph.run(latents, ["mean"])
    if not np.array_equal(found, to_output(means, output_type)):
        raise AssertionError("an answer is not what the graph gives")


def show(report: dict[str, Any], console: Console) -> None:
    """Print the medians."""
    table = Table(title="Decode, in-process, 2 calls in flight", title_justify="left")
    for heading in ("shape", "rows", "type", "rows/s", "MB/s", "of a copy", "of the bare graph"):
        table.add_column(heading, justify="left" if heading in {"shape", "type"} else "right")
    copy = report["copy_megabytes_per_s"]
    for row in report["rows"]:
        table.add_row(
            row["shape"],
            f"{row['rows']:,}",
            row["type"],
            f"{row['rows_per_s']:,.0f}",
            f"{row['megabytes_per_s']:,.0f}",
            f"{row['megabytes_per_s'] / copy:.2f}",
            f"{row['of_the_bare_graph']:.2f}",
        )
    console.print(table)
    console.print(f"a copy in memory moves {copy:,.0f} MB/s here", highlight=False)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="length of one measurement")
    parser.add_argument("--rounds", type=int, default=3, help="rounds; medians are shown")
    parser.add_argument("--json", type=Path, help="file for the report")
    arguments = parser.parse_args()
    console = Console()
    report = run(arguments.seconds, arguments.rounds, console)
    show(report, console)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
