"""The models of the Open Inference Protocol: encoder, decoder and prior, their tensors, and what runs them."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple

from protos.inference import inference_pb2 as pb
from serving.config import ServingConfig
from serving.gateway.inference_parameters import Parameters
from serving.gateway.inference_tensors import FIELD, Array, TensorSpec
from serving.gateway.operations import ObservationDraw, Operations, choose_seed
from serving.gateway.statistics import Statistics
from serving.likelihoods import Float32
from serving.tickets import GENERATION, HIGHEST, LOWEST, Ticket

VERSION: Final = "1"
"""Clients read versions as numbers; which weights it is says the digest."""

PLATFORM: Final = "onnxruntime_onnx"
BACKEND: Final = "onnxruntime"

_MAX_INT32: Final = 2**31 - 1
_MICROSECONDS: Final = 1e6
_TYPES: Final = {"FP32": pb.TYPE_FP32, "UINT64": pb.TYPE_UINT64}

_SEED: Final = "int64 or uint64: seed of the draw; chosen by the service and returned if absent"
_TEMPERATURE: Final = "double in [0, 10]: standard deviation of the latents; 1 by default"
_OBSERVATION: Final = "string: mean (default) of p(x | z), or sample: a draw from it"
_DRAWN: Final = {
    "bernoulli": "zeros and ones",
    "gaussian": "a normal value, clipped to [0, 1]",
    "categorical": "one of the equally spaced levels of intensity in [0, 1]",
}
_ROW: Final = (
    "numbers of rows in the endless sequence of draws that the parameter seed means; rows 0 to n - 1 are what "
    "vae.v1.VaeService/Sample returns for n samples of that seed"
)
_FLOATS: Final = ("FP32", "FP16")


class Answer(NamedTuple):
    """What a model returned: outputs by name, and the seed if something was drawn."""

    outputs: dict[str, Float32]
    seed: int | None = None


@dataclass(frozen=True, kw_only=True)
class Model:
    """One model: what goes in, what comes out, what runs it."""

    name: str

    input: TensorSpec
    """Its only input."""

    outputs: tuple[TensorSpec, ...]
    """What `run` returns."""

    run: Callable[[Array, Parameters, Ticket], Awaitable[Answer]]
    """Runs it on rows of the input."""

    graph: Literal["encoder", "decoder"]
    """The graph that it runs."""

    properties: dict[str, str]
    """What clients should know beside shapes and types."""

    priority: int = HIGHEST
    """Priority of its rows, unless the caller steps back."""

    statistics: Statistics = field(default_factory=Statistics)
    """What it did."""

    def metadata(self) -> pb.ModelMetadataResponse:
        """Return its inputs, outputs and properties."""

        def tensor(spec: TensorSpec) -> pb.ModelMetadataResponse.TensorMetadata:
            return pb.ModelMetadataResponse.TensorMetadata(
                name=spec.name, datatype=spec.datatypes[0], shape=spec.shape
            )

        return pb.ModelMetadataResponse(
            name=self.name,
            versions=[VERSION],
            platform=PLATFORM,
            inputs=[tensor(self.input)],
            outputs=[tensor(spec) for spec in self.outputs],
            properties=self.properties,
        )

    def config(self, config: ServingConfig, max_rows: int) -> pb.ModelConfig:
        """Return how it is run, with at most `max_rows` in one request."""
        replicas = config.encoder if self.graph == "encoder" else config.decoder
        kind = pb.ModelInstanceGroup.KIND_GPU if config.device == "cuda" else pb.ModelInstanceGroup.KIND_CPU
        return pb.ModelConfig(
            name=self.name,
            platform=PLATFORM,
            backend=BACKEND,
            max_batch_size=min(max_rows, _MAX_INT32),
            input=[
                pb.ModelInput(
                    name=self.input.name, data_type=_TYPES[self.input.datatypes[0]], dims=self.input.row_shape
                )
            ],
            output=[
                pb.ModelOutput(name=spec.name, data_type=_TYPES[spec.datatypes[0]], dims=spec.row_shape)
                for spec in self.outputs
            ],
            instance_group=[
                pb.ModelInstanceGroup(
                    name=self.graph,
                    count=max(1, replicas.min_replicas) if config.engine == "ray" else 1,
                    kind=kind,
                )
            ],
            dynamic_batching=pb.ModelDynamicBatching(
                max_queue_delay_microseconds=round(config.batching.max_gather_s * _MICROSECONDS),
                priority_levels=LOWEST,
                default_priority_level=self.priority,
            ),
            parameters={key: pb.ModelParameter(string_value=value) for key, value in self.properties.items()},
        )


def models(operations: Operations) -> dict[str, Model]:
    """Return the three models by name, in alphabetical order."""
    manifest = operations.manifest
    data_shape, latent_shape = manifest.data_shape, (manifest.latent_dim,)

    async def encode(rows: Array, _parameters: Parameters, ticket: Ticket) -> Answer:
        posterior = await operations.encode(rows, ticket=ticket, field=FIELD)
        return Answer({"mean": posterior.mean, "log_var": posterior.log_var})

    async def decode(rows: Array, parameters: Parameters, ticket: Ticket) -> Answer:
        seed = _seed(parameters, ticket) if parameters.observes else None
        draw = None if seed is None else ObservationDraw(seed)
        values = await operations.decode(rows, draw=draw, ticket=ticket, field=FIELD)
        return Answer({"reconstruction": values}, seed)

    async def draw(rows: Array, parameters: Parameters, ticket: Ticket) -> Answer:
        seed = _seed(parameters, ticket)
        samples = await operations.sample_rows(
            rows.reshape(-1),
            seed=seed,
            temperature=parameters.temperature,
            observe=parameters.observes,
            ticket=ticket,
            field=f"{FIELD}.shape",
        )
        return Answer({"samples": samples.observations}, seed)

    common = {"model_name": manifest.name, "model_digest": manifest.version}
    observed = {
        "likelihood": manifest.likelihood,
        "parameter.observation": f"{_OBSERVATION}, which is {_DRAWN[manifest.likelihood]}",
    }
    return {
        "decoder": Model(
            name="decoder",
            input=TensorSpec("latents", latent_shape, _FLOATS),
            outputs=(TensorSpec("reconstruction", data_shape, (*_FLOATS, "UINT8")),),
            run=decode,
            graph="decoder",
            properties={
                **common,
                **observed,
                "input.latents": "FP32 or FP16",
                "parameter.output_datatype": "string: FP32 (default), FP16, or UINT8 in 255ths",
                "parameter.seed": _SEED,
            },
        ),
        "encoder": Model(
            name="encoder",
            input=TensorSpec("data", data_shape, (*_FLOATS, "UINT8")),
            outputs=(TensorSpec("mean", latent_shape, _FLOATS), TensorSpec("log_var", latent_shape, _FLOATS)),
            run=encode,
            graph="encoder",
            properties={
                **common,
                "input.data": "FP32 or FP16 in [0, 1], or UINT8 in 255ths",
                "parameter.output_datatype": "string: FP32 (default) or FP16",
            },
        ),
        "prior": Model(
            name="prior",
            input=TensorSpec("row", (1,), ("UINT64", "INT64")),
            outputs=(TensorSpec("samples", data_shape, (*_FLOATS, "UINT8")),),
            run=draw,
            graph="decoder",
            priority=GENERATION,
            properties={
                **common,
                **observed,
                "input.row": f"UINT64, or INT64 not below 0: {_ROW}",
                "parameter.output_datatype": "string: FP32 (default), FP16, or UINT8 in 255ths",
                "parameter.seed": _SEED,
                "parameter.temperature": _TEMPERATURE,
            },
        ),
    }


def _seed(parameters: Parameters, ticket: Ticket) -> int:
    """Return the caller's seed, or one of ours."""
    ticket.seed = seed = choose_seed() if parameters.seed is None else parameters.seed
    return seed
