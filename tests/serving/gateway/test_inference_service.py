"""The Open Inference Protocol over the wire: the same bytes as the typed API, and each way to be wrong."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from importlib import metadata
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.message import Message
from numpy.typing import NDArray

from protos.inference import inference_pb2 as pb
from protos.vae.v1 import vae_pb2
from serving import noise
from serving.bundle import Bundle
from serving.client import AsyncVaeClient
from serving.config import ServingConfig
from serving.engine.protocol import Rows
from serving.gateway import inference_service
from serving.gateway.server import GatewayServer
from tests.serving.harness import PuppetEngine, call, eventually, serving_with, settings, trailers, wire
from tests.serving.inference_harness import DATATYPES, GOOD, METHODS, SERVICE, ask, counts, infer, refused, request


@pytest.fixture
async def channel(service: GatewayServer) -> AsyncIterator[grpc.aio.Channel]:
    """Return a channel to the service."""
    async with wire(service.port) as connected:
        yield connected


async def test_the_server_says_what_it_is(channel: grpc.aio.Channel) -> None:
    """It is alive, ready, has the version of the package, and claims no extension that it does not have."""
    assert (await ask(channel, "ServerLive", pb.ServerLiveRequest())).live
    assert (await ask(channel, "ServerReady", pb.ServerReadyRequest())).ready
    server = await ask(channel, "ServerMetadata", pb.ServerMetadataRequest())
    assert (server.name, server.version) == ("vae-serving", metadata.version("vae-serving"))
    expected = ["binary_tensor_data", "model_configuration", "parameters", "schedule_policy", "statistics"]
    assert list(server.extensions) == expected


async def test_every_method_of_the_proto_is_served(channel: grpc.aio.Channel) -> None:
    """None is UNIMPLEMENTED, but the two that an operator must enable, which say so."""
    assert inference_service.NAME == SERVICE
    missing = set()
    for method in METHODS:
        multi: Any = channel.unary_unary(f"/{SERVICE}/{method}")
        try:
            await multi(b"", timeout=20)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                missing.add((method, trailers(error)["vae-error-reason"]))
    disabled = {"RepositoryModelLoad", "RepositoryModelUnload"}
    assert missing == {(method, "METHOD_DISABLED") for method in disabled}
    assert disabled < set(METHODS)


@pytest.mark.parametrize(
    ("name", "version", "expected"),
    [
        ("encoder", "", True),
        ("decoder", "1", True),
        ("prior", "", True),
        ("encoder", "2", False),
        ("resnet", "", False),
        ("", "", False),
    ],
)
async def test_a_model_is_ready_if_it_exists(
    channel: grpc.aio.Channel,
    name: str,
    version: str,
    expected: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    """A model or version that does not exist is not ready, which is no error."""
    answer = await ask(channel, "ModelReady", pb.ModelReadyRequest(name=name, version=version))
    assert answer.ready is expected


async def test_nothing_is_ready_while_the_engine_is_not(small: Bundle, config: ServingConfig) -> None:
    """Readiness is that of the graphs: false for server and models, and the index says why."""
    engine = PuppetEngine(small.manifest)
    engine.is_ill = True
    async with serving_with(engine, small.manifest, config) as server, wire(server.port) as channel:
        assert (await ask(channel, "ServerLive", pb.ServerLiveRequest())).live
        assert not (await ask(channel, "ServerReady", pb.ServerReadyRequest())).ready
        assert not (await ask(channel, "ModelReady", pb.ModelReadyRequest(name="encoder"))).ready
        index = await ask(channel, "RepositoryIndex", pb.RepositoryIndexRequest())
        assert {(model.state, model.reason) for model in index.models} == {
            ("UNAVAILABLE", "the service is not ready")
        }
        assert not (await ask(channel, "RepositoryIndex", pb.RepositoryIndexRequest(ready=True))).models


@pytest.mark.parametrize(
    ("name", "inputs", "outputs"),
    [
        ("encoder", [("data", "FP32", [-1, 1, 4, 4])], [("mean", "FP32", [-1, 2]), ("log_var", "FP32", [-1, 2])]),
        ("decoder", [("latents", "FP32", [-1, 2])], [("reconstruction", "FP32", [-1, 1, 4, 4])]),
        ("prior", [("row", "UINT64", [-1, 1])], [("samples", "FP32", [-1, 1, 4, 4])]),
    ],
)
async def test_metadata_and_config_describe_a_model(
    channel: grpc.aio.Channel,
    small: Bundle,
    name: str,
    inputs: list[tuple[str, str, list[int]]],
    outputs: list[tuple[str, str, list[int]]],
) -> None:
    """Both name the same tensors; the metadata has any number of rows in front, the configuration does not."""

    def described(tensors: Any) -> list[tuple[str, str, list[int]]]:  # noqa: ANN401 - of two messages
        return [(tensor.name, tensor.datatype, list(tensor.shape)) for tensor in tensors]

    def configured(tensors: Any) -> list[tuple[str, str, list[int]]]:  # noqa: ANN401 - as above
        return [
            (tensor.name, pb.DataType.Name(tensor.data_type).removeprefix("TYPE_"), [-1, *tensor.dims])
            for tensor in tensors
        ]

    found = await ask(channel, "ModelMetadata", pb.ModelMetadataRequest(name=name))
    assert (found.name, list(found.versions), found.platform) == (name, ["1"], "onnxruntime_onnx")
    assert (described(found.inputs), described(found.outputs)) == (inputs, outputs)
    assert found.properties["model_digest"] == small.manifest.version
    config = (await ask(channel, "ModelConfig", pb.ModelConfigRequest(name=name, version="1"))).config
    assert (config.name, config.platform, config.backend) == (name, "onnxruntime_onnx", "onnxruntime")
    assert (configured(config.input), configured(config.output)) == (inputs, outputs)
    assert (config.max_batch_size, config.dynamic_batching.priority_levels) == (4096, 3)
    assert config.dynamic_batching.default_priority_level == (2 if name == "prior" else 1)
    assert [(group.count, group.kind) for group in config.instance_group] == [(1, pb.ModelInstanceGroup.KIND_CPU)]
    assert {key: value.string_value for key, value in config.parameters.items()} == dict(found.properties)


async def test_metadata_says_how_the_prior_is_asked(channel: grpc.aio.Channel) -> None:
    """Who knows only the protocol learns of rows, seed, temperature and observation."""
    found = await ask(channel, "ModelMetadata", pb.ModelMetadataRequest(name="prior"))
    assert "Sample" in found.properties["input.row"]
    for name in ("seed", "temperature", "observation", "output_datatype"):
        assert found.properties[f"parameter.{name}"]


@pytest.mark.parametrize("method", ["ModelMetadata", "ModelConfig", "ModelStatistics", "ModelInfer"])
@pytest.mark.parametrize(
    ("name", "version", "text"),
    [
        ("resnet", "", "Request for unknown model: 'resnet' is not found"),
        ("encoder", "2", "Request for unknown model: 'encoder' version 2 is not found"),
        ("encoder", "v1", "Request for unknown model: 'encoder' version v1 is not found"),
        ("m" * 1000, "", f"Request for unknown model: '{'m' * 64}' is not found"),
    ],
)
async def test_a_model_that_does_not_exist_is_not_found(
    channel: grpc.aio.Channel, method: str, name: str, version: str, text: str
) -> None:
    """The code and the text are Triton's, which clients match on."""
    if method == "ModelInfer":
        message: Message = pb.ModelInferRequest(model_name=name, model_version=version)
    else:
        message = getattr(pb, f"{method}Request")(name=name, version=version)
    error = await refused(channel, method, message)
    assert (error.code(), error.details()) == (grpc.StatusCode.NOT_FOUND, text)
    assert trailers(error)["vae-error-reason"] == "UNKNOWN_MODEL"


