"""Both clients: NumPy in, NumPy out, typed errors, one behaviour."""

import asyncio
import inspect
import json
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from protos.vae.v1 import vae_pb2 as pb
from serving import client as clients
from serving.bundle import Bundle
from serving.client import (
    SERVICE_CONFIG,
    AsyncVaeClient,
    DeadlineExceeded,
    InvalidArgument,
    ModelNotFound,
    Overloaded,
    Unavailable,
    VaeClient,
    VaeError,
)
from serving.demo import free_port
from serving.errors import EngineUnavailable
from serving.gateway.server import GatewayServer
from tests.serving.harness import PuppetEngine, eventually, serving_with, settings

PIXELS = np.arange(32, dtype=np.uint8).reshape(2, 1, 4, 4)
LATENTS = np.array([[0.5, -1.0], [2.0, 0.0]], np.float32)

CALLS: list[tuple[str, Callable[[Any], Any]]] = [
    ("get_model", lambda client: client.get_model()),
    ("encode", lambda client: client.encode(PIXELS, num_latents=2, seed=1)),
    ("decode", lambda client: client.decode(LATENTS, output_type="float16")),
    ("sample", lambda client: client.sample(3, seed=1, first_row=2, temperature=0.5, include_latents=True)),
    ("reconstruct", lambda client: client.reconstruct(PIXELS, observation="sample", seed=1)),
    ("interpolate", lambda client: client.interpolate(PIXELS[:1], PIXELS[1:], 4, interpolation="spherical")),
]


def _public(kind: type) -> dict[str, inspect.Signature]:
    names = [name for name in vars(kind) if not name.startswith("_")]
    return {name: inspect.signature(getattr(kind, name)) for name in names}


def test_both_clients_have_the_same_methods() -> None:
    """What one can do the other can, with the same arguments, and the proto has no method more."""
    assert _public(VaeClient) == _public(AsyncVaeClient)
    assert inspect.signature(VaeClient) == inspect.signature(AsyncVaeClient)
    methods = {method.name for method in pb.DESCRIPTOR.services_by_name["VaeService"].methods}
    assert {name.replace("_", "") for name in _public(VaeClient)} - {"close"} == {name.lower() for name in methods}


@pytest.mark.parametrize(("name", "call"), CALLS)
async def test_both_clients_give_the_same_arrays(
    service: GatewayServer, client: AsyncVaeClient, name: str, call: Callable[[Any], Any]
) -> None:
    """The synchronous client and its twin give equal answers, array by array."""

    def synchronous() -> Any:  # noqa: ANN401 - six kinds of answers
        with VaeClient(f"127.0.0.1:{service.port}") as other:
            return call(other)

    left, right = await call(client), await asyncio.to_thread(synchronous)
    assert type(left) is type(right)
    assert left._fields, name
    for one, two in zip(left, right, strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize(
    "data",
    [PIXELS, PIXELS / 255, (PIXELS / 255).astype(np.float32), (PIXELS / 255).tolist(), np.asfortranarray(PIXELS)],
    ids=["uint8", "float64", "float32", "lists", "fortran"],
)
async def test_data_may_come_as_any_array(client: AsyncVaeClient, data: Any) -> None:  # noqa: ANN401 - arrays and lists
    """Bytes, floats of any width and plain lists of the same pixels give the same posteriors."""
    expected, actual = await client.encode(PIXELS), await client.encode(data)
    np.testing.assert_array_equal(actual.mean, expected.mean)


async def test_bad_input_is_a_value_error_with_its_field(client: AsyncVaeClient) -> None:
    """The error has code, reason, field and a text that says what to change."""
    with pytest.raises(
        InvalidArgument, match=r"^INVALID_ARGUMENT: latents\.shape: expected shape \(rows, 2\)"
    ) as caught:
        await client.decode(np.zeros((2, 3)))
    error = caught.value
    assert isinstance(error, VaeError)
    assert isinstance(error, ValueError)
    assert (error.code, error.reason, error.field) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "SHAPE_MISMATCH",
        "latents.shape",
    )
    assert error.retry_after_s is None


