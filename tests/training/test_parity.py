"""The gates pass for what they should pass, and fail for what they should fail."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from training import parity
from training.data import Dataset
from training.errors import BatchDependence, ParityFailed
from training.graphs import Graph, MeanDecoder, PixelEncoder

from .conftest import SmokeRun


def _rows(digits: Dataset) -> parity.Rows:
    return digits.test[:130].astype(np.float32)


def test_exported_graphs_pass(smoke_run: SmokeRun, smoke_graphs: tuple[Graph, Graph], digits: Dataset) -> None:
    """Differences are reported for each output, and are those of rounding."""
    encoder, decoder = smoke_graphs
    latents = parity.Session(encoder).run(_rows(digits))["mean"]
    found = parity.require_parity(encoder, PixelEncoder(smoke_run.vae.encoder), _rows(digits))
    found |= parity.require_parity(decoder, MeanDecoder(smoke_run.vae.decoder), latents)
    parity.require_batch_independence(encoder, _rows(digits)[:64])
    parity.require_batch_independence(decoder, latents[:64])
    assert sorted(found) == ["decoder.logits", "decoder.mean", "encoder.log_var", "encoder.mean"]
    assert all(0 <= difference < parity.TOLERANCE for difference in found.values())


@pytest.mark.parametrize("shift", [1e-3, np.nan])
def test_changed_weight_fails(
    shift: float, smoke_run: SmokeRun, smoke_graphs: tuple[Graph, Graph], digits: Dataset
) -> None:
    """A thousandth on the weights of one layer, or one not-a-number, does not pass."""
    encoder, _ = smoke_graphs
    model = onnx.load_model_from_string(encoder.content)
    weight = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) + np.float32(shift), weight.name))
    changed = encoder._replace(content=model.SerializeToString())
    with pytest.raises(ParityFailed, match=r"encoder\.(mean|log_var): PyTorch and ONNX Runtime differ by"):
        parity.require_parity(changed, PixelEncoder(smoke_run.vae.encoder), _rows(digits))


def test_answer_that_depends_on_other_rows_fails() -> None:
    """Subtracting the batch mean is the simplest dependence; the gate finds it."""
    nodes = [
        helper.make_node("ReduceMean", ["data", "axes"], ["centre"]),
        helper.make_node("Sub", ["data", "centre"], ["mean"]),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 2]) for name in ("data", "mean")]
    axes = numpy_helper.from_array(np.array([0]), "axes")
    proto = helper.make_graph(nodes, "g", values[:1], values[1:], initializer=[axes])
    model = helper.make_model(proto, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    graph = Graph("encoder", model.SerializeToString(), ("data",), ("mean",), 10)
    rows = np.random.default_rng(0).normal(size=(8, 2)).astype(np.float32)
    with pytest.raises(BatchDependence, match=r"encoder\.mean: row 0 of a batch of 2 is not bit-equal"):
        parity.require_batch_independence(graph, rows)

    class Centred(nn.Module):
        def forward(self, data: Tensor) -> tuple[Tensor, ...]:
            return (data - data.mean(dim=0),)

    wide = np.random.default_rng(0).normal(size=(64, 2)).astype(np.float32)
    assert parity.require_parity(graph, Centred(), wide)["encoder.mean"] < parity.TOLERANCE
    assert torch.is_inference_mode_enabled() is False
