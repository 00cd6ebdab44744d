"""The two protocols that a load test speaks: which method, which bytes, and what an answer's bytes hold."""

from collections.abc import Mapping
from typing import Any, Final, Literal, Protocol

import numpy as np
from google.protobuf.message import DecodeError, Message
from numpy.typing import NDArray

from protos.inference import inference_pb2
from protos.vae.v1 import vae_pb2
from serving.loadtest.errors import BadWorkload, ServiceNotReady
from serving.loadtest.workload import Contents, ModelFacts, Operation
from serving.tensors import from_message, little_endian, to_message

ProtocolName = Literal["vae", "oip"]

Call = Any
"""Calls a method: a path, bytes; returns bytes."""

Values = dict[str, NDArray[Any] | str | int]
"""What an answer holds: arrays by name, and what else can be compared, such as a version or a seed."""

_VAE: Final = "/vae.v1.VaeService/"
_INFERENCE: Final = "/inference.GRPCInferenceService/"
_ALL: Final = frozenset({vae_pb2.DATA_TYPE_FLOAT32, vae_pb2.DATA_TYPE_FLOAT16, vae_pb2.DATA_TYPE_UINT8})
_DTYPES: Final = {"FP32": "<f4", "FP16": "<f2", "UINT8": "u1"}


class Dialect(Protocol):
    """One protocol."""

    async def facts(self, call: Call) -> ModelFacts:
        """Ask the service what it serves.

        Raises:
            ServiceNotReady: If what it says is of no use.
        """

    def path(self, operation: Operation) -> str:
        """Return the full name of the method.

        Raises:
            BadWorkload: If this protocol does not have the operation.
        """

    def body(self, operation: Operation, contents: Contents) -> bytes:
        """Return the request."""

    def read(self, operation: Operation, answer: bytes) -> Values:
        """Return what an answer holds.

        Raises:
            ValueError: If it cannot be read.
        """


class Vae:
    """vae.v1.VaeService."""

    async def facts(self, call: Call) -> ModelFacts:
        """Ask GetModel."""
        model = vae_pb2.GetModelResponse.FromString(await call(f"{_VAE}GetModel", b""))
        return ModelFacts(
            name=model.name,
            digest=model.model_version,
            data_shape=tuple(model.data_shape),
            latent_dim=model.latent_dim,
            max_rows=model.limits.max_rows or None,
        )

    def path(self, operation: Operation) -> str:
        """Return the full name of the method."""
        return f"{_VAE}{operation.method.capitalize()}"

    def body(self, operation: Operation, contents: Contents) -> bytes:
        """Return the request."""
        return _vae_request(operation, contents).SerializeToString()

    def read(self, operation: Operation, answer: bytes) -> Values:
        """Return tensors as arrays, the rest as it is."""
        message: Message = getattr(vae_pb2, f"{operation.method.capitalize()}Response")()
        try:
            message.ParseFromString(answer)
        except DecodeError as error:
            raise ValueError(str(error)) from None
        return {
            field.name: from_message(value, field=field.name, accept=_ALL) if field.message_type else value
            for field, value in message.ListFields()
        }


def _vae_request(operation: Operation, contents: Contents) -> Message:
    seed, first_row = contents.seed, contents.first_row
    if operation.method == "decode":
        return vae_pb2.DecodeRequest(latents=to_message(contents.latents))
    if operation.method == "sample":
        return vae_pb2.SampleRequest(num_samples=operation.rows, seed=seed, first_row=first_row)
    if operation.method == "interpolate":
        start, end = (to_message(row[None]) for row in contents.latents)
        ends = vae_pb2.Endpoints(start=start, end=end)
        return vae_pb2.InterpolateRequest(latents=ends, num_steps=operation.rows)
    data = to_message(contents.data)
    if operation.method == "encode":
        return vae_pb2.EncodeRequest(data=data)
    if operation.method == "reconstruct":
        return vae_pb2.ReconstructRequest(data=data)
    return vae_pb2.ScoreRequest(data=data, seed=seed, first_row=first_row)


class OpenInference:
    """inference.GRPCInferenceService, with raw contents: the models encoder, decoder and prior."""

    _MODELS: Final[Mapping[str, tuple[str, str, str]]] = {
        "encode": ("encoder", "data", "UINT8"),
        "decode": ("decoder", "latents", "FP32"),
        "sample": ("prior", "row", "UINT64"),
    }

    async def facts(self, call: Call) -> ModelFacts:
        """Ask the metadata of encoder and decoder."""
        encoder, decoder = [
            inference_pb2.ModelMetadataResponse.FromString(
                await call(
                    f"{_INFERENCE}ModelMetadata",
                    inference_pb2.ModelMetadataRequest(name=name).SerializeToString(),
                )
            )
            for name in ("encoder", "decoder")
        ]
        if not (encoder.inputs and decoder.inputs):
            raise ServiceNotReady(
                target="Open Inference Protocol", problem="its models encoder and decoder have no input"
            )
        return ModelFacts(
            name=encoder.properties.get("model_name", "encoder"),
            digest=encoder.properties.get("model_digest", ""),
            data_shape=tuple(encoder.inputs[0].shape[1:]),
            latent_dim=decoder.inputs[0].shape[-1],
            max_rows=None,
        )

    def path(self, operation: Operation) -> str:
        """Return the full name of the method."""
        if operation.method not in self._MODELS:
            given, expected = operation.name, f"{', '.join(self._MODELS)} with --protocol oip"
            raise BadWorkload("--mix", given=given, expected=expected)
        return f"{_INFERENCE}ModelInfer"

    def body(self, operation: Operation, contents: Contents) -> bytes:
        """Return the request."""
        model, name, datatype = self._MODELS[operation.method]
        numbers = np.arange(operation.rows, dtype=np.uint64)[:, None] + np.uint64(contents.first_row)
        inputs: dict[str, NDArray[Any]] = {"data": contents.data, "latents": contents.latents, "row": numbers}
        rows = inputs[name]
        request = inference_pb2.ModelInferRequest(
            model_name=model,
            inputs=[
                inference_pb2.ModelInferRequest.InferInputTensor(name=name, datatype=datatype, shape=rows.shape)
            ],
            raw_input_contents=[little_endian(rows).tobytes()],
        )
        if operation.method == "sample":
            request.parameters["seed"].int64_param = contents.seed
        return request.SerializeToString()

    def read(self, operation: Operation, answer: bytes) -> Values:
        """Return outputs as arrays, and the digest of the weights."""
        message = inference_pb2.ModelInferResponse()
        try:
            message.ParseFromString(answer)
        except DecodeError as error:
            raise ValueError(str(error)) from None
        values: Values = {"model": message.model_name}
        for output, content in zip(message.outputs, message.raw_output_contents, strict=True):
            if output.datatype not in _DTYPES:
                raise ValueError(f"{operation.name}: an output of type {output.datatype}")
            values[output.name] = np.frombuffer(content, _DTYPES[output.datatype]).reshape(tuple(output.shape))
        if "model_digest" in message.parameters:
            values["digest"] = message.parameters["model_digest"].string_param
        return values


DIALECTS: Final[Mapping[ProtocolName, Dialect]] = {"vae": Vae(), "oip": OpenInference()}
