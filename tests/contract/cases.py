"""The table of bad requests: what is sent, and the code, reason and field that the contract names for it."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import grpc
import numpy as np
from google.protobuf.message import Message

from protos.inference import inference_pb2 as oip
from protos.vae.v1 import vae_pb2 as pb
from serving.tensors import to_message
from tests.bundles import DATA_SHAPE, LATENT_DIM
from tests.contract.conftest import MAX_ROWS

VAE = "vae.v1.VaeService"
OIP = "inference.GRPCInferenceService"
INVALID = grpc.StatusCode.INVALID_ARGUMENT
UNKNOWN_VALUE: Any = 99
Infer = oip.ModelInferRequest
Parameter = oip.InferParameter

UNARY = [
    *(
        f"{VAE}/{name}"
        for name in ("Encode", "Decode", "Sample", "Reconstruct", "Interpolate", "Score", "GetModel")
    ),
    *(
        f"{OIP}/{name}"
        for name in (
            "ServerLive",
            "ServerReady",
            "ModelReady",
            "ServerMetadata",
            "ModelMetadata",
            "ModelInfer",
            "ModelConfig",
            "ModelStatistics",
            "RepositoryIndex",
            "RepositoryModelLoad",
            "RepositoryModelUnload",
        )
    ),
]
STREAMS = [f"{VAE}/SampleStream", f"{OIP}/ModelStreamInfer"]


class Case(NamedTuple):
    """One bad request and what it must end with."""

    method: str
    why: str
    request: Message | bytes
    code: grpc.StatusCode
    reason: str
    field: str = ""


def floats(*shape: int, value: float = 0.5) -> pb.Tensor:
    """Return a tensor of float32."""
    return to_message(np.full(shape, value, np.float32))


def tensor(dtype: int, shape: tuple[int, ...], data: bytes) -> pb.Tensor:
    """Return a tensor as it is told, right or wrong."""
    return pb.Tensor(dtype=dtype, shape=shape, data=data)  # type: ignore[arg-type]  # wrong on purpose


def bad_tensors(row: tuple[int, ...], *, bytes_are_fine: bool) -> Iterator[tuple[str, pb.Tensor, str, str]]:
    """Return what can be wrong with a tensor: why, the tensor, the reason, the part of the field."""
    size = int(np.prod(row))
    one = np.full((1, *row), 0.5, np.float32).tobytes()
    f32, u8 = pb.DATA_TYPE_FLOAT32, pb.DATA_TYPE_UINT8
    yield "absent", pb.Tensor(), "MISSING_FIELD", ""
    yield "no type", tensor(0, (1, *row), one), "UNSUPPORTED_TYPE", ".dtype"
    yield "unknown type", tensor(77, (1, *row), one), "UNSUPPORTED_TYPE", ".dtype"
    yield "negative type", tensor(-1, (1, *row), one), "UNSUPPORTED_TYPE", ".dtype"
    yield "float16", tensor(pb.DATA_TYPE_FLOAT16, (1, *row), bytes(2 * size)), "UNSUPPORTED_TYPE", ".dtype"
    if not bytes_are_fine:
        yield "uint8", tensor(u8, (1, *row), bytes(size)), "UNSUPPORTED_TYPE", ".dtype"
    yield "no shape", tensor(f32, (), one), "SHAPE_MISMATCH", ".shape"
    yield "rank 9", tensor(f32, (1,) * 9, b"\0" * 4), "SHAPE_MISMATCH", ".shape"
    yield "rank 50,000", tensor(f32, (1,) * 50_000, b"\0" * 4), "SHAPE_MISMATCH", ".shape"
    yield (
        "row too long",
        tensor(f32, (1, *row[:-1], row[-1] + 1), bytes(4 * size // row[-1] * (row[-1] + 1))),
        ("SHAPE_MISMATCH"),
        ".shape",
    )
    yield "row too short", tensor(f32, (1, *row[:-1], 1), bytes(4 * size // row[-1])), "SHAPE_MISMATCH", ".shape"
    yield "no row dimension", tensor(f32, row, one), "SHAPE_MISMATCH", ".shape"
    yield "zero rows", tensor(f32, (0, *row), b""), "OUT_OF_RANGE", ".shape"
    yield "minus one", tensor(f32, (-1, *row), one), "OUT_OF_RANGE", ".shape"
    yield "zero and huge", tensor(f32, (0, 2**40), b""), "OUT_OF_RANGE", ".shape"
    yield "smallest integer", tensor(f32, (-(2**63), *row), one), "OUT_OF_RANGE", ".shape"
    yield "overflow", tensor(f32, (2**62, 2**62), one), "SIZE_MISMATCH", ".data"
    yield "wraps to the right size", tensor(f32, (2**63 - 1, 2**63 - 1), bytes(4)), "SIZE_MISMATCH", ".data"
    yield "one byte short", tensor(f32, (1, *row), one[:-1]), "SIZE_MISMATCH", ".data"
    yield "one byte long", tensor(f32, (1, *row), one + b"\0"), "SIZE_MISMATCH", ".data"
    yield "empty", tensor(f32, (1, *row), b""), "SIZE_MISMATCH", ".data"
    yield "NaN", to_message(np.full((2, *row), np.nan, np.float32)), "NOT_FINITE", ".data"
    yield "infinity", to_message(np.full((2, *row), np.inf, np.float32)), "NOT_FINITE", ".data"
    yield "minus infinity", to_message(np.full((2, *row), -np.inf, np.float32)), "NOT_FINITE", ".data"
    if bytes_are_fine:
        yield "above one", to_message(np.full((1, *row), 1.001, np.float32)), "OUT_OF_RANGE", ".data"
        yield "below zero", to_message(np.full((1, *row), -0.001, np.float32)), "OUT_OF_RANGE", ".data"
    yield "too many rows", to_message(np.zeros((MAX_ROWS + 1, *row), np.float32)), "TOO_MANY_ROWS", ".shape"


def bad_tensor_cases() -> Iterator[Case]:
    """Return every bad tensor in every field of the typed API that takes one."""
    for why, bad, reason, part in bad_tensors(DATA_SHAPE, bytes_are_fine=True):
        for kind in (pb.EncodeRequest, pb.ReconstructRequest, pb.ScoreRequest):
            make: Any = kind
            yield typed(why, make(data=bad), reason, f"data{part}")
    for why, bad, reason, part in bad_tensors((LATENT_DIM,), bytes_are_fine=False):
        yield typed(why, pb.DecodeRequest(latents=bad), reason, f"latents{part}")
        ends = pb.Endpoints(start=bad, end=bad)
        field = f"latents.start{part}" if reason != "TOO_MANY_ROWS" else "num_steps"
        yield typed(why, pb.InterpolateRequest(latents=ends, num_steps=2), reason, field)


def typed(why: str, request: Message, reason: str, field: str = "") -> Case:
    """Return a case of the typed API; the method is the request's."""
    method = f"{VAE}/{type(request).__name__.removesuffix('Request')}"
    code = grpc.StatusCode.NOT_FOUND if reason.startswith("UNKNOWN_MODEL") else INVALID
    return Case(method, why, request, code, reason, field)


