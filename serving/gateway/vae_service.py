"""The typed API, vae.v1.VaeService: message -> arrays -> operation -> message."""

import contextlib
from collections.abc import AsyncGenerator
from typing import Any, Final, Protocol

from protos.vae.v1 import vae_pb2 as pb
from serving import noise
from serving.config import LimitsConfig
from serving.engine.protocol import Providers
from serving.errors import EngineUnavailable, MissingField, OutOfRange
from serving.gateway.calls import Method
from serving.gateway.operations import Bound, ObservationDraw, Operations, Path, choose_seed
from serving.gateway.replies import Reply
from serving.likelihoods import Float32
from serving.tensors import check_type, from_message, to_output
from serving.tickets import GENERATION, Ticket

NAME: Final = pb.DESCRIPTOR.services_by_name["VaeService"].full_name

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
_BOUNDS: Final[dict[int, Bound]] = {
    pb.BOUND_UNSPECIFIED: "elbo",
    pb.BOUND_ELBO: "elbo",
    pb.BOUND_IMPORTANCE_WEIGHTED: "importance-weighted",
}
_LIKELIHOODS: Final = {
    "bernoulli": pb.LIKELIHOOD_BERNOULLI,
    "gaussian": pb.LIKELIHOOD_GAUSSIAN,
    "categorical": pb.LIKELIHOOD_CATEGORICAL,
}
_FLOATS: Final = frozenset({pb.DATA_TYPE_UNSPECIFIED, pb.DATA_TYPE_FLOAT32, pb.DATA_TYPE_FLOAT16})
_OUTPUTS: Final = _FLOATS | {pb.DATA_TYPE_UINT8}