async def test_another_version_is_not_found(client: AsyncVaeClient) -> None:
    """A model that is not loaded has its own error."""
    with pytest.raises(ModelNotFound, match=r"NOT_FOUND: model_version: 'old' is not loaded") as caught:
        await client.sample(1, model_version="old")
    assert (caught.value.reason, caught.value.field) == ("UNKNOWN_MODEL_VERSION", "")


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda client: client.sample(-1), "num_samples"),
        (lambda client: client.sample(2**32), "num_samples"),
        (lambda client: client.sample(1, seed=-1), "seed"),
        (lambda client: client.sample(1, seed=2**64), "seed"),
        (lambda client: client.sample(1, first_row=-1), "first_row"),
        (lambda client: client.encode(PIXELS, num_latents=-1), "num_latents"),
        (lambda client: client.interpolate(LATENTS, LATENTS, -2, kind="latents"), "num_steps"),
    ],
)
async def test_numbers_that_no_message_can_hold_are_bad_input(
    client: AsyncVaeClient, call: Callable[[Any], Any], field: str
) -> None:
    """A negative or an endless number is refused like any other bad input, by name."""
    with pytest.raises(InvalidArgument, match=rf"{field}: expected a number in \[0, 2\^(32|64)\), got ") as caught:
        await call(client)
    assert (caught.value.reason, caught.value.field) == ("OUT_OF_RANGE", field)


@pytest.mark.parametrize(
    "call",
    [
        lambda client: client.sample(1, sed=1),
        lambda client: client.encode(PIXELS, temperature=1.0),
        lambda client: client.get_model(timeout=1),
    ],
)
async def test_an_option_that_does_not_exist_is_an_error(
    client: AsyncVaeClient, call: Callable[[Any], Any]
) -> None:
    """A misspelt option is a TypeError as with any function, not an answer to another question."""
    with pytest.raises(TypeError, match=r"sed|temperature|timeout"):
        await call(client)


@pytest.mark.parametrize(
    "call",
    [
        lambda client: client.decode(LATENTS, output_type="float64"),
        lambda client: client.decode(LATENTS, observation="median"),
        lambda client: client.interpolate(LATENTS, LATENTS, 3, kind="latents", interpolation="cubic"),
        lambda client: client.interpolate(LATENTS, LATENTS, 3, kind="latent"),
    ],
)
async def test_a_word_that_does_not_exist_is_bad_input(client: AsyncVaeClient, call: Callable[[Any], Any]) -> None:
    """A word outside a closed set is a VaeError that lists the words, as every failed call is a VaeError."""
    with pytest.raises(InvalidArgument, match=r"float32|mean|linear|data"):
        await call(client)


async def test_nobody_listens_and_the_deadline_passes() -> None:
    """Without a service, a call waits for its deadline and says so; the text names no socket of ours."""
    async with AsyncVaeClient(f"127.0.0.1:{free_port()}", timeout_s=0.2) as client:
        started = time.monotonic()
        with pytest.raises(DeadlineExceeded, match=r"^DEADLINE_EXCEEDED: ") as caught:
            await client.get_model()
        assert 0.15 < time.monotonic() - started < 2
    assert isinstance(caught.value, TimeoutError)
    assert caught.value.reason == ""


async def test_a_call_may_bring_its_own_deadline(bundle_dir: Path, small: Bundle) -> None:
    """`timeout_s` of a call wins over the client's."""
    engine = PuppetEngine(small.manifest)
    engine.is_open.clear()
    async with (
        serving_with(engine, small.manifest, settings(bundle_dir)) as server,
        AsyncVaeClient(f"127.0.0.1:{server.port}", timeout_s=30) as client,
    ):
        with pytest.raises(DeadlineExceeded, match="DEADLINE_EXCEEDED"):
            await client.sample(1, timeout_s=0.1)


