"""Faster steps are the same steps; where they cannot be had, the log says so and nothing else changes."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from training import acceleration, presets
from training.acceleration import WARM_UP_STEPS, GraphedStep, compiled, matrix_products, stepping
from training.checkpoint import Checkpoint, RunFolder
from training.config import OptimizerConfig
from training.data import Dataset
from training.models.vae import VAE
from training.step_objective import StepObjective
from training.trainer import Trainer

from .conftest import CPU

COMPILED = 1e-5
"""Relative: a compiler orders the sums of float32 anew, over some dozens of terms of 6e-8 each."""

CAPTURED = 1e-3
"""Absolute, of weights of order 0.1 after some steps of Adam: it divides by the size of the gradient, so that the
rounding of a gradient near zero shows at the size of a step, which is at most 1e-3."""

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and PyTorch finds none")


@pytest.fixture
def batch(source: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return data, noise and KL weight."""
    data = (torch.rand((6, 1, 2, 2), generator=source) < 0.4).float()
    return data, torch.randn((6, 2), generator=source), torch.ones(())


def _value_and_gradients(
    objective: torch.nn.Module, batch: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, list[Tensor]]:
    value, _ = objective(*batch)
    return value, list(torch.autograd.grad(value, list(objective.parameters())))


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"
)  # torch imports it
def test_compiled_objective_is_the_objective(small_vae: VAE, batch: tuple[Tensor, Tensor, Tensor]) -> None:
    """Value and gradients agree up to rounding; a new weight of the KL compiles nothing anew."""
    plain = StepObjective(small_vae, OptimizerConfig())
    fast = compiled(plain, *batch)
    assert fast is not plain
    for weight in (0.25, 0.5):
        weighted = (*batch[:2], torch.tensor(weight))
        with torch.compiler.set_stance("fail_on_recompile"):
            found = _value_and_gradients(fast, weighted)
        torch.testing.assert_close(found, _value_and_gradients(plain, weighted), rtol=COMPILED, atol=COMPILED)
    assert all(weight.grad is None for weight in small_vae.parameters())


def test_without_a_compiler_the_objective_stays_as_it_is(
    small_vae: VAE,
    batch: tuple[Tensor, Tensor, Tensor],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The log names the reason in one line."""

    def absent(*_: object, **__: object) -> None:
        raise RuntimeError("No working\nC++ compiler")

    monkeypatch.setattr(torch, "compile", absent)
    plain = StepObjective(small_vae, OptimizerConfig())
    with caplog.at_level(logging.WARNING):
        assert compiled(plain, *batch) is plain
    assert "torch.compile failed, no faster steps (RuntimeError: No working C++ compiler)" in caplog.text


def test_step_that_cannot_be_captured_runs_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Every call is one step, before the attempt, at it and after it; the log says once why there is no graph."""

    def absent() -> None:
        raise RuntimeError("no driver")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", absent)
    calls: list[float] = []

    def step(data: Tensor, noise: Tensor) -> Tensor:
        calls.append(float(data + noise))
        return data + noise

    graphed = GraphedStep(step, CPU)
    with caplog.at_level(logging.WARNING):
        found = [float(graphed(torch.tensor(number), torch.tensor(0.5))) for number in range(WARM_UP_STEPS + 3)]
    assert found == calls == [number + 0.5 for number in range(WARM_UP_STEPS + 3)]
    assert caplog.text.count("no CUDA graph, kernels are launched one by one (RuntimeError: no driver)") == 1


def test_only_a_gpu_captures() -> None:
    """On a CPU there is nothing to capture; without the request nothing is."""

    def step(data: Tensor, _: Tensor) -> Tensor:
        return data

    assert stepping(step, is_captured=True, device=CPU) is step
    assert stepping(step, is_captured=False, device=torch.device("cuda")) is step
    assert isinstance(stepping(step, is_captured=True, device=torch.device("cuda")), GraphedStep)


def test_precision_of_matrix_products_is_set_and_set_back() -> None:
    """It is a switch of the whole process, so the block leaves it as it was, after an error too."""
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    with matrix_products("tf32", torch.device("cuda")):
        assert products.fp32_precision == "tf32"
        with matrix_products("ieee", torch.device("cuda")):
            assert products.fp32_precision == "ieee"
        assert products.fp32_precision == "tf32"
    assert products.fp32_precision == before

    def interrupted() -> None:
        with matrix_products("tf32", torch.device("cuda")):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert products.fp32_precision == before
    with matrix_products("tf32", CPU):
        assert products.fp32_precision == before


def _fit(dataset: Dataset, folder: Path, *, is_compiled: bool, **settings: Any) -> Checkpoint:  # noqa: ANN401
    """Fit on the GPU for two epochs and return the state."""
    folder.mkdir()
    config = presets.smoke().merge({"data": {"max_train_rows": None}, "optimizer": settings})
    trainer = Trainer(config, dataset, RunFolder(folder), device=torch.device("cuda"), is_compiled=is_compiled)
    return trainer.run(lambda: False, lambda _: None).checkpoint


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"precision": "bfloat16"},
        {
            "bound": "importance-weighted",
            "gradient": "doubly-reparametrised",
            "num_samples": 5,
            "warm_up_fraction": 0,
        },
        {"gradient": "score-function", "baseline": "leave-one-out", "num_samples": 4},
    ],
    ids=["elbo", "bfloat16", "doubly reparametrised", "score function"],
)
def test_captured_steps_are_the_steps(
    settings: dict[str, Any],
    digits: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Forty steps, most of them replayed, end where forty launched ones end; schedules go on in the graph."""
    monkeypatch.setattr(acceleration, "compiled", lambda objective, *_: objective)  # the graph alone
    plain = _fit(digits, tmp_path / "plain", is_compiled=False, **settings)
    captured = _fit(digits, tmp_path / "captured", is_compiled=True, **settings)
    assert "no CUDA graph" not in caplog.text
    assert captured.step == plain.step == 40
    for name, weight in plain.weights.items():
        torch.testing.assert_close(captured.weights[name], weight, rtol=0, atol=CAPTURED)


@needs_gpu
@pytest.mark.gpu
def test_captured_run_resumes(digits: Dataset, tmp_path: Path) -> None:
    """A checkpoint holds nothing of the graph: a run goes on with one or without."""
    folder = RunFolder(tmp_path / "first")
    state = _fit(digits, folder.path, is_compiled=True)
    longer = state.config.override(["optimizer.epochs=3"])
    device = torch.device("cuda")
    ends = []
    for is_compiled in (False, True):
        trainer = Trainer(longer, digits, folder, device=device, is_compiled=is_compiled)
        trainer.restore(state)
        ends.append(trainer.run(lambda: False, lambda _: None).checkpoint)
    assert ends[0].step == ends[1].step == 60
    for name, weight in ends[0].weights.items():
        torch.testing.assert_close(ends[1].weights[name], weight, rtol=0, atol=CAPTURED)


@needs_gpu
@pytest.mark.gpu
def test_a_step_does_not_wait_for_the_device(digits: Dataset, tmp_path: Path) -> None:
    """Between two validations no number is read from the GPU: PyTorch would raise."""
    config = presets.smoke().merge({"data": {"max_train_rows": None}})
    trainer = Trainer(config, digits, RunFolder(tmp_path), device=torch.device("cuda"))
    trainer.run(_after(2), lambda _: None)  # caches and lazy initialisation may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            trainer._take_step()  # noqa: SLF001  # a run also saves, which reads
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _after(num_steps: int) -> Any:  # noqa: ANN401  # a callable with a memory
    answers = iter([False] * (num_steps - 1) + [True])
    return lambda: next(answers)
