"""Both clients: NumPy in, NumPy out, typed errors, one behaviour."""

import asyncio
import contextlib
import inspect
import json
import pickle
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import grpc
import numpy as np
import pytest

from protos.vae.v1 import vae_pb2 as pb
from serving import api_keys
from serving import client as clients
from serving.bundle import Bundle
from serving.client import (
    SERVICE_CONFIG,
    AsyncVaeClient,
    CallOptions,
    DeadlineExceeded,
    InvalidArgument,
    ModelNotFound,
    Overloaded,
    PermissionDenied,
    SampledChunk,
    Timings,
    Unauthenticated,
    Unavailable,
    VaeClient,
    VaeError,
)
from serving.demo import free_port
from serving.errors import EngineUnavailable
from serving.gateway.server import GatewayServer
from serving.standalone import in_process
from serving.tensors import to_message
from tests.bundles import small_bundle
from tests.certificates import Authority, ServerFiles
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
    ("score", lambda client: client.score(PIXELS, bound="importance-weighted", num_latents=3, seed=1, priority=3)),
]


def _public(kind: type) -> dict[str, inspect.Signature]:
    names = [name for name in vars(kind) if not name.startswith("_")]
    return {name: inspect.signature(getattr(kind, name)) for name in names}


def test_both_clients_have_the_same_methods() -> None:
    """What one can do the other can, with the same arguments, and the proto has no method more."""
    one, two = _public(VaeClient), _public(AsyncVaeClient)
    streams = [signatures.pop("sample_stream") for signatures in (one, two)]
    assert one == two
    assert streams[0].parameters == streams[1].parameters
    assert inspect.signature(VaeClient) == inspect.signature(AsyncVaeClient)
    methods = {method.name for method in pb.DESCRIPTOR.services_by_name["VaeService"].methods}
    extra = {"close", "wait_until_ready"}
    assert {name.replace("_", "") for name in set(_public(VaeClient)) - extra} == {
        name.lower() for name in methods
    }


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
        (lambda client: client.score(PIXELS, num_latents=-1), "num_latents"),
        (lambda client: client.sample_stream(2**64), "num_samples"),
        (lambda client: client.sample_stream(1, max_chunk_rows=-1), "max_chunk_rows"),
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
        lambda client: client.sample_stream(1, chunk_rows=1),
    ],
)
async def test_an_option_that_does_not_exist_is_an_error(
    client: AsyncVaeClient, call: Callable[[Any], Any]
) -> None:
    """A misspelt option is a TypeError as with any function, not an answer to another question."""
    with pytest.raises(TypeError, match=r"sed|temperature|timeout|chunk_rows"):
        await call(client)


@pytest.mark.parametrize(
    "call",
    [
        lambda client: client.decode(LATENTS, output_type="float64"),
        lambda client: client.decode(LATENTS, observation="median"),
        lambda client: client.interpolate(LATENTS, LATENTS, 3, kind="latents", interpolation="cubic"),
        lambda client: client.interpolate(LATENTS, LATENTS, 3, kind="latent"),
        lambda client: client.score(PIXELS, bound="upper"),
        lambda client: client.sample(1, priority=0),
    ],
)
async def test_a_word_that_does_not_exist_is_bad_input(client: AsyncVaeClient, call: Callable[[Any], Any]) -> None:
    """A word outside a closed set is a VaeError that lists the words, as every failed call is a VaeError."""
    with pytest.raises(InvalidArgument, match=r"float32|mean|linear|data|elbo|1, 2 or 3"):
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
    """GRPC takes the JSON; its retries hold for each method but the stream, which the client resumes itself."""
    config = json.loads(json.dumps(SERVICE_CONFIG))
    full_names = {service.full_name for service in pb.DESCRIPTOR.services_by_name.values()}
    every, stream = config["methodConfig"]
    assert {name["service"] for name in every["name"]} == full_names
    assert all("method" not in name for name in every["name"])
    codes = every["retryPolicy"]["retryableStatusCodes"]
    assert all(hasattr(grpc.StatusCode, code) for code in codes)
    assert 2 <= every["retryPolicy"]["maxAttempts"] <= 5
    methods = pb.DESCRIPTOR.services_by_name["VaeService"].methods
    streaming = [method.name for method in methods if method.server_streaming]
    assert [name["method"] for name in stream["name"]] == streaming
    assert "retryPolicy" not in stream
    assert config["healthCheckConfig"]["serviceName"] in full_names
    assert config["loadBalancingConfig"] == [{"round_robin": {}}]  # health checks work with no other policy


