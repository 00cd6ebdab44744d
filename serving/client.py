"""NumPy in, NumPy out: the client of the service, and its asyncio twin. Needs grpcio, protobuf and numpy alone."""

import asyncio
import contextlib
import json
import math
import random
import re
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Final, Generic, Literal, NamedTuple, Self, TypedDict, TypeVar, Unpack

import grpc
import numpy as np
from google.protobuf.message import Message
from numpy.typing import ArrayLike

from protos.vae.v1 import vae_pb2 as pb
from protos.vae.v1 import vae_pb2_grpc
from serving.tensors import Array, from_message, to_message

Observation = Literal["mean", "sample"]
OutputType = Literal["float32", "float16", "uint8"]
Interpolation = Literal["linear", "spherical"]
Bound = Literal["elbo", "importance-weighted"]
Token = str | Callable[[], str]
Metadata = tuple[tuple[str, str], ...]

T = TypeVar("T")

SERVICE: Final = pb.DESCRIPTOR.services_by_name["VaeService"].full_name
DEFAULT_TIMEOUT_S: Final = 10.0
_HEALTH_CHECK: Final = "/grpc.health.v1.Health/Check"
_UNLIMITED: Final = -1
_ALL: Final = frozenset({pb.DATA_TYPE_FLOAT32, pb.DATA_TYPE_FLOAT16, pb.DATA_TYPE_UINT8})
_TYPES: Final = {
    "float32": pb.DATA_TYPE_FLOAT32,
    "float16": pb.DATA_TYPE_FLOAT16,
    "uint8": pb.DATA_TYPE_UINT8,
}
_OBSERVATIONS: Final = {"mean": pb.OBSERVATION_MEAN, "sample": pb.OBSERVATION_SAMPLE}
_PATHS: Final = {"linear": pb.INTERPOLATION_LINEAR, "spherical": pb.INTERPOLATION_SPHERICAL}
_BOUNDS: Final = {"elbo": pb.BOUND_ELBO, "importance-weighted": pb.BOUND_IMPORTANCE_WEIGHTED}
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
_PRIORITIES: Final = (1, 2, 3)
_RESUME_AFTER_S: Final = (0.2, 1.0, 5.0)
"""Longest waits before a stream is asked for again, while no chunk comes; then it is given up."""

_LOOPBACK: Final = re.compile(
    r"(dns:(///)?)?localhost(:\d+)?|((dns:(///)?)|ipv4:)?127(\.\d{1,3}){3}(:\d+)?"
    r"|((dns:(///)?)|ipv6:)?\[::1\](:\d+)?|unix(-abstract)?:.+"
)
_BEARER: Final = re.compile(r"[!-~]+")

SERVICE_CONFIG: Final[Mapping[str, Any]] = {
    "loadBalancingConfig": [{"round_robin": {}}],
    "healthCheckConfig": {"serviceName": SERVICE},
    "methodConfig": [
        {
            "name": [{"service": SERVICE}],
            "waitForReady": True,
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.1s",
                "maxBackoff": "1s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
            },
        },
        {"name": [{"service": SERVICE, "method": "SampleStream"}], "waitForReady": True},
    ],
    "retryThrottling": {"maxTokens": 10, "tokenRatio": 0.1},
}
"""How any gRPC client should call the service: every call is pure, so it may be repeated. Backends that say
NOT_SERVING get no calls (`healthCheckConfig` works with `round_robin` only). A stream is not repeated by gRPC,
which could do so before its first message only: whoever reads it knows from which row on to ask again."""


class VaeError(Exception):
    """A call failed.

    Args:
        code: gRPC status code.
        message: What the service says; fit to be shown.
        reason: Name of `vae.v1.ErrorReason` without its prefix; empty if the service did not answer.
        field: Path of the field that is wrong, for bad input.
        retry_after_s: When to come back, if the service is busy.
        request_id: Name of the call in the service's log; empty if the service did not answer.
    """

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        *,
        reason: str = "",
        field: str = "",
        retry_after_s: float | None = None,
        request_id: str = "",
    ) -> None:
        super().__init__(f"{code.name}: {message}")
        self.code, self.message, self.reason, self.field = code, message, reason, field
        self.retry_after_s, self.request_id = retry_after_s, request_id

    def __reduce__(self) -> tuple[Any, ...]:
        """Rebuild from the arguments: errors cross processes, and pickle alone would drop keywords."""
        names = ("reason", "field", "retry_after_s", "request_id")
        named: dict[str, Any] = {name: getattr(self, name) for name in names}
        return partial(type(self), self.code, self.message, **named), ()


class InvalidArgument(VaeError, ValueError):
    """The request cannot be answered as it is; `field` and the message say what to change."""


