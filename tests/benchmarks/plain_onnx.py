"""An encoder and a decoder as ONNX files, written without the `onnx` package.

Field numbers are those of onnx.proto. For machines that have ONNX Runtime and NumPy alone. The nets are those of
`tests.bundles`: ReLU layers between pixels and latents, both ways.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

OPSET: Final = 20
IR_VERSION: Final = 10

_FLOAT: Final = 1
_INT64: Final = 7
_TYPES: Final = {np.dtype(np.float32): _FLOAT, np.dtype(np.int64): _INT64}


class Node(NamedTuple):
    """An operation on named values."""

    operator: str
    inputs: Sequence[str]
    output: str


def model(
    nodes: Sequence[Node],
    weights: Mapping[str, NDArray[np.generic]],
    *,
    inputs: Mapping[str, tuple[int, ...]],
    outputs: Mapping[str, tuple[int, ...]],
) -> bytes:
    """Return a serialised ModelProto.

    Args:
        nodes: In the order in which they can run.
        weights: Constants by name, float32 or int64.
        inputs: Shape of one row of each input, float32.
        outputs: Shape of one row of each output, float32.
    """
    graph = b"".join(
        [
            *(_message(1, _node(node)) for node in nodes),
            _message(2, b"graph"),
            *(_message(5, _tensor(name, values)) for name, values in weights.items()),
            *(_message(11, _value(name, shape)) for name, shape in inputs.items()),
            *(_message(12, _value(name, shape)) for name, shape in outputs.items()),
        ]
    )
    return _number(1, IR_VERSION) + _message(7, graph) + _message(8, _message(1, b"") + _number(2, OPSET))


def encoder(seed: int, data_shape: tuple[int, ...], hidden: Sequence[int], latent_dim: int) -> bytes:
    """Return a graph from pixels in [0, 255] to `mean` and `log_var`, with random weights."""
    stack = _Stack(seed, {"largest": np.array(255, np.float32)})
    stack.nodes += [Node("Div", ["data", "largest"], "unit"), Node("Flatten", ["unit"], "flat")]
    widths = (int(np.prod(data_shape)), *hidden)
    last = stack.layers("flat", widths)
    for name in ("mean", "log_var"):
        stack.gemm(last, widths[-1], latent_dim, name)
    shapes = {"mean": (latent_dim,), "log_var": (latent_dim,)}
    return model(stack.nodes, stack.weights, inputs={"data": data_shape}, outputs=shapes)


def decoder(seed: int, data_shape: tuple[int, ...], hidden: Sequence[int], latent_dim: int) -> bytes:
    """Return a graph from latents to `logits` and `mean`, with random weights."""
    stack = _Stack(seed, {"shape": np.array([-1, *data_shape], np.int64)})
    widths = (latent_dim, *reversed(hidden))
    stack.gemm(stack.layers("latents", widths), widths[-1], int(np.prod(data_shape)), "flat")
    stack.nodes += [Node("Reshape", ["flat", "shape"], "logits"), Node("Sigmoid", ["logits"], "mean")]
    shapes = {"logits": data_shape, "mean": data_shape}
    return model(stack.nodes, stack.weights, inputs={"latents": (latent_dim,)}, outputs=shapes)


class _Stack:
    """Nodes and weights of a graph under construction."""

    def __init__(self, seed: int, weights: dict[str, NDArray[np.generic]]) -> None:
        self._random = np.random.default_rng(seed)
        self.nodes: list[Node] = []
        self.weights = weights

    def gemm(self, rows: str, num_inputs: int, num_outputs: int, output: str) -> str:
        weight = self._random.standard_normal((num_inputs, num_outputs)) * num_inputs**-0.5
        self.weights[f"{output}.weight"] = weight.astype(np.float32)
        self.weights[f"{output}.bias"] = (self._random.standard_normal(num_outputs) * 0.5).astype(np.float32)
        self.nodes.append(Node("Gemm", [rows, f"{output}.weight", f"{output}.bias"], output))
        return output

    def layers(self, rows: str, widths: Sequence[int]) -> str:
        for index, (num_inputs, num_outputs) in enumerate(pairwise(widths)):
            linear = self.gemm(rows, num_inputs, num_outputs, f"linear{index}")
            rows = f"hidden{index}"
            self.nodes.append(Node("Relu", [linear], rows))
        return rows


def _node(node: Node) -> bytes:
    inputs = b"".join(_message(1, name.encode()) for name in node.inputs)
    return inputs + _message(2, node.output.encode()) + _message(4, node.operator.encode())


def _tensor(name: str, values: NDArray[np.generic]) -> bytes:
    dimensions = b"".join(_number(1, length) for length in values.shape)
    little = values.astype(values.dtype.newbyteorder("<"))
    kind = _number(2, _TYPES[values.dtype])
    return dimensions + kind + _message(8, name.encode()) + _message(9, little.tobytes())


def _value(name: str, row_shape: tuple[int, ...]) -> bytes:
    batch = _message(1, _message(2, b"batch"))
    shape = batch + b"".join(_message(1, _number(1, length)) for length in row_shape)
    tensor_type = _number(1, _FLOAT) + _message(2, shape)
    return _message(1, name.encode()) + _message(2, _message(1, tensor_type))


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _message(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])