KINDS = [
    VaeError,
    InvalidArgument,
    Unauthenticated,
    PermissionDenied,
    ModelNotFound,
    Overloaded,
    Unavailable,
    DeadlineExceeded,
]


@pytest.mark.parametrize("kind", KINDS)
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
    assert kinds == set(KINDS)


async def test_a_channel_is_closed_with_its_client(service: GatewayServer) -> None:
    """After the block, the client does not call any more."""
    async with AsyncVaeClient(f"127.0.0.1:{service.port}") as client:
        await client.get_model()
    with pytest.raises(Exception, match=r"[Cc]losed"):
        await client.get_model()


async def test_ready_means_reachable_and_healthy(bundle_dir: Path, small: Bundle) -> None:
    """A client waits for a service that listens and is ill, and no longer than it was told."""
    engine = PuppetEngine(small.manifest)
    engine.is_ill = True
    async with (
        serving_with(engine, small.manifest, settings(bundle_dir)) as server,
        AsyncVaeClient(f"127.0.0.1:{server.port}") as client,
    ):
        with pytest.raises(DeadlineExceeded, match=r"the service was not ready within 0\.1 s"):
            await client.wait_until_ready(0.1)
        engine.is_ill = False
        await client.wait_until_ready(20)


def test_a_synchronous_client_waits_too() -> None:
    """Where nobody listens, the wait ends with an error."""
    with (
        VaeClient(f"127.0.0.1:{free_port()}") as client,
        pytest.raises(DeadlineExceeded, match="not ready"),
    ):
        client.wait_until_ready(0.1)


async def test_a_score_is_what_its_parts_say(client: AsyncVaeClient) -> None:
    """The ELBO is the log-likelihood minus the KL; the other bound is no smaller on the same draws."""
    elbo = await client.score(PIXELS, num_latents=8, seed=1)
    np.testing.assert_allclose(elbo.score, elbo.log_likelihood - elbo.kl, rtol=1e-5)
    tighter = await client.score(PIXELS, bound="importance-weighted", num_latents=8, seed=1)
    assert elbo.score.shape == tighter.score.shape == (2,)
    assert (elbo.seed, tighter.seed) == (1, 1)
    np.testing.assert_array_equal(tighter.kl, elbo.kl)


class Relay:
    """Forwards bytes between clients and a service, and cuts connections where it is told.

    Args:
        port: Of the service.
        cuts: Bytes to the client after which the first connection is cut, the second, and so on.
    """

    def __init__(self, port: int, *cuts: int) -> None:
        self._target, self._cuts, self.num_cut, self.port = port, iter(cuts), 0, 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        service_reader, service_writer = await asyncio.open_connection("127.0.0.1", self._target)
        up = asyncio.ensure_future(self._forward(reader, service_writer, None))
        with contextlib.suppress(ConnectionError):
            await self._forward(service_reader, writer, next(self._cuts, None))
        up.cancel()
        for end in (writer, service_writer):
            end.transport.abort()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, left: int | None) -> None:
        while part := await reader.read(2048):
            writer.write(part)
            await writer.drain()
            if left is not None and (left := left - len(part)) < 0:
                self.num_cut += 1
                return


def _join(chunks: list[SampledChunk], field: str) -> Any:  # noqa: ANN401 - an array
    return np.concatenate([getattr(chunk, field) for chunk in chunks])


NUM_STREAMED = 2500