class VaeService:
    """Answers the methods; each takes the request and its ticket.

    Args:
        operations: What the service does, on arrays.
        limits: What GetModel states.
    """

    def __init__(self, operations: Operations, limits: LimitsConfig) -> None:
        self._operations, self._limits = operations, limits
        self._version = operations.manifest.version
        self.providers: Providers | None = None

    async def Encode(self, request: pb.EncodeRequest, ticket: Ticket) -> Reply:
        """Return posteriors, and draws from them on request."""
        self._operations.check_version(request.model_version)
        check_type(request.output_type, field="output_type", accept=_FLOATS)
        data = from_message(request.data, field="data")
        self._operations.check_num_latents(len(data), request.num_latents)
        self._operations.check_first_row(request.first_row)
        posterior = await self._operations.encode(data, ticket=ticket)
        response, latents = pb.EncodeResponse(model_version=self._version), None
        if request.num_latents:
            response.seed = _seed(request, ticket)
            latents = await self._operations.draw_latents(
                posterior, request.num_latents, response.seed, first_row=request.first_row
            )
        drawn = None if latents is None else to_output(latents, request.output_type)
        mean, log_var = (to_output(values, request.output_type) for values in posterior)
        return Reply(response, mean=mean, log_var=log_var, latents=drawn)

    async def Decode(self, request: pb.DecodeRequest, ticket: Ticket) -> Reply:
        """Return means of p(x | z), or draws from it."""
        self._operations.check_version(request.model_version)
        observes = _observes(request)
        self._operations.check_first_row(request.first_row)
        latents = from_message(request.latents, field="latents")
        draw = _draw(request, len(latents), ticket) if observes else None
        values = await self._operations.decode(latents, draw=draw, ticket=ticket)
        response = pb.DecodeResponse(model_version=self._version)
        return _reconstructed(response, values, request.output_type, draw)

    async def Sample(self, request: pb.SampleRequest, ticket: Ticket) -> Reply:
        """Return draws from the prior, decoded."""
        self._operations.check_version(request.model_version)
        observes = _observes(request)
        samples = await self._operations.sample(
            request.num_samples,
            seed=_seed(request, ticket),
            first_row=request.first_row,
            temperature=request.temperature if request.HasField("temperature") else 1.0,
            observe=observes,
            ticket=ticket,
        )
        return Reply(
            pb.SampleResponse(seed=samples.draw.seed, model_version=self._version),
            samples=to_output(samples.observations, request.output_type),
            latents=samples.draw.latents() if request.include_latents else None,
        )

    async def Reconstruct(self, request: pb.ReconstructRequest, ticket: Ticket) -> Reply:
        """Return the decoded posterior means of data, or observations drawn there."""
        self._operations.check_version(request.model_version)
        observes = _observes(request)
        self._operations.check_first_row(request.first_row)
        data = from_message(request.data, field="data")
        draw = _draw(request, len(data), ticket) if observes else None
        values = await self._operations.reconstruct(data, draw=draw, ticket=ticket)
        response = pb.ReconstructResponse(model_version=self._version)
        return _reconstructed(response, values, request.output_type, draw)

    async def Interpolate(self, request: pb.InterpolateRequest, ticket: Ticket) -> Reply:
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
            ticket=ticket,
        )
        return Reply(
            pb.InterpolateResponse(model_version=self._version),
            observations=to_output(means, request.output_type),
            latents=latents if request.include_latents else None,
        )

    async def Score(self, request: pb.ScoreRequest, ticket: Ticket) -> Reply:
        """Return lower bounds on log p(x)."""
        self._operations.check_version(request.model_version)
        if (bound := _BOUNDS.get(request.bound)) is None:
            expected, actual = "ELBO or IMPORTANCE_WEIGHTED", f"unknown value {request.bound}"
            raise OutOfRange("bound", expected=expected, actual=actual)
        seed = _seed(request, ticket)
        scores = await self._operations.score(
            from_message(request.data, field="data"),
            bound=bound,
            num_latents=request.num_latents or 1,
            seed=seed,
            first_row=request.first_row,
            ticket=ticket,
        )
        response = pb.ScoreResponse(seed=seed, model_version=self._version)
        return Reply(response, score=scores.score, log_likelihood=scores.log_likelihood, kl=scores.kl)

    async def SampleStream(self, request: pb.SampleStreamRequest, ticket: Ticket) -> AsyncGenerator[Reply]:
        """Return draws from the prior, decoded, chunk by chunk."""
        self._operations.check_version(request.model_version)
        chunks = self._operations.sample_stream(
            request.num_samples,
            seed=_seed(request, ticket),
            first_row=request.first_row,
            temperature=request.temperature if request.HasField("temperature") else 1.0,
            observe=_observes(request),
            max_chunk_rows=request.max_chunk_rows,
            ticket=ticket,
        )
        async with contextlib.aclosing(chunks):
            async for first_row, (observations, draw) in chunks:
                yield Reply(
                    pb.SampleStreamResponse(first_row=first_row, seed=draw.seed, model_version=self._version),
                    samples=to_output(observations, request.output_type),
                    latents=draw.latents() if request.include_latents else None,
                )

    async def GetModel(self, _request: pb.GetModelRequest, _ticket: Ticket) -> pb.GetModelResponse:
        """Return what is known of the model."""
        if self.providers is None:
            raise EngineUnavailable(graph="model")
        manifest, limits = self._operations.manifest, self._limits
        return pb.GetModelResponse(
            name=manifest.name,
            model_version=manifest.version,
            data_shape=manifest.data_shape,
            latent_dim=manifest.latent_dim,
            likelihood=_LIKELIHOODS[manifest.likelihood],
            num_levels=manifest.num_levels or 0,
            prior=manifest.prior,
            noise_algorithm=noise.ALGORITHM,
            dataset=manifest.dataset.name,
            metrics=manifest.metrics,
            limits=pb.Limits(
                max_rows=self._operations.max_rows,
                max_latents_per_row=limits.max_latents_per_row,
                max_request_bytes=limits.max_request_bytes,
                max_deadline_s=limits.max_deadline_s,
                max_stream_rows=limits.max_stream_rows,
                max_stream_s=limits.max_stream_s,
            ),
            encoder_provider=self.providers.encoder,
            decoder_provider=self.providers.decoder,
        )

    def methods(self) -> dict[str, Method]:
        """Return every method of the service by its name. What is drawn from the prior is shed first."""
        return {
            "Encode": Method(pb.EncodeRequest, self.Encode),
            "Decode": Method(pb.DecodeRequest, self.Decode),
            "Sample": Method(pb.SampleRequest, self.Sample, priority=GENERATION, is_small=True),
            "Reconstruct": Method(pb.ReconstructRequest, self.Reconstruct),
            "Interpolate": Method(pb.InterpolateRequest, self.Interpolate),
            "Score": Method(pb.ScoreRequest, self.Score),
            "SampleStream": Method(
                pb.SampleStreamRequest, server_stream=self.SampleStream, priority=GENERATION, is_small=True
            ),
            "GetModel": Method(pb.GetModelRequest, self.GetModel, is_small=True),
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


def _seed(request: _Seeded, ticket: Ticket) -> int:
    """Return the caller's seed, or one of ours; the ticket tells the log."""
    ticket.seed = seed = request.seed if request.HasField("seed") else choose_seed()
    return seed


def _draw(request: pb.DecodeRequest | pb.ReconstructRequest, num_rows: int, ticket: Ticket) -> ObservationDraw:
    """Return which observations a request means."""
    return ObservationDraw(_seed(request, ticket), (request.first_row, num_rows))


def _reconstructed(
    response: pb.DecodeResponse | pb.ReconstructResponse,
    values: Float32,
    output_type: int,
    draw: ObservationDraw | None,
) -> Reply:
    """Return the response with means of p(x | z), or with draws and their seed."""
    if draw is not None:
        response.seed = draw.seed
    return Reply(response, reconstruction=to_output(values, output_type))


def _observes(request: _Observing) -> bool:
    """Return whether observations are asked for rather than means; refuse what is neither."""
    check_type(request.output_type, field="output_type", accept=_OUTPUTS)
    if (observes := _OBSERVES.get(request.observation)) is None:
        actual = f"unknown value {request.observation}"
        raise OutOfRange("observation", expected="MEAN or SAMPLE", actual=actual)
    return observes