class Unauthenticated(VaeError):
    """The service wants credentials, and got none or none that are valid."""


class PermissionDenied(VaeError):
    """The service knows the caller, who may not do this."""


class ModelNotFound(VaeError):
    """The model version asked for is not loaded."""


class Overloaded(VaeError):
    """The service is busy, and stayed so through the retries."""


class Unavailable(VaeError):
    """The service does not answer now."""


class DeadlineExceeded(VaeError, TimeoutError):
    """No answer came in time."""


_ERRORS: Final[Mapping[grpc.StatusCode, type[VaeError]]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgument,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.NOT_FOUND: ModelNotFound,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
}


class Encoded(NamedTuple):
    """Posteriors: `mean` and `log_var` (n, latent_dim), and draws `latents` (n, num_latents, latent_dim)."""

    mean: Array
    log_var: Array
    latents: Array | None
    seed: int | None
    model_version: str


class Decoded(NamedTuple):
    """Means or observations (n, *data_shape)."""

    reconstruction: Array
    seed: int | None
    model_version: str


class Sampled(NamedTuple):
    """Draws from the prior: `samples` (n, *data_shape), `latents` (n, latent_dim) if asked for, the `seed`."""

    samples: Array
    latents: Array | None
    seed: int
    model_version: str


class SampledChunk(NamedTuple):
    """Consecutive draws from the prior, as for `Sampled`, and the number of the first in the seed's sequence."""

    first_row: int
    samples: Array
    latents: Array | None
    seed: int
    model_version: str


class Scored(NamedTuple):
    """Lower bounds `score` on log p(x), and their parts `log_likelihood` and `kl`: each (n,) float32, in nats."""

    score: Array
    log_likelihood: Array
    kl: Array
    seed: int
    model_version: str


class Interpolated(NamedTuple):
    """Points on paths: `observations` (n, num_steps, *data_shape), `latents` (n, num_steps, latent_dim)."""

    observations: Array
    latents: Array | None
    model_version: str


class Model(NamedTuple):
    """What is known of the loaded model; `limits` as in the proto.

    `likelihood` is "bernoulli", "gaussian" (then scores are of densities) or "categorical"; `num_levels` belongs
    to the last, and is zero for the others.
    """

    name: str
    model_version: str
    data_shape: tuple[int, ...]
    latent_dim: int
    likelihood: str
    prior: str
    noise_algorithm: str
    dataset: str
    metrics: dict[str, float]
    limits: dict[str, float]
    encoder_provider: str
    decoder_provider: str
    num_levels: int


class Timings(NamedTuple):
    """Where the time of one call went, as the gateway saw it."""

    request_id: str
    """The caller's, or the one that the service gave it: its log lines and errors name it."""

    queue_s: float
    """Waiting for a run, seconds."""

    engine_s: float
    """From the begin of the first run to the end of the last, seconds."""

    total_s: float
    """From its arrival to its answer, seconds."""

    batch_rows: int
    """Rows of the largest run that it took part in, those of others included."""

    model_version: str


class CallOptions(TypedDict, total=False):
    """What every call takes."""

    model_version: str
    """Version the model must have; any by default."""

    timeout_s: float
    """Deadline, seconds; the client's by default. Of a stream: of all of it; none by default."""

    priority: Literal[1, 2, 3]
    """3 lets others go first and is shed first; a call can step back from its method's own, never ahead."""

    request_id: str
    """Name of the call in the service's log and errors: up to 64 of `A-Z a-z 0-9 . _ -`; chosen if absent."""

    on_timings: Callable[[Timings], None]
    """Told where the time of a call that succeeded went. Not of a stream."""


class EncodeOptions(CallOptions, total=False):
    """What `encode` takes."""

    num_latents: int
    """Draws from each posterior; none by default."""

    seed: int
    """Seed of the draws, in [0, 2^64); chosen by the service by default."""

    first_row: int
    """Number of the first row in the seed's endless sequence; 0 by default."""

    output_type: Literal["float32", "float16"]
    """Type of the answer; float32 by default."""


class ObservationOptions(CallOptions, total=False):
    """What `decode` and `reconstruct` take."""

    observation: Observation
    """Mean of p(x | z) (default), or one draw from it."""

    seed: int
    """Seed of the draw, in [0, 2^64); chosen by the service by default."""

    first_row: int
    """Number of the first row in the seed's endless sequence; 0 by default."""

    output_type: OutputType
    """Type of the answer; float32 by default."""


class SampleOptions(ObservationOptions, total=False):
    """What `sample` takes."""

    temperature: float
    """Standard deviation of the latents, in [0, 10]; 1 by default."""

    include_latents: bool
    """Whether the latents are returned too."""


