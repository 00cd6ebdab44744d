"""One call over a real socket: bodies that do not come, streams that are not read, deadlines, priorities, ids."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from protos.vae.v1 import vae_pb2 as pb
from serving import bundle
from serving.bundle import Bundle
from serving.gateway.server import GatewayServer
from serving.standalone import in_process
from serving.tensors import to_message
from tests.bundles import small_bundle
from tests.contract.wire import Answer, RawClient, message
from tests.serving.harness import (
    SERVICE,
    PuppetEngine,
    call,
    eventually,
    failure,
    read_until_failure,
    sample_stream,
    serving_with,
    settings,
    trailers,
    wire,
)

BODY_TIMEOUT_S = 0.2
SLACK_S = 2.0
"""What a busy machine may add."""

UNARY = ("Encode", "Decode", "Sample", "Reconstruct", "Interpolate", "Score", "GetModel")
METHODS = (*UNARY, "SampleStream")
ONE = pb.EncodeRequest(data=to_message(np.zeros((1, 1, 4, 4), np.uint8)))


@pytest.fixture
def engine(small: Bundle) -> PuppetEngine:
    """Return an engine that obeys."""
    return PuppetEngine(small.manifest)


@pytest.fixture
async def held(bundle_dir: Path, small: Bundle, engine: PuppetEngine) -> AsyncIterator[GatewayServer]:
    """Run a gateway in front of the engine that obeys, which waits for no body longer than a fifth of a second."""
    config = settings(
        bundle_dir,
        f"gateway.transport.body_timeout_s={BODY_TIMEOUT_S}",
        "limits.max_stream_s=0.5",
        "batching.max_queue_rows=10",
    )
    async with serving_with(engine, small.manifest, config) as server:
        yield server


def opened(channel: grpc.aio.Channel, method: str, **options: Any) -> Any:  # noqa: ANN401 - of gRPC
    """Begin a call whose messages are sent one by one, or not at all."""
    response = getattr(pb, f"{method}Response")
    multi: Any = channel.stream_unary(
        f"/{SERVICE}/{method}", request_serializer=None, response_deserializer=response.FromString
    )
    return multi(**({"timeout": 20} | options))


async def end_of(pending: Any) -> tuple[grpc.StatusCode, str, dict[str, Any]]:  # noqa: ANN401 - of gRPC
    """Return code, text and trailers of a call."""
    code = await pending.code()
    return code, await pending.details(), dict(await pending.trailing_metadata() or ())


@pytest.mark.parametrize("method", METHODS)
async def test_a_body_that_does_not_come_ends_the_call(held: GatewayServer, method: str) -> None:
    """Headers alone hold a call for the time of a body, and the caller hears what was missing."""
    started = time.monotonic()
    async with wire(held.port) as channel:
        code, text, found = await end_of(opened(channel, method))
    assert (code, text) == (grpc.StatusCode.DEADLINE_EXCEEDED, "the request did not arrive within 0.2 s")
    assert found["vae-error-reason"] == "REQUEST_STALLED"
    assert BODY_TIMEOUT_S <= time.monotonic() - started < BODY_TIMEOUT_S + SLACK_S


@pytest.mark.parametrize("method", ["Encode", "SampleStream"])
async def test_half_a_body_is_no_body(held: GatewayServer, method: str) -> None:
    """A message that stops in its middle is timed out like one that never began."""

    def send_half() -> Answer:
        with RawClient(held.port) as client:
            stream = client.open(f"{SERVICE}/{method}")
            client.send(stream, message(b"x" * 1000)[:500], end=False)
            return client.answer(stream)

    answer = await asyncio.to_thread(send_half)
    assert answer.status == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
    assert answer.trailers["vae-error-reason"] == "REQUEST_STALLED"
    assert BODY_TIMEOUT_S <= answer.seconds < BODY_TIMEOUT_S + SLACK_S


async def test_each_body_has_its_own_time(held: GatewayServer) -> None:
    """Calls that send nothing end one after the other as they began; others are answered meanwhile."""
    ends: list[tuple[float, float]] = []

    async def stall(channel: grpc.aio.Channel) -> None:
        started = time.monotonic()
        assert (await end_of(opened(channel, "Encode")))[2]["vae-error-reason"] == "REQUEST_STALLED"
        ends.append((started, time.monotonic()))

    async with wire(held.port) as channel:
        await call(channel, "GetModel", pb.GetModelRequest())
        stalled = []
        for _ in range(5):
            stalled.append(asyncio.ensure_future(stall(channel)))
            assert len((await call(channel, "Encode", ONE)).mean.data) == 8
            await asyncio.sleep(0.06)
        await asyncio.gather(*stalled)
    assert ends == sorted(ends)
    assert all(ended - started >= BODY_TIMEOUT_S for started, ended in ends)
    assert ends[-1][1] - ends[0][1] > 0.1  # not all with the first


async def test_a_body_that_comes_late_but_in_time_is_answered(held: GatewayServer) -> None:
    """A body may take its time, if it is not more than that."""
    async with wire(held.port) as channel:
        pending = opened(channel, "Encode")
        await asyncio.sleep(BODY_TIMEOUT_S / 4)
        await pending.write(ONE.SerializeToString())
        assert len((await pending).mean.data) == 8


async def test_a_slow_answer_is_not_taken_for_a_slow_body(held: GatewayServer, engine: PuppetEngine) -> None:
    """Once its body is there, a call may run for longer than a body may take."""
    engine.is_open.clear()
    async with wire(held.port) as channel:
        pending = asyncio.ensure_future(call(channel, "Encode", ONE))
        await asyncio.sleep(2 * BODY_TIMEOUT_S)
        assert not pending.done()
        engine.is_open.set()
        assert len((await pending).mean.data) == 8


@pytest.mark.parametrize("method", METHODS)
async def test_a_call_without_a_message_is_malformed(held: GatewayServer, method: str) -> None:
    """Whoever ends its half of the call and has sent nothing is told what was expected."""
    async with wire(held.port) as channel:
        pending = opened(channel, method)
        await pending.done_writing()
        code, text, found = await end_of(pending)
    assert (code, found["vae-error-reason"]) == (grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_MESSAGE")
    assert text.startswith(f"request: expected a {method}Request message, got ")


@pytest.mark.parametrize("second", [ONE.SerializeToString(), b"\xff\xff", b""])
async def test_a_second_message_of_a_unary_call_changes_nothing(held: GatewayServer, second: bytes) -> None:
    """The first message is the request; what comes after it is not read."""
    async with wire(held.port) as channel:
        pending = opened(channel, "Encode")
        await pending.write(ONE.SerializeToString())
        await pending.write(second)
        assert len((await pending).mean.data) == 8
        assert len((await call(channel, "Encode", ONE)).mean.data) == 8


@pytest.mark.parametrize("method", ["Sample", "GetModel", "SampleStream"])
async def test_a_large_request_without_tensors_is_refused_unparsed(held: GatewayServer, method: str) -> None:
    """What needs some dozen bytes is not read at megabytes: parsing multiplies hostile messages."""
    async with wire(held.port) as channel:
        error = await failure(channel, method, b"\x92\x03\x01x" * 20_000)
    found = trailers(error)
    assert (error.code(), found["vae-error-reason"]) == (grpc.StatusCode.INVALID_ARGUMENT, "OUT_OF_RANGE")
    assert found["vae-error-field"] == "request"


async def test_a_hundred_keys_of_metadata_are_no_trouble(held: GatewayServer) -> None:
    """Metadata below the limit is carried and ignored, repeated and binary keys too."""
    metadata: list[tuple[str, str | bytes]] = [(f"key-{index}", "value") for index in range(100)]
    metadata += [("repeated", "one"), ("repeated", "two"), ("binary-bin", b"\x00\xff")]
    async with wire(held.port) as channel:
        assert len((await call(channel, "Encode", ONE, metadata=metadata)).mean.data) == 8


@pytest.mark.parametrize("size", [20_000, 60_000])
async def test_a_flood_of_metadata_is_refused(held: GatewayServer, size: int) -> None:
    """Metadata above the limit is RESOURCE_EXHAUSTED, and the connection lives on."""
    async with wire(held.port) as channel:
        error = await failure(channel, "Encode", ONE, metadata=(("flood", "x" * size),))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert len((await call(channel, "Encode", ONE)).mean.data) == 8


PRIORITIES = [
    ("Encode", None, 10),
    ("Encode", "1", 10),
    ("Encode", "2", 8),
    ("Encode", "3", 5),
    ("Sample", None, 8),
    ("Sample", "1", 8),
    ("Sample", "3", 5),
    ("Encode", "0", 10),
    ("Encode", "4", 10),
    ("Encode", "-1", 10),
    ("Encode", "high", 10),
    ("Encode", "", 10),
]


@pytest.mark.parametrize(("method", "asked", "bound"), PRIORITIES)
async def test_a_caller_may_step_back(
    held: GatewayServer, engine: PuppetEngine, method: str, asked: str | None, bound: int
) -> None:
    """`vae-priority` lowers the priority of a call and never raises it; what is no priority is ignored."""
    metadata = [] if asked is None else [("vae-priority", asked)]
    engine.is_open.clear()

    def request(num_rows: int) -> pb.EncodeRequest | pb.SampleRequest:
        if method == "Sample":
            return pb.SampleRequest(num_samples=num_rows)
        return pb.EncodeRequest(data=to_message(np.zeros((num_rows, 1, 4, 4), np.uint8)))

    batcher = held.operations.decoder if method == "Sample" else held.operations.encoder
    async with wire(held.port) as channel:
        first = asyncio.ensure_future(call(channel, method, request(1)))
        await eventually(lambda: batcher.num_rows == 1)
        error = await failure(channel, method, request(bound), metadata=metadata)
        assert trailers(error)["vae-error-reason"] == "QUEUE_FULL"
        second = asyncio.ensure_future(call(channel, method, request(bound - 1), metadata=metadata))
        await eventually(lambda: batcher.num_rows == bound)
        engine.is_open.set()
        await asyncio.gather(first, second)


@pytest.mark.parametrize("timeout_s", [0.1, 60, None])
async def test_a_stream_has_a_deadline(held: GatewayServer, engine: PuppetEngine, timeout_s: float | None) -> None:
    """A stream ends at the caller's deadline, or after the longest time of a stream, and leaves no rows."""
    engine.is_open.clear()
    started = time.monotonic()
    async with wire(held.port) as channel:
        stream = sample_stream(channel, pb.SampleStreamRequest(num_samples=9, seed=1), timeout=timeout_s)
        _, error = await read_until_failure(stream)
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert time.monotonic() - started < (timeout_s if timeout_s == 0.1 else 0.5) + SLACK_S
    if timeout_s != 0.1:
        assert trailers(error)["vae-error-reason"] == "DEADLINE_EXCEEDED"
        assert time.monotonic() - started >= 0.5
    await eventually(lambda: held.operations.decoder.num_rows == 0)


