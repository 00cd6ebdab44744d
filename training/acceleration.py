"""Faster steps: the objective compiled, and on a GPU the whole step captured once and replayed as a CUDA graph.

Both are attempts. Where one fails, the log says why and the step runs as it is written.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, Literal, cast

import torch
from torch import Tensor, nn

WARM_UP_STEPS: Final = 3
"""Steps of a run before its step is captured: libraries choose kernels and allocate in their first calls."""

_MAX_REASON: Final = 300

logger = logging.getLogger(__name__)

Step = Callable[[Tensor, Tensor], Tensor]
"""From data and noise to what is recorded; moves the weights."""


@contextmanager
def matrix_products(precision: Literal["ieee", "tf32"], device: torch.device) -> Iterator[None]:
    """Compute float32 matrix products and convolutions of a GPU in this precision inside the block."""
    if device.type != "cuda":
        yield
        return
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = products.fp32_precision, convolutions.fp32_precision
    products.fp32_precision = convolutions.fp32_precision = precision
    try:
        yield
    finally:
        products.fp32_precision, convolutions.fp32_precision = before


def compiled(objective: nn.Module, data: Tensor, noise: Tensor, kl_weight: Tensor) -> nn.Module:
    """Return the objective compiled by `torch.compile`, or the objective itself where that fails.

    Args:
        objective: A `training.step_objective.StepObjective`.
        data: Some rows, of the shape that every batch will have; a forward and a backward pass are tried on them.
        noise: Their noise.
        kl_weight: As in every step.
    """
    try:
        made = cast("nn.Module", torch.compile(objective, dynamic=False))
        value, _ = made(data, noise, kl_weight)
        torch.autograd.backward(-value)
    except Exception as error:  # noqa: BLE001  # a compiler, a C++ compiler and a driver raise almost anything
        logger.warning("--compile: torch.compile failed, no faster steps (%s)", _reason(error))
        made = objective
    objective.zero_grad(set_to_none=True)
    return made


class GraphedStep:
    """A step that is captured after a few calls, then replayed: one launch in place of two hundred.

    The first calls are steps of the run too. What changes from step to step must lie in tensors that stay where
    they are: weights, optimiser state, step size, KL weight.

    Args:
        step: What to capture; no host synchronisation inside.
        device: Where it runs.
    """

    def __init__(self, step: Step, device: torch.device) -> None:
        self._step, self._device = step, device
        self._num_calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._has_failed = False
        self._data = self._noise = self._recorded = torch.empty(0)

    def __call__(self, data: Tensor, noise: Tensor) -> Tensor:
        """Run one step and return what it records; the next call writes it anew."""
        if self._graph is None and not self._has_failed and self._num_calls >= WARM_UP_STEPS:
            self._capture(data, noise)
        self._num_calls += 1
        if self._graph is None:
            with self._side_stream():
                return self._step(data, noise)
        self._data.copy_(data)
        self._noise.copy_(noise)
        self._graph.replay()
        return self._recorded

    def _capture(self, data: Tensor, noise: Tensor) -> None:
        """Record the kernels of one step; none of them runs."""
        self._data, self._noise = data.clone(), noise.clone()
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._recorded = self._step(self._data, self._noise)
        except Exception as error:  # noqa: BLE001  # drivers and libraries raise almost anything
            logger.warning("--compile: no CUDA graph, kernels are launched one by one (%s)", _reason(error))
            self._has_failed = True
            return
        self._graph = graph

    @contextmanager
    def _side_stream(self) -> Iterator[None]:
        """Run the warm-up beside the default stream, as a capture needs it."""
        if self._has_failed or self._device.type != "cuda":
            yield
            return
        main = torch.cuda.current_stream(self._device)
        side = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        side.wait_stream(main)
        with torch.cuda.stream(side):
            yield
        main.wait_stream(side)


def _reason(error: Exception) -> str:
    """Return one line of an error that may be pages long."""
    return " ".join(f"{type(error).__name__}: {error}"[:_MAX_REASON].split())


def stepping(step: Step, *, is_captured: bool, device: torch.device) -> Step:
    """Return the step, captured on request where there is a GPU."""
    return GraphedStep(step, device) if is_captured and device.type == "cuda" else step