class SampleStreamOptions(SampleOptions, total=False):
    """What `sample_stream` takes."""

    max_chunk_rows: int
    """Most rows in one chunk; about a megabyte by default."""

    progress: bool
    """Whether a bar is shown on a terminal, which needs the package rich."""


class ScoreOptions(CallOptions, total=False):
    """What `score` takes."""

    bound: Bound
    """Evidence lower bound (default), or the tighter importance-weighted bound."""

    num_latents: int
    """Draws from each posterior that the bound is estimated with; 1 by default."""

    seed: int
    """Seed of the draws, in [0, 2^64); chosen by the service by default."""

    first_row: int
    """Number of the first row in the seed's endless sequence; 0 by default."""


class InterpolateOptions(CallOptions, total=False):
    """What `interpolate` takes."""

    kind: Literal["data", "latents"]
    """What the ends are; data by default."""

    interpolation: Interpolation
    """Shape of the path; linear by default."""

    output_type: OutputType
    """Type of the answer; float32 by default."""

    include_latents: bool
    """Whether the latents of the path are returned too."""


class VaeClient:
    """Calls the service. Thread-safe. Every method raises a `VaeError` when a call fails.

    Args:
        target: Address, such as "localhost:50051" or "dns:///vae.example:50051".
        timeout_s: Deadline of a call unless it brings its own, seconds.
        credentials: Transport security, such as `grpc.ssl_channel_credentials(ca)`; plaintext if absent.
        api_key: API key that says who calls.
        token: JSON Web Token instead, or a quick function that returns the current one, asked at every call.
        options: Further gRPC channel arguments.

    Raises:
        ValueError: If a key or a token is to be sent in plaintext to another machine, or both are given.

    Example:
        with VaeClient("localhost:50051") as client:
            samples = client.sample(16, seed=1).samples
    """

    def __init__(
        self,
        target: str,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        credentials: grpc.ChannelCredentials | None = None,
        api_key: str | None = None,
        token: Token | None = None,
        options: Sequence[tuple[str, Any]] = (),
    ) -> None:
        self._bearer = _bearer(api_key, token, may_leave=credentials is not None or _is_loopback(target))
        arguments = _arguments(options, is_direct=self._bearer is not None and credentials is None)
        self._channel = (
            grpc.secure_channel(target, credentials, arguments)
            if credentials
            else grpc.insecure_channel(target, arguments)
        )
        self._stub = vae_pb2_grpc.VaeServiceStub(self._channel)
        self._timeout_s = timeout_s

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the channel."""
        self._channel.close()

    def wait_until_ready(self, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        """Return once the service can be reached and is healthy."""
        # By a call, whatever its answer: the future of gRPC leaves a thread that fails when the channel closes.
        check: Any = self._channel.unary_unary(_HEALTH_CHECK)
        try:
            check(b"", timeout=timeout_s, wait_for_ready=True, metadata=_metadata(self._bearer, {}))
        except grpc.RpcError as error:
            if error.code() in {grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE}:
                raise _not_ready(timeout_s) from None

    def get_model(self, **options: Unpack[CallOptions]) -> Model:
        """Return what is known of the loaded model; wait for the service up to the deadline."""
        return self._call(_get_model(options))

    def encode(self, data: ArrayLike, **options: Unpack[EncodeOptions]) -> Encoded:
        """Return the posteriors of data (n, *data_shape): uint8 in 255ths, or floats in [0, 1]."""
        return self._call(_encode(data, options))

    def decode(self, latents: ArrayLike, **options: Unpack[ObservationOptions]) -> Decoded:
        """Return means of p(x | z), or draws from it, for latents (n, latent_dim)."""
        return self._call(_decode(latents, options))

    def sample(self, num_samples: int, **options: Unpack[SampleOptions]) -> Sampled:
        """Return draws from the prior, decoded. The same seed gives the same samples."""
        return self._call(_sample(num_samples, options))

    def sample_stream(
        self, num_samples: int, **options: Unpack[SampleStreamOptions]
    ) -> Generator[SampledChunk, None, None]:
        """Draw any number of samples, chunk by chunk, each row once and in order.

        A stream that breaks is asked for again from the first row that is missing, with the same seed and model
        version; after four attempts in a row that bring no chunk, the error of the last is raised. Close the
        iterator to stop early.

        Raises:
            ModelNotFound: If the model was replaced meanwhile: rows of two models are never mixed.
            ImportError: If a progress bar is asked for and rich is not installed.
        """
        return self._chunks(_Stream(num_samples, options))

    def reconstruct(self, data: ArrayLike, **options: Unpack[ObservationOptions]) -> Decoded:
        """Return the decoded posterior means of data (n, *data_shape), as for `encode`."""
        return self._call(_reconstruct(data, options))

    def score(self, data: ArrayLike, **options: Unpack[ScoreOptions]) -> Scored:
        """Return lower bounds on log p(x) of data (n, *data_shape), as for `encode`: low for unusual rows."""
        return self._call(_score(data, options))

    def interpolate(
        self, start: ArrayLike, end: ArrayLike, num_steps: int, **options: Unpack[InterpolateOptions]
    ) -> Interpolated:
        """Return decoded points between two ends of equal shape (n, ...), both ends included."""
        return self._call(_interpolate(start, end, num_steps, options))

    def _call(self, plan: "_Plan[T]") -> T:
        timeout_s = plan.options.get("timeout_s", self._timeout_s)
        metadata = _metadata(self._bearer, plan.options)
        method = getattr(self._stub, plan.method)
        try:
            if "on_timings" not in plan.options:
                return plan.read(method(plan.request, timeout=timeout_s, metadata=metadata))
            answer, call = method.with_call(plan.request, timeout=timeout_s, metadata=metadata)
            plan.options["on_timings"](_timings(call.trailing_metadata()))
            return plan.read(answer)
        except grpc.RpcError as error:
            raise _error(error) from None

    def _chunks(self, stream: "_Stream") -> Generator[SampledChunk, None, None]:
        with stream.bar() as advance:
            while True:
                self.wait_until_ready(min(self._timeout_s, stream.remaining_s))
                timeout_s = stream.remaining_s if stream.is_limited else None
                metadata = _metadata(self._bearer, stream.options)
                call = self._stub.SampleStream(
                    stream.request, timeout=timeout_s, metadata=metadata, wait_for_ready=False
                )
                try:
                    for response in call:
                        chunk = stream.take(response)
                        advance(len(chunk.samples))
                        yield chunk
                    stream.end()
                except grpc.RpcError as error:
                    delay_s = stream.delay_after(_error(error))
                else:
                    return
                finally:
                    call.cancel()
                time.sleep(delay_s)


class AsyncVaeClient:
    """Calls the service from asyncio: the methods of `VaeClient`, to be awaited.

    Args:
        target: Address, such as "localhost:50051" or "dns:///vae.example:50051".
        timeout_s: Deadline of a call unless it brings its own, seconds.
        credentials: Transport security, such as `grpc.ssl_channel_credentials(ca)`; plaintext if absent.
        api_key: API key that says who calls.
        token: JSON Web Token instead, or a quick function that returns the current one, asked at every call.
        options: Further gRPC channel arguments.

    Raises:
        ValueError: If a key or a token is to be sent in plaintext to another machine, or both are given.
    """

    def __init__(
        self,
        target: str,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        credentials: grpc.ChannelCredentials | None = None,
        api_key: str | None = None,
        token: Token | None = None,
        options: Sequence[tuple[str, Any]] = (),
    ) -> None:
        self._bearer = _bearer(api_key, token, may_leave=credentials is not None or _is_loopback(target))
        arguments = _arguments(options, is_direct=self._bearer is not None and credentials is None)
        self._channel = (
            grpc.aio.secure_channel(target, credentials, arguments)
            if credentials
            else grpc.aio.insecure_channel(target, arguments)
        )
        self._stub = vae_pb2_grpc.VaeServiceStub(self._channel)
        self._timeout_s = timeout_s

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close()

    async def wait_until_ready(self, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        """Return once the service can be reached and is healthy."""
        try:
            await asyncio.wait_for(self._channel.channel_ready(), timeout_s)
        except TimeoutError:
            raise _not_ready(timeout_s) from None

    async def get_model(self, **options: Unpack[CallOptions]) -> Model:
        """Return what is known of the loaded model; wait for the service up to the deadline."""
        return await self._call(_get_model(options))

    async def encode(self, data: ArrayLike, **options: Unpack[EncodeOptions]) -> Encoded:
        """Return the posteriors of data (n, *data_shape): uint8 in 255ths, or floats in [0, 1]."""
        return await self._call(_encode(data, options))

    async def decode(self, latents: ArrayLike, **options: Unpack[ObservationOptions]) -> Decoded:
        """Return means of p(x | z), or draws from it, for latents (n, latent_dim)."""
        return await self._call(_decode(latents, options))

    async def sample(self, num_samples: int, **options: Unpack[SampleOptions]) -> Sampled:
        """Return draws from the prior, decoded. The same seed gives the same samples."""
        return await self._call(_sample(num_samples, options))

    def sample_stream(
        self, num_samples: int, **options: Unpack[SampleStreamOptions]
    ) -> AsyncGenerator[SampledChunk, None]:
        """Draw any number of samples, chunk by chunk, each row once and in order.

        A stream that breaks is asked for again from the first row that is missing, with the same seed and model
        version; after four attempts in a row that bring no chunk, the error of the last is raised. Close the
        iterator to stop early.

        Raises:
            ModelNotFound: If the model was replaced meanwhile: rows of two models are never mixed.
            ImportError: If a progress bar is asked for and rich is not installed.
        """
        return self._chunks(_Stream(num_samples, options))

    async def reconstruct(self, data: ArrayLike, **options: Unpack[ObservationOptions]) -> Decoded:
        """Return the decoded posterior means of data (n, *data_shape), as for `encode`."""
        return await self._call(_reconstruct(data, options))

    async def score(self, data: ArrayLike, **options: Unpack[ScoreOptions]) -> Scored:
        """Return lower bounds on log p(x) of data (n, *data_shape), as for `encode`: low for unusual rows."""
        return await self._call(_score(data, options))

    async def interpolate(
        self, start: ArrayLike, end: ArrayLike, num_steps: int, **options: Unpack[InterpolateOptions]
    ) -> Interpolated:
        """Return decoded points between two ends of equal shape (n, ...), both ends included."""
        return await self._call(_interpolate(start, end, num_steps, options))

    async def _call(self, plan: "_Plan[T]") -> T:
        timeout_s = plan.options.get("timeout_s", self._timeout_s)
        metadata = _metadata(self._bearer, plan.options)
        call = getattr(self._stub, plan.method)(plan.request, timeout=timeout_s, metadata=metadata)
        try:
            answer = await call
            if "on_timings" in plan.options:
                plan.options["on_timings"](_timings(await call.trailing_metadata()))
            return plan.read(answer)
        except grpc.RpcError as error:
            raise _error(error) from None

    async def _chunks(self, stream: "_Stream") -> AsyncGenerator[SampledChunk, None]:
        with stream.bar() as advance:
            while True:
                await self.wait_until_ready(min(self._timeout_s, stream.remaining_s))
                timeout_s = stream.remaining_s if stream.is_limited else None
                metadata = _metadata(self._bearer, stream.options)
                call = self._stub.SampleStream(
                    stream.request, timeout=timeout_s, metadata=metadata, wait_for_ready=False
                )
                try:
                    async for response in call:
                        chunk = stream.take(response)
                        advance(len(chunk.samples))
                        yield chunk
                    stream.end()
                except grpc.RpcError as error:
                    delay_s = stream.delay_after(_error(error))
                else:
                    return
                finally:
                    call.cancel()
                await asyncio.sleep(delay_s)


class _Plan(NamedTuple, Generic[T]):
    """One call: what to send where, and how to read the answer. Shared by both clients."""

    method: str
    request: Message
    options: CallOptions
    read: Callable[[Any], T]


class _Stream:
    """What came of a stream, what is missing, and whether to ask again. Shared by both clients.

    Args:
        num_samples: Rows to draw.
        options: Of the caller.
    """

    def __init__(self, num_samples: int, options: SampleStreamOptions) -> None:
        _check_names(options, SampleStreamOptions)
        _metadata(None, options)
        self.options = options
        self.request = pb.SampleStreamRequest(
            max_chunk_rows=_unsigned("max_chunk_rows", options.get("max_chunk_rows", 0), bits=32),
            **_prior(num_samples, options, bits=64),
        )
        """Asks for what is missing."""
        if not self.request.HasField("seed"):
            self.request.seed = secrets.randbits(64)  # ours, so that it is known before the first chunk
        self._total = num_samples
        self._expires_at = time.monotonic() + options.get("timeout_s", math.inf)
        self._num_failures = 0
        if options.get("progress"):
            _require_rich()

    @property
    def is_limited(self) -> bool:
        """Whether the caller gave a deadline."""
        return self._expires_at < math.inf

    @property
    def remaining_s(self) -> float:
        """Time until the deadline, seconds."""
        return max(0.0, self._expires_at - time.monotonic())

    def take(self, response: pb.SampleStreamResponse) -> SampledChunk:
        """Return a chunk, and count it as come.

        Raises:
            VaeError: If it is not what comes next.
        """
        chunk = SampledChunk(
            first_row=response.first_row,
            samples=_output(response.samples),
            latents=_output(response.latents) if response.HasField("latents") else None,
            seed=response.seed,
            model_version=response.model_version,
        )
        request, num_rows = self.request, len(chunk.samples)
        if (chunk.first_row, chunk.seed) != (request.first_row, request.seed) or num_rows > request.num_samples:
            raise _data_loss(f"expected row {request.first_row} next, got {num_rows} from {chunk.first_row} on")
        request.first_row += num_rows
        request.num_samples -= num_rows
        request.model_version = response.model_version
        self._num_failures = 0
        return chunk

    def end(self) -> None:
        """Check that nothing is missing.

        Raises:
            VaeError: If something is.
        """
        if self.request.num_samples:
            raise _data_loss(f"the stream ended {self.request.num_samples} rows early")

    def delay_after(self, error: VaeError) -> float:
        """Return how long to wait before asking again, seconds.

        Raises:
            VaeError: The error, if asking again is of no use.
        """
        # A deadline that is not ours is the service's own limit of a stream, or we read too slowly for it.
        passes = isinstance(error, Unavailable | DeadlineExceeded) or error.retry_after_s is not None
        if not passes or self._num_failures >= len(_RESUME_AFTER_S):
            raise error from None
        jitter = random.uniform(0.5, 1)  # noqa: S311 - spreads callers, guards nothing
        delay_s = max(_RESUME_AFTER_S[self._num_failures] * jitter, error.retry_after_s or 0)
        if delay_s >= self.remaining_s:
            raise error from None
        self._num_failures += 1
        return delay_s

    @contextlib.contextmanager
    def bar(self) -> Iterator[Callable[[int], object]]:
        """Show a bar if the caller wants one; yield what moves it by a number of rows."""
        if not self.options.get("progress"):
            yield lambda _num_rows: None
            return
        from rich.console import Console  # noqa: PLC0415 - only who wants a bar needs rich
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn  # noqa: PLC0415

        console = Console(stderr=True)
        columns = ("sampling", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task("sampling", total=self._total)
            yield lambda num_rows: progress.advance(task, num_rows)


def _get_model(options: CallOptions) -> _Plan[Model]:
    _check_names(options, CallOptions)
    return _Plan("GetModel", pb.GetModelRequest(), options, _read_model)


def _encode(data: ArrayLike, options: EncodeOptions) -> _Plan[Encoded]:
    _check_names(options, EncodeOptions)
    request = pb.EncodeRequest(
        data=_input(data),
        num_latents=_unsigned("num_latents", options.get("num_latents", 0), bits=32),
        seed=_seed(options),
        first_row=_unsigned("first_row", options.get("first_row", 0), bits=64),
        output_type=_word(_TYPES, "output_type", options.get("output_type", "float32")),
        model_version=options.get("model_version", ""),
    )
    return _Plan("Encode", request, options, _read_encoded)


def _decode(latents: ArrayLike, options: ObservationOptions) -> _Plan[Decoded]:
    _check_names(options, ObservationOptions)
    request = pb.DecodeRequest(latents=_input(latents), **_observation(options))
    return _Plan("Decode", request, options, _read_decoded)


def _sample(num_samples: int, options: SampleOptions) -> _Plan[Sampled]:
    _check_names(options, SampleOptions)
    return _Plan("Sample", pb.SampleRequest(**_prior(num_samples, options, bits=32)), options, _read_sampled)


def _prior(num_samples: int, options: SampleOptions, *, bits: int) -> dict[str, Any]:
    """Return the fields of both requests for draws from the prior."""
    return {
        "num_samples": _unsigned("num_samples", num_samples, bits=bits),
        "temperature": options.get("temperature", 1.0),
        "include_latents": options.get("include_latents", False),
        **_observation(options),
    }


def _observation(options: ObservationOptions) -> dict[str, Any]:
    """Return the fields of every request that may draw from p(x | z)."""
    return {
        "observation": _word(_OBSERVATIONS, "observation", options.get("observation", "mean")),
        "seed": _seed(options),
        "first_row": _unsigned("first_row", options.get("first_row", 0), bits=64),
        "output_type": _word(_TYPES, "output_type", options.get("output_type", "float32")),
        "model_version": options.get("model_version", ""),
    }


def _reconstruct(data: ArrayLike, options: ObservationOptions) -> _Plan[Decoded]:
    _check_names(options, ObservationOptions)
    request = pb.ReconstructRequest(data=_input(data), **_observation(options))
    return _Plan("Reconstruct", request, options, _read_decoded)


def _score(data: ArrayLike, options: ScoreOptions) -> _Plan[Scored]:
    _check_names(options, ScoreOptions)
    request = pb.ScoreRequest(
        data=_input(data),
        bound=_word(_BOUNDS, "bound", options.get("bound", "elbo")),
        num_latents=_unsigned("num_latents", options.get("num_latents", 1), bits=32),
        seed=_seed(options),
        first_row=_unsigned("first_row", options.get("first_row", 0), bits=64),
        model_version=options.get("model_version", ""),
    )
    return _Plan("Score", request, options, _read_scored)


def _interpolate(
    start: ArrayLike, end: ArrayLike, num_steps: int, options: InterpolateOptions
) -> _Plan[Interpolated]:
    _check_names(options, InterpolateOptions)
    ends = pb.Endpoints(start=_input(start), end=_input(end))
    are_data = _word({"data": True, "latents": False}, "kind", options.get("kind", "data"))
    request = pb.InterpolateRequest(
        data=ends if are_data else None,
        latents=None if are_data else ends,
        num_steps=_unsigned("num_steps", num_steps, bits=32),
        interpolation=_word(_PATHS, "interpolation", options.get("interpolation", "linear")),
        output_type=_word(_TYPES, "output_type", options.get("output_type", "float32")),
        include_latents=options.get("include_latents", False),
        model_version=options.get("model_version", ""),
    )
    return _Plan("Interpolate", request, options, _read_interpolated)


def _read_model(response: pb.GetModelResponse) -> Model:
    limits = {field.name: value for field, value in response.limits.ListFields()}
    return Model(
        name=response.name,
        model_version=response.model_version,
        data_shape=tuple(response.data_shape),
        latent_dim=response.latent_dim,
        likelihood=pb.Likelihood.Name(response.likelihood).removeprefix("LIKELIHOOD_").lower(),
        prior=response.prior,
        noise_algorithm=response.noise_algorithm,
        dataset=response.dataset,
        metrics=dict(response.metrics),
        limits=limits,
        encoder_provider=response.encoder_provider,
        decoder_provider=response.decoder_provider,
        num_levels=response.num_levels,
    )


def _read_encoded(response: pb.EncodeResponse) -> Encoded:
    return Encoded(
        mean=_output(response.mean),
        log_var=_output(response.log_var),
        latents=_output(response.latents) if response.HasField("latents") else None,
        seed=response.seed if response.HasField("seed") else None,
        model_version=response.model_version,
    )


def _read_decoded(response: pb.DecodeResponse | pb.ReconstructResponse) -> Decoded:
    return Decoded(
        reconstruction=_output(response.reconstruction),
        seed=response.seed if response.HasField("seed") else None,
        model_version=response.model_version,
    )


def _read_sampled(response: pb.SampleResponse) -> Sampled:
    return Sampled(
        samples=_output(response.samples),
        latents=_output(response.latents) if response.HasField("latents") else None,
        seed=response.seed,
        model_version=response.model_version,
    )


def _read_scored(response: pb.ScoreResponse) -> Scored:
    return Scored(
        score=_output(response.score),
        log_likelihood=_output(response.log_likelihood),
        kl=_output(response.kl),
        seed=response.seed,
        model_version=response.model_version,
    )


def _read_interpolated(response: pb.InterpolateResponse) -> Interpolated:
    return Interpolated(
        observations=_output(response.observations),
        latents=_output(response.latents) if response.HasField("latents") else None,
        model_version=response.model_version,
    )


def _arguments(extra: Sequence[tuple[str, Any]], *, is_direct: bool) -> list[tuple[str, Any]]:
    """Return the channel's arguments; `is_direct` forbids a proxy that the environment names."""
    return [
        *([("grpc.enable_http_proxy", 0)] if is_direct else ()),  # to a proxy, a key in plaintext would leave
        ("grpc.service_config", json.dumps(SERVICE_CONFIG)),
        ("grpc.max_receive_message_length", _UNLIMITED),  # the server bounds its answers
        ("grpc.max_send_message_length", _UNLIMITED),  # the server says what is too large
        (
            "grpc.keepalive_time_ms",
            320_000,
        ),  # a stream whose peer vanished ends; the server wants 300 s of silence
        ("grpc.keepalive_timeout_ms", 20_000),
        *extra,
    ]


