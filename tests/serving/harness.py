"""What several tests of serving need: configurations, an engine that obeys, and raw calls over the wire."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnxruntime as ort
from google.protobuf.message import Message

from protos.vae.v1 import vae_pb2 as pb
from serving.bundle import Bundle, DecoderOutput, Graph, Manifest
from serving.config import ServingConfig
from serving.engine.protocol import Posterior, Providers, Rows
from serving.errors import EngineUnavailable
from serving.gateway.server import GatewayServer

SERVICE = "vae.v1.VaeService"


def settings(bundle_dir: Path, *overrides: str) -> ServingConfig:
    """Return the configuration of an in-process service on a free port that drains quickly."""
    quick = ("gateway.port=0", "gateway.drain_quiet_s=0.02", "gateway.stop_grace_s=0.2")
    config = ServingConfig.parse({"bundle": str(bundle_dir), "engine": "in-process"})
    return config.override([*quick, *overrides])


class PuppetEngine:
    """Answers when told to: an engine that can be held, made ill, or made to fail."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self.is_open = asyncio.Event()
        self.is_open.set()
        self.is_ill = False
        self.error: Exception | None = None
        self.is_closed = False
        self.num_running = 0
        self.num_encoded = 0
        self.num_decoded = 0

    @property
    def num_slots(self) -> int:
        """One run of each graph at a time."""
        return 1

    def num_replicas(self, _graph: Graph) -> int:
        """One."""
        return 1

    def num_answering(self, _graph: Graph) -> int:
        """All."""
        return 1

    async def encode(self, data: Rows, _timeout_s: float) -> Posterior:
        """Return the first pixels as means, and unit variances."""
        await self._obey()
        self.num_encoded += len(data)
        mean = data.reshape(len(data), -1)[:, : self._manifest.latent_dim].astype(np.float32) / 255
        return Posterior(mean, np.zeros_like(mean))

    async def decode(
        self, latents: Rows, _timeout_s: float, outputs: Sequence[DecoderOutput] = ("mean",)
    ) -> tuple[Rows, ...]:
        """Return means of one half everywhere."""
        await self._obey()
        self.num_decoded += len(latents)
        shape = len(latents), *self._manifest.data_shape
        return tuple(np.full(shape, 0.5 if output == "mean" else 0.0, np.float32) for output in outputs)

    async def check(self) -> Providers:
        """Answer, unless ill."""
        if self.is_ill:
            raise EngineUnavailable(graph="encoder", detail="ill")
        return Providers("CPUExecutionProvider", "CPUExecutionProvider")

    async def close(self) -> None:
        """Remember that it was closed."""
        self.is_closed = True

    async def _obey(self) -> None:
        self.num_running += 1
        try:
            await self.is_open.wait()
        finally:
            self.num_running -= 1
        if self.error is not None:
            raise self.error


@contextlib.asynccontextmanager
async def serving_with(
    engine: PuppetEngine, manifest: Manifest, config: ServingConfig
) -> AsyncIterator[GatewayServer]:
    """Run a gateway in front of an engine; the engine is released before the drain."""
    server = GatewayServer(engine, manifest, config)
    try:
        await server.start()
        if not engine.is_ill:
            await server.health.wait_until_ready(5)
        yield server
    finally:
        engine.is_open.set()
        await server.drain()


@contextlib.asynccontextmanager
async def wire(
    port: int, *, config: str = "{}", extra: Sequence[tuple[str, Any]] = ()
) -> AsyncIterator[grpc.aio.Channel]:
    """Return a channel without the client's retries and limits."""
    options = [
        *extra,
        ("grpc.service_config", config),
        ("grpc.enable_retries", 0),
        ("grpc.max_receive_message_length", -1),
        ("grpc.max_send_message_length", -1),
        ("grpc.use_local_subchannel_pool", 1),
    ]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options) as channel:
        yield channel


async def call(channel: grpc.aio.Channel, method: str, request: Message | bytes, **options: Any) -> Any:  # noqa: ANN401 - whatever the method answers
    """Call a method of the service with a message, or with bytes as they are; return its response."""
    body = request if isinstance(request, bytes) else request.SerializeToString()
    response = getattr(pb, f"{method}Response")
    multi: Any = channel.unary_unary(
        f"/{SERVICE}/{method}", request_serializer=None, response_deserializer=response.FromString
    )
    return await multi(body, **({"timeout": 20} | options))


def sample_stream(channel: grpc.aio.Channel, request: Message | bytes, **options: Any) -> Any:  # noqa: ANN401 - of gRPC
    """Begin a SampleStream with a message, or with bytes as they are; return the call."""
    body = request if isinstance(request, bytes) else request.SerializeToString()
    multi: Any = channel.unary_stream(
        f"/{SERVICE}/SampleStream",
        request_serializer=None,
        response_deserializer=pb.SampleStreamResponse.FromString,
    )
    return multi(body, **({"timeout": 20} | options))


async def read_until_failure(stream: Any) -> tuple[list[Any], grpc.aio.AioRpcError]:  # noqa: ANN401 - of gRPC
    """Return what came on a stream that must fail, and how it failed."""
    responses = []
    try:
        while (response := await stream.read()) is not grpc.aio.EOF:
            responses.append(response)
    except grpc.aio.AioRpcError as error:
        return responses, error
    raise AssertionError("the stream did not fail")


async def failure(
    channel: grpc.aio.Channel,
    method: str,
    request: Message | bytes,
    **options: Any,  # noqa: ANN401 - as above
) -> grpc.aio.AioRpcError:
    """Return the error of a call that must fail."""
    try:
        await call(channel, method, request, **options)
    except grpc.aio.AioRpcError as error:
        return error
    raise AssertionError(f"{method} did not fail")


def trailers(error: grpc.aio.AioRpcError) -> dict[str, str | bytes]:
    """Return the trailing metadata of a failed call."""
    return {str(key): value for key, value in error.trailing_metadata() or ()}


async def eventually(condition: Any, *, timeout_s: float = 5.0) -> None:  # noqa: ANN401 - a function without arguments
    """Return when a condition holds; fail if it does not in time."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - the condition is not ours to signal
            await asyncio.sleep(0.005)


class Oracle:
    """Computes both halves of a bundle with onnxruntime directly, one row at a time."""

    def __init__(self, bundle: Bundle) -> None:
        self._encoder = ort.InferenceSession(bundle.encoder, providers=["CPUExecutionProvider"])
        self._decoder = ort.InferenceSession(bundle.decoder, providers=["CPUExecutionProvider"])

    def encode(self, pixels: Rows) -> tuple[Rows, Rows]:
        """Return mean and log_var of rows in pixel units."""
        parts = [
            self._encoder.run(["mean", "log_var"], {"data": pixels[i : i + 1].astype(np.float32)})
            for i in range(len(pixels))
        ]
        return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])

    def decode(self, latents: Rows, output: DecoderOutput = "mean") -> Rows:
        """Return means of p(x | z), or another output."""
        parts = [self._decoder.run([output], {"latents": latents[i : i + 1]})[0] for i in range(len(latents))]
        return np.concatenate(parts)
