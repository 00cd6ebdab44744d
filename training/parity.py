"""Gates of the export: ONNX Runtime answers as PyTorch does, and a row's answer is its own.

No bundle is written unless both pass.
"""

from typing import Final

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import nn

from training.errors import BatchDependence, ParityFailed
from training.graphs import Graph

Rows = NDArray[np.float32]

BATCHES: Final = (1, 2, 7, 64)
"""Batch sizes at which answers are compared: one, the exported one, an odd one, a usual one."""

TOLERANCE: Final = 1e-5
"""Absolute plus relative. Untrained nets differ by 1e-7; logits of some hundreds round at 3e-5."""


class Session:
    """A graph in ONNX Runtime on one CPU thread, as a function from rows to named outputs."""

    def __init__(self, graph: Graph) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(graph.content, options, providers=["CPUExecutionProvider"])
        self._input, self._outputs = graph.inputs[0], graph.outputs

    def run(self, rows: Rows) -> dict[str, Rows]:
        """Return every output by name."""
        answers = self._session.run(list(self._outputs), {self._input: rows})
        return dict(zip(self._outputs, answers, strict=True))


def require_parity(graph: Graph, module: nn.Module, rows: Rows) -> dict[str, float]:
    """Compare a graph with the module it was made from.

    Args:
        graph: The exported graph.
        module: The same function in PyTorch, on the CPU; outputs in the graph's order.
        rows: Inputs to compare on; more than the largest of `BATCHES`.

    Returns:
        The largest absolute difference of each output, by `<graph>.<output>`.

    Raises:
        ParityFailed: If an output differs by more than `TOLERANCE`, absolute plus relative.
    """
    session = Session(graph)
    largest = {f"{graph.name}.{output}": 0.0 for output in graph.outputs}
    for batch in BATCHES:
        for first in range(0, len(rows) - batch + 1, max(BATCHES)):
            piece = rows[first : first + batch]
            actual = session.run(piece)
            with torch.inference_mode():
                expected = [output.numpy() for output in module(torch.from_numpy(piece))]
            for output, wanted in zip(graph.outputs, expected, strict=True):
                difference = np.abs(actual[output] - wanted)
                excess = difference - TOLERANCE * (1 + np.abs(wanted))
                # Not "any above": a NaN is above nothing.
                if not (excess <= 0).all():
                    raise ParityFailed(
                        output=f"{graph.name}.{output}",
                        batch=batch,
                        difference=float(difference.max()),
                        tolerance=TOLERANCE,
                    )
                key = f"{graph.name}.{output}"
                largest[key] = max(largest[key], float(difference.max()))
    return largest


def require_batch_independence(graph: Graph, rows: Rows) -> None:
    """Compare every row of a batch with the same row alone, bit for bit.

    Raises:
        BatchDependence: If one differs: then an answer would depend on who else calls.
    """
    session = Session(graph)
    alone = [session.run(row[np.newaxis]) for row in rows]
    for batch in BATCHES:
        together = session.run(rows[:batch])
        for output in graph.outputs:
            for row in range(min(batch, len(rows))):
                if together[output][row].tobytes() != alone[row][output][0].tobytes():
                    raise BatchDependence(output=f"{graph.name}.{output}", batch=batch, row=row)