def _bearer(api_key: str | None, token: Token | None, *, may_leave: bool) -> Callable[[], str] | None:
    """Return what says who calls, if anything does.

    Raises:
        ValueError: If there are two credentials, or they would leave this machine in plaintext.
    """
    if api_key is not None and token is not None:
        raise ValueError("give an api_key or a token, not both")
    given = token if api_key is None else api_key
    if given is None:
        return None
    if not may_leave:
        raise ValueError("a key or token is never sent in plaintext to another machine; give credentials (TLS)")
    if callable(given):
        return given
    _check_bearer(given)
    return lambda: given


def _check_bearer(given: str) -> str:
    """Return a key or token that a header can hold; whatever is wrong with it, the text does not show it."""
    if not _BEARER.fullmatch(given):
        raise ValueError("a key or token is one word of printable ASCII; it may have come with spaces or newlines")
    return given


def _is_loopback(target: str) -> bool:
    """Return whether a target can only be this machine."""
    return _LOOPBACK.fullmatch(target) is not None


def _metadata(bearer: Callable[[], str] | None, options: CallOptions) -> Metadata | None:
    """Return what goes beside the request. Not as call credentials: gRPC asks those on a thread for each call."""
    metadata: Metadata = () if bearer is None else (("authorization", f"Bearer {_check_bearer(bearer())}"),)
    if (priority := options.get("priority")) is not None:
        if priority not in _PRIORITIES:
            raise _out_of_range("priority", "1, 2 or 3", str(priority))
        metadata += (("vae-priority", str(priority)),)
    if (request_id := options.get("request_id")) is not None:
        if not _REQUEST_ID.fullmatch(request_id):
            raise _out_of_range("request_id", "1 to 64 of A-Z a-z 0-9 . _ -", repr(request_id[:80]))
        metadata += (("x-request-id", request_id),)
    if "on_timings" in options:
        metadata += (("vae-timings", "1"),)
    return metadata or None