def bad_value_cases() -> Iterator[Case]:
    """Return the bad values of the typed API, beside its tensors."""
    data, latents, ten = floats(2, *DATA_SHAPE), floats(2, LATENT_DIM), floats(10, *DATA_SHAPE)
    out_of_range, too_many, bad_type = "OUT_OF_RANGE", "TOO_MANY_ROWS", "UNSUPPORTED_TYPE"
    yield typed("too many latents", pb.EncodeRequest(data=data, num_latents=17), out_of_range, "num_latents")
    yield typed("too many draws", pb.EncodeRequest(data=ten, num_latents=16), too_many, "num_latents")
    yield typed("uint8 out", pb.EncodeRequest(data=data, output_type=pb.DATA_TYPE_UINT8), bad_type, "output_type")
    yield typed("first row", pb.EncodeRequest(data=data, first_row=2**64 - 1), out_of_range, "first_row")
    unknown = {"observation": out_of_range, "output_type": bad_type}
    for field, reason in unknown.items():
        unknown_value = {field: UNKNOWN_VALUE}
        yield typed(f"unknown {field}", pb.DecodeRequest(latents=latents, **unknown_value), reason, field)
        yield typed(f"unknown {field}", pb.ReconstructRequest(data=data, **unknown_value), reason, field)
        yield typed(f"unknown {field}", pb.SampleRequest(num_samples=1, **unknown_value), reason, field)
        yield typed(f"unknown {field}", pb.SampleStreamRequest(num_samples=1, **unknown_value), reason, field)
    for kind in (pb.SampleRequest, pb.SampleStreamRequest):
        make: Any = kind
        yield typed("none", make(), out_of_range, "num_samples")
        yield typed("first row", make(num_samples=1, first_row=2**63 + 1), out_of_range, "first_row")
        for value in (-0.1, 10.5, float("nan"), float("inf"), float("-inf")):
            bad = make(num_samples=1, temperature=value)
            yield typed(f"temperature {value}", bad, out_of_range, "temperature")
    for number in (MAX_ROWS + 1, 2**31, 2**32 - 1):
        yield typed(f"{number} samples", pb.SampleRequest(num_samples=number), too_many, "num_samples")
    for number in (100_001, 2**64 - 1):
        bad = pb.SampleStreamRequest(num_samples=number)
        yield typed(f"{number} samples", bad, out_of_range, "num_samples")
    bad = pb.SampleStreamRequest(num_samples=1, max_chunk_rows=MAX_ROWS + 1)
    yield typed("chunk rows", bad, too_many, "max_chunk_rows")
    yield typed("bound", pb.ScoreRequest(data=data, bound=UNKNOWN_VALUE), out_of_range, "bound")
    yield typed("too many latents", pb.ScoreRequest(data=data, num_latents=17), out_of_range, "num_latents")
    ends, uneven = pb.Endpoints(start=latents, end=latents), pb.Endpoints(start=latents, end=floats(1, LATENT_DIM))
    make = pb.InterpolateRequest
    yield typed("no ends", make(num_steps=3), "MISSING_FIELD", "endpoints")
    yield typed("one step", make(latents=ends, num_steps=1), out_of_range, "num_steps")
    yield typed("too many points", make(latents=ends, num_steps=MAX_ROWS), too_many, "num_steps")
    bad = make(latents=ends, num_steps=2, interpolation=UNKNOWN_VALUE)
    yield typed("shape of the path", bad, out_of_range, "interpolation")
    yield typed("uneven ends", make(latents=uneven, num_steps=2), "SHAPE_MISMATCH", "latents.end.shape")
    for request in (
        pb.EncodeRequest(data=data, model_version="other"),
        pb.DecodeRequest(latents=latents, model_version="x" * 100_000),
        pb.SampleRequest(num_samples=1, model_version="\n\x1b[31m"),
        pb.SampleStreamRequest(num_samples=1, model_version="../../etc/passwd"),
        pb.ReconstructRequest(data=data, model_version="other"),
        pb.InterpolateRequest(latents=ends, num_steps=2, model_version="other"),
        pb.ScoreRequest(data=data, model_version="other"),
    ):
        yield typed("model version", request, "UNKNOWN_MODEL_VERSION")


