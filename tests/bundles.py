"""Small bundles built with `onnx.helper`, without torch: the serving tests need nothing of training."""

from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from serving import bundle

LikelihoodName = Literal["bernoulli", "gaussian", "categorical"]
Decoder = tuple[bytes, tuple[str, ...]]
"""A graph and the names of its outputs."""

OPSET = 20
IR_VERSION = 10
DATA_SHAPE = (1, 4, 4)
LATENT_DIM = 2


def small_bundle(
    directory: Path,
    *,
    seed: int = 0,
    data_shape: tuple[int, ...] = DATA_SHAPE,
    latent_dim: int = LATENT_DIM,
    hidden: tuple[int, ...] = (),
    likelihood: LikelihoodName = "bernoulli",
    num_levels: int | None = None,
) -> Path:
    """Write an encoder and a decoder with random weights; return the folder.

    Args:
        directory: Folder of the bundle.
        seed: Seed of the weights.
        data_shape: Shape of one row of data.
        latent_dim: Dimensions of one row of latents.
        hidden: Widths of the encoder's hidden layers (ReLU), mirrored in the decoder; none makes them linear.
        likelihood: Family of p(x | z). The log variance of a Gaussian differs from row to row.
        num_levels: Levels of a categorical likelihood.
    """
    size = int(np.prod(data_shape))
    random = np.random.default_rng(seed)
    encoder = _encoder(random, (size, *hidden), latent_dim, data_shape)
    make = {"bernoulli": _decoder, "gaussian": _gaussian_decoder, "categorical": _categorical_decoder}[likelihood]
    decoder, decoder_outputs = make(random, (latent_dim, *reversed(hidden)), data_shape, num_levels or 0)
    manifest = bundle.Manifest(
        name="small",
        version=bundle.version_of(encoder, decoder),
        created="2026-01-01T00:00:00Z",
        data_shape=data_shape,
        latent_dim=latent_dim,
        likelihood=likelihood,
        num_levels=num_levels,
        opset=OPSET,
        ir_version=IR_VERSION,
        tool_versions={"onnx": onnx.__version__},
        dataset=bundle.Dataset(name="none", split="none", sha256="0" * 64),
        config_sha256="0" * 64,
        seed=seed,
        metrics={"elbo": -1.5},
        parity={},
        encoder=bundle.graph_file("encoder.onnx", encoder, inputs=("data",), outputs=("mean", "log_var")),
        decoder=bundle.graph_file("decoder.onnx", decoder, inputs=("latents",), outputs=decoder_outputs),
        golden=_golden(encoder, decoder, data_shape, latent_dim, decoder_outputs),
    )
    bundle.write(directory, manifest=manifest, encoder=encoder, decoder=decoder, extra={})
    return directory


def _golden(
    encoder: bytes, decoder: bytes, data_shape: tuple[int, ...], latent_dim: int, outputs: tuple[str, ...]
) -> tuple[bundle.KnownAnswer, ...]:
    """Compute the known answers with onnx's reference evaluator: a second implementation."""
    from onnx.reference import ReferenceEvaluator  # noqa: PLC0415 - slow to import

    encoded: Any = ReferenceEvaluator(encoder).run(None, {"data": bundle.golden_data(data_shape)})
    decoded: Any = ReferenceEvaluator(decoder).run(None, {"latents": bundle.golden_latents(latent_dim)})
    return (
        bundle.known_answer("encoder", "mean", encoded[0]),
        bundle.known_answer("encoder", "log_var", encoded[1]),
        *(bundle.known_answer("decoder", name, values) for name, values in zip(outputs, decoded, strict=True)),
    )


def _encoder(
    random: np.random.Generator, widths: tuple[int, ...], latent_dim: int, shape: tuple[int, ...]
) -> bytes:
    stack = _Stack(random)
    flat = stack.add("Flatten", [stack.add("Div", ["data", stack.weight(np.array(255, np.float32))])])
    last = stack.layers(flat, widths)
    stack.gemm(last, widths[-1], latent_dim, output="mean")
    stack.gemm(last, widths[-1], latent_dim, output="log_var")
    return stack.graph("encoder", {"data": shape}, {"mean": (latent_dim,), "log_var": (latent_dim,)})


