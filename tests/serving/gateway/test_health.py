"""Health is derived: NOT_SERVING until the engine answers, and whenever it does not."""

import asyncio
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from serving.bundle import Bundle
from serving.gateway.health import Health
from serving.gateway.server import GatewayServer
from tests.serving.harness import SERVICE, PuppetEngine, eventually, serving_with, settings, wire

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
NAMES = ("", SERVICE, "inference.GRPCInferenceService")


async def _check(channel: grpc.aio.Channel, name: str) -> int:
    stub: Any = health_pb2_grpc.HealthStub(channel)  # the stubs of the package know no methods
    response = await stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=5)
    return int(response.status)


@pytest.mark.parametrize("name", NAMES)
async def test_every_name_is_serving_once_the_engine_answers(service: GatewayServer, name: str) -> None:
    """When the service says it is ready, health says so under its name and for the whole server."""
    async with wire(service.port) as channel:
        assert await _check(channel, name) == SERVING


async def test_an_unknown_name_is_not_found(service: GatewayServer) -> None:
    """The protocol's answer to a service that is not there is NOT_FOUND."""
    async with wire(service.port) as channel:
        with pytest.raises(grpc.aio.AioRpcError, match="NOT_FOUND"):
            await _check(channel, "vae.v2.VaeService")


@pytest.mark.parametrize("name", NAMES)
async def test_nothing_serves_until_the_engine_answers(bundle_dir: Path, small: Bundle, name: str) -> None:
    """NOT_SERVING while the engine is ill, SERVING when it is well, and back again."""
    engine = PuppetEngine(small.manifest)
    engine.is_ill = True
    async with serving_with(engine, small.manifest, settings(bundle_dir)) as server, wire(server.port) as channel:
        assert await _check(channel, name) == NOT_SERVING
        assert not server.health.is_ready
        engine.is_ill = False
        await server.health.wait_until_ready(5)
        await eventually(lambda: server.health.is_ready)
        assert await _check(channel, name) == SERVING
        engine.is_ill = True
        await eventually(lambda: not server.health.is_ready)
        await asyncio.sleep(0.01)
        assert await _check(channel, name) == NOT_SERVING


@pytest.mark.parametrize("name", NAMES)
async def test_nothing_serves_before_the_start(small: Bundle, name: str) -> None:
    """The servicer never says SERVING before the engine was asked, not even for an instant."""
    engine = PuppetEngine(small.manifest)
    health = Health(engine, [SERVICE], is_stalled=lambda: False, on_ready=lambda _: None)
    await health.prepare()
    request, context = health_pb2.HealthCheckRequest(service=name), cast("Any", _Context())
    try:
        response = await health.servicer.Check(request, context)
    except grpc.aio.AbortError:
        return
    assert response.status != SERVING


class _Context:
    """A context that can only abort."""

    async def abort(self, *_: object) -> None:
        """Abort."""
        raise grpc.aio.AbortError

    def set_code(self, _: object) -> None:
        """Take a code."""


async def test_a_surprise_of_the_engine_is_not_the_end_of_the_watch(bundle_dir: Path, small: Bundle) -> None:
    """An exception that nobody expected makes the service ill, not blind."""
    engine = PuppetEngine(small.manifest)
    async with serving_with(engine, small.manifest, settings(bundle_dir)) as server:
        answer = engine.check

        async def surprise() -> None:
            raise ValueError("surprise")

        engine.check = surprise  # type: ignore[method-assign, assignment]
        await eventually(lambda: not server.health.is_ready)
        assert server.health.is_alive
        engine.check = answer  # type: ignore[method-assign]
        await eventually(lambda: server.health.is_ready)


async def test_a_stall_makes_the_service_ill(small: Bundle) -> None:
    """An engine that answers its check but runs nothing is not healthy."""
    is_stalled = False
    health = Health(
        PuppetEngine(small.manifest), [SERVICE], is_stalled=lambda: is_stalled, on_ready=lambda _: None
    )
    await health.start()
    await health.wait_until_ready(5)
    is_stalled = True
    await eventually(lambda: not health.is_ready)
    await health.enter_drain()


async def test_waiting_has_an_end(small: Bundle) -> None:
    """Who waits for a service that does not come up is told so."""
    engine = PuppetEngine(small.manifest)
    engine.is_ill = True
    health = Health(engine, [SERVICE], is_stalled=lambda: False, on_ready=lambda _: None)
    await health.start()
    with pytest.raises(TimeoutError, match=r"^$"):
        await health.wait_until_ready(0.05)
    await health.enter_drain()


async def test_reflection_lists_the_services(service: GatewayServer) -> None:
    """Tools such as grpcurl find the API, health and reflection."""
    async with wire(service.port) as channel:
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(cast("Any", channel))
        call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        response = await call.read()
    names = {service.name for service in response.list_services_response.service}
    assert names == {
        SERVICE,
        "inference.GRPCInferenceService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }


async def test_reflection_can_be_turned_off(bundle_dir: Path, small: Bundle) -> None:
    """Without reflection, nobody is told what there is."""
    config = settings(bundle_dir, "gateway.auth.reflection=disabled")
    async with (
        serving_with(PuppetEngine(small.manifest), small.manifest, config) as server,
        wire(server.port) as channel,
    ):
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(cast("Any", channel))
        call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        with pytest.raises(grpc.aio.AioRpcError, match="UNIMPLEMENTED"):
            await call.read()