async def test_the_encoder_is_encode(channel: grpc.aio.Channel, client: AsyncVaeClient, seed: int) -> None:
    """Floats and 255ths, raw, give the bytes of Encode; halves give those of the same numbers as floats."""
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 1, 4, 4), dtype=np.uint8)
    halves = (pixels / np.float32(255)).astype(np.float16)
    pairs: list[tuple[Rows, Rows]] = [
        (pixels, pixels),
        (pixels / np.float32(255), pixels),
        (halves, halves.astype(np.float32)),
    ]
    for rows, same in pairs:
        expected = await client.encode(same)
        answer = await infer(channel, request("encoder", rows))
        assert [(output.name, output.datatype, list(output.shape)) for output in answer.outputs] == [
            ("mean", "FP32", [5, 2]),
            ("log_var", "FP32", [5, 2]),
        ]
        assert list(answer.raw_output_contents) == [expected.mean.tobytes(), expected.log_var.tobytes()]


async def test_the_decoder_is_decode(channel: grpc.aio.Channel, client: AsyncVaeClient, seed: int) -> None:
    """Means and observations have the bytes of Decode, in each type of output."""
    latents = np.random.default_rng(seed).standard_normal((5, 2)).astype(np.float32)
    for observation in ("mean", "sample"):
        for output_type in ("float32", "float16", "uint8"):
            options: Any = {"observation": observation, "output_type": output_type}
            expected = await client.decode(latents, seed=seed, **options)
            parameters: Any = {"observation": observation, "output_datatype": DATATYPES[output_type], "seed": seed}
            answer = await infer(channel, request("decoder", latents, **parameters))
            assert answer.outputs[0].datatype == DATATYPES[output_type]
            assert answer.raw_output_contents[0] == expected.reconstruction.tobytes()
            assert answer.parameters["seed"].uint64_param == (seed if observation == "sample" else 0)