async def test_a_stream_that_is_cancelled_stops_the_work(held: GatewayServer, engine: PuppetEngine) -> None:
    """When the caller cancels or its connection goes, nothing of the stream waits or comes after."""
    for leaves in ("cancel", "close"):
        engine.is_open.set()
        async with wire(held.port) as channel:
            stream = sample_stream(
                channel, pb.SampleStreamRequest(num_samples=1_000_000, seed=1, max_chunk_rows=2)
            )
            assert (await stream.read()).first_row == 0
            engine.is_open.clear()
            await eventually(lambda: engine.num_running == 1)
            if leaves == "cancel":
                stream.cancel()
                await eventually(lambda: held.operations.decoder.num_rows == 0)
        await eventually(lambda: held.operations.decoder.num_rows == 0)
        engine.is_open.set()
        await eventually(lambda: engine.num_running == 0)
        num_decoded = engine.num_decoded
        async with wire(held.port) as channel:
            await call(channel, "Sample", pb.SampleRequest(num_samples=1))
        assert engine.num_decoded == num_decoded + 1


@pytest.fixture(scope="module")
def wide_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a bundle with rows of 3 kB, so that a stream soon fills what a connection holds."""
    return small_bundle(tmp_path_factory.mktemp("bundles") / "wide", data_shape=(1, 28, 28))


async def test_a_stream_that_is_not_read_waits_and_then_ends(wide_dir: Path) -> None:
    """A reader that stops costs a few chunks and no more; it is told where it stands, and can resume there."""
    manifest = bundle.read(str(wide_dir)).manifest
    engine = PuppetEngine(manifest)
    config = settings(wide_dir, "gateway.transport.write_timeout_s=0.3")
    request = pb.SampleStreamRequest(num_samples=1_000_000, seed=1)
    fixed = [("grpc.http2.bdp_probe", 0)]  # else the reader's window grows to megabytes by its own measurements
    async with serving_with(engine, manifest, config) as server, wire(server.port, extra=fixed) as channel:
        stream = sample_stream(channel, request)
        chunk_rows = (await stream.read()).samples.shape[0]
        await eventually(lambda: engine.num_decoded >= 2 * chunk_rows)
        await asyncio.sleep(0.15)  # within the time of one message
        num_decoded = engine.num_decoded
        assert num_decoded < 20 * chunk_rows
        await eventually(lambda: server.operations.decoder.num_in_flight == 0)
        await asyncio.sleep(0.4)
        assert engine.num_decoded == num_decoded
        responses, error = await read_until_failure(stream)
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert error.details() == "the answer was not read for 0.3 s; resume from the first row that is missing"
        assert trailers(error)["vae-error-reason"] == "RESPONSE_STALLED"
        assert [part.first_row for part in responses] == [chunk_rows * (1 + i) for i in range(len(responses))]
        num_rows = chunk_rows * (1 + len(responses))
        assert num_rows < num_decoded + chunk_rows
        resumed = sample_stream(channel, pb.SampleStreamRequest(num_samples=10, seed=1, first_row=num_rows))
        assert (await resumed.read()).first_row == num_rows


async def test_a_reader_that_is_slow_but_reads_is_served(wide_dir: Path) -> None:
    """The time is for one message: a stream may take many times as long as a message may."""
    config = settings(wide_dir, "gateway.transport.write_timeout_s=0.3")
    request = pb.SampleStreamRequest(num_samples=12 * 333, seed=1, max_chunk_rows=333)
    async with in_process(config) as server, wire(server.port) as channel:
        stream = sample_stream(channel, request)
        num_rows, started = 0, time.monotonic()
        async for response in stream:
            num_rows += response.samples.shape[0]
            await asyncio.sleep(0.05)
        assert num_rows == 12 * 333
        assert time.monotonic() - started > 0.5


async def test_a_drain_ends_a_stream_where_it_can_be_resumed(bundle_dir: Path, small: Bundle) -> None:
    """A stream keeps no server from stopping: it ends between two chunks, with a reason to go on elsewhere."""
    engine = PuppetEngine(small.manifest)
    server = GatewayServer(engine, small.manifest, settings(bundle_dir))
    await server.start()
    await server.health.wait_until_ready(5)
    async with wire(server.port) as channel:
        request = pb.SampleStreamRequest(num_samples=10_000_000, seed=1, max_chunk_rows=3)
        stream = sample_stream(channel, request)
        first = await stream.read()
        started = time.monotonic()
        drain = asyncio.ensure_future(server.drain())
        responses, error = await read_until_failure(stream)
        await asyncio.wait_for(drain, 10)
        assert time.monotonic() - started < 5
    assert (error.code(), trailers(error)["vae-error-reason"]) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
    assert [part.first_row for part in [first, *responses]] == [3 * index for index in range(1 + len(responses))]
    assert engine.num_running == 0


async def test_a_drain_cuts_a_stream_that_is_stuck(bundle_dir: Path, small: Bundle) -> None:
    """A stream whose next chunk never comes is cut after the drain's time, with a status that says so."""
    engine = PuppetEngine(small.manifest)
    config = settings(bundle_dir, "gateway.drain_timeout_s=0.2", "gateway.stop_grace_s=0.1")
    server = GatewayServer(engine, small.manifest, config)
    await server.start()
    await server.health.wait_until_ready(5)
    async with wire(server.port) as channel:
        stream = sample_stream(channel, pb.SampleStreamRequest(num_samples=100, seed=1, max_chunk_rows=3))
        await stream.read()
        engine.is_open.clear()
        reading = asyncio.ensure_future(read_until_failure(stream))
        await eventually(lambda: engine.num_running == 1)
        await asyncio.wait_for(server.drain(), 5)
        _, error = await reading
        assert error.code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
    await eventually(lambda: engine.num_running == 0)
