"""Exported graphs are fit to be served, and others are refused."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from training import graphs, parity, presets
from training.errors import GraphRejected
from training.graphs import Graph
from training.models.vae import VAE
from training.noise import Stream, TrainingStream, generator, normal


@pytest.fixture(scope="module")
def both(smoke_graphs: tuple[Graph, Graph]) -> dict[str, onnx.ModelProto]:
    """Return both graphs as models."""
    return {graph.name: onnx.load_model_from_string(graph.content) for graph in smoke_graphs}


def _model(*, operator: str = "Identity", batch: str | int = "batch") -> onnx.ModelProto:
    node = helper.make_node(operator, ["data"], ["mean"])
    shape = [batch, 2]
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("data", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("mean", TensorProto.FLOAT, shape)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_names_and_shapes_are_those_of_the_contract(both: dict[str, onnx.ModelProto]) -> None:
    """Serving finds its inputs and outputs by these names, with a dynamic batch."""
    shapes = {
        f"{name}.{value.name}": [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for name, model in both.items()
        for value in (*model.graph.input, *model.graph.output)
    }
    assert shapes == {
        "encoder.data": ["batch", 1, 8, 8],
        "encoder.mean": ["batch", 4],
        "encoder.log_var": ["batch", 4],
        "decoder.latents": ["batch", 4],
        "decoder.logits": ["batch", 1, 8, 8],
        "decoder.mean": ["batch", 1, 8, 8],
    }


@pytest.mark.parametrize(
    ("changes", "outputs"),
    [
        (["likelihood=gaussian"], {"mean": ["batch", 1, 2, 2], "log_var": ["batch", 1, 1, 1]}),
        (
            ["likelihood=categorical", "num_levels=5"],
            {"logits": ["batch", 5, 1, 2, 2], "mean": ["batch", 1, 2, 2]},
        ),
    ],
)
def test_outputs_are_those_of_the_likelihood(changes: list[str], outputs: dict[str, list[str | int]]) -> None:
    """The mean has the shape of data, whatever the likelihood; its parameters have their own names and shapes."""
    graph = graphs.decoder_graph(_vae(changes, (1, 2, 2)))
    model = onnx.load_model_from_string(graph.content)
    found = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in model.graph.output
    }
    assert found == outputs
    assert graph.outputs == tuple(outputs)


def test_the_encoder_moves_pixels_to_their_levels(seed: int) -> None:
    """Raw pixels of one level have the same posterior, and that of another level is another one."""
    graph = graphs.encoder_graph(_vae(["likelihood=categorical", "num_levels=5"], (1, 2, 2)))
    pixels = np.random.default_rng(seed).integers(0, 256, (50, 1, 2, 2)).astype(np.float32)
    levels = np.rint(pixels / 255 * 4)
    session = parity.Session(graph)
    np.testing.assert_array_equal(session.run(pixels)["mean"], session.run(levels * np.float32(255 / 4))["mean"])
    assert not np.array_equal(session.run(pixels)["mean"], session.run(255 - pixels)["mean"])


@pytest.mark.parametrize(
    ("num_levels", "data_shape"), [(17, (3, 5, 7)), (17, (1, 1, 1)), (256, (1, 8, 8)), (2, (30,))]
)
def test_rows_of_levels_are_bit_equal_alone_and_together(num_levels: int, data_shape: tuple[int, ...]) -> None:
    """ONNX Runtime sums over levels in an order that depends on the batch: the graph must not ask it to."""
    vae = _vae(["likelihood=categorical", f"num_levels={num_levels}"], data_shape)
    graph = graphs.decoder_graph(vae)
    latents = normal(0, 65, vae.latent_dim, stream=Stream.PRIOR).numpy()
    parity.require_batch_independence(graph, latents[:64])
    parity.require_parity(graph, graphs.MeanDecoder(vae.decoder), latents)
    mean = parity.Session(graph).run(latents)["mean"]
    assert ((mean >= 0) & (mean <= 1)).all()


def _vae(changes: list[str], data_shape: tuple[int, ...]) -> VAE:
    """Return an untrained model with another likelihood."""
    config = presets.smoke().model.override(["latent_dim=2", "hidden_dims=[5]", *changes])
    return VAE(config, data_shape, generator(0, TrainingStream.INIT)).requires_grad_(requires_grad=False)


def test_operator_set_is_the_documented_one(both: dict[str, onnx.ModelProto]) -> None:
    """Standard operators alone, of one set."""
    for model in both.values():
        assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", graphs.OPSET)]


def test_graphs_hold_no_trace_of_this_machine(smoke_graphs: tuple[Graph, Graph]) -> None:
    """No folder, no Python file, no stack trace is in the bytes."""
    words = [Path.cwd(), Path.home() / "x", Path(torch.__file__).parent, "site-packages", ".py", "stack_trace"]
    for graph in smoke_graphs:
        assert [word for word in words if str(word).encode() in graph.content] == []


def test_graphs_repeat_byte_for_byte(small_vae: VAE) -> None:
    """The digest of a graph means something: the same weights give the same bytes."""
    assert graphs.encoder_graph(small_vae) == graphs.encoder_graph(small_vae)


def test_sound_graph_is_accepted() -> None:
    """The model that the refused ones are made from is itself fine."""
    graphs.check("encoder", _model())


@pytest.mark.parametrize("operator", ["RandomNormalLike", "RandomUniformLike"])
def test_random_operators_are_refused(operator: str) -> None:
    """A graph that draws answers differently each time."""
    with pytest.raises(GraphRejected, match=rf"encoder\.onnx: it draws random numbers \({operator}\)"):
        graphs.check("encoder", _model(operator=operator))


def test_fixed_batch_is_refused() -> None:
    """A graph specialised to the example's batch cannot serve others."""
    with pytest.raises(GraphRejected, match="the batch size of data is fixed"):
        graphs.check("encoder", _model(batch=2))


def test_paths_are_refused_and_stripped() -> None:
    """What the exporter writes beside nodes must not be published; stripping removes it."""
    model = _model()
    model.graph.node[0].metadata_props.add(key="stack_trace", value=f"File {torch.__file__}")
    model.graph.input[0].doc_string = str(Path.cwd())
    with pytest.raises(GraphRejected, match="contains a path of this machine"):
        graphs.check("encoder", model)
    graphs.strip(model)
    graphs.check("encoder", model)


def test_invalid_graph_is_refused() -> None:
    """ONNX's own checker has a say."""
    model = _model()
    model.graph.node[0].input[0] = "nothing"
    with pytest.raises(GraphRejected, match="it is not valid ONNX"):
        graphs.check("encoder", model)


def test_functions_are_refused() -> None:
    """Operators inside functions would escape the check for random ones."""
    model = _model()
    node = helper.make_node("RandomNormalLike", ["x"], ["y"])
    model.functions.append(
        helper.make_function("local", "draw", ["x"], ["y"], [node], [helper.make_opsetid("", 20)])
    )
    model.opset_import.append(helper.make_opsetid("local", 1))
    with pytest.raises(GraphRejected, match="it has functions"):
        graphs.check("encoder", model)