@pytest.mark.parametrize("observation", ["mean", "sample"])
async def test_the_prior_is_sample(
    channel: grpc.aio.Channel,
    client: AsyncVaeClient,
    seed: int,
    observation: Any,  # noqa: ANN401 - a literal
) -> None:
    """Rows of a seed have the bytes of Sample: contiguous, shuffled, signed, repeated, far out, one by one."""
    sampled = await client.sample(8, seed=seed, first_row=3, temperature=0.5, observation=observation)
    options: Any = {"seed": seed, "temperature": 0.5, "observation": observation}
    for order in (np.arange(8), np.array([5, 0, 7, 2, 2]), np.array([6])):
        for dtype in (np.uint64, np.int64):
            rows = (order + 3).astype(dtype)[:, None]
            answer = await infer(channel, request("prior", rows, **options))
            assert answer.raw_output_contents[0] == sampled.samples[order].tobytes()
            assert list(answer.outputs[0].shape) == [len(order), 1, 4, 4]
            assert answer.parameters["seed"].uint64_param == seed
    far = await infer(channel, request("prior", np.array([[2**64 - 1]], np.uint64), **options, priority=3))
    z = noise.normal_at(np.full(1, seed, np.uint64), np.full(1, 2**64 - 1, np.uint64), 2) * np.float32(0.5)
    if observation == "mean":
        assert far.raw_output_contents[0] == (await client.decode(z)).reconstruction.tobytes()


async def test_a_seed_is_chosen_and_returned(channel: grpc.aio.Channel) -> None:
    """Without a seed two draws differ, and the seed that comes back repeats its draw."""
    first, second = [await infer(channel, request("prior")) for _ in range(2)]
    assert first.raw_output_contents[0] != second.raw_output_contents[0]
    again = await infer(channel, request("prior", seed=first.parameters["seed"]))
    assert again.raw_output_contents[0] == first.raw_output_contents[0]


async def test_every_seed_of_64_bits_is_a_seed(channel: grpc.aio.Channel, client: AsyncVaeClient) -> None:
    """Zero and the largest are seeds, also as the unsigned parameter, and whole numbers are temperatures."""
    for seed in (0, 2**64 - 1):
        expected = await client.sample(2, seed=seed, temperature=2.0)
        answer = await infer(channel, request("prior", seed=pb.InferParameter(uint64_param=seed), temperature=2))
        assert answer.raw_output_contents[0] == expected.samples.tobytes()


async def test_an_answer_says_whose_it_is(channel: grpc.aio.Channel, small: Bundle) -> None:
    """Id, model, version and the digest of the weights come back; nothing was drawn, so there is no seed."""
    message = request("encoder")
    message.id, message.model_version = "a/b \N{SNOWMAN}", "1"
    answer = await infer(channel, message)
    assert (answer.id, answer.model_name, answer.model_version) == (message.id, "encoder", "1")
    assert {key: value.string_param for key, value in answer.parameters.items()} == {
        "model_digest": small.manifest.version
    }


async def test_outputs_come_as_asked_for(channel: grpc.aio.Channel) -> None:
    """A subset, in the caller's order; all of them without a wish."""
    whole = await infer(channel, request("encoder"))
    turned = await infer(channel, request("encoder", outputs=("log_var", "mean")))
    assert [output.name for output in turned.outputs] == ["log_var", "mean"]
    assert list(turned.raw_output_contents) == list(whole.raw_output_contents)[::-1]
    one = await infer(channel, request("encoder", outputs=("log_var",), output_datatype="FP16"))
    half = np.frombuffer(whole.raw_output_contents[1], np.float32).astype(np.float16)
    assert list(one.raw_output_contents) == [half.tobytes()]


@pytest.mark.parametrize(
    ("model", "contents", "datatype"),
    [
        ("encoder", {"fp32_contents": [0.25] * 16}, "FP32"),
        ("encoder", {"uint_contents": range(240, 256)}, "UINT8"),
        ("decoder", {"fp32_contents": [-1.5, 2.0]}, "FP32"),
        ("prior", {"uint64_contents": [2**63]}, "UINT64"),
        ("prior", {"int64_contents": [7]}, "INT64"),
    ],
)
async def test_typed_contents_are_raw_contents(
    channel: grpc.aio.Channel, model: str, contents: dict[str, Any], datatype: str
) -> None:
    """Numbers in the field of their type mean what their bytes mean; the answer is raw in any case."""
    dtype = next(np.dtype(name) for name, own in DATATYPES.items() if own == datatype)
    values = np.array(list(*contents.values()), dtype).reshape(1, *GOOD[model].shape[1:])
    message = request(model, values, seed=1)
    raw = await infer(channel, message)
    del message.raw_input_contents[:]
    message.inputs[0].contents.CopyFrom(pb.InferTensorContents(**contents))
    typed = await infer(channel, message)
    assert typed == raw
    assert len(typed.raw_output_contents) == len(typed.outputs) > 0


