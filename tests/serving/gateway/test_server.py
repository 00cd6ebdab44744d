"""Start, serve, drain: nothing is lost, nothing is shared, nothing is left."""

import asyncio
import socket
import time
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos.vae.v1 import vae_pb2 as pb
from serving.bundle import Bundle
from serving.client import SERVICE_CONFIG, AsyncVaeClient
from serving.errors import PortTaken
from serving.gateway.server import GatewayServer
from serving.standalone import in_process
from serving.tensors import to_message
from tests.bundles import small_bundle
from tests.serving.harness import PuppetEngine, call, eventually, failure, serving_with, settings, trailers, wire

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


async def test_a_free_port_is_chosen(service: GatewayServer) -> None:
    """Port zero becomes a real one."""
    assert 0 < service.port < 65_536


async def test_a_second_listener_fails_loudly(service: GatewayServer, bundle_dir: Path) -> None:
    """Two services never share a port in silence; the error names the address and the way out."""
    config = settings(bundle_dir, f"gateway.port={service.port}")
    with pytest.raises(PortTaken, match=rf"cannot listen on 127\.0\.0\.1:{service.port}: .*--port"):
        async with in_process(config):
            pass
    async with wire(service.port) as channel:
        await call(channel, "GetModel", pb.GetModelRequest())


async def test_an_address_of_another_machine_fails_loudly(bundle_dir: Path) -> None:
    """A host that is not this machine is refused at the start."""
    with pytest.raises(PortTaken, match=r"cannot listen on 192\.0\.2\.1:0"):
        async with in_process(settings(bundle_dir, "gateway.host=192.0.2.1", "gateway.allow_plaintext=true")):
            pass


async def test_the_port_is_free_again_after_the_drain(bundle_dir: Path) -> None:
    """A service may be stopped and started on the same port."""
    async with in_process(settings(bundle_dir)) as first:
        port = first.port
    async with in_process(settings(bundle_dir, f"gateway.port={port}")) as second:
        assert second.port == port


async def test_a_message_that_is_too_large_is_refused(bundle_dir: Path) -> None:
    """More bytes than the limit end as RESOURCE_EXHAUSTED, before they are parsed; the service lives on."""
    config = settings(bundle_dir, "limits.max_request_bytes=65536")
    async with in_process(config) as server, wire(server.port) as channel:
        data = to_message(np.zeros((200_000, 1), np.uint8))
        ended = await failure(channel, "Encode", pb.EncodeRequest(data=data))
        assert ended.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        await call(channel, "GetModel", pb.GetModelRequest())


