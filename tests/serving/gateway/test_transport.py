"""Settings of the transport, seen from the other end of the connection."""

import asyncio
import time
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from protos.vae.v1 import vae_pb2 as pb
from serving.client import AsyncVaeClient
from serving.standalone import in_process
from serving.tensors import to_message
from tests.bundles import DATA_SHAPE
from tests.contract.wire import RawClient, message
from tests.serving.harness import call, settings, wire

ENCODE, SAMPLE = "vae.v1.VaeService/Encode", "vae.v1.VaeService/Sample"
RESOURCE_EXHAUSTED = 8
LIMIT_BYTES = 128 * 1024


def one_image() -> pb.EncodeRequest:
    """Return a good request."""
    return pb.EncodeRequest(data=to_message(np.zeros((1, *DATA_SHAPE), np.uint8)))


async def test_gzip_is_understood_where_it_is_allowed(bundle_dir: Path) -> None:
    """A compressed request is served; a bomb stops at the largest message, which is what inflating it may cost."""
    config = settings(bundle_dir, "gateway.transport.compression=gzip", f"limits.max_request_bytes={LIMIT_BYTES}")
    async with in_process(config) as server:
        async with wire(server.port) as channel:
            plain = await call(channel, "Encode", one_image())
            packed = await call(channel, "Encode", one_image(), compression=grpc.Compression.Gzip)
        assert packed == plain

        def bomb() -> int | None:
            with RawClient(server.port) as client:
                stream = client.open(ENCODE, [("grpc-encoding", "gzip")])
                client.send(stream, message(bytes(64 * 2**20), compressed=True))
                return client.answer(stream).status

        assert await asyncio.to_thread(bomb) == RESOURCE_EXHAUSTED


async def test_aged_connections_are_replaced_and_no_call_is_lost(bundle_dir: Path) -> None:
    """Callers move every fifth of a second, in the middle of their calls, and see nothing of it."""
    config = settings(bundle_dir, "gateway.transport.max_connection_age_s=0.2")
    async with in_process(config) as server, AsyncVaeClient(f"127.0.0.1:{server.port}") as client:
        expected = (await client.sample(3, seed=1)).samples.tobytes()
        stop_at = time.monotonic() + 1.5
        answers: list[bytes] = []

        async def caller() -> None:
            while time.monotonic() < stop_at:
                answers.append((await client.sample(3, seed=1)).samples.tobytes())

        await asyncio.gather(*(caller() for _ in range(8)))
        assert set(answers) == {expected}
        with RawClient(server.port) as stranger:
            assert await asyncio.to_thread(stranger.wait_closed, 5) < 5


async def test_idle_connections_are_closed(bundle_dir: Path) -> None:
    """A connection that has made its call is sent away after the idle time."""
    config = settings(bundle_dir, "gateway.transport.max_connection_idle_s=0.3")
    async with in_process(config) as server:

        def be_idle() -> tuple[int | None, float]:
            with RawClient(server.port) as client:
                status = client.call(SAMPLE, pb.SampleRequest(num_samples=1).SerializeToString()).status
                return status, client.wait_closed(5)

        status, seconds = await asyncio.to_thread(be_idle)
        assert status == 0
        assert seconds < 5


async def test_streams_above_a_bound_are_refused_where_one_is_set(bundle_dir: Path) -> None:
    """The bound on the calls of one connection is stated to callers in the server's settings."""
    config = settings(bundle_dir, "gateway.transport.max_concurrent_streams=7")
    async with in_process(config) as server:

        def stated() -> Any:  # noqa: ANN401 - a number, or nothing
            with RawClient(server.port) as client:
                client.call(SAMPLE, pb.SampleRequest(num_samples=1).SerializeToString())
                return client.connection.remote_settings.max_concurrent_streams

        assert await asyncio.to_thread(stated) == 7