async def test_parameters_of_triton_are_tolerated(channel: grpc.aio.Channel) -> None:
    """What tritonclient and perf_analyzer send beside the tensors changes nothing."""
    plain = await infer(channel, request("encoder"))
    message = request(
        "encoder",
        sequence_id="s",
        sequence_start=True,
        sequence_end=False,
        binary_data_output=True,
        headers="x",
        triton_enable_empty_final_response=True,
        priority=pb.InferParameter(uint64_param=2**64 - 1),
        timeout=0,
        unknown=1.5,
    )
    message.inputs[0].parameters["binary_data_size"].int64_param = 128
    message.outputs.add(name="mean").parameters["binary_data"].bool_param = True
    message.outputs.add(name="log_var")
    assert await infer(channel, message) == plain


Change = Callable[[pb.ModelInferRequest], object]


def _tensor(**fields: Any) -> Change:  # noqa: ANN401 - fields of a message
    """Return what replaces fields of the first input."""

    def change(message: pb.ModelInferRequest) -> None:
        for name, value in fields.items():
            message.inputs[0].ClearField(name)  # type: ignore[arg-type]  # a name of a field
            message.inputs[0].MergeFrom(pb.ModelInferRequest.InferInputTensor(**{name: value}))

    return change


def _typed(**contents: Any) -> Change:  # noqa: ANN401 - numbers
    """Return what replaces raw contents by typed ones."""

    def change(message: pb.ModelInferRequest) -> None:
        message.ClearField("raw_input_contents")
        message.inputs[0].contents.CopyFrom(pb.InferTensorContents(**contents))

    return change


def _set(name: str, **value: Any) -> Change:  # noqa: ANN401 - a value of a parameter
    return lambda message: message.parameters[name].CopyFrom(pb.InferParameter(**value))


def _raw(*contents: bytes) -> Change:
    def change(message: pb.ModelInferRequest) -> None:
        message.ClearField("raw_input_contents")
        message.raw_input_contents.extend(contents)

    return change


def _output(name: str, **parameters: pb.InferParameter) -> Change:
    def change(message: pb.ModelInferRequest) -> None:
        output = message.outputs.add(name=name)
        for key, value in parameters.items():
            output.parameters[key].CopyFrom(value)

    return change


def _both(*changes: Change) -> Change:
    def change(message: pb.ModelInferRequest) -> None:
        for one in changes:
            one(message)

    return change


def _rows(values: NDArray[Any]) -> Change:
    tensor = _tensor(shape=list(values.shape), datatype=DATATYPES[values.dtype.name])
    return _both(tensor, _raw(values.tobytes()))


