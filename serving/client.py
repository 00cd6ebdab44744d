"""NumPy in, NumPy out: the client of the service, and its asyncio twin. Needs grpcio, protobuf and numpy alone."""

import json
from collections.abc import Callable, Mapping, Sequence
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

T = TypeVar("T")

SERVICE: Final = pb.DESCRIPTOR.services_by_name["VaeService"].full_name
DEFAULT_TIMEOUT_S: Final = 10.0
_UNLIMITED: Final = -1
_ALL: Final = frozenset({pb.DATA_TYPE_FLOAT32, pb.DATA_TYPE_FLOAT16, pb.DATA_TYPE_UINT8})
_TYPES: Final = {
    "float32": pb.DATA_TYPE_FLOAT32,
    "float16": pb.DATA_TYPE_FLOAT16,
    "uint8": pb.DATA_TYPE_UINT8,
}
_OBSERVATIONS: Final = {"mean": pb.OBSERVATION_MEAN, "sample": pb.OBSERVATION_SAMPLE}
_PATHS: Final = {"linear": pb.INTERPOLATION_LINEAR, "spherical": pb.INTERPOLATION_SPHERICAL}

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
        }
    ],
    "retryThrottling": {"maxTokens": 10, "tokenRatio": 0.1},
}
"""How any gRPC client should call the service: every call is pure, so it may be repeated. Backends that say
NOT_SERVING get no calls (`healthCheckConfig` works with `round_robin` only)."""


class VaeError(Exception):
    """A call failed.

    Args:
        code: gRPC status code.
        message: What the service says; fit to be shown.
        reason: Name of `vae.v1.ErrorReason` without its prefix; empty if the service did not answer.
        field: Path of the field that is wrong, for bad input.
        retry_after_s: When to come back, if the service is busy.
    """

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        *,
        reason: str = "",
        field: str = "",
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(f"{code.name}: {message}")
        self.code, self.message, self.reason, self.field = code, message, reason, field
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[Any, ...]:
        """Rebuild from the arguments: errors cross processes, and pickle alone would drop keywords."""
        named: dict[str, Any] = {"reason": self.reason, "field": self.field, "retry_after_s": self.retry_after_s}
        return partial(type(self), self.code, self.message, **named), ()


class InvalidArgument(VaeError, ValueError):
    """The request cannot be answered as it is; `field` and the message say what to change."""


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


class Interpolated(NamedTuple):
    """Points on paths: `observations` (n, num_steps, *data_shape), `latents` (n, num_steps, latent_dim)."""

    observations: Array
    latents: Array | None
    model_version: str


class Model(NamedTuple):
    """What is known of the loaded model; `limits` as in the proto."""

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


class CallOptions(TypedDict, total=False):
    """What every call takes."""

    model_version: str
    """Version the model must have; any by default."""

    timeout_s: float
    """Deadline, seconds; the client's by default."""


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
        credentials: Transport security; plaintext if absent.
        options: Further gRPC channel arguments.

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
        options: Sequence[tuple[str, Any]] = (),
    ) -> None:
        arguments = _arguments(options)
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

    def reconstruct(self, data: ArrayLike, **options: Unpack[ObservationOptions]) -> Decoded:
        """Return the decoded posterior means of data (n, *data_shape), as for `encode`."""
        return self._call(_reconstruct(data, options))

    def interpolate(
        self, start: ArrayLike, end: ArrayLike, num_steps: int, **options: Unpack[InterpolateOptions]
    ) -> Interpolated:
        """Return decoded points between two ends of equal shape (n, ...), both ends included."""
        return self._call(_interpolate(start, end, num_steps, options))

    def _call(self, plan: "_Plan[T]") -> T:
        timeout_s = plan.options.get("timeout_s", self._timeout_s)
        try:
            return plan.read(getattr(self._stub, plan.method)(plan.request, timeout=timeout_s))
        except grpc.RpcError as error:
            raise _error(error) from None