async def test_a_stream_has_the_bytes_of_one_call(client: AsyncVaeClient) -> None:
    """Chunks in order, joined, are what `sample` returns, with latents and whatever else it is told."""
    options: Any = {
        "seed": 3,
        "first_row": 7,
        "temperature": 0.5,
        "include_latents": True,
        "observation": "sample",
        "output_type": "uint8",
    }
    whole = await client.sample(100, **options)
    chunks = [chunk async for chunk in client.sample_stream(100, max_chunk_rows=33, **options)]
    assert [(chunk.first_row, len(chunk.samples)) for chunk in chunks] == [(7, 33), (40, 33), (73, 33), (106, 1)]
    for field in ("samples", "latents"):
        np.testing.assert_array_equal(_join(chunks, field), getattr(whole, field))
    assert {(chunk.seed, chunk.model_version) for chunk in chunks} == {(3, whole.model_version)}


async def test_a_stream_that_breaks_goes_on_where_it_was(service: GatewayServer, client: AsyncVaeClient) -> None:
    """Through a relay that cuts three connections, each row comes once, with the bytes of one call."""
    whole = await client.sample(NUM_STREAMED, seed=5)
    async with Relay(service.port, 30_000, 9_000, 60_000) as relay:

        def synchronous() -> list[SampledChunk]:
            with VaeClient(f"127.0.0.1:{relay.port}") as broken:
                return list(broken.sample_stream(NUM_STREAMED, seed=5, max_chunk_rows=16))

        chunks = await asyncio.to_thread(synchronous)
    assert relay.num_cut == 3
    assert chunks[0].first_row == 0
    assert all(left.first_row + len(left.samples) == right.first_row for left, right in pairwise(chunks))
    assert _join(chunks, "samples").tobytes() == whole.samples.tobytes()


async def test_a_stream_without_a_seed_is_resumed_with_the_one_it_began_with(service: GatewayServer) -> None:
    """Cut before its first chunk and after some, a stream has one seed, and that seed repeats it."""
    async with (
        Relay(service.port, 50, 20_000) as relay,
        AsyncVaeClient(f"127.0.0.1:{relay.port}") as broken,
    ):
        chunks = [chunk async for chunk in broken.sample_stream(1000, max_chunk_rows=16)]
        assert relay.num_cut == 2
        (seed,) = {chunk.seed for chunk in chunks}
        again = await broken.sample(1000, seed=seed)
    np.testing.assert_array_equal(_join(chunks, "samples"), again.samples)


async def test_a_stream_survives_the_restart_of_the_service(bundle_dir: Path) -> None:
    """The service stops amid a stream and another one starts at its address: no row is lost or repeated."""
    port = free_port()
    config = settings(bundle_dir, f"gateway.port={port}", "gateway.drain_timeout_s=0.05")
    chunks: list[SampledChunk] = []
    async with AsyncVaeClient(f"127.0.0.1:{port}") as client:
        async with in_process(config):
            stream = client.sample_stream(200_000, seed=1, max_chunk_rows=1000)
            chunks.append(await anext(stream))
        async with in_process(config):
            chunks += [chunk async for chunk in stream]
            whole = await client.sample(1000, seed=1, first_row=199_000)
    assert [chunk.first_row for chunk in chunks] == list(range(0, 200_000, 1000))
    np.testing.assert_array_equal(chunks[-1].samples, whole.samples)


async def test_rows_of_two_models_are_never_mixed(bundle_dir: Path, tmp_path: Path) -> None:
    """Another model takes the place of the one that a stream began with: the stream ends with an error."""
    other = small_bundle(tmp_path / "other", seed=1)
    port = free_port()
    overrides = (f"gateway.port={port}", "gateway.drain_timeout_s=0.05")
    async with AsyncVaeClient(f"127.0.0.1:{port}") as client:
        async with in_process(settings(bundle_dir, *overrides)):
            stream = client.sample_stream(200_000, seed=1, max_chunk_rows=1000)
            chunks = [await anext(stream)]
        async with in_process(settings(other, *overrides)) as second:
            with pytest.raises(ModelNotFound, match="model_version: ") as caught:
                chunks += [chunk async for chunk in stream]
            assert second.operations.manifest.version != chunks[0].model_version
    assert caught.value.reason == "UNKNOWN_MODEL_VERSION"