NAN = np.full((2, 1, 4, 4), np.nan, np.float32)
FLOATS = np.full((2, 1, 4, 4), 0.5, np.float32)
REGION = pb.InferParameter(string_param="region")
EMPTY = pb.InferTensorContents()
WRONG: list[tuple[str, Change, str, str]] = [
    ("encoder", lambda m: m.ClearField("inputs"), "UNKNOWN_TENSOR", "inputs"),
    ("encoder", _tensor(name="image"), "UNKNOWN_TENSOR", "inputs"),
    ("encoder", lambda m: m.inputs.append(m.inputs[0]), "UNKNOWN_TENSOR", "inputs[1].name"),
    ("encoder", lambda m: m.inputs.add(name="mask"), "UNKNOWN_TENSOR", "inputs[1].name"),
    ("encoder", lambda m: m.inputs.insert(0, m.inputs.add(name="mask")), "UNKNOWN_TENSOR", "inputs[0].name"),
    ("encoder", _tensor(parameters={"shared_memory_region": REGION}), "MIXED_CONTENTS",
     "inputs[0].parameters.shared_memory_region"),
    ("encoder", _tensor(datatype=""), "UNSUPPORTED_TYPE", "inputs[0].datatype"),
    ("encoder", _tensor(datatype="FP64"), "UNSUPPORTED_TYPE", "inputs[0].datatype"),
    ("encoder", _tensor(datatype="BYTES"), "UNSUPPORTED_TYPE", "inputs[0].datatype"),
    ("encoder", _tensor(datatype="fp32"), "UNSUPPORTED_TYPE", "inputs[0].datatype"),
    ("decoder", _tensor(datatype="UINT8"), "UNSUPPORTED_TYPE", "inputs[0].datatype"),
    ("prior", _tensor(datatype="FP32"), "UNSUPPORTED_TYPE", "inputs[0].datatype"),
    ("encoder", _tensor(shape=[]), "SHAPE_MISMATCH", "inputs[0].shape"),
    ("encoder", _tensor(shape=[2, 16]), "SHAPE_MISMATCH", "inputs[0].shape"),
    ("encoder", _tensor(shape=[1, 4, 4]), "SHAPE_MISMATCH", "inputs[0].shape"),
    ("encoder", _tensor(shape=[2, 1, 4, 4, 1]), "SHAPE_MISMATCH", "inputs[0].shape"),
    ("encoder", _tensor(shape=[2, 1, 4, 5]), "SHAPE_MISMATCH", "inputs[0].shape"),
    ("encoder", _tensor(shape=[1] * 100_000), "SHAPE_MISMATCH", "inputs[0].shape"),
    ("decoder", _tensor(shape=[2, 3]), "SHAPE_MISMATCH", "inputs[0].shape"),
    ("prior", _tensor(shape=[2]), "SHAPE_MISMATCH", "inputs[0].shape"),
    ("prior", _tensor(shape=[1, 2]), "SHAPE_MISMATCH", "inputs[0].shape"),
    ("encoder", _tensor(shape=[0, 1, 4, 4]), "OUT_OF_RANGE", "inputs[0].shape"),
    ("encoder", _tensor(shape=[-1, 1, 4, 4]), "OUT_OF_RANGE", "inputs[0].shape"),
    ("encoder", _tensor(shape=[4097, 1, 4, 4]), "TOO_MANY_ROWS", "inputs[0].shape"),
    ("encoder", _tensor(shape=[2**62, 1, 4, 4]), "TOO_MANY_ROWS", "inputs[0].shape"),
    ("prior", _tensor(shape=[2**63 - 1, 1]), "TOO_MANY_ROWS", "inputs[0].shape"),
    ("encoder", _tensor(shape=[3, 1, 4, 4]), "SIZE_MISMATCH", "raw_input_contents[0]"),
    ("encoder", _raw(b""), "SIZE_MISMATCH", "raw_input_contents[0]"),
    ("encoder", _raw(FLOATS.tobytes()[:-1]), "SIZE_MISMATCH", "raw_input_contents[0]"),
    ("encoder", _raw(FLOATS.tobytes() + b"x"), "SIZE_MISMATCH", "raw_input_contents[0]"),
    ("encoder", _raw(FLOATS.tobytes(), b""), "MIXED_CONTENTS", "raw_input_contents[1]"),
    ("encoder", _tensor(contents=pb.InferTensorContents(fp32_contents=[0.5])), "MIXED_CONTENTS",
     "inputs[0].contents"),
    ("encoder", _tensor(contents=EMPTY), "MIXED_CONTENTS", "inputs[0].contents"),
    ("encoder", _raw(), "MISSING_FIELD", "inputs[0]"),
    ("encoder", _typed(), "MISSING_FIELD", "inputs[0].contents"),
    ("encoder", _typed(fp32_contents=[0.5] * 31), "SIZE_MISMATCH", "inputs[0].contents.fp32_contents"),
    ("encoder", _typed(fp32_contents=[0.5] * 33), "SIZE_MISMATCH", "inputs[0].contents.fp32_contents"),
    ("encoder", _typed(fp64_contents=[0.5] * 32), "MIXED_CONTENTS", "inputs[0].contents.fp64_contents"),
    ("encoder", _typed(fp32_contents=[0.5] * 32, bytes_contents=[b"x"]), "MIXED_CONTENTS",
     "inputs[0].contents.bytes_contents"),
    ("encoder", _both(_tensor(datatype="FP16"), _typed(fp32_contents=[0.5] * 32)), "MIXED_CONTENTS",
     "inputs[0].contents.fp32_contents"),
    ("encoder", _both(_tensor(datatype="UINT8"), _typed(uint_contents=[256] * 32)), "OUT_OF_RANGE",
     "inputs[0].contents.uint_contents"),
    ("encoder", _rows(NAN), "NOT_FINITE", "inputs[0].data"),
    ("encoder", _rows(NAN.astype(np.float16)), "NOT_FINITE", "inputs[0].data"),
    ("encoder", _rows(FLOATS * 3), "OUT_OF_RANGE", "inputs[0].data"),
    ("encoder", _rows(-FLOATS), "OUT_OF_RANGE", "inputs[0].data"),
    ("decoder", _rows(np.full((2, 2), np.inf, np.float32)), "NOT_FINITE", "inputs[0].data"),
    ("prior", _rows(np.array([[3], [-1]], np.int64)), "OUT_OF_RANGE", "inputs[0].data"),
    ("encoder", _output("median"), "UNKNOWN_TENSOR", "outputs[0].name"),
    ("encoder", _output(""), "UNKNOWN_TENSOR", "outputs[0].name"),
    ("decoder", _output("logits"), "UNKNOWN_TENSOR", "outputs[0].name"),
    ("encoder", _both(_output("mean"), _output("mean")), "UNKNOWN_TENSOR", "outputs[1].name"),
    ("encoder", _output("mean", shared_memory_region=REGION), "MIXED_CONTENTS",
     "outputs[0].parameters.shared_memory_region"),
    ("encoder", _output("mean", classification=pb.InferParameter(int64_param=3)), "UNSUPPORTED_TYPE",
     "outputs[0].parameters.classification"),
    ("prior", _set("seed", string_param="1"), "UNSUPPORTED_TYPE", "parameters.seed"),
    ("prior", _set("seed", double_param=1.0), "UNSUPPORTED_TYPE", "parameters.seed"),
    ("prior", _set("seed"), "UNSUPPORTED_TYPE", "parameters.seed"),
    ("prior", _set("seed", int64_param=-1), "OUT_OF_RANGE", "parameters.seed"),
    ("prior", _set("temperature", double_param=-0.1), "OUT_OF_RANGE", "parameters.temperature"),
    ("prior", _set("temperature", double_param=float("nan")), "OUT_OF_RANGE", "parameters.temperature"),
    ("prior", _set("temperature", int64_param=11), "OUT_OF_RANGE", "parameters.temperature"),
    ("prior", _set("temperature", string_param="1"), "UNSUPPORTED_TYPE", "parameters.temperature"),
    ("prior", _set("observation", string_param="mode"), "OUT_OF_RANGE", "parameters.observation"),
    ("decoder", _set("observation", bool_param=True), "UNSUPPORTED_TYPE", "parameters.observation"),
    ("decoder", _set("output_datatype", string_param="FP64"), "OUT_OF_RANGE", "parameters.output_datatype"),
    ("encoder", _set("output_datatype", string_param="UINT8"), "OUT_OF_RANGE", "parameters.output_datatype"),
    ("encoder", _set("priority", int64_param=-1), "OUT_OF_RANGE", "parameters.priority"),
    ("encoder", _set("priority", string_param="high"), "UNSUPPORTED_TYPE", "parameters.priority"),
    ("encoder", _set("timeout", int64_param=-1), "OUT_OF_RANGE", "parameters.timeout"),
    ("encoder", _set("timeout", bool_param=True), "UNSUPPORTED_TYPE", "parameters.timeout"),
]  # fmt: skip


