"""Row 23: what autograd sees of a sample, drawn as two computation graphs and tested on them."""

import re
from itertools import pairwise
from typing import Final, NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from torch import Tensor
from torch.autograd.graph import Node

from training import estimators, gaussians, presets
from training.data import Dataset, binarise_rows
from training.estimators import GaussianLatents
from training.models.vae import VAE
from training.noise import TrainingStream, generator
from training.study import claims, figures, sampled
from training.study.claims import Check, Checks, Figure, Section, Table
from training.study.figures import INK, MUTED, PALETTE
from training.study.setup import Study
from training.variance_probe import quadratic

_BLUE, _RED, *_ = PALETTE

_TEXT: Final = r"""
Why does a program not simply differentiate through a sample? Because drawing is not an operation that has a
derivative. A random generator returns numbers; that their distribution was made from $\mu$ and $\sigma$ is not
written into them. What $f$ receives is a constant, and the backward pass ends there.

Reparametrisation draws the same numbers in another order of work: first the noise, which depends on nothing,
then $z = \mu + \sigma \epsilon$, an ordinary addition and multiplication. The forward values are the same to the
last bit. But now the path from $f$ back to $\phi$ consists of operations with derivatives, and the random node
has been moved to the side, where no gradient has to pass.
"""

_CAPTION: Final = r"""
The two graphs. Boxes are computed, rounded ones are drawn at random; black arrows are the forward pass, red ones
the gradient. Above: plain sampling, where the gradient stops at the random node. Below: reparametrised, where it
goes round it.
"""

_CONCLUSION: Final = r"""
The score function reaches $\phi$ in a third way: its sample is the constant of the upper graph, but it is put into
$\log q_\phi(z)$, which depends on $\phi$ openly. That is why it works where no path exists.
"""


def two_graphs(study: Study) -> Section:
    """Row 23: a plainly drawn sample is a constant, a reparametrised one is not; both have the same value."""
    parameters = torch.tensor([0.4, -1.1, 0.2, -0.6], dtype=torch.float64, requires_grad=True)
    noise = sampled.noise(study.source(2300), 1, 2)
    sampled_graph = Outcome.of(parameters, latents_of(parameters).sample(noise))
    path_graph = Outcome.of(parameters, latents_of(parameters).rsample(noise))
    scored = estimators.score_function(quadratic, latents_of(parameters), noise)
    return Section(
        "Two computation graphs",
        (23,),
        (
            _TEXT,
            Figure("two-computation-graphs", _CAPTION, _picture()),
            Table(
                ("sample", "value of f", "operations that autograd recorded, from f back", "reaches φ"),
                (sampled_graph.row("plain"), path_graph.row("reparametrised")),
                "What PyTorch kept of the two graphs, for equal noise.",
            ),
            Checks(
                (
                    *graph_checks(sampled_graph, path_graph),
                    _matches_differences(parameters.detach(), noise),
                    claims.holds(
                        "score-function surrogate: its graph reaches φ",
                        reaches(scored, parameters),
                        source="through log q",
                    ),
                    *vae_checks(study.dataset(presets.digits()), study.source(2301)),
                )
            ),
            _CONCLUSION,
        ),
    )


class Outcome(NamedTuple):
    """What became of one way of sampling."""

    latents: Tensor
    value: float
    """f(z)."""
    operations: tuple[str, ...]
    """Names of what autograd recorded between f and its leaves."""
    is_reached: bool
    """Whether phi is among the leaves."""

    @classmethod
    def of(cls, parameters: Tensor, latents: Tensor) -> "Outcome":
        """Return the outcome for latents that were made from the parameters."""
        result = quadratic(latents).sum()
        operations = tuple(re.sub(r"Backward\d+$", "", node.name()) for node in recorded(result))
        return cls(latents.detach(), result.item(), operations, reaches(result, parameters))

    def row(self, name: str) -> tuple[str, str, str, str]:
        """Return the outcome as a row of a table."""
        kept = ", ".join(self.operations) if self.operations else "none: z is a constant"
        return name, f"{self.value:.10f}", kept, "yes" if self.is_reached else "no"