async def test_whoever_closes_a_stream_ends_the_work(service: GatewayServer, client: AsyncVaeClient) -> None:
    """A stream that is left early is cancelled at the service, in both clients."""
    stream = client.sample_stream(5_000_000, max_chunk_rows=1)
    await anext(stream)
    assert service._traffic.num_in_flight >= 1  # noqa: SLF001 - what a drain waits for
    await stream.aclose()
    await eventually(lambda: service._traffic.num_in_flight == 0)  # noqa: SLF001 - as above

    def synchronous() -> None:
        with VaeClient(f"127.0.0.1:{service.port}") as other:
            chunks = other.sample_stream(5_000_000, max_chunk_rows=1)
            next(chunks)
            chunks.close()

    await asyncio.to_thread(synchronous)
    await eventually(lambda: service._traffic.num_in_flight == 0)  # noqa: SLF001 - as above


End = tuple[int, grpc.StatusCode | None, dict[str, str]]


class Script:
    """A service whose stream ends as it is told: for each call, the chunks before the end, and the end.

    Args:
        ends: For each call, how many chunks of one row come, and the code and trailers; OK if there is no code.
    """

    def __init__(self, *ends: End) -> None:
        self._ends = iter(ends)
        self.requests: list[pb.SampleStreamRequest] = []

    async def stream(self, body: bytes, context: Any) -> AsyncIterator[bytes]:  # noqa: ANN401 - of gRPC
        """Answer one call."""
        request = pb.SampleStreamRequest.FromString(body)
        self.requests.append(request)
        num_chunks, code, trailers = next(self._ends)
        for i in range(num_chunks):
            response = pb.SampleStreamResponse(
                first_row=request.first_row + i,
                samples=to_message(np.full((1, 1), request.first_row + i, np.float32)),
                seed=request.seed,
                model_version="one",
            )
            yield response.SerializeToString()
        if code is not None:
            await context.abort(code, "as told", tuple(trailers.items()))

    @contextlib.asynccontextmanager
    async def served(self) -> AsyncIterator[AsyncVaeClient]:
        """Run it; yield a client of it."""
        server = grpc.aio.server()
        handlers: Any = {"SampleStream": grpc.unary_stream_rpc_method_handler(self.stream)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(clients.SERVICE, handlers),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            async with AsyncVaeClient(f"127.0.0.1:{port}") as client:
                yield client
        finally:
            await server.stop(None)


async def _collect(stream: AsyncIterator[SampledChunk], rows: list[int]) -> None:
    """Append the number of each chunk's first row; keep those that came before an error."""
    async for chunk in stream:
        rows.append(chunk.first_row)  # noqa: PERF401 - a comprehension would forget them


@pytest.mark.parametrize(
    ("code", "trailers"),
    [
        (grpc.StatusCode.UNAVAILABLE, {}),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, {"grpc-retry-pushback-ms": "20"}),
        (grpc.StatusCode.DEADLINE_EXCEEDED, {"vae-error-reason": "DEADLINE_EXCEEDED"}),
        (grpc.StatusCode.DEADLINE_EXCEEDED, {"vae-error-reason": "RESPONSE_STALLED"}),
    ],
)
async def test_what_passes_is_waited_out(code: grpc.StatusCode, trailers: dict[str, str]) -> None:
    """A break, a busy service and the service's own limits of time: the stream is asked for what is missing."""
    script = Script((2, code, trailers), (0, code, trailers), (3, None, {}))
    async with script.served() as client:
        chunks = [chunk async for chunk in client.sample_stream(5, seed=9, first_row=10)]
    assert [chunk.first_row for chunk in chunks] == [10, 11, 12, 13, 14]
    asked = [(request.first_row, request.num_samples, request.model_version) for request in script.requests]
    assert asked == [(10, 5, ""), (12, 3, "one"), (12, 3, "one")]
    assert {request.seed for request in script.requests} == {9}


async def test_a_pushback_is_honoured() -> None:
    """A busy service that says when to come back is not asked earlier."""
    busy = {"grpc-retry-pushback-ms": "600"}
    script = Script((1, grpc.StatusCode.RESOURCE_EXHAUSTED, busy), (1, None, {}))
    async with script.served() as client:
        stream = client.sample_stream(2)
        await anext(stream)
        began = time.monotonic()
        await anext(stream)
        assert time.monotonic() - began >= 0.6