async def test_a_service_that_stays_ill_is_unavailable(bundle_dir: Path, small: Bundle) -> None:
    """After its retries, a client says UNAVAILABLE with the service's reason."""
    engine = PuppetEngine(small.manifest)
    engine.error = EngineUnavailable(graph="decoder", detail="secret")
    async with (
        serving_with(engine, small.manifest, settings(bundle_dir)) as server,
        AsyncVaeClient(f"127.0.0.1:{server.port}") as client,
    ):
        with pytest.raises(Unavailable, match=r"^UNAVAILABLE: the decoder is not available now") as caught:
            await client.sample(1)
    assert caught.value.reason == "ENGINE_UNAVAILABLE"
    assert "secret" not in str(caught.value)


async def test_a_busy_service_says_when_to_return(bundle_dir: Path, small: Bundle) -> None:
    """After its retries, a client says that the service is busy, and until when."""
    engine = PuppetEngine(small.manifest)
    engine.is_open.clear()
    config = settings(bundle_dir, "batching.max_queue_rows=4")
    async with (
        serving_with(engine, small.manifest, config) as server,
        AsyncVaeClient(f"127.0.0.1:{server.port}") as client,
    ):
        held = asyncio.ensure_future(client.sample(4))
        await eventually(lambda: server.operations.decoder.num_rows == 4)
        with pytest.raises(Overloaded, match="the service is busy; retry in") as caught:
            await client.sample(1)
        assert caught.value.reason == "QUEUE_FULL"
        assert caught.value.retry_after_s is not None
        assert caught.value.retry_after_s >= 0.05
        engine.is_open.set()
        await held


def test_the_service_config_is_valid_and_names_every_method() -> None:
    """GRPC takes the JSON, and its retries hold for each method of the service."""
    config = json.loads(json.dumps(SERVICE_CONFIG))
    full_names = {service.full_name for service in pb.DESCRIPTOR.services_by_name.values()}
    named = {name["service"] for method in config["methodConfig"] for name in method["name"]}
    assert named == full_names
    assert all("method" not in name for method in config["methodConfig"] for name in method["name"])
    for method in config["methodConfig"]:
        codes = method["retryPolicy"]["retryableStatusCodes"]
        assert all(hasattr(grpc.StatusCode, code) for code in codes)
        assert 2 <= method["retryPolicy"]["maxAttempts"] <= 5
    assert config["healthCheckConfig"]["serviceName"] in full_names
    assert config["loadBalancingConfig"] == [{"round_robin": {}}]  # health checks work with no other policy


@pytest.mark.parametrize(
    "kind", [VaeError, InvalidArgument, ModelNotFound, Overloaded, Unavailable, DeadlineExceeded]
)
def test_an_error_of_the_client_survives_pickling(kind: type[VaeError]) -> None:
    """Errors come back from pools of processes whole."""
    error = kind(grpc.StatusCode.UNAVAILABLE, "text", reason="REASON", field="f", retry_after_s=0.5)
    other = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
    assert type(other) is kind
    assert str(other) == str(error)
    assert vars(other) == vars(error)


def test_every_code_that_the_service_sends_has_an_error() -> None:
    """A caller can tell all of them apart by class."""
    kinds = {kind for kind in vars(clients).values() if isinstance(kind, type) and issubclass(kind, VaeError)}
    assert kinds == {VaeError, InvalidArgument, ModelNotFound, Overloaded, Unavailable, DeadlineExceeded}


async def test_a_channel_is_closed_with_its_client(service: GatewayServer) -> None:
    """After the block, the client does not call any more."""
    async with AsyncVaeClient(f"127.0.0.1:{service.port}") as client:
        await client.get_model()
    with pytest.raises(Exception, match=r"[Cc]losed"):
        await client.get_model()
