"""The typed API, vae.v1.VaeService: message -> arrays -> operation -> message."""

from collections.abc import Awaitable, Callable
from typing import Any, Final, Protocol, TypeVar

from google.protobuf.message import Message

from protos.vae.v1 import vae_pb2 as pb
from serving import noise
from serving.config import LimitsConfig
from serving.engine.protocol import Providers
from serving.errors import EngineUnavailable, MissingField, OutOfRange
from serving.gateway.operations import Float32, Operations, Path, choose_seed
from serving.tensors import check_type, from_message, to_message, to_output

NAME: Final = pb.DESCRIPTOR.services_by_name["VaeService"].full_name

Behaviour = Callable[[Any, float], Awaitable[Message]]

ReconstructionT = TypeVar("ReconstructionT", pb.DecodeResponse, pb.ReconstructResponse)

_PATHS: Final[dict[int, Path]] = {
    pb.INTERPOLATION_UNSPECIFIED: "linear",
    pb.INTERPOLATION_LINEAR: "linear",
    pb.INTERPOLATION_SPHERICAL: "spherical",
}
_OBSERVES: Final[dict[int, bool]] = {
    pb.OBSERVATION_UNSPECIFIED: False,
    pb.OBSERVATION_MEAN: False,
    pb.OBSERVATION_SAMPLE: True,
}
_FLOATS: Final = frozenset({pb.DATA_TYPE_UNSPECIFIED, pb.DATA_TYPE_FLOAT32, pb.DATA_TYPE_FLOAT16})
_OUTPUTS: Final = _FLOATS | {pb.DATA_TYPE_UINT8}