@pytest.mark.parametrize(
    ("code", "trailers", "kind"),
    [
        (grpc.StatusCode.NOT_FOUND, {"vae-error-reason": "UNKNOWN_MODEL_VERSION"}, ModelNotFound),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, {}, Overloaded),
        (grpc.StatusCode.UNAUTHENTICATED, {}, Unauthenticated),
        (grpc.StatusCode.PERMISSION_DENIED, {}, PermissionDenied),
        (grpc.StatusCode.INVALID_ARGUMENT, {}, InvalidArgument),
        (grpc.StatusCode.INTERNAL, {}, VaeError),
    ],
)
async def test_what_does_not_pass_is_raised(
    code: grpc.StatusCode, trailers: dict[str, str], kind: type[VaeError]
) -> None:
    """After the rows that came, the error; the stream is not asked for again. A replaced model is one of them."""
    script = Script((2, code, trailers))
    rows: list[int] = []
    async with script.served() as client:
        with pytest.raises(kind, match="as told") as caught:
            await _collect(client.sample_stream(5), rows)
    assert type(caught.value) is kind
    assert (rows, len(script.requests)) == ([0, 1], 1)


async def test_a_stream_without_progress_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four attempts in a row without a chunk end it; a chunk makes it count anew."""
    monkeypatch.setattr(clients, "_RESUME_AFTER_S", (0.01, 0.01, 0.01))
    lost: End = (0, grpc.StatusCode.UNAVAILABLE, {})
    script = Script(lost, lost, lost, (1, grpc.StatusCode.UNAVAILABLE, {}), lost, lost, lost, lost)
    rows: list[int] = []
    async with script.served() as client:
        with pytest.raises(Unavailable, match="as told"):
            await _collect(client.sample_stream(5), rows)
    assert (rows, len(script.requests)) == ([0], 7)


async def test_the_deadline_of_a_stream_holds_over_its_resumptions() -> None:
    """With a deadline, nothing is waited for that comes after it."""
    busy = {"grpc-retry-pushback-ms": "60000"}
    script = Script((1, grpc.StatusCode.RESOURCE_EXHAUSTED, busy))
    async with script.served() as client:
        began = time.monotonic()
        with pytest.raises(Overloaded, match="as told"):
            _ = [chunk async for chunk in client.sample_stream(5, timeout_s=10)]
        assert time.monotonic() - began < 5


async def test_a_stream_that_ends_early_is_an_error() -> None:
    """A stream that says OK before all rows came does not pass for a whole one."""
    script = Script((2, None, {}))
    async with script.served() as client:
        with pytest.raises(VaeError, match="DATA_LOSS: the stream ended 3 rows early"):
            _ = [chunk async for chunk in client.sample_stream(5)]


async def test_rows_of_another_place_are_an_error() -> None:
    """A service that ignores where it was asked to go on is found out."""
    script = Script((6, None, {}))
    async with script.served() as client:
        with pytest.raises(VaeError, match="DATA_LOSS: expected row 5 next, got 1 from 5 on"):
            _ = [chunk async for chunk in client.sample_stream(5)]


def test_a_bar_needs_rich_and_says_so() -> None:
    """Where rich is not installed, the client works and a progress bar is an error that says what to install."""
    code = """
import sys
sys.modules["rich"] = None
from serving.client import VaeClient
client = VaeClient("localhost:1")
client.sample_stream(1)
try:
    client.sample_stream(1, progress=True)
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "a progress bar needs rich: pip install rich\n"


async def test_a_bar_changes_nothing(client: AsyncVaeClient, capsys: pytest.CaptureFixture[str]) -> None:
    """With a bar the same rows come, and nothing is printed where there is no terminal."""
    rows = [chunk.first_row async for chunk in client.sample_stream(10, max_chunk_rows=4, progress=True)]
    assert rows == [0, 4, 8]
    assert capsys.readouterr() == ("", "")


