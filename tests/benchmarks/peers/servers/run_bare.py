"""A bare grpc.aio server around ONNX Runtime, the floor: a run per call, no batches, no checks.

python -m tests.benchmarks.peers.servers.run_bare BUNDLE PORT
"""

import asyncio
import sys
from pathlib import Path
from typing import Any, Final

import grpc
import numpy as np
import onnxruntime as ort

from protos.inference import inference_pb2 as pb

OUTPUTS: Final = {"encoder": {"mean": "mean", "log_var": "log_var"}, "decoder": {"mean": "reconstruction"}}
"""Outputs of each graph, and their names on the wire: those of our service."""


def session(path: Path) -> ort.InferenceSession:
    """Return a session with one thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def rows_of(request: pb.ModelInferRequest) -> dict[str, Any]:
    """Return the one input of a request, by name."""
    tensor = request.inputs[0]
    return {tensor.name: np.frombuffer(request.raw_input_contents[0], np.float32).reshape(tensor.shape)}


def answer(model: str, names: list[str], values: list[Any]) -> pb.ModelInferResponse:
    """Return the answer with arrays by name."""
    response = pb.ModelInferResponse(model_name=model)
    for name, array in zip(names, values, strict=True):
        response.outputs.add(name=name, datatype="FP32", shape=array.shape)
        response.raw_output_contents.append(array.tobytes())
    return response


async def serve(bundle: Path, port: int) -> None:
    """Serve until stopped."""
    sessions = {name: session(bundle / f"{name}.onnx") for name in OUTPUTS}

    async def infer(body: bytes, _context: object) -> bytes:
        request = pb.ModelInferRequest.FromString(body)
        outputs = OUTPUTS[request.model_name]
        values = sessions[request.model_name].run(list(outputs), rows_of(request))
        return answer(request.model_name, list(outputs.values()), values).SerializeToString()

    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    methods: dict[str, Any] = {"ModelInfer": grpc.unary_unary_rpc_method_handler(infer)}
    handler = grpc.method_handlers_generic_handler("inference.GRPCInferenceService", methods)
    server.add_generic_rpc_handlers((handler,))
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1]), int(sys.argv[2])))
