"""The harness that compares servers: what it counts, what it calls right, what it computes from both."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import grpc
import numpy as np
import onnxruntime as ort
import pytest
from rich.console import Console

from protos.inference import inference_pb2 as pb
from tests.benchmarks.peers import __main__ as command
from tests.benchmarks.peers import contestants, load, report
from tests.benchmarks.peers.calls import NUM_REQUESTS, TOLERANCE, WORKLOADS, Calls, Series
from tests.benchmarks.peers.servers import run_bare

PEER: Final = Series("PyTriton")
ENCODE: Final = WORKLOADS[0]
SERVICE_S: Final = 0.02
Handler = Callable[[bytes], Awaitable[bytes]]


def right_answer(session: ort.InferenceSession, body: bytes) -> pb.ModelInferResponse:
    """Return ONNX Runtime's answer to a request for the encoder."""
    outputs = run_bare.OUTPUTS["encoder"]
    values = session.run(list(outputs), run_bare.rows_of(pb.ModelInferRequest.FromString(body)))
    return run_bare.answer("encoder", list(outputs.values()), values)


@pytest.fixture
def encoder(bundle_dir: Path) -> ort.InferenceSession:
    """Return a session of the small bundle's encoder."""
    return run_bare.session(bundle_dir / "encoder.onnx")


@contextlib.asynccontextmanager
async def served(handler: Handler) -> AsyncIterator[int]:
    """Serve ModelInfer by a function of bytes; yield the port."""

    async def infer(body: bytes, _context: object) -> bytes:
        return await handler(body)

    methods: dict[str, Any] = {"ModelInfer": grpc.unary_unary_rpc_method_handler(infer)}
    server = grpc.aio.server()
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("inference.GRPCInferenceService", methods),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield port
    finally:
        await server.stop(None)


def test_only_the_answer_of_onnx_runtime_is_right(bundle_dir: Path, encoder: ort.InferenceSession) -> None:
    """Another request's rows, a value off by more than the tolerance, half an answer and no answer are wrong."""
    calls = Calls(bundle_dir, PEER, ENCODE)
    answers = [right_answer(encoder, body) for body in calls.bodies]
    off = pb.ModelInferResponse.FromString(answers[0].SerializeToString())
    values = np.frombuffer(off.raw_output_contents[0], "f4") + 10 * TOLERANCE
    off.raw_output_contents[0] = values.tobytes()
    half = pb.ModelInferResponse(model_name="encoder", outputs=answers[0].outputs[:1])
    half.raw_output_contents.append(answers[0].raw_output_contents[0])

    assert all(calls.is_right(index, answer.SerializeToString()) for index, answer in enumerate(answers))
    assert not calls.is_right(0, answers[1].SerializeToString())
    assert not calls.is_right(0, off.SerializeToString())
    assert not calls.is_right(0, half.SerializeToString())
    assert not calls.is_right(0, b"\xff")
    assert not calls.is_right(0, b"")


async def test_wrong_answers_and_errors_are_counted_and_are_no_throughput(
    bundle_dir: Path, encoder: ort.InferenceSession
) -> None:
    """Of sixteen requests one is answered with another's rows and one not at all."""
    calls = Calls(bundle_dir, PEER, ENCODE)
    wrong, failing = calls.bodies[3], calls.bodies[5]
    answers = {body: right_answer(encoder, body).SerializeToString() for body in calls.bodies}
    answers[wrong] = answers[calls.bodies[4]]

    async def handler(body: bytes) -> bytes:
        if body == failing:
            raise RuntimeError("on purpose")  # gRPC ends the call as UNKNOWN
        return answers[body]

    async with served(handler) as port:
        window = await load.closed_loop(port, PEER, calls, concurrency=4, seconds=0.2)
    total = sum(window.statuses.values())
    share = 1 / NUM_REQUESTS
    assert set(window.statuses) == {load.RIGHT, load.WRONG, "UNKNOWN"}
    # Each of the four callers may be a round of sixteen ahead of its last wrong answer, or just behind it.
    assert window.statuses[load.WRONG] == pytest.approx(total * share, abs=4)
    assert window.statuses["UNKNOWN"] == pytest.approx(total * share, abs=4)
    assert 0 < window.calls_per_s < total / 0.2


async def test_latency_counts_from_when_a_call_was_due(
    bundle_dir: Path, encoder: ort.InferenceSession, seed: int
) -> None:
    """A server that takes 20 ms a call and is offered 100 a second for 0.4 s ends 0.4 s behind, and it shows."""
    calls = Calls(bundle_dir, PEER, ENCODE)
    answers = {body: right_answer(encoder, body).SerializeToString() for body in calls.bodies}
    turn = asyncio.Lock()

    async def handler(body: bytes) -> bytes:
        async with turn:
            await asyncio.sleep(SERVICE_S)
            return answers[body]

    async with served(handler) as port:
        closed = await load.closed_loop(port, PEER, calls, concurrency=1, seconds=0.3)
        opened = await load.open_loop(port, PEER, calls, rate=2 / SERVICE_S, seconds=0.4, seed=seed)
    assert opened.statuses == {load.RIGHT: 40}
    assert closed.p50_ms >= SERVICE_S * 1000
    assert closed.calls_per_s <= 1 / SERVICE_S
    # Forty calls take 0.8 s; the last was due near 0.4 s, give or take a deviation of sqrt(40) arrivals, 0.06 s.
    assert opened.p99_ms > 200


