"""Callers who do not read what they asked for: bounded, refused in time, and never waited for."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from prometheus_client import REGISTRY

from protos.vae.v1 import vae_pb2 as pb
from serving.gateway.server import GatewayServer
from serving.standalone import in_process
from tests.bundles import small_bundle
from tests.contract.wire import RawClient, message
from tests.serving.harness import call, eventually, failure, settings, trailers, wire

SAMPLE, STREAM = "vae.v1.VaeService/Sample", "vae.v1.VaeService/SampleStream"
NUM_ROWS = 100
ANSWER_BYTES = NUM_ROWS * 28 * 28 * 4
MIB = 2**20


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a bundle whose answers are larger than what flow control lets go unread."""
    return small_bundle(tmp_path_factory.mktemp("bundles") / "images", data_shape=(1, 28, 28))


@pytest.fixture
async def server(images: Path) -> AsyncIterator[GatewayServer]:
    """Run a service that holds little, and waits for readers a fifth of a second."""
    small = ("gateway.admission.max_unread_bytes=1048576", "gateway.transport.write_timeout_s=0.2")
    async with in_process(settings(images, *small)) as server:
        yield server


def send(client: RawClient, path: str, body: bytes) -> None:
    """Call, and do not read."""
    client.send(client.open(path), message(body))


async def test_unread_answers_are_counted_and_then_refused(server: GatewayServer) -> None:
    """Who has half of the bound unread gets no more; who leaves, or reads, gives it back."""
    request = pb.SampleRequest(num_samples=NUM_ROWS, seed=1)
    with RawClient(server.port) as greedy:
        for _ in range(10):
            await asyncio.to_thread(send, greedy, SAMPLE, request.SerializeToString())
        async with wire(server.port) as channel:

            async def refused() -> bool:
                try:
                    await call(channel, "Sample", request)
                except grpc.aio.AioRpcError as error:
                    return error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                return False

            async with asyncio.timeout(5):
                while not await refused():  # noqa: ASYNC110 - what is asked is another machine, in principle
                    await asyncio.sleep(0.01)
            error = await failure(channel, "Sample", request)
            assert trailers(error)["vae-error-reason"] == "QUEUE_FULL"
            assert "read" in (error.details() or "")
    async with wire(server.port) as channel, asyncio.timeout(5):
        while True:
            try:
                answer = await call(channel, "Sample", request)
            except grpc.aio.AioRpcError:
                await asyncio.sleep(0.01)
            else:
                break
    assert len(answer.samples.data) == ANSWER_BYTES


async def test_readers_are_not_refused(server: GatewayServer) -> None:
    """Answers that are read count for nothing, however many there are."""
    request = pb.SampleRequest(num_samples=NUM_ROWS, seed=1)
    async with wire(server.port) as channel:
        answers = [await call(channel, "Sample", request) for _ in range(3 * MIB // ANSWER_BYTES)]
    assert len({answer.samples.data for answer in answers}) == 1


async def test_a_reader_who_stalls_is_not_waited_for(server: GatewayServer) -> None:
    """A stream that nobody reads ends for us, in the metrics and for a drain, while its caller is still there."""
    request = pb.SampleStreamRequest(num_samples=100_000, seed=1)
    labels = {"method": "SampleStream", "code": "DEADLINE_EXCEEDED"}
    before = REGISTRY.get_sample_value("vae_calls_total", labels) or 0.0
    with RawClient(server.port) as stalled:
        await asyncio.to_thread(send, stalled, STREAM, request.SerializeToString())
        await eventually(lambda: REGISTRY.get_sample_value("vae_calls_total", labels) == before + 1)
        assert REGISTRY.get_sample_value("vae_calls_in_flight") == 0
        began = time.monotonic()
        await server.drain()
        assert time.monotonic() - began < 5, "a drain waits for quiet, which is here; its limit is 15 s"


async def test_a_drain_ends_streams_so_that_they_can_be_resumed(server: GatewayServer) -> None:
    """A long stream ends with UNAVAILABLE, reason DRAINING, after a whole chunk; idle streams of requests too."""
    async with wire(server.port) as channel:
        stream = channel.unary_stream(
            f"/{STREAM}",
            request_serializer=pb.SampleStreamRequest.SerializeToString,
            response_deserializer=pb.SampleStreamResponse.FromString,
        )(pb.SampleStreamRequest(num_samples=1_000_000, seed=1), timeout=30)
        idle: Any = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")(timeout=30)
        await idle.wait_for_connection()
        first = await stream.read()
        assert isinstance(first, pb.SampleStreamResponse)
        drain = asyncio.ensure_future(server.drain())
        num_rows, error = first.samples.shape[0], None
        while error is None:
            try:
                chunk: Any = await stream.read()
            except grpc.aio.AioRpcError as ended_by:
                error = ended_by
            else:
                assert chunk.first_row == num_rows
                num_rows += chunk.samples.shape[0]
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert trailers(error)["vae-error-reason"] == "DRAINING"
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await idle.read()
        assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
        async with asyncio.timeout(5):
            await drain