async def test_the_largest_answers_of_each_method_arrive(tmp_path: Path) -> None:
    """What the stated limits allow can be answered: no answer is too large for its own message."""
    folder = small_bundle(tmp_path / "wide", data_shape=(1, 8, 8), latent_dim=64)
    config = settings(folder, "limits.max_response_bytes=65536")
    async with in_process(config) as server, AsyncVaeClient(f"127.0.0.1:{server.port}") as client:
        limit = int((await client.get_model()).limits["max_rows"])
        sampled = await client.sample(limit, seed=1, include_latents=True)
        assert len(sampled.samples) == limit
        latents = np.zeros((limit // 2, 64), np.float32)
        await client.interpolate(latents, latents, 2, kind="latents", include_latents=True)
        encoded = await client.encode(np.zeros((limit, 1, 8, 8), np.uint8), num_latents=1)
        assert len(encoded.mean) == limit


async def test_compressed_messages_are_refused(service: GatewayServer) -> None:
    """A small message that inflates to a large one is not inflated."""
    async with wire(service.port) as channel:
        data = to_message(np.zeros((1000, 1, 4, 4), np.float32))
        ended = await failure(channel, "Encode", pb.EncodeRequest(data=data), compression=grpc.Compression.Gzip)
        assert ended.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_full_queue_is_resource_exhausted_with_a_delay(bundle_dir: Path, small: Bundle) -> None:
    """Calls above the bound are shed at once, with the time after which to come back."""
    engine = PuppetEngine(small.manifest)
    engine.is_open.clear()
    config = settings(bundle_dir, "batching.max_queue_rows=10")
    async with serving_with(engine, small.manifest, config) as server, wire(server.port) as channel:
        held = asyncio.ensure_future(call(channel, "Sample", pb.SampleRequest(num_samples=10)))
        await eventually(lambda: server.operations.decoder.num_rows == 10)
        ended = await failure(channel, "Sample", pb.SampleRequest(num_samples=1))
        assert ended.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert trailers(ended)["vae-error-reason"] == "QUEUE_FULL"
        assert int(trailers(ended)["grpc-retry-pushback-ms"]) >= 50
        engine.is_open.set()
        await held


async def test_a_drain_says_so_first_and_finishes_what_runs(bundle_dir: Path, small: Bundle) -> None:
    """A watcher reads NOT_SERVING while the calls in flight still run, and they are answered."""
    engine = PuppetEngine(small.manifest)
    server = GatewayServer(engine, small.manifest, settings(bundle_dir))
    await server.start()
    await server.health.wait_until_ready(5)
    async with wire(server.port) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(service=""))
        assert (await watch.read()).status == SERVING
        engine.is_open.clear()
        pending = asyncio.ensure_future(call(channel, "Sample", pb.SampleRequest(num_samples=1)))
        await eventually(lambda: engine.num_running == 1)
        drain = asyncio.ensure_future(server.drain())
        assert (await asyncio.wait_for(watch.read(), 5)).status == NOT_SERVING
        assert server.is_draining
        await asyncio.sleep(0.1)
        assert not drain.done()
        assert not pending.done()
        late = asyncio.ensure_future(call(channel, "Sample", pb.SampleRequest(num_samples=1)))
        await eventually(lambda: server.operations.decoder.num_rows == 2)
        engine.is_open.set()
        assert len((await asyncio.gather(pending, late))[0].samples.data) == 64
        await asyncio.wait_for(drain, 5)
    assert engine.is_closed


async def test_a_drain_has_an_end(bundle_dir: Path, small: Bundle) -> None:
    """A call that never ends is cut after the longest drain and the grace."""
    engine = PuppetEngine(small.manifest)
    config = settings(bundle_dir, "gateway.drain_timeout_s=0.2", "gateway.stop_grace_s=0.1")
    server = GatewayServer(engine, small.manifest, config)
    await server.start()
    await server.health.wait_until_ready(5)
    engine.is_open.clear()
    async with wire(server.port) as channel:
        pending = asyncio.ensure_future(failure(channel, "Sample", pb.SampleRequest(num_samples=1)))
        await eventually(lambda: engine.num_running == 1)
        started = time.monotonic()
        await asyncio.wait_for(server.drain(), 5)
        assert 0.2 < time.monotonic() - started < 2
        assert (await pending).code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
    await eventually(lambda: engine.num_running == 0)


async def test_draining_twice_is_draining_once(bundle_dir: Path) -> None:
    """A second drain does no harm, also while the first one runs."""
    async with in_process(settings(bundle_dir)) as server:
        await asyncio.gather(server.drain(), server.drain())
        await server.drain()


async def test_a_lame_duck_loses_nothing_under_load(bundle_dir: Path) -> None:
    """Sixteen callers go on calling while the service drains and another one starts: every call is answered."""
    first, second = in_process(settings(bundle_dir)), in_process(settings(bundle_dir))
    one, two = await first.__aenter__(), await second.__aenter__()
    target = f"ipv4:127.0.0.1:{one.port},127.0.0.1:{two.port}"
    stop = asyncio.Event()

    async def caller(client: AsyncVaeClient, index: int) -> int:
        num_calls = 0
        while not stop.is_set():
            sampled = await client.sample(2, seed=index, timeout_s=5)
            assert len(sampled.samples) == 2
            num_calls += 1
        return num_calls

    async with AsyncVaeClient(target) as client:
        callers = [asyncio.ensure_future(caller(client, index)) for index in range(16)]
        await asyncio.sleep(0.2)
        await first.__aexit__(None, None, None)
        await asyncio.sleep(0.2)
        stop.set()
        counts = await asyncio.gather(*callers)
    await second.__aexit__(None, None, None)
    assert min(counts) > 0


async def test_calls_in_flight_at_the_drain_are_all_answered(bundle_dir: Path) -> None:
    """One service, no second one: what was accepted before and during the drain is answered, without retries."""
    async with (
        in_process(settings(bundle_dir, "gateway.drain_quiet_s=0.1")) as server,
        wire(server.port) as channel,
    ):
        await call(channel, "GetModel", pb.GetModelRequest())
        burst = [
            asyncio.ensure_future(call(channel, "Sample", pb.SampleRequest(num_samples=3))) for _ in range(200)
        ]
        await asyncio.sleep(0)
        await server.drain()
        answers = await asyncio.gather(*burst)
    assert all(len(answer.samples.data) == 3 * 64 for answer in answers)


async def test_the_metrics_endpoint_ends_with_the_server(bundle_dir: Path) -> None:
    """After the drain nothing listens any more, the metrics neither."""
    async with in_process(settings(bundle_dir, "gateway.metrics_port=0")) as server:
        assert server.metrics_port is not None
        assert _listens(server.metrics_port)
    assert not _listens(server.metrics_port)


def test_the_service_config_asks_for_the_name_that_health_knows() -> None:
    """A typo here would switch client-side health checking off in silence."""
    assert SERVICE_CONFIG["healthCheckConfig"] == {"serviceName": "vae.v1.VaeService"}


def _has_ipv6() -> bool:
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            return False
    return True


async def test_whoever_drains_again_waits_for_the_same_drain(bundle_dir: Path, small: Bundle) -> None:
    """Serve ends a replica when its drain returns: the second one must not return before the first."""
    engine = PuppetEngine(small.manifest)
    server = GatewayServer(engine, small.manifest, settings(bundle_dir))
    await server.start()
    await server.health.wait_until_ready(5)
    async with wire(server.port) as channel:
        engine.is_open.clear()
        pending = asyncio.ensure_future(call(channel, "Sample", pb.SampleRequest(num_samples=1)))
        await eventually(lambda: engine.num_running == 1)
        drains = [asyncio.ensure_future(server.drain()) for _ in range(2)]
        await asyncio.sleep(0.05)
        assert not any(drain.done() for drain in drains)
        engine.is_open.set()
        await asyncio.wait_for(asyncio.gather(pending, *drains), 5)


@pytest.mark.skipif(not _has_ipv6(), reason="this machine has no IPv6")
@pytest.mark.parametrize("host", ["::1", "[::1]"])
async def test_an_ipv6_host_is_listened_on_with_and_without_brackets(bundle_dir: Path, host: str) -> None:
    """Both ways of writing the address mean the same."""
    async with (
        in_process(settings(bundle_dir).merge({"gateway": {"host": host}})) as server,
        AsyncVaeClient(f"[::1]:{server.port}") as client,
    ):
        assert (await client.sample(2, seed=1)).samples.shape == (2, 1, 4, 4)


async def test_a_file_begins_the_drain(bundle_dir: Path, tmp_path: Path) -> None:
    """The gateway serves its notice, stops, and removes the file. One from before asks for nothing."""
    file = tmp_path / "drain"
    file.touch()
    config = settings(bundle_dir, f"gateway.drain_file={file}", "gateway.drain_notice_s=0.3")
    async with in_process(config) as server:
        await eventually(lambda: not file.exists())
        assert not server.is_draining
        file.touch()
        await eventually(lambda: server.is_draining)
        async with wire(server.port) as channel:
            await call(channel, "GetModel", pb.GetModelRequest())
        await eventually(lambda: not file.exists())
        assert not _listens(server.port)