def test_timers_are_exact_to_less_than_a_millisecond() -> None:
    """A loop that rounds sleeps up to milliseconds would be late by half a call."""

    async def lateness() -> float:
        late = []
        for _ in range(50):
            due = asyncio.get_running_loop().time() + 0.0002
            await asyncio.sleep(0.0002)
            late.append(asyncio.get_running_loop().time() - due)
        return min(late)  # of many: other programs use the processors too

    # epoll would sleep a whole millisecond, 0.8 ms too long, every time.
    assert load.run(lateness()) < 0.0006


def window(calls_per_s: float, p50_ms: float) -> load.Window:
    """Return what was measured, as far as the tables show it."""
    return load.Window(calls_per_s, p50_ms, 2 * p50_ms, {load.RIGHT: 10})


def synthetic() -> report.Report:
    """Return a report of figures that are easy to divide."""
    cells = report.Cells()
    figures = {
        "ours, in-process, vae.v1": (1200.0, 0.5),
        "PyTriton": (600.0, 1.0),
        "MLServer": (300.0, 1.0),
        "MLServer, batches": (400.0, 9.0),
        "Ray Serve": (240.0, 5.0),
    }
    for workload in WORKLOADS:
        for series, (calls_per_s, p50_ms) in figures.items():
            for scale in (0.5, 1.0, 4.0):  # the median is not the mean
                for concurrency in (1, 128):
                    key = report.Key(workload.name, series, "closed", concurrency)
                    cells.add(key, window(scale * calls_per_s, scale * p50_ms))
    return {
        "command": "python",
        "date": "2026-01-01",
        "machine": {"processors": 2, "model": "any", "python": "3.11", "load_average": 0.0},
        "model": "small",
        "rounds": 3,
        "tolerance": TOLERANCE,
        "concurrencies": (1, 128),
        "open_share": 0.7,
        "rates": {},
        "absent": {"absent peer": "run `make it`"},
        "settings": {},
        "series": list(figures),
        "cells": cells.as_json(),
    }


def test_ratios_are_of_medians_and_against_the_better_setting() -> None:
    """1,200/s is twice PyTriton's 600/s, three times the better MLServer's 400/s, five times Ray Serve's 240/s."""
    text = report.as_markdown(synthetic())
    assert f"| PyTriton | throughput | ≥ 1.2 | {ENCODE.name} | **2.00** |" in text
    assert f"| PyTriton | latency | ≤ 0.8 | {ENCODE.name} | **0.50** |" in text
    assert f"| MLServer | throughput | ≥ 2 | {ENCODE.name} | **3.00** |" in text
    assert f"| Ray Serve | throughput | ≥ 6 | {ENCODE.name} | 5.00 |" in text  # not reached: not bold
    assert "all 1,200 calls were answered OK" in text  # 4 workloads x 5 series x 3 rounds x 2 levels x 10
    assert "absent peer is not here and was left out: run `make it`" in text


def test_the_json_holds_what_the_tables_are_made_of() -> None:
    """A later run can be compared with it; where nothing was right there is a null, not a figure."""
    values = synthetic()
    cells = report.Cells()
    nothing = load.Window(0.0, float("nan"), float("nan"), {"UNAVAILABLE": 3})
    cells.add(report.Key(ENCODE.name, "PyTriton", "closed", 1), nothing)
    read = json.loads(report.dumps({**values, "cells": [*values["cells"], *cells.as_json()]}))
    assert read["cells"][:-1] == values["cells"]
    assert read["cells"][-1]["median"]["p50_ms"] is None
    assert read["cells"][-1]["statuses"] == {"UNAVAILABLE": 3}


def test_a_status_that_is_not_right_is_named() -> None:
    """Nobody reads a table of figures that were not all right without being told."""
    values = synthetic()
    cell = values["cells"][0]
    cell["statuses"] = {load.RIGHT: 29, load.WRONG: 1}  # of three windows of ten calls; eight cells a series
    assert f"{cell['series']}: OK 239, WRONG 1" in report.as_markdown(values)


def test_the_plot_names_every_series(tmp_path: Path) -> None:
    """An SVG whose text is text."""
    values = synthetic()
    report.plot(values, tmp_path / "peers.svg")
    drawn = (tmp_path / "peers.svg").read_text()
    assert "nan" not in drawn
    assert all(series in drawn for series in values["series"])


def test_absent_peers_say_how_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without their environments MLServer and PyTriton are left out, ours and Ray Serve are not."""
    monkeypatch.setattr(contestants, "ENVIRONMENTS", tmp_path)
    absent = {each.name: each.how_to_get for each in contestants.contestants() if not each.is_here}
    assert set(absent) == {"PyTriton", "MLServer", "MLServer, batches"}
    assert all("make serving-peers" in how for how in absent.values())
    with pytest.raises(SystemExit, match="nobody to compare"):
        command.measure(command.Plan(1, 0.1), ["MLServer"], Console(quiet=True))


@pytest.mark.slow
def test_servers_are_started_measured_and_stopped(bundle_dir: Path) -> None:
    """One round of ours and of the bare server, as processes of their own, answers every call rightly."""
    chosen = [each for each in contestants.contestants() if each.name in {"ours, in-process", "bare grpc.aio"}]
    run = command.Run(chosen, bundle_dir, command.Plan(1, 0.05), Console(quiet=True))
    cells, rates = run.everything()
    assert not run.failures
    assert rates == {}  # without a peer and a second round there is no open loop
    measured = cells.as_json()
    assert {cell["series"] for cell in measured} == {series.name for each in chosen for series in each.series}
    assert all(set(cell["statuses"]) == {load.RIGHT} for cell in measured)
    assert all(cell["median"]["calls_per_s"] > 0 for cell in measured)