async def test_a_bar_is_shown_on_a_terminal(
    client: AsyncVaeClient, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bar stands on standard error, so that the product of a program can be piped on."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    rows = [chunk.first_row async for chunk in client.sample_stream(10, max_chunk_rows=4, progress=True)]
    out, err = capsys.readouterr()
    assert (rows, out) == ([0, 4, 8], "")
    assert "sampling" in err
    assert "10/10" in err


KEY = "vae_a-key-that-nobody-may-see"


@pytest.fixture
async def guarded(
    bundle_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncGenerator[tuple[int, Authority]]:
    """Run a service with TLS and one key, which may do all but sample; yield its port and its authority."""
    monkeypatch.setenv("VAE_API_KEYS", f"alice:{api_keys.digest_of(KEY)}")
    authority = Authority()
    files = ServerFiles.write(tmp_path, authority.issue(), authority)
    methods = '["vae.v1.VaeService/GetModel", "vae.v1.VaeService/SampleStream"]'
    config = settings(
        bundle_dir,
        f"gateway.tls.certificate={files.certificate}",
        f"gateway.tls.private_key={files.private_key}",
        f'gateway.auth.grants=[{{"clients": ["key:alice"], "methods": {methods}}}]',
    )
    async with in_process(config) as server:
        yield server.port, authority


@pytest.mark.parametrize("name", ["api_key", "token", "function"])
async def test_a_key_goes_with_every_call_over_tls(guarded: tuple[int, Authority], name: str) -> None:
    """As a text or as a function that returns it, in calls and in streams."""
    port, authority = guarded
    given: dict[str, Any] = {"api_key": KEY} if name == "api_key" else {"token": KEY}
    if name == "function":
        given = {"token": lambda: KEY}
    async with AsyncVaeClient(f"localhost:{port}", credentials=authority.trust(), **given) as client:
        assert (await client.get_model()).name == "small"
        assert [chunk.first_row async for chunk in client.sample_stream(1)] == [0]
        with pytest.raises(PermissionDenied, match="PERMISSION_DENIED") as caught:
            await client.sample(1)
        assert caught.value.reason == "PERMISSION_DENIED"
        assert KEY not in repr(client) + repr(caught.value)


async def test_without_a_valid_key_nobody_is_let_in(guarded: tuple[int, Authority]) -> None:
    """No key and a wrong key have an error of their own, which does not repeat the key."""
    port, authority = guarded
    for api_key in (None, "vae_wrong-key"):
        async with AsyncVaeClient(f"localhost:{port}", credentials=authority.trust(), api_key=api_key) as client:
            with pytest.raises(Unauthenticated, match="UNAUTHENTICATED") as caught:
                await client.get_model()
            assert caught.value.reason == "UNAUTHENTICATED"
            assert "wrong-key" not in str(caught.value)


@pytest.mark.parametrize("kind", [VaeClient, AsyncVaeClient])
@pytest.mark.parametrize(
    "target",
    [
        "vae.example:50051",
        "10.0.0.1:50051",
        "dns://127.0.0.1/vae.example:50051",
        "dns://10.0.0.1/localhost:50051",
        "localhost.example:50051",
        "127.0.0.1.example:50051",
        "ipv4:127.0.0.1:50051,10.0.0.1:50051",
        "localhost:50051@vae.example",
        "[::2]:50051",
        "0.0.0.0:50051",
        "https://127.0.0.1",
    ],
)
async def test_a_key_is_not_sent_in_plaintext_to_another_machine(kind: type[Any], target: str) -> None:
    """Without TLS, a target that is not surely this machine is refused, before anything is sent."""
    with pytest.raises(ValueError, match="never sent in plaintext") as caught:
        kind(target, api_key=KEY)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    "target",
    [
        "localhost:50051",
        "localhost",
        "127.0.0.1:50051",
        "127.1.2.3:1",
        "[::1]:50051",
        "dns:///localhost:50051",
        "dns:localhost:1",
        "ipv4:127.0.0.1:50051",
        "ipv6:[::1]:50051",
        "unix:/run/vae.sock",
    ],
)
async def test_a_key_may_be_sent_in_plaintext_on_this_machine(target: str) -> None:
    """Loopback in its spellings, and sockets of the file system."""
    async with AsyncVaeClient(target, api_key=KEY):
        pass


async def test_a_key_in_plaintext_goes_through_no_proxy(
    service: GatewayServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy of the environment is on another machine, maybe: a key for loopback does not go there."""
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy", "grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    async with AsyncVaeClient(f"localhost:{service.port}", api_key=KEY) as client:
        assert (await client.get_model()).name == "small"


@pytest.mark.parametrize("bad", [f"{KEY}\n", f"{KEY} x", f"{KEY}\u00fc", ""])
@pytest.mark.parametrize("kind", [VaeClient, AsyncVaeClient])
async def test_a_key_that_no_header_can_hold_is_named_without_being_shown(kind: type[Any], bad: str) -> None:
    """A newline that came along with a file is the caller's error, and the text does not show the key."""
    with pytest.raises(ValueError, match="one word of printable ASCII") as caught:
        kind("localhost:1", api_key=bad)
    assert KEY not in str(caught.value)
    with pytest.raises(ValueError, match="not both"):
        kind("localhost:1", api_key=KEY, token=KEY)


async def test_a_priority_goes_beside_the_request() -> None:
    """`priority` becomes `vae-priority`, and by default nothing is sent."""
    seen: list[str] = []

    async def answer(_body: bytes, context: Any) -> bytes:  # noqa: ANN401 - of gRPC
        seen.append(dict(context.invocation_metadata()).get("vae-priority", ""))
        return b""

    server = grpc.aio.server()
    handlers: Any = {"GetModel": grpc.unary_unary_rpc_method_handler(answer)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(clients.SERVICE, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with AsyncVaeClient(f"127.0.0.1:{port}") as client:
        await client.get_model()
        await client.get_model(priority=3)
    await server.stop(None)
    assert seen == ["", "3"]


@pytest.mark.parametrize("call", [call for _, call in CALLS], ids=[name for name, _ in CALLS])
async def test_timings_are_told_to_whoever_asks(service: GatewayServer, call: Callable[[Any], Any]) -> None:
    """Both clients: the parts are within the whole, the batch held the call's rows, the id is the caller's."""
    told: list[Timings] = []
    asked: CallOptions = {"request_id": "mine-1", "on_timings": told.append}

    class Asking:
        """Adds the options to whatever method is called."""

        def __init__(self, client: Any) -> None:  # noqa: ANN401 - either client
            self._client = client

        def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - any method
            return lambda *args, **options: getattr(self._client, name)(*args, **options, **asked)

    target = f"127.0.0.1:{service.port}"
    async with AsyncVaeClient(target) as client:
        await call(Asking(client))
    with VaeClient(target) as blocking:
        await asyncio.to_thread(call, Asking(blocking))
    assert len(told) == 2
    for timings in told:
        assert timings.request_id == "mine-1"
        assert 0 <= timings.queue_s <= timings.total_s < 10
        assert 0 <= timings.engine_s <= timings.total_s + 1e-5
        assert timings.model_version in {service.operations.manifest.version, ""}


async def test_timings_name_the_batch(service: GatewayServer) -> None:
    """Rows that ran alone were a batch of their own."""
    told: list[Timings] = []
    async with AsyncVaeClient(f"127.0.0.1:{service.port}") as client:
        await client.sample(7, on_timings=told.append)
    (timings,) = told
    assert timings.batch_rows == 7
    assert timings.engine_s > 0
    assert timings.model_version == service.operations.manifest.version
    assert len(timings.request_id) == 16


async def test_an_error_has_the_id_of_its_call(client: AsyncVaeClient) -> None:
    """What the caller chose; it survives pickling, as the rest does."""
    with pytest.raises(InvalidArgument) as caught:
        await client.sample(0, request_id="broken.1")
    assert caught.value.request_id == "broken.1"
    assert pickle.loads(pickle.dumps(caught.value)).request_id == "broken.1"  # noqa: S301 - our own


@pytest.mark.parametrize("bad", ["", "a b", "x" * 65, "\n"])
async def test_a_request_id_that_the_service_would_replace_is_refused(client: AsyncVaeClient, bad: str) -> None:
    """Before it is sent, and named."""
    with pytest.raises(InvalidArgument, match="request_id: expected 1 to 64"):
        await client.sample(1, request_id=bad)