async def test_each_way_to_be_wrong_has_its_reason_and_field(channel: grpc.aio.Channel) -> None:
    """Bad input of every kind is INVALID_ARGUMENT with the right reason and field, and hurts nobody else."""
    wrong = []
    for model, change, reason, field in WRONG:
        message = request(model)
        change(message)
        error = await refused(channel, "ModelInfer", message)
        found = trailers(error)
        actual = (error.code(), found.get("vae-error-reason"), found.get("vae-error-field"))
        if actual != (grpc.StatusCode.INVALID_ARGUMENT, reason, field) or len(str(error.details())) > 512:
            wrong.append(((reason, field), actual, error.details()))
    assert not wrong
    assert (await infer(channel, request("encoder"))).outputs


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            _tensor(name="image"),
            (
                "inputs: expected 1 inputs but got 1 inputs for model 'encoder'. Got input(s) ['image'], "
                "but missing required input(s) ['data']."
            ),
        ),
        (_output("median"), "outputs[0].name: unexpected inference output 'median' for model 'encoder'"),
        (
            _tensor(contents=EMPTY),
            (
                "inputs[0].contents: contents field must not be specified when using raw_input_contents "
                "for 'data' for model 'encoder'"
            ),
        ),
        (_tensor(shape=[1, 9]), "inputs[0].shape: expected shape [-1,1,4,4], got (1, 9)"),
    ],
)
async def test_errors_keep_the_words_of_triton(channel: grpc.aio.Channel, change: Change, text: str) -> None:
    """Clients that match on Triton's text find it after the path of the field."""
    message = request("encoder")
    change(message)
    assert (await refused(channel, "ModelInfer", message)).details() == text


async def test_a_long_name_is_cut(channel: grpc.aio.Channel) -> None:
    """A stranger's megabyte does not come back."""
    message = request("encoder")
    message.inputs[0].name = "x" * 2**20
    error = await refused(channel, "ModelInfer", message)
    assert len(str(error.details())) < 250


