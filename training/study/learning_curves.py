"""Short training runs that are compared: the held-out bound against steps."""

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn

from training import data
from training.study import figures

_POINTS: Final = 20


class LearningCurve(NamedTuple):
    """What a run reached: numbers of steps, and the held-out bound after each, nats."""

    name: str
    steps: tuple[int, ...]
    elbo: tuple[float, ...]


class Recipe(NamedTuple):
    """How long and how fast."""

    num_steps: int
    learning_rate: float = 3e-3
    """Step size of Adam."""
    batch_size: int = 100


def learning_curve(
    name: str,
    model: nn.Module,
    *,
    objective: Callable[[Tensor, torch.Generator], Tensor],
    measure: Callable[[], float],
    pixels: Tensor,
    recipe: Recipe,
    source: torch.Generator,
) -> LearningCurve:
    """Fit a model in place and return how the held-out bound went, at twenty points.

    Args:
        name: Of the curve.
        model: What is fitted.
        objective: Batch of binary images and source of noise to what is climbed, one value per row.
        measure: Returns the held-out bound of the model as it is.
        pixels: uint8, shape (n, ...); binarised afresh at each visit.
        recipe: Steps, step size and batch.
        source: Order, binarisation and noise.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.learning_rate)
    interval = max(1, recipe.num_steps // _POINTS)
    steps, found = [0], [measure()]
    for step in range(1, recipe.num_steps + 1):
        chosen = pixels[torch.randint(len(pixels), (recipe.batch_size,), generator=source)]
        loss = -objective(data.binarise(chosen, source), source).mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        if step % interval == 0 or step == recipe.num_steps:
            steps.append(step)
            found.append(measure())
    return LearningCurve(name, tuple(steps), tuple(found))


def picture(
    curves: Sequence[LearningCurve], colours: Sequence[str], *, level: tuple[str, float] | None = None
) -> bytes:
    """Return the curves as a PNG.

    Args:
        curves: What to draw.
        colours: One for each.
        level: Name and height of a line to compare with, nats.
    """
    made = figures.figure(height=3.2)
    (axes,) = figures.axes(made)[0]
    for curve, colour in zip(curves, colours, strict=True):
        axes.plot(curve.steps, curve.elbo, color=colour, label=curve.name)
    if level is not None:
        axes.axhline(level[1], color=figures.MUTED, ls="--", lw=1.2, label=level[0])
    axes.set(xlabel="steps", ylabel="held-out bound, nats")
    figures.legend_below(made, axes, columns=3)
    return figures.png(made)