def infer(model: str = "decoder", **changes: Any) -> Infer:  # noqa: ANN401 - any field of the message
    """Return a request that is right but for its changes."""
    name, row = ("data", DATA_SHAPE) if model == "encoder" else ("latents", (LATENT_DIM,))
    right: dict[str, Any] = {
        "model_name": model,
        "inputs": [given(name, shape=(1, *row))],
        "raw_input_contents": [np.full(row, 0.5, np.float32).tobytes()],
    }
    return Infer(**(right | changes))


def given(
    name: str = "latents",
    datatype: str = "FP32",
    shape: tuple[int, ...] = (1, LATENT_DIM),
    **more: Any,  # noqa: ANN401 - as above
) -> Infer.InferInputTensor:
    """Return the description of an input."""
    return Infer.InferInputTensor(name=name, datatype=datatype, shape=shape, **more)


def typed_input(**contents: list[Any]) -> Infer:
    """Return a request whose input is in typed contents."""
    return infer(inputs=[given(contents=oip.InferTensorContents(**contents))], raw_input_contents=[])


def draw(**parameters: Parameter) -> Infer:
    """Return a request for one draw from the prior."""
    inputs = [given("row", "UINT64", (1, 1))]
    return infer("prior", inputs=inputs, raw_input_contents=[bytes(8)], parameters=parameters)


def open_inference_cases() -> Iterator[Case]:
    """Return the bad inputs of the Open Inference Protocol."""
    not_found = grpc.StatusCode.NOT_FOUND
    for kind in (oip.ModelMetadataRequest, oip.ModelConfigRequest, oip.ModelStatisticsRequest):
        make: Any = kind
        method = f"{OIP}/{kind.__name__.removesuffix('Request')}"
        yield Case(method, "model", make(name="nobody"), not_found, "UNKNOWN_MODEL")
        yield Case(method, "version", make(name="encoder", version="9"), not_found, "UNKNOWN_MODEL")
    for why, request in {
        "no model": infer(""),
        "unknown model": infer("nobody"),
        "long name": infer("x" * 100_000),
        "hostile name": infer("\n\x1b[31m/etc/passwd"),
        "version 2": infer(model_version="2"),
        "version text": infer(model_version="latest"),
    }.items():
        yield Case(f"{OIP}/ModelInfer", why, request, not_found, "UNKNOWN_MODEL")
    for why, request, reason, field in bad_inferences():
        yield Case(f"{OIP}/ModelInfer", why, request, INVALID, reason, field)
    switched_off = grpc.StatusCode.UNIMPLEMENTED, "METHOD_DISABLED"
    load, unload = (
        oip.RepositoryModelLoadRequest(model_name="encoder"),
        oip.RepositoryModelUnloadRequest(model_name="encoder"),
    )
    yield Case(f"{OIP}/RepositoryModelLoad", "switched off", load, *switched_off)
    yield Case(f"{OIP}/RepositoryModelUnload", "switched off", unload, *switched_off)