def _timings(trailers: Any) -> Timings:  # noqa: ANN401 - pairs, though the stubs disagree between the two clients
    """Return what a call's trailing metadata says."""
    found = {key: value for key, value in trailers or () if isinstance(value, str)}

    def seconds(key: str) -> float:
        return int(found.get(key, "0")) / 1e6

    return Timings(
        request_id=found.get("x-request-id", ""),
        queue_s=seconds("vae-queue-us"),
        engine_s=seconds("vae-engine-us"),
        total_s=seconds("vae-total-us"),
        batch_rows=int(found.get("vae-batch-rows", "0")),
        model_version=found.get("vae-model-version", ""),
    )


def _require_rich() -> None:
    try:
        import rich.progress  # noqa: F401, PLC0415 - only who wants a bar needs it
    except ModuleNotFoundError:
        raise ImportError("a progress bar needs rich: pip install rich") from None


def _input(values: ArrayLike) -> pb.Tensor:
    array = np.asarray(values)
    return to_message(array if array.dtype == np.uint8 else array.astype(np.float32))


def _output(tensor: pb.Tensor) -> Array:
    return from_message(tensor, field="response", accept=_ALL)


def _check_names(options: CallOptions, known: type[CallOptions]) -> None:
    """Refuse an option that is not one: at run time a misspelt one would be ignored.

    Raises:
        TypeError: Names it and those that are.
    """
    names = set(known.__annotations__)  # those it inherits too
    if unknown := sorted(options.keys() - names):
        raise TypeError(f"unknown option {', '.join(unknown)}; known: {', '.join(sorted(names))}")


