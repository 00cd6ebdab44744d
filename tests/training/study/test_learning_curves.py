"""Short runs: they climb what they are given, from the same source in the same way."""

import pytest
import torch
from torch import Tensor, nn

from training.likelihoods import Bernoulli
from training.study import figures, learning_curves
from training.study.learning_curves import LearningCurve, Recipe


def run(seed: int, *, num_steps: int = 60) -> LearningCurve:
    """Fit the log odds of four independent pixels, one of which is always white."""
    model = nn.Linear(1, 4)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)

    def objective(batch: Tensor, _: torch.Generator) -> Tensor:
        return Bernoulli(model.bias).log_prob(batch)

    return learning_curves.learning_curve(
        "pixels",
        model,
        objective=objective,
        measure=lambda: float(torch.sigmoid(model.bias.detach())[0]),
        pixels=torch.tensor([[255, 0, 0, 0], [255, 255, 0, 0]], dtype=torch.uint8),
        recipe=Recipe(num_steps, learning_rate=0.1, batch_size=8),
        source=torch.Generator().manual_seed(seed),
    )


def test_the_model_learns() -> None:
    """A pixel that is always white becomes probable, from one half."""
    curve = run(1)
    assert curve.elbo[0] == 0.5
    assert curve.elbo[-1] > 0.9


@pytest.mark.parametrize("num_steps", [7, 60, 65])
def test_it_is_measured_before_the_first_and_after_the_last_step(num_steps: int) -> None:
    """And at about twenty places in between."""
    curve = run(1, num_steps=num_steps)
    assert curve.steps[0] == 0
    assert curve.steps[-1] == num_steps
    assert len(curve.steps) == len(curve.elbo) <= 23


def test_a_run_is_a_function_of_its_source() -> None:
    """Curves that share a source differ by nothing but what is compared."""
    assert run(1) == run(1)


def test_curves_are_drawn() -> None:
    """With a line to compare with, or without."""
    curves = [run(1), run(2)]
    plain = learning_curves.picture(curves, figures.PALETTE[:2])
    assert plain.startswith(b"\x89PNG")
    assert plain != learning_curves.picture(curves, figures.PALETTE[:2], level=("half", 0.5))