class VaeService:
    """Answers the six methods; each takes the request and the monotonic time at which it expires.

    Args:
        operations: What the service does, on arrays.
        limits: What GetModel states.
    """

    def __init__(self, operations: Operations, limits: LimitsConfig) -> None:
        self._operations, self._limits = operations, limits
        self._version = operations.manifest.version
        self.providers: Providers | None = None

    async def Encode(self, request: pb.EncodeRequest, expires_at: float) -> pb.EncodeResponse:
        """Return posteriors, and draws from them on request."""
        self._operations.check_version(request.model_version)
        check_type(request.output_type, field="output_type", accept=_FLOATS)
        data = from_message(request.data, field="data")
        self._operations.check_num_latents(len(data), request.num_latents)
        self._operations.check_first_row(request.first_row)
        posterior = await self._operations.encode(data, expires_at=expires_at)
        response = pb.EncodeResponse(
            mean=_message(posterior.mean, request.output_type),
            log_var=_message(posterior.log_var, request.output_type),
            model_version=self._version,
        )
        if request.num_latents:
            seed = _seed(request)
            latents = self._operations.draw_latents(
                posterior, request.num_latents, seed, first_row=request.first_row
            )
            response.latents.CopyFrom(_message(latents, request.output_type))
            response.seed = seed
        return response

    async def Decode(self, request: pb.DecodeRequest, expires_at: float) -> pb.DecodeResponse:
        """Return means of p(x | z), or draws from it."""
        self._operations.check_version(request.model_version)
        observes = _observes(request)
        self._operations.check_first_row(request.first_row)
        latents = from_message(request.latents, field="latents")
        mean = await self._operations.decode(latents, expires_at=expires_at)
        response = pb.DecodeResponse(model_version=self._version)
        return self._reconstructed(response, request, mean, observes=observes)

    async def Sample(self, request: pb.SampleRequest, expires_at: float) -> pb.SampleResponse:
        """Return draws from the prior, decoded."""
        self._operations.check_version(request.model_version)
        observes = _observes(request)
        samples = await self._operations.sample(
            request.num_samples,
            seed=_seed(request),
            first_row=request.first_row,
            temperature=request.temperature if request.HasField("temperature") else 1.0,
            observe=observes,
            expires_at=expires_at,
        )
        return pb.SampleResponse(
            samples=_message(samples.observations, request.output_type),
            latents=to_message(samples.draw.latents()) if request.include_latents else None,
            seed=samples.draw.seed,
            model_version=self._version,
        )

    async def Reconstruct(self, request: pb.ReconstructRequest, expires_at: float) -> pb.ReconstructResponse:
        """Return the decoded posterior means of data."""
        self._operations.check_version(request.model_version)
        observes = _observes(request)
        self._operations.check_first_row(request.first_row)
        data = from_message(request.data, field="data")
        mean = await self._operations.reconstruct(data, expires_at=expires_at)
        response = pb.ReconstructResponse(model_version=self._version)
        return self._reconstructed(response, request, mean, observes=observes)

    async def Interpolate(self, request: pb.InterpolateRequest, expires_at: float) -> pb.InterpolateResponse:
        """Return decoded points between two ends."""
        self._operations.check_version(request.model_version)
        check_type(request.output_type, field="output_type", accept=_OUTPUTS)
        if (path := _PATHS.get(request.interpolation)) is None:
            actual = f"unknown value {request.interpolation}"
            raise OutOfRange("interpolation", expected="LINEAR or SPHERICAL", actual=actual)
        if (kind := request.WhichOneof("endpoints")) is None:
            raise MissingField("endpoints", expected="`data` or `latents`")
        ends: pb.Endpoints = request.data if kind == "data" else request.latents
        means, latents = await self._operations.interpolate(
            from_message(ends.start, field=f"{kind}.start"),
            from_message(ends.end, field=f"{kind}.end"),
            request.num_steps,
            kind=kind,
            path=path,
            expires_at=expires_at,
        )
        return pb.InterpolateResponse(
            observations=_message(means, request.output_type),
            latents=to_message(latents) if request.include_latents else None,
            model_version=self._version,
        )

    async def GetModel(self, _request: pb.GetModelRequest, _expires_at: float) -> pb.GetModelResponse:
        """Return what is known of the model."""
        if self.providers is None:
            raise EngineUnavailable(graph="model")
        manifest, limits = self._operations.manifest, self._limits
        return pb.GetModelResponse(
            name=manifest.name,
            model_version=manifest.version,
            data_shape=manifest.data_shape,
            latent_dim=manifest.latent_dim,
            likelihood=pb.LIKELIHOOD_BERNOULLI,
            prior=manifest.prior,
            noise_algorithm=noise.ALGORITHM,
            dataset=manifest.dataset.name,
            metrics=manifest.metrics,
            limits=pb.Limits(
                max_rows=self._operations.max_rows,
                max_latents_per_row=limits.max_latents_per_row,
                max_request_bytes=limits.max_request_bytes,
                max_deadline_s=limits.max_deadline_s,
            ),
            encoder_provider=self.providers.encoder,
            decoder_provider=self.providers.decoder,
        )

    def _reconstructed(
        self,
        response: ReconstructionT,
        request: pb.DecodeRequest | pb.ReconstructRequest,
        mean: Float32,
        *,
        observes: bool,
    ) -> ReconstructionT:
        """Return the response with means of p(x | z), or with draws and their seed."""
        if observes:
            response.seed = _seed(request)
            mean = self._operations.observe(mean, response.seed, first_row=request.first_row)
        response.reconstruction.CopyFrom(_message(mean, request.output_type))
        return response

    def methods(self) -> dict[str, tuple[type[Message], Behaviour]]:
        """Return every method of the service: its name, the class of its request, its behaviour."""
        return {
            "Encode": (pb.EncodeRequest, self.Encode),
            "Decode": (pb.DecodeRequest, self.Decode),
            "Sample": (pb.SampleRequest, self.Sample),
            "Reconstruct": (pb.ReconstructRequest, self.Reconstruct),
            "Interpolate": (pb.InterpolateRequest, self.Interpolate),
            "GetModel": (pb.GetModelRequest, self.GetModel),
        }


class _Seeded(Protocol):
    """A request with an optional seed."""

    @property
    def seed(self) -> int: ...

    def HasField(self, field_name: Any) -> bool: ...  # noqa: ANN401 - protobuf's own name and type


class _Observing(Protocol):
    """A request that says what to return of p(x | z)."""

    @property
    def observation(self) -> pb.Observation.ValueType: ...

    @property
    def output_type(self) -> pb.DataType.ValueType: ...


def _seed(request: _Seeded) -> int:
    """Return the caller's seed, or one of ours."""
    return request.seed if request.HasField("seed") else choose_seed()


def _observes(request: _Observing) -> bool:
    """Return whether observations are asked for rather than means; refuse what is neither."""
    check_type(request.output_type, field="output_type", accept=_OUTPUTS)
    if (observes := _OBSERVES.get(request.observation)) is None:
        actual = f"unknown value {request.observation}"
        raise OutOfRange("observation", expected="MEAN or SAMPLE", actual=actual)
    return observes


def _message(values: Float32, output_type: int) -> pb.Tensor:
    return to_message(to_output(values, output_type))