class AsyncVaeClient:
    """Calls the service from asyncio: the methods of `VaeClient`, to be awaited.

    Args:
        target: Address, such as "localhost:50051" or "dns:///vae.example:50051".
        timeout_s: Deadline of a call unless it brings its own, seconds.
        credentials: Transport security; plaintext if absent.
        options: Further gRPC channel arguments.
    """

    def __init__(
        self,
        target: str,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        credentials: grpc.ChannelCredentials | None = None,
        options: Sequence[tuple[str, Any]] = (),
    ) -> None:
        arguments = _arguments(options)
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

    async def reconstruct(self, data: ArrayLike, **options: Unpack[ObservationOptions]) -> Decoded:
        """Return the decoded posterior means of data (n, *data_shape), as for `encode`."""
        return await self._call(_reconstruct(data, options))

    async def interpolate(
        self, start: ArrayLike, end: ArrayLike, num_steps: int, **options: Unpack[InterpolateOptions]
    ) -> Interpolated:
        """Return decoded points between two ends of equal shape (n, ...), both ends included."""
        return await self._call(_interpolate(start, end, num_steps, options))

    async def _call(self, plan: "_Plan[T]") -> T:
        timeout_s = plan.options.get("timeout_s", self._timeout_s)
        try:
            return plan.read(await getattr(self._stub, plan.method)(plan.request, timeout=timeout_s))
        except grpc.RpcError as error:
            raise _error(error) from None


class _Plan(NamedTuple, Generic[T]):
    """One call: what to send where, and how to read the answer. Shared by both clients."""

    method: str
    request: Message
    options: CallOptions
    read: Callable[[Any], T]


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
    request = pb.SampleRequest(
        num_samples=_unsigned("num_samples", num_samples, bits=32),
        temperature=options.get("temperature", 1.0),
        include_latents=options.get("include_latents", False),
        **_observation(options),
    )
    return _Plan("Sample", request, options, _read_sampled)


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


def _read_interpolated(response: pb.InterpolateResponse) -> Interpolated:
    return Interpolated(
        observations=_output(response.observations),
        latents=_output(response.latents) if response.HasField("latents") else None,
        model_version=response.model_version,
    )


def _arguments(extra: Sequence[tuple[str, Any]]) -> list[tuple[str, Any]]:
    return [
        ("grpc.service_config", json.dumps(SERVICE_CONFIG)),
        ("grpc.max_receive_message_length", _UNLIMITED),  # the server bounds its answers
        ("grpc.max_send_message_length", _UNLIMITED),  # the server says what is too large
        *extra,
    ]


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


def _seed(options: EncodeOptions | ObservationOptions) -> int | None:
    seed = options.get("seed")
    return None if seed is None else _unsigned("seed", seed, bits=64)


def _unsigned(field: str, value: int, *, bits: int) -> int:
    """Return a number that the message can hold; the service checks its own, narrower range."""
    if not 0 <= value < 2**bits:
        raise _out_of_range(field, f"a number in [0, 2^{bits})", str(value))
    return value


def _error(error: grpc.RpcError) -> VaeError:
    """Return the typed error of a failed call of either client."""
    metadata: Any = error.trailing_metadata() or ()  # pairs, though the stubs disagree between the two clients
    trailers = {key: value for key, value in metadata if isinstance(value, str)}
    pushback_ms = trailers.get("grpc-retry-pushback-ms")
    message = error.details() or "no answer"
    # The one RESOURCE_EXHAUSTED that no waiting cures comes from gRPC itself.
    is_too_large = error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in message
    kind = InvalidArgument if is_too_large else _ERRORS.get(error.code(), VaeError)
    return kind(
        error.code(),
        message,
        reason=trailers.get("vae-error-reason", ""),
        field=trailers.get("vae-error-field", ""),
        retry_after_s=int(pushback_ms) / 1000 if pushback_ms else None,
    )