def _decoder(random: np.random.Generator, widths: tuple[int, ...], shape: tuple[int, ...], _: int) -> Decoder:
    stack = _Stack(random)
    flat = stack.gemm(stack.layers("latents", widths), widths[-1], int(np.prod(shape)))
    stack.reshape(flat, shape, output="logits")
    stack.add("Sigmoid", ["logits"], output="mean")
    outputs = {"logits": shape, "mean": shape}
    return stack.graph("decoder", {"latents": (widths[0],)}, outputs), tuple(outputs)


def _gaussian_decoder(
    random: np.random.Generator, widths: tuple[int, ...], shape: tuple[int, ...], _: int
) -> Decoder:
    stack, ones = _Stack(random), (1,) * len(shape)
    last = stack.layers("latents", widths)
    logits = stack.reshape(stack.gemm(last, widths[-1], int(np.prod(shape))), shape)
    stack.add("Sigmoid", [logits], output="mean")
    stack.reshape(stack.gemm(last, widths[-1], 1), ones, output="log_var")
    outputs = {"mean": shape, "log_var": ones}
    return stack.graph("decoder", {"latents": (widths[0],)}, outputs), tuple(outputs)


def _categorical_decoder(
    random: np.random.Generator, widths: tuple[int, ...], shape: tuple[int, ...], num_levels: int
) -> Decoder:
    stack, size = _Stack(random), int(np.prod(shape))
    flat = stack.gemm(stack.layers("latents", widths), widths[-1], num_levels * size)
    stack.reshape(flat, (num_levels, *shape), output="logits")
    levels = stack.reshape("logits", (num_levels, size))
    intensities = stack.weight(np.linspace(0, 1, num_levels, dtype=np.float32)[None])
    expected = stack.add("MatMul", [intensities, stack.softmax(levels)])
    stack.reshape(expected, shape, output="mean")
    outputs = {"logits": (num_levels, *shape), "mean": shape}
    return stack.graph("decoder", {"latents": (widths[0],)}, outputs), tuple(outputs)


class _Stack:
    """Nodes and weights of a graph under construction."""

    def __init__(self, random: np.random.Generator) -> None:
        self._random = random
        self._nodes: list[onnx.NodeProto] = []
        self._weights: list[onnx.TensorProto] = []

    def add(self, operator: str, inputs: list[str], *, output: str = "") -> str:
        name = output or f"value{len(self._nodes)}"
        self._nodes.append(helper.make_node(operator, inputs, [name]))
        return name

    def reshape(self, rows: str, shape: tuple[int, ...], *, output: str = "") -> str:
        return self.add("Reshape", [rows, self.weight(np.array([-1, *shape], np.int64))], output=output)

    def softmax(self, rows: str) -> str:
        """Add a softmax over the dimension after the batch."""
        name = self.add("Softmax", [rows])
        self._nodes[-1].attribute.append(helper.make_attribute("axis", 1))
        return name

    def weight(self, values: NDArray[np.generic]) -> str:
        name = f"weight{len(self._weights)}"
        self._weights.append(numpy_helper.from_array(values, name))
        return name

    def gemm(self, rows: str, num_inputs: int, num_outputs: int, *, output: str = "") -> str:
        scale = 0.5 if num_inputs <= np.prod(DATA_SHAPE) else num_inputs**-0.5
        weight = self._random.standard_normal((num_inputs, num_outputs)) * scale
        bias = self._random.standard_normal(num_outputs) * 0.5
        parts = [self.weight(weight.astype(np.float32)), self.weight(bias.astype(np.float32))]
        return self.add("Gemm", [rows, *parts], output=output)

    def layers(self, rows: str, widths: tuple[int, ...]) -> str:
        for num_inputs, num_outputs in pairwise(widths):
            rows = self.add("Relu", [self.gemm(rows, num_inputs, num_outputs)])
        return rows

    def graph(self, name: str, inputs: dict[str, tuple[int, ...]], outputs: dict[str, tuple[int, ...]]) -> bytes:
        def values(shapes: dict[str, tuple[int, ...]]) -> list[onnx.ValueInfoProto]:
            make = helper.make_tensor_value_info
            return [make(key, TensorProto.FLOAT, ["batch", *shape]) for key, shape in shapes.items()]

        graph = helper.make_graph(self._nodes, name, values(inputs), values(outputs), self._weights)
        opset = helper.make_opsetid("", OPSET)
        model = helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION)
        onnx.checker.check_model(model, full_check=True)
        content: bytes = model.SerializeToString()
        return content