async def test_bytes_that_do_not_parse_are_refused(channel: grpc.aio.Channel) -> None:
    """Garbage is INVALID_ARGUMENT in every method."""
    for method in METHODS:
        multi: Any = channel.unary_unary(f"/{SERVICE}/{method}")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await multi(b"\xff\xff\xff", timeout=20)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, method
        assert trailers(caught.value)["vae-error-reason"] == "MALFORMED_MESSAGE"


async def test_a_timeout_shortens_the_deadline_alone(small: Bundle, config: ServingConfig) -> None:
    """After `timeout` microseconds the call ends and its rows are gone; it never outlives the gRPC deadline."""
    engine = PuppetEngine(small.manifest)
    engine.is_open.clear()
    async with serving_with(engine, small.manifest, config) as server, wire(server.port) as channel:
        error = await refused(channel, "ModelInfer", request("encoder", timeout=50_000))
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert trailers(error)["vae-error-reason"] == "DEADLINE_EXCEEDED"
        await eventually(lambda: server.operations.encoder.num_rows == 0)
        with pytest.raises(grpc.aio.AioRpcError, match=r"(?i)deadline"):
            await infer(channel, request("encoder", timeout=60_000_000), timeout=0.1)
        engine.is_open.set()
        assert (await infer(channel, request("encoder", timeout=10_000_000))).outputs


async def test_a_priority_lets_others_ahead(small: Bundle, config: ServingConfig) -> None:
    """Above half of the queue the lowest priority is shed, then the prior, and last what a caller has sent."""
    engine = PuppetEngine(small.manifest)
    engine.is_open.clear()
    bounded = config.override(["batching.max_queue_rows=10"])
    async with serving_with(engine, small.manifest, bounded) as server, wire(server.port) as channel:
        sent = [asyncio.ensure_future(infer(channel, request("decoder"))) for _ in range(3)]
        await eventually(lambda: server.operations.decoder.num_rows == 6)
        for priority in (3, 7, 2**63 - 1):
            error = await refused(channel, "ModelInfer", request("decoder", priority=priority))
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert int(trailers(error)["grpc-retry-pushback-ms"]) > 0
        sent.append(asyncio.ensure_future(infer(channel, request("prior"))))
        await eventually(lambda: server.operations.decoder.num_rows == 8)
        error = await refused(channel, "ModelInfer", request("prior", priority=1))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        sent.append(asyncio.ensure_future(infer(channel, request("decoder", priority=1))))
        await eventually(lambda: server.operations.decoder.num_rows == 10)
        engine.is_open.set()
        assert [len(answer.outputs) for answer in await asyncio.gather(*sent)] == [1] * 5


async def test_statistics_count_requests_rows_and_runs(channel: grpc.aio.Channel) -> None:
    """Requests in the durations, rows in inference_count, runs in execution_count; of each model its own."""
    rows = np.zeros((7, 2), np.float32)
    for _ in range(3):
        await infer(channel, request("decoder", rows))
    await refused(channel, "ModelInfer", request("decoder", outputs=("logits",)))
    found = await counts(channel, "decoder")
    own = found.inference_stats
    assert (found.name, found.version, found.inference_count, found.execution_count) == ("decoder", "1", 21, 3)
    for duration in (own.success, own.compute_input, own.compute_infer, own.compute_output, own.queue):
        assert (duration.count, duration.ns > 0) == (3, True)
    parts = sum(part.ns for part in (own.queue, own.compute_input, own.compute_infer, own.compute_output))
    assert parts <= own.success.ns
    assert (own.fail.count, own.fail.ns > 0) == (1, True)
    assert found.last_inference > 1_700_000_000_000
    assert (await counts(channel, "encoder")).inference_count == 0
    every = await ask(channel, "ModelStatistics", pb.ModelStatisticsRequest())
    assert [model.name for model in every.model_stats] == ["decoder", "encoder", "prior"]


async def test_statistics_count_the_cancelled(small: Bundle, config: ServingConfig) -> None:
    """A caller who leaves is a failed request."""
    engine = PuppetEngine(small.manifest)
    engine.is_open.clear()
    async with serving_with(engine, small.manifest, config) as server, wire(server.port) as channel:
        task = asyncio.ensure_future(infer(channel, request("encoder")))
        await eventually(lambda: server.operations.encoder.num_rows == 2)
        task.cancel()
        await eventually(lambda: server.operations.encoder.num_rows == 0)
        assert (await counts(channel, "encoder")).inference_stats.fail.count == 1