def latents_of(parameters: Tensor) -> GaussianLatents:
    """Return q with mean and log variance from one vector of parameters, phi."""
    mean, log_var = parameters.chunk(2)
    return GaussianLatents(mean, log_var)


def recorded(result: Tensor) -> list[Node]:
    """Return the nodes that a backward pass from a result would visit, without the leaves; nearest first."""
    found, waiting = list[Node](), [result.grad_fn]
    while waiting:
        node = waiting.pop(0)
        if node is None or node in found or node.name().endswith("AccumulateGrad"):
            continue
        found.append(node)
        waiting += [before for before, _ in node.next_functions]
    return found


def reaches(result: Tensor, leaf: Tensor) -> bool:
    """Return whether a backward pass from a result would arrive at a leaf."""
    nodes = recorded(result)
    leaves = [before for node in nodes for before, _ in node.next_functions if before is not None]
    return any(getattr(node, "variable", None) is leaf for node in leaves)


def graph_checks(plain: Outcome, path: Outcome) -> list[Check]:
    """Return the checks of both graphs."""
    return [
        claims.holds(
            "plain sample: f does not depend on φ for autograd",
            not plain.is_reached,
            source="a draw has no derivative",
        ),
        claims.holds(
            "reparametrised sample: the graph reaches φ", path.is_reached, source="z is a smooth function of φ"
        ),
        claims.holds(
            "equal noise gives equal latents, bit for bit",
            torch.equal(plain.latents, path.latents) and plain.value == path.value,
            source="the same arithmetic",
        ),
    ]


def _matches_differences(parameters: Tensor, noise: Tensor) -> Check:
    """Check the pathwise gradient against central differences with the noise held fixed."""
    step = 1e-5

    def value(at: Tensor) -> Tensor:
        return quadratic(latents_of(at).rsample(noise)).sum()

    leaf = parameters.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(value(leaf), leaf)
    units = step * torch.eye(len(parameters), dtype=parameters.dtype)
    differences = torch.stack(
        [(value(parameters + unit) - value(parameters - unit)) / (2 * step) for unit in units]
    )
    return claims.at_most(
        "pathwise gradient against central differences, largest error",
        float((gradient - differences).abs().max()),
        1e-8,
        source="error of the differences: step² times the third derivative, rounding / step; both below 1e-9",
        unit="",
    )


def vae_checks(dataset: Dataset, source: torch.Generator) -> list[Check]:
    """Return the checks on a VAE: whose parameters get a gradient from log p(x | z), by kind of sample."""
    vae = VAE(presets.digits().model, dataset.data_shape, generator(0, TrainingStream.INIT))
    data = binarise_rows(dataset.test[:8], seed=0)
    mean, log_var = vae.posterior(data)
    noise = torch.randn(mean.shape, generator=source)
    path = gaussians.rsample(mean, log_var, noise)
    with_gradient = {
        name: _with_gradient(vae, vae.likelihood(latents).log_prob(data).sum())
        for name, latents in (("plain", path.detach()), ("path", path))
    }
    encoder, decoder = (
        {name for name, _ in vae.named_parameters() if name.startswith(part)} for part in ("encoder", "decoder")
    )
    return [
        claims.holds(
            "VAE, plain sample: log p(x given z) moves all of the decoder and nothing of the encoder",
            with_gradient["plain"] == decoder,
            source="z is a constant",
        ),
        claims.holds(
            "VAE, reparametrised: it moves all of both",
            with_gradient["path"] == encoder | decoder,
            source="z depends on the encoder",
        ),
    ]