def _word(words: Mapping[str, T], field: str, word: str) -> T:
    """Return what a word means."""
    if word not in words:
        raise _out_of_range(field, f"one of {', '.join(words)}", repr(word))
    return words[word]


def _out_of_range(field: str, expected: str, actual: str) -> InvalidArgument:
    message = f"{field}: expected {expected}, got {actual}"
    return InvalidArgument(grpc.StatusCode.INVALID_ARGUMENT, message, reason="OUT_OF_RANGE", field=field)


def _seed(options: EncodeOptions | ObservationOptions | ScoreOptions) -> int | None:
    seed = options.get("seed")
    return None if seed is None else _unsigned("seed", seed, bits=64)


def _unsigned(field: str, value: int, *, bits: int) -> int:
    """Return a number that the message can hold; the service checks its own, narrower range."""
    if not 0 <= value < 2**bits:
        raise _out_of_range(field, f"a number in [0, 2^{bits})", str(value))
    return value


def _not_ready(timeout_s: float) -> DeadlineExceeded:
    message = f"the service was not ready within {timeout_s:g} s"
    return DeadlineExceeded(grpc.StatusCode.DEADLINE_EXCEEDED, message)


def _data_loss(message: str) -> VaeError:
    return VaeError(grpc.StatusCode.DATA_LOSS, message)


def _error(error: grpc.RpcError) -> VaeError:
    """Return the typed error of a failed call of either client."""
    metadata: Any = error.trailing_metadata() or ()  # pairs, though the stubs disagree between the two clients
    trailers = {key: value for key, value in metadata if isinstance(value, str)}
    pushback_ms = trailers.get("grpc-retry-pushback-ms", "")
    message = error.details() or "no answer"
    # The one RESOURCE_EXHAUSTED that no waiting cures comes from gRPC itself.
    is_too_large = error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in message
    kind = InvalidArgument if is_too_large else _ERRORS.get(error.code(), VaeError)
    return kind(
        error.code(),
        message,
        reason=trailers.get("vae-error-reason", ""),
        field=trailers.get("vae-error-field", ""),
        retry_after_s=int(pushback_ms) / 1000 if pushback_ms.isdecimal() else None,
        request_id=trailers.get("x-request-id", ""),
    )
