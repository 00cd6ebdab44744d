"""Health and reflection obey their policies; grants are no matter to them."""

import contextlib
from collections.abc import AsyncIterator
from typing import Any, cast

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc

from serving import api_keys
from serving.config import AuthConfig, TlsConfig
from serving.gateway.guard import Guard
from serving.gateway.identity import HEALTH, REFLECTION, Identity
from tests.serving.harness import trailers, wire

KEY = api_keys.new_key()
GOOD = (("x-api-key", KEY),)
SERVING = health_pb2.HealthCheckResponse.SERVING


@contextlib.asynccontextmanager
async def _served(**auth: object) -> AsyncIterator[grpc.aio.Channel]:
    """Run health and reflection alone, behind guards; return a channel to them."""
    environ = {"VAE_API_KEYS": f"probe:{api_keys.digest_of(KEY)}"}
    identity = Identity(AuthConfig.parse(auth), TlsConfig(), environ=environ)
    server = grpc.aio.server()
    servicer = health_aio.HealthServicer()
    await servicer.set("", SERVING)
    reflector = reflection.aio.ReflectionServicer([HEALTH])
    server.add_generic_rpc_handlers(
        (
            Guard(identity, health_pb2_grpc.add_HealthServicer_to_server, servicer),
            Guard(identity, reflection_pb2_grpc.add_ServerReflectionServicer_to_server, reflector),
        )
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with wire(port) as channel:
            yield channel
    finally:
        await server.stop(0)


async def _health(channel: grpc.aio.Channel, method: str, metadata: Any = ()) -> int:  # noqa: ANN401 - of gRPC
    stub: Any = health_pb2_grpc.HealthStub(channel)  # the stubs of the package know no methods
    request = health_pb2.HealthCheckRequest()
    if method == "Check":
        return int((await stub.Check(request, timeout=5, metadata=metadata)).status)
    call = stub.Watch(request, timeout=5, metadata=metadata)
    status = int((await call.read()).status)
    call.cancel()
    return status


async def _names(channel: grpc.aio.Channel, metadata: Any = ()) -> list[str]:  # noqa: ANN401 - of gRPC
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(cast("Any", channel))
    requests = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
    call = stub.ServerReflectionInfo(requests, timeout=5, metadata=metadata)
    return [service.name async for answer in call for service in answer.list_services_response.service]


METHODS = ("Check", "Watch")


@pytest.mark.parametrize("method", METHODS)
async def test_open_health_answers_everybody(method: str) -> None:
    """Probes need no credentials by default."""
    async with _served() as channel:
        assert await _health(channel, method) == SERVING


@pytest.mark.parametrize("method", METHODS)
async def test_guarded_health_answers_who_is_known(method: str) -> None:
    """With the policy `authenticated` a key is needed, and wrong ones do not do; a stream ends the same way."""
    async with _served(health="authenticated") as channel:
        assert await _health(channel, method, GOOD) == SERVING
        for metadata in ((), (("x-api-key", "wrong"),)):
            with pytest.raises(grpc.aio.AioRpcError, match="this service expects an API key") as caught:
                await _health(channel, method, metadata)
            assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
            assert trailers(caught.value)["vae-error-reason"] == "UNAUTHENTICATED"


async def test_guarded_reflection_answers_who_is_known() -> None:
    """By default the API is shown to whoever may call it."""
    async with _served() as channel:
        assert await _names(channel, GOOD) == [HEALTH]
        with pytest.raises(grpc.aio.AioRpcError, match="UNAUTHENTICATED"):
            await _names(channel)


async def test_open_reflection_answers_everybody() -> None:
    """The API may be shown to strangers."""
    async with _served(reflection="open") as channel:
        assert await _names(channel) == [HEALTH]


async def test_disabled_reflection_is_not_there() -> None:
    """Switched off, reflection is an unknown method, for known callers too."""
    async with _served(reflection="disabled") as channel:
        with pytest.raises(grpc.aio.AioRpcError, match="UNIMPLEMENTED"):
            await _names(channel, GOOD)


async def test_unknown_methods_stay_unknown() -> None:
    """A guard invents no methods."""
    async with _served() as channel:
        call: Any = channel.unary_unary(f"/{HEALTH}/None")
        with pytest.raises(grpc.aio.AioRpcError, match="UNIMPLEMENTED"):
            await call(b"", timeout=5, metadata=GOOD)


async def test_what_the_servicer_lacks_shows_nothing() -> None:
    """The servicer of grpc.health.v1 has no List: that is said without the name of a class."""
    async with _served() as channel:
        call: Any = channel.unary_unary(f"/{HEALTH}/List")
        with pytest.raises(grpc.aio.AioRpcError, match="UNIMPLEMENTED") as caught:
            await call(b"", timeout=5)
        assert caught.value.details() == "Method not found!"


async def test_a_surprise_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception of a servicer ends as INTERNAL with an id, also when everybody may call."""

    async def surprise(*_: object) -> None:
        raise ValueError("secret")

    monkeypatch.setattr(health_aio.HealthServicer, "Check", surprise)
    async with _served() as channel:
        with pytest.raises(grpc.aio.AioRpcError, match="internal error") as caught:
            await _health(channel, "Check")
        assert caught.value.code() == grpc.StatusCode.INTERNAL
        assert "secret" not in str(caught.value)


async def test_grants_do_not_apply() -> None:
    """A client that may call nothing of the API is still told whether it serves."""
    grants = [{"clients": ["key:other"], "methods": ["*"]}]
    async with _served(health="authenticated", grants=grants) as channel:
        assert await _health(channel, "Check", GOOD) == SERVING
        assert await _names(channel, GOOD) == [HEALTH]


def test_policies() -> None:
    """Health and both versions of reflection follow their settings; everything else needs to be known."""
    auth = AuthConfig(health="authenticated", reflection="open")
    identity = Identity(auth, TlsConfig(), environ={})
    assert identity.policy_for(f"{HEALTH}/Check") == "authenticated"
    assert {identity.policy_for(f"{name}/ServerReflectionInfo") for name in REFLECTION} == {"open"}
    assert identity.policy_for("vae.v1.VaeService/Encode") == "authenticated"