def bad_inferences() -> Iterator[tuple[str, Infer, str, str]]:
    """Return what can be wrong with an inference: why, the request, the reason (or any), the field's beginning."""
    row = np.full((1, LATENT_DIM), 0.5, np.float32).tobytes()
    not_a_number = np.full(LATENT_DIM, np.nan, np.float32).tobytes()
    both = given(contents=oip.InferTensorContents(fp32_contents=[0.5] * LATENT_DIM))
    requested = Infer.InferRequestedOutputTensor(name="y")
    shared = given(parameters={"shared_memory_region": Parameter(string_param="r")})
    too_wide = given(shape=(1, LATENT_DIM + 1))
    many = given(shape=(MAX_ROWS + 1, LATENT_DIM))
    yield "no inputs", infer(inputs=[], raw_input_contents=[]), "UNKNOWN_TENSOR", "inputs"
    yield "unknown input", infer(inputs=[given("pixels")]), "UNKNOWN_TENSOR", "inputs"
    yield "twice", infer(inputs=[given(), given()], raw_input_contents=[row, row]), "UNKNOWN_TENSOR", "inputs"
    yield "unknown output", infer(outputs=[requested]), "UNKNOWN_TENSOR", "outputs"
    yield "no contents", infer(raw_input_contents=[]), "MISSING_FIELD", ""
    yield "spare raw", infer(raw_input_contents=[row, row]), "", "raw_input_contents"
    yield "raw and typed", infer(inputs=[both]), "MIXED_CONTENTS", ""
    yield "typed as integers", typed_input(int_contents=[1, 2]), "", ""
    yield "typed too few", typed_input(fp32_contents=[0.5]), "SIZE_MISMATCH", ""
    yield "typed too many", typed_input(fp32_contents=[0.5] * 1000), "SIZE_MISMATCH", ""
    yield "raw too short", infer(raw_input_contents=[row[:-1]]), "SIZE_MISMATCH", ""
    yield "raw too long", infer(raw_input_contents=[row + b"\0"]), "SIZE_MISMATCH", ""
    yield "FP64", infer(inputs=[given(datatype="FP64")], raw_input_contents=[row * 2]), "UNSUPPORTED_TYPE", ""
    yield "no such type", infer(inputs=[given(datatype="FLOAT")]), "UNSUPPORTED_TYPE", ""
    yield "shape", infer(inputs=[too_wide], raw_input_contents=[row + bytes(4)]), "SHAPE_MISMATCH", ""
    yield "negative shape", infer(inputs=[given(shape=(-1, LATENT_DIM))]), "", ""
    yield "overflowing shape", infer(inputs=[given(shape=(2**62, 2**62))]), "", ""
    yield "NaN", infer(raw_input_contents=[not_a_number]), "NOT_FINITE", ""
    yield "batch", infer(inputs=[many], raw_input_contents=[row * (MAX_ROWS + 1)]), "TOO_MANY_ROWS", ""
    yield "shared memory", infer(inputs=[shared]), "", ""
    yield "temperature", draw(temperature=Parameter(double_param=99.0)), "OUT_OF_RANGE", "parameters.temperature"
    yield "seed", draw(seed=Parameter(string_param="seven")), "", "parameters.seed"
    timeout = {"timeout": Parameter(int64_param=-1)}
    yield "negative timeout", infer(parameters=timeout), "OUT_OF_RANGE", "parameters.timeout"


def malformed_cases() -> Iterator[Case]:
    """Return bytes that are no message, for every method with a request that has fields."""
    bodies = {
        "tag alone": b"\x0a",
        "length beyond the end": b"\x0a\xff\xff\xff\xff\x0f",
        "field zero": b"\x00" * 20,
        "deep groups": b"\x0b" * 5000,
        "varint without end": b"\x08" + b"\xff" * 11,
        "wire type 7": b"\x0f",
    }
    # A parser skips the fields it does not know, also wrong ones, where a message has none of its own.
    empty = {f"{VAE}/GetModel", f"{OIP}/ServerLive", f"{OIP}/ServerReady", f"{OIP}/ServerMetadata"}
    for method in [*UNARY, STREAMS[0]]:
        for why, body in bodies.items():
            if method not in empty:
                yield Case(method, why, body, INVALID, "MALFORMED_MESSAGE", "request")


CASES = [*bad_tensor_cases(), *bad_value_cases(), *open_inference_cases(), *malformed_cases()]
