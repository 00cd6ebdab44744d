"""Calls of the Open Inference Protocol over the wire, with our own stubs."""

from typing import Any, Final

import grpc
import numpy as np
import pytest
from google.protobuf.message import Message

from protos.inference import inference_pb2 as pb
from serving.engine.protocol import Rows

SERVICE: Final = "inference.GRPCInferenceService"
METHODS: Final = [method.name for method in pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods]
DATATYPES: Final = {"float32": "FP32", "float16": "FP16", "uint8": "UINT8", "uint64": "UINT64", "int64": "INT64"}
INPUTS: Final = {"encoder": "data", "decoder": "latents", "prior": "row"}
GOOD: Final[dict[str, Rows]] = {
    "encoder": np.full((2, 1, 4, 4), 0.5, np.float32),
    "decoder": np.zeros((2, 2), np.float32),
    "prior": np.array([[0], [1]], np.uint64),
}


def parameter(value: bool | float | str) -> pb.InferParameter:  # noqa: FBT001 - a value like others
    """Return a value as the parameter that tritonclient makes of it."""
    kinds = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}
    fields: Any = {kinds[type(value)]: value}
    return pb.InferParameter(**fields)


def request(
    model: str,
    rows: Rows | None = None,
    *,
    outputs: tuple[str, ...] = (),
    **parameters: Any,  # noqa: ANN401 - of four types
) -> pb.ModelInferRequest:
    """Return a request with raw contents."""
    rows = GOOD[model] if rows is None else rows
    made = pb.ModelInferRequest(
        model_name=model,
        inputs=[
            pb.ModelInferRequest.InferInputTensor(
                name=INPUTS[model], datatype=DATATYPES[rows.dtype.name], shape=rows.shape
            )
        ],
        outputs=[pb.ModelInferRequest.InferRequestedOutputTensor(name=name) for name in outputs],
        raw_input_contents=[rows.tobytes()],
    )
    for name, value in parameters.items():
        made.parameters[name].CopyFrom(value if isinstance(value, pb.InferParameter) else parameter(value))
    return made


async def ask(channel: grpc.aio.Channel, method: str, message: Message, **options: Any) -> Any:  # noqa: ANN401 - whatever the method answers
    """Call a unary method of the protocol; return its response."""
    multi: Any = channel.unary_unary(
        f"/{SERVICE}/{method}",
        request_serializer=lambda request: request.SerializeToString(),
        response_deserializer=getattr(pb, f"{method}Response").FromString,
    )
    return await multi(message, **({"timeout": 20} | options))


async def infer(channel: grpc.aio.Channel, message: pb.ModelInferRequest, **options: Any) -> pb.ModelInferResponse:  # noqa: ANN401 - of gRPC
    """Call ModelInfer."""
    response: pb.ModelInferResponse = await ask(channel, "ModelInfer", message, **options)
    return response


async def refused(channel: grpc.aio.Channel, method: str, message: Message) -> grpc.aio.AioRpcError:
    """Return the error of a call that must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ask(channel, method, message)
    return caught.value


def stream(channel: grpc.aio.Channel, **options: Any) -> Any:  # noqa: ANN401 - the stubs do not name it
    """Begin a ModelStreamInfer that sends messages, or bytes as they are."""
    multi: Any = channel.stream_stream(
        f"/{SERVICE}/ModelStreamInfer",
        request_serializer=lambda body: body if isinstance(body, bytes) else body.SerializeToString(),
        response_deserializer=pb.ModelStreamInferResponse.FromString,
    )
    return multi(**({"timeout": 20} | options))


async def counts(channel: grpc.aio.Channel, name: str) -> pb.ModelStatistics:
    """Return the statistics of a model."""
    answer = await ask(channel, "ModelStatistics", pb.ModelStatisticsRequest(name=name))
    (found,) = answer.model_stats
    assert isinstance(found, pb.ModelStatistics)
    return found
