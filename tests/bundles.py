"""Small bundles built with `onnx.helper`, without torch: the serving tests need nothing of training."""

from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from serving import bundle

OPSET = 20
IR_VERSION = 10
DATA_SHAPE = (1, 4, 4)
LATENT_DIM = 2


def small_bundle(
    directory: Path, *, seed: int = 0, data_shape: tuple[int, ...] = DATA_SHAPE, latent_dim: int = LATENT_DIM
) -> Path:
    """Write a linear encoder and decoder with random weights; return the folder."""
    size = int(np.prod(data_shape))
    random = np.random.default_rng(seed)
    encoder = _encoder(random, size, latent_dim, data_shape)
    decoder = _decoder(random, size, latent_dim, data_shape)
    manifest = bundle.Manifest(
        name="small",
        version=bundle.version_of(encoder, decoder),
        created="2026-01-01T00:00:00Z",
        data_shape=data_shape,
        latent_dim=latent_dim,
        opset=OPSET,
        ir_version=IR_VERSION,
        tool_versions={"onnx": onnx.__version__},
        dataset=bundle.Dataset(name="none", split="none", sha256="0" * 64),
        config_sha256="0" * 64,
        seed=seed,
        metrics={"elbo": -1.5},
        parity={},
        encoder=bundle.graph_file("encoder.onnx", encoder, inputs=("data",), outputs=("mean", "log_var")),
        decoder=bundle.graph_file("decoder.onnx", decoder, inputs=("latents",), outputs=("logits", "mean")),
        golden=_golden(encoder, decoder, data_shape, latent_dim),
    )
    bundle.write(directory, manifest=manifest, encoder=encoder, decoder=decoder, extra={})
    return directory


def _golden(
    encoder: bytes, decoder: bytes, data_shape: tuple[int, ...], latent_dim: int
) -> tuple[bundle.KnownAnswer, ...]:
    """Compute the known answers with onnx's reference evaluator: a second implementation."""
    from onnx.reference import ReferenceEvaluator  # noqa: PLC0415 - slow to import

    mean, log_var = ReferenceEvaluator(encoder).run(None, {"data": bundle.golden_data(data_shape)})
    logits, observation = ReferenceEvaluator(decoder).run(None, {"latents": bundle.golden_latents(latent_dim)})
    return (
        bundle.known_answer("encoder", "mean", mean),
        bundle.known_answer("encoder", "log_var", log_var),
        bundle.known_answer("decoder", "logits", logits),
        bundle.known_answer("decoder", "mean", observation),
    )


def _encoder(random: np.random.Generator, size: int, latent_dim: int, shape: tuple[int, ...]) -> bytes:
    nodes = [
        helper.make_node("Div", ["data", "pixel_max"], ["unit"]),
        helper.make_node("Flatten", ["unit"], ["flat"]),
        helper.make_node("Gemm", ["flat", "mean_weight", "mean_bias"], ["mean"]),
        helper.make_node("Gemm", ["flat", "log_var_weight", "log_var_bias"], ["log_var"]),
    ]
    weights = {
        "pixel_max": np.array(255, np.float32),
        "mean_weight": _weight(random, size, latent_dim),
        "mean_bias": _weight(random, latent_dim),
        "log_var_weight": _weight(random, size, latent_dim),
        "log_var_bias": _weight(random, latent_dim),
    }
    outputs = {"mean": (latent_dim,), "log_var": (latent_dim,)}
    return _graph("encoder", nodes, weights, {"data": shape}, outputs)


def _decoder(random: np.random.Generator, size: int, latent_dim: int, shape: tuple[int, ...]) -> bytes:
    nodes = [
        helper.make_node("Gemm", ["latents", "weight", "bias"], ["flat"]),
        helper.make_node("Reshape", ["flat", "shape"], ["logits"]),
        helper.make_node("Sigmoid", ["logits"], ["mean"]),
    ]
    weights = {
        "weight": _weight(random, latent_dim, size),
        "bias": _weight(random, size),
        "shape": np.array([-1, *shape], np.int64),
    }
    return _graph("decoder", nodes, weights, {"latents": (latent_dim,)}, {"logits": shape, "mean": shape})


def _weight(random: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    return (random.standard_normal(shape) * 0.5).astype(np.float32)


def _graph(
    name: str,
    nodes: list[onnx.NodeProto],
    weights: dict[str, NDArray[np.generic]],
    inputs: dict[str, tuple[int, ...]],
    outputs: dict[str, tuple[int, ...]],
) -> bytes:
    def values(shapes: dict[str, tuple[int, ...]]) -> list[onnx.ValueInfoProto]:
        return [
            helper.make_tensor_value_info(key, TensorProto.FLOAT, ["batch", *shape])
            for key, shape in shapes.items()
        ]

    initializers = [numpy_helper.from_array(value, key) for key, value in weights.items()]
    graph = helper.make_graph(nodes, name, values(inputs), values(outputs), initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    onnx.checker.check_model(model, full_check=True)
    content: bytes = model.SerializeToString()
    return content