def _with_gradient(vae: VAE, result: Tensor) -> set[str]:
    """Return the names of the parameters whose gradient exists and is not zero everywhere."""
    names, parameters = zip(*vae.named_parameters(), strict=True)
    found = torch.autograd.grad(result, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
    return {name for name, each in zip(names, found, strict=True) if bool(each.any())}


# The drawing

_HALF_HEIGHT: Final = 0.34
_FORWARD, _BACKWARD = 0.13, -0.13
"""Heights of the arrows above and below the middle of the boxes."""


class _Drawn(NamedTuple):
    """A node of a picture."""

    place: tuple[float, float]
    half_width: float
    label: str
    is_random: bool = False

    @property
    def left(self) -> float:
        return self.place[0] - self.half_width

    @property
    def right(self) -> float:
        return self.place[0] + self.half_width


def _picture() -> bytes:
    made = figures.figure(width=7.0, height=3.9)
    above, below = figures.axes(made, 2, 1, height_ratios=(1, 1.5))[:, 0]
    phi = _Drawn((0.5, 0), 0.4, r"$\phi$")
    moments = _Drawn((2.9, 0), 0.7, r"$\mu_\phi, \; \sigma_\phi$")
    drawn = _Drawn((6.1, 0), 1.1, r"$z \sim N(\mu_\phi, \sigma_\phi^2)$", is_random=True)
    computed = _Drawn((6.1, 0), 1.1, r"$z = \mu_\phi + \sigma_\phi \, \epsilon$")
    noise = _Drawn((6.1, 1.3), 0.9, r"$\epsilon \sim N(0, I)$", is_random=True)
    result = _Drawn((9.4, 0), 0.5, r"$f(z)$")
    _draw(above, (phi, moments, drawn, result), title="Plain sampling", num_gradients=1)
    _cross(above, moments, drawn)
    _draw(below, (phi, moments, computed, result), title="Reparametrised", num_gradients=3)
    _node(below, noise)
    _arrow(below, (6.1, 1.3 - _HALF_HEIGHT), (6.1, _HALF_HEIGHT), INK)
    below.set_ylim(-0.9, 1.75)
    return figures.png(made)


def _draw(axes: Axes, nodes: tuple[_Drawn, ...], *, title: str, num_gradients: int) -> None:
    """Draw a chain; the gradient goes so many steps back from its end."""
    axes.set(xlim=(0, 10), ylim=(-0.9, 0.7))
    axes.set_title(title, loc="left")
    axes.set_axis_off()
    for node in nodes:
        _node(axes, node)
    for before, after in pairwise(nodes):
        _arrow(axes, (before.right, _FORWARD), (after.left, _FORWARD), INK)
    for before, after in list(pairwise(nodes))[-num_gradients:]:
        _arrow(axes, (after.left, _BACKWARD), (before.right, _BACKWARD), _RED)
        axes.text((after.left + before.right) / 2, -0.6, "gradient", color=_RED, ha="center", fontsize=8.5)


def _node(axes: Axes, node: _Drawn) -> None:
    colour, face = (_RED, "#fbeff0") if node.is_random else (_BLUE, "#eaf1f8")
    style = f"round,pad=0,rounding_size={_HALF_HEIGHT}" if node.is_random else "square,pad=0"
    corner = node.left, node.place[1] - _HALF_HEIGHT
    axes.add_patch(
        FancyBboxPatch(
            corner, 2 * node.half_width, 2 * _HALF_HEIGHT, boxstyle=style, facecolor=face, edgecolor=colour, lw=1.3
        )
    )
    axes.text(*node.place, node.label, ha="center", va="center", fontsize=12)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    style = "-" if colour == INK else (0, (4, 2))
    axes.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle="-|>",
            mutation_scale=12,
            color=colour,
            lw=1.3,
            linestyle=style,
            shrinkA=2,
            shrinkB=2,
        )
    )


def _cross(axes: Axes, before: _Drawn, after: _Drawn) -> None:
    """Mark where the gradient ends, and why."""
    middle = (before.right + after.left) / 2
    axes.plot([middle], [_BACKWARD], marker="x", ms=9, mew=2, color=_RED)
    axes.text(middle, -0.6, "stops here", color=_RED, ha="center", fontsize=8.5)
    axes.text(after.place[0], -0.6, "random: no derivative", color=MUTED, ha="center", fontsize=8.5)
