"""Graphs written without the onnx package are what that package would have written."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx.reference import ReferenceEvaluator

from serving import bundle
from tests.benchmarks import plain_onnx

SHAPE = (1, 4, 4)
WIDTHS = (300, 8)
"""More than 127 units: numbers that need two bytes on the wire."""


@pytest.mark.parametrize("make", [plain_onnx.encoder, plain_onnx.decoder])
def test_a_graph_is_valid_and_computes_what_it_says(make: type[bytes]) -> None:
    """The checker takes it, and ONNX Runtime and the reference evaluator agree within float32's rounding."""
    graph = make(7, SHAPE, WIDTHS, 3)  # type: ignore[call-overload]
    model = onnx.load_from_string(graph)
    onnx.checker.check_model(model, full_check=True)
    assert model.ir_version == plain_onnx.IR_VERSION
    rows = bundle.golden_data(SHAPE) if make is plain_onnx.encoder else bundle.golden_latents(3)
    session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: rows}
    for computed, expected in zip(session.run(None, feed), ReferenceEvaluator(model).run(None, feed), strict=True):
        np.testing.assert_allclose(computed, expected, rtol=1e-5, atol=1e-5)


def test_the_seed_decides_the_weights() -> None:
    """Two machines make the same graphs, and another seed makes others."""
    assert plain_onnx.encoder(0, SHAPE, WIDTHS, 3) == plain_onnx.encoder(0, SHAPE, WIDTHS, 3)
    assert plain_onnx.encoder(0, SHAPE, WIDTHS, 3) != plain_onnx.encoder(1, SHAPE, WIDTHS, 3)