async def test_the_index_lists_the_models(channel: grpc.aio.Channel) -> None:
    """Three models, ready."""
    for is_ready in (False, True):
        index = await ask(channel, "RepositoryIndex", pb.RepositoryIndexRequest(ready=is_ready))
        assert [(model.name, model.version, model.state, model.reason) for model in index.models] == [
            (name, "1", "READY", "") for name in ("decoder", "encoder", "prior")
        ]


@pytest.mark.parametrize("method", ["RepositoryModelLoad", "RepositoryModelUnload"])
async def test_models_are_not_taken_out_unless_enabled(channel: grpc.aio.Channel, method: str) -> None:
    """Load and Unload are UNIMPLEMENTED by default, and say which setting enables them."""
    error = await refused(channel, method, getattr(pb, f"{method}Request")(model_name="encoder"))
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED
    assert trailers(error)["vae-error-reason"] == "METHOD_DISABLED"
    assert "gateway.repository_control" in str(error.details())
    assert (await infer(channel, request("encoder"))).outputs


@contextlib.asynccontextmanager
async def _controllable(small: Bundle, config: ServingConfig) -> AsyncIterator[grpc.aio.Channel]:
    enabled = config.override(["gateway.repository_control=true"])
    engine = PuppetEngine(small.manifest)
    async with serving_with(engine, small.manifest, enabled) as server, wire(server.port) as channel:
        yield channel


async def test_a_model_goes_out_of_service_and_comes_back(small: Bundle, config: ServingConfig) -> None:
    """Unloaded it is not ready, UNAVAILABLE and listed with the reason; the others and the typed API go on."""
    unload, load = (
        getattr(pb, f"RepositoryModel{verb}Request")(model_name="encoder") for verb in ("Unload", "Load")
    )
    unload.parameters["unload_dependents"].bool_param = False
    async with _controllable(small, config) as channel:
        server = await ask(channel, "ServerMetadata", pb.ServerMetadataRequest())
        assert "model_repository" in server.extensions
        for _ in range(2):
            await ask(channel, "RepositoryModelUnload", unload)
        assert not (await ask(channel, "ModelReady", pb.ModelReadyRequest(name="encoder"))).ready
        for method, message in [
            ("ModelInfer", request("encoder")),
            ("ModelMetadata", pb.ModelMetadataRequest(name="encoder")),
            ("ModelConfig", pb.ModelConfigRequest(name="encoder")),
        ]:
            error = await refused(channel, method, message)
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            assert error.details() == "Request for unknown model: 'encoder' has no available versions"
        index = (await ask(channel, "RepositoryIndex", pb.RepositoryIndexRequest())).models
        assert ("encoder", "UNAVAILABLE", "unloaded") in {(own.name, own.state, own.reason) for own in index}
        ready = (await ask(channel, "RepositoryIndex", pb.RepositoryIndexRequest(ready=True))).models
        assert [own.name for own in ready] == ["decoder", "prior"]
        assert (await infer(channel, request("decoder"))).outputs
        tensor = vae_pb2.Tensor(dtype=vae_pb2.DATA_TYPE_UINT8, shape=[1, 1, 4, 4], data=bytes(16))
        assert await call(channel, "Encode", vae_pb2.EncodeRequest(data=tensor))
        for _ in range(2):
            await ask(channel, "RepositoryModelLoad", load)
        assert (await ask(channel, "ModelReady", pb.ModelReadyRequest(name="encoder"))).ready
        assert (await infer(channel, request("encoder"))).outputs


async def test_only_what_exists_is_loaded(small: Bundle, config: ServingConfig) -> None:
    """An unknown model is NOT_FOUND, an override of the configuration or a file is refused."""
    async with _controllable(small, config) as channel:
        for method in ("RepositoryModelLoad", "RepositoryModelUnload"):
            error = await refused(channel, method, getattr(pb, f"{method}Request")(model_name="resnet"))
            assert error.code() is grpc.StatusCode.NOT_FOUND
        load = pb.RepositoryModelLoadRequest(model_name="encoder")
        load.parameters["config"].string_param = "{}"
        error = await refused(channel, "RepositoryModelLoad", load)
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert trailers(error)["vae-error-field"] == "parameters.config"


async def test_the_protocol_can_be_switched_off(small: Bundle, bundle_dir: Any) -> None:  # noqa: ANN401 - a folder
    """Without `gateway.open_inference` there is the typed API alone."""
    engine = PuppetEngine(small.manifest)
    config = settings(bundle_dir, "gateway.open_inference=false")
    async with serving_with(engine, small.manifest, config) as server, wire(server.port) as channel:
        error = await refused(channel, "ServerLive", pb.ServerLiveRequest())
        assert error.code() is grpc.StatusCode.UNIMPLEMENTED
        assert await call(channel, "GetModel", vae_pb2.GetModelRequest())
