"""PyTorch modules -> ONNX graphs as bytes: dynamic batch, no randomness, no trace of this machine."""

import contextlib
import io
import logging
import site
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import onnx
import torch
from torch import Tensor, nn

from training.data import MAX_PIXEL
from training.errors import GraphRejected
from training.models.networks import Decoder, Encoder
from training.models.vae import VAE

OPSET: Final = 20
"""Operator set: the exporter's default, readable by ONNX Runtime from 1.17 on."""

BATCH: Final = "batch"

_RANDOM_OPERATORS: Final = frozenset(
    {
        "RandomNormal",
        "RandomNormalLike",
        "RandomUniform",
        "RandomUniformLike",
        "Bernoulli",
        "Multinomial",
        "Dropout",
    }
)
_EXAMPLE_ROWS: Final = 2  # One row would be taken for a constant (pytorch issue 133653).


class Graph(NamedTuple):
    """An ONNX graph and the names of what goes in and comes out."""

    name: str
    content: bytes
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    ir_version: int


class PixelEncoder(nn.Module):
    """The encoder as it is served: takes pixel units, so that no caller has to know the scaling."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, data: Tensor) -> tuple[Tensor, Tensor]:
        """Return (mean, log_var) for data in [0, 255], shape (batch, *data_shape)."""
        mean, log_var = self.encoder(data / MAX_PIXEL)
        return mean, log_var


class MeanDecoder(nn.Module):
    """The decoder as it is served: parameters of the likelihood to score and to draw with, and means to look at.

    | likelihood | outputs |
    |---|---|
    | Bernoulli | `logits` (batch, *data_shape) and `mean` |
    | Gaussian | `mean` and `log_var`, one number per row, (batch, 1, ..., 1), to be broadcast |
    | categorical | `logits` (batch, num_levels, *data_shape) and `mean` |

    The mean is in [0, 1], shape (batch, *data_shape), whatever the likelihood. It is no substitute for the logits:
    a float32 sigmoid rounds to 0 or 1, whose logarithm fails.
    """

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs, in order."""
        return ("mean", "log_var") if self.decoder.excess_log_var is not None else ("logits", "mean")

    def forward(self, latents: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs for latents of shape (batch, latent_dim)."""
        likelihood = self.decoder.distribution(self.decoder(latents))
        return tuple(getattr(likelihood, name) for name in self.outputs)


def encoder_graph(vae: VAE) -> Graph:
    """Return the graph data -> (mean, log_var).

    Raises:
        GraphRejected: If the graph is not fit to be served; says why.
    """
    example = torch.zeros(_EXAMPLE_ROWS, *vae.data_shape)
    return _graph("encoder", PixelEncoder(vae.encoder), example, input_name="data", outputs=("mean", "log_var"))


def decoder_graph(vae: VAE) -> Graph:
    """Return the graph latents -> parameters of the likelihood and its mean, as `MeanDecoder` names them.

    Raises:
        GraphRejected: If the graph is not fit to be served; says why.
    """
    example, module = torch.zeros(_EXAMPLE_ROWS, vae.latent_dim), MeanDecoder(vae.decoder)
    return _graph("decoder", module, example, input_name="latents", outputs=module.outputs)


def _graph(name: str, module: nn.Module, example: Tensor, *, input_name: str, outputs: tuple[str, ...]) -> Graph:
    with _quiet():
        program = torch.onnx.export(
            module.eval(),
            (example,),
            dynamo=True,
            opset_version=OPSET,
            external_data=False,
            dynamic_shapes=({0: torch.export.Dim(BATCH)},),
            input_names=[input_name],
            output_names=list(outputs),
            verbose=False,
        )
    if program is None:
        raise GraphRejected(graph=name, problem="the exporter returned nothing")
    model = program.model_proto
    strip(model)
    check(name, model)
    return Graph(
        name, model.SerializeToString(deterministic=True), (input_name,), outputs, ir_version=model.ir_version
    )


def strip(model: onnx.ModelProto) -> None:
    """Remove what the exporter writes about this machine: stack traces with paths, in every node."""
    model.doc_string = ""
    del model.metadata_props[:]
    graph = model.graph
    graph.doc_string = ""
    del graph.metadata_props[:]
    for node in graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    for value in (*graph.input, *graph.output, *graph.value_info):
        value.doc_string = ""
        del value.metadata_props[:]
    for weight in graph.initializer:
        weight.doc_string = ""
        del weight.metadata_props[:]


def check(name: str, model: onnx.ModelProto) -> None:
    """Refuse a graph that is not fit to be served.

    Raises:
        GraphRejected: If it is not valid ONNX, has random operators or functions, a fixed batch size, or
            contains a path of this machine.
    """
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise GraphRejected(graph=name, problem=f"it is not valid ONNX ({str(error)[:200]})") from None
    random = sorted({node.op_type for node in model.graph.node} & _RANDOM_OPERATORS)
    if random:
        raise GraphRejected(graph=name, problem=f"it draws random numbers ({', '.join(random)})")
    if model.functions:
        raise GraphRejected(graph=name, problem="it has functions, in which operators could hide")
    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.shape.dim[0].dim_param != BATCH:
            raise GraphRejected(graph=name, problem=f"the batch size of {value.name} is fixed")
    content = model.SerializeToString(deterministic=True)
    if any(path.encode() in content for path in _local_paths()):
        raise GraphRejected(graph=name, problem="it contains a path of this machine")


def _local_paths() -> set[str]:
    """Return folders that must not occur in a published file; those of one or two letters say nothing."""
    folders = {Path.cwd(), Path.home(), Path(torch.__file__).parent, Path(__file__).parent}
    folders |= {Path(folder) for folder in site.getsitepackages()}
    return {str(folder) for folder in folders if len(folder.parts) > 1}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence what the exporter says about packages that are not installed and about its own deprecations."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
