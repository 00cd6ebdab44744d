r"""Rows 11, 12 and 17: what each term of the bound does to q, and in which sense q is near what it approximates.

In one dimension, where everything can be drawn, and with closed forms or integrals beside every number.
"""

import math
from collections.abc import Callable
from typing import Final, NamedTuple

import torch
from matplotlib.axes import Axes
from torch import Tensor

from training import estimators, gaussians, variance_probe
from training.estimators import GaussianLatents
from training.models.ppca import ProbabilisticPCA
from training.study import claims, figures, numerics, sampled
from training.study.bound import EXACT, gaussian, one_dimensional
from training.study.claims import Check, Checks, Correction, Figure, Section
from training.study.figures import INK, PALETTE
from training.study.setup import Study

_BLUE, _RED, _GREEN, _VIOLET, _ORANGE, _ = PALETTE

Objective = Callable[[Tensor, Tensor], Tensor]
"""Mean and standard deviation of q, shape (n,), to what is to be large, shape (n,)."""


# Row 11: what the entropy does

WEIGHT: Final = 1.0
SCALE: Final = 0.5
"""Noise of x = WEIGHT z + noise."""

DATUM: Final = 1.0

NUM_STEPS: Final = 1000
RATE: Final = 0.1
_START: Final = (-1.0, 1.0)
"""Mean and standard deviation of q at the start."""

_ENTROPY_TEXT: Final = r"""
In form A the bound is $\mathbb{E}_q[\log p(x, z)] + H(q)$. What does each term want? Fix one datum $x$ and look at
$\log p(x, z)$ as a landscape over $z$: high where $z$ explains $x$ well.

The first term alone asks for the highest average height. There is only one way to have it: sit on the peak with
all of $q$. Its standard deviation goes to zero, and one is left with a single point, the most probable $z$.
Nothing is said about how many other $z$ would do as well.

The entropy $H(q) = \log \sigma + \frac{1}{2} \log \, 2 \pi e$ pays for width. It grows without end as $q$ spreads
and falls without end as $q$ shrinks, and with both terms $q$ settles at the width at which the landscape falls
away as fast as the entropy rises. Here $x = w z + s \epsilon$ with noise $\epsilon$ from $N(0, 1)$, so that the
landscape is a parabola, and that width is exactly the posterior's: $\sigma^2 = s^2 / (w^2 + s^2)$.
"""

_BIMODAL_TEXT: Final = r"""
A parabola has one peak. What if there are two? Let $x \mid z \sim N(z^2, s^2)$: the datum tells $|z|$ but not the
sign, and the posterior has two equal humps. A single Gaussian must choose. Without the entropy it becomes a spike
on one of the peaks. With it, it takes the shape of *one hump* and ignores the other. A $q$ wide enough to cover
both would have to spend much of its mass on the valley between, where $\log p(x, z)$ is very low; the bound
punishes $q$ for being where the posterior is not, and hardly for being absent where the posterior is.
"""


class Path(NamedTuple):
    """q on its way up: means and standard deviations before each step and after the last, and the objective."""

    means: Tensor
    scales: Tensor
    values: Tensor


def climb(objective: Objective, *, num_steps: int = NUM_STEPS, rate: float = RATE) -> Path:
    """Return the path of plain gradient ascent in mean and log standard deviation."""
    mean = torch.tensor([_START[0]], dtype=torch.float64, requires_grad=True)
    log_scale = torch.tensor([math.log(_START[1])], dtype=torch.float64, requires_grad=True)
    visited = []
    for _ in range(num_steps):
        value = objective(mean, log_scale.exp()).sum()
        visited.append((mean.item(), math.exp(log_scale.item()), value.item()))
        slope, log_scale_slope = torch.autograd.grad(value, (mean, log_scale))
        with torch.no_grad():
            mean += rate * slope
            log_scale += rate * log_scale_slope
    with torch.no_grad():
        visited.append((mean.item(), math.exp(log_scale.item()), objective(mean, log_scale.exp()).item()))
    return Path(*torch.tensor(visited, dtype=torch.float64).T)


def objectives_of(model: ProbabilisticPCA) -> tuple[Objective, Objective]:
    """Return E_q[log p(x, z)] alone, and the bound, at the datum of this page."""

    def data(mean: Tensor) -> Tensor:
        return torch.full((len(mean), 1), DATUM, dtype=torch.float64)

    return (
        lambda mean, scale: model.expected_log_joint(data(mean), gaussian(mean, scale)),
        lambda mean, scale: model.elbo(data(mean), gaussian(mean, scale)),
    )


def entropy(study: Study) -> Section:  # noqa: ARG001  all experiments are called alike
    """Row 11: without the entropy q collapses to a point, with it q becomes the posterior; two humps."""
    joint, bound = objectives_of(one_dimensional(WEIGHT, SCALE))
    alone, whole = climb(joint), climb(bound)
    humps = Humps.fitted()
    return Section(
        "What the entropy does to $q$",
        (11,),
        (
            _ENTROPY_TEXT,
            _entropy_figure(alone, whole),
            Checks((*collapse_checks(alone), *posterior_checks(whole))),
            _BIMODAL_TEXT,
            _humps_figure(humps),
            Checks(hump_checks(humps)),
            Correction(
                article=r"Thanks to the entropy $q$ is spread out and covers most of the posterior.",
                right=r"It covers as much as its shape can without reaching where the posterior is not: "
                r"minimising $\mathrm{KL}(q \parallel p)$ is *zero-forcing*. With one hump that is all of it. "
                f"With two a Gaussian $q$ takes one and leaves the other out, and misses {humps.gap:.3f} nats, "
                r"about $\log \, 2$, of $\log p(x)$.",
            ),
        ),
    )


def posterior_variance(weight: float, scale: float) -> float:
    """Return the variance of p(z given x) where x = weight z + noise of that scale and z is N(0, 1)."""
    return scale**2 / (weight**2 + scale**2)


def collapse_checks(path: Path) -> tuple[Check, ...]:
    """Return that q shrinks for ever without the entropy, by the law of gradient flow.

    The objective falls off as -c sigma^2 / 2 with c = 1 / posterior variance, so that 1 / sigma^2 grows by 2 c per
    unit of time.
    """
    curvature = 1 / posterior_variance(WEIGHT, SCALE)
    expected = (_START[1] ** -2 + 2 * curvature * RATE * (len(path.scales) - 1)) ** -0.5
    name = "first term alone"
    return (
        claims.at_most(
            rf"{name}: largest $\sigma$ after a step / before it",
            float((path.scales[1:] / path.scales[:-1]).max()),
            1 - 1e-6,
            source="it shrinks in every step",
            unit="",
        ),
        claims.close(
            rf"{name}: $\sigma$ after {len(path.scales) - 1} steps",
            float(path.scales[-1]),
            expected,
            # A step is not a flow: it is off by rate * curvature * sigma^2 relative, of which the sum is taken.
            within=0.05 * expected,
            source=r"gradient flow: $\sigma^{-2}$ grows for ever",
            unit="",
        ),
        claims.close(
            f"{name}: mean",
            float(path.means[-1]),
            WEIGHT * DATUM / (WEIGHT**2 + SCALE**2),
            within=1e-6,
            source="the peak",
            unit="",
        ),
        claims.at_least(
            f"{name}: smallest gain in a step",
            float(path.values.diff().min()),
            0,
            source="no maximum, only a limit",
        ),
    )


def posterior_checks(path: Path) -> tuple[Check, ...]:
    """Return where the bound's own climb ends, and the best width for other models."""
    expected = posterior_variance(WEIGHT, SCALE)
    checks = [
        claims.close(
            rf"both terms: $\sigma^2$ after {len(path.scales) - 1} steps",
            float(path.scales[-1]) ** 2,
            expected,
            within=1e-9,
            source="the posterior, $s^2 / (w^2 + s^2)$",
            unit="",
        )
    ]
    for weight, scale in ((1.0, 1.0), (3.0, 0.5), (0.2, 2.0)):
        _, bound = objectives_of(one_dimensional(weight, scale))
        _, best_scale = best_gaussian(_negative(bound), [0.0], [1.0])
        checks.append(
            claims.close(
                rf"best $\sigma^2$ at $w = {weight:g}$, $s = {scale:g}$",
                float(best_scale) ** 2,
                posterior_variance(weight, scale),
                within=1e-6,
                source="the posterior",
                unit="",
            )
        )
    return tuple(checks)


def _negative(objective: Objective) -> Objective:
    return lambda mean, scale: -objective(mean, scale)


def best_gaussian(loss: Objective, means: list[float], scales: list[float]) -> tuple[Tensor, Tensor]:
    """Return means and standard deviations where a loss is least, one for each start."""
    mean = torch.tensor(means, dtype=torch.float64, requires_grad=True)
    log_scale = torch.tensor(scales, dtype=torch.float64).log().requires_grad_()
    numerics.minimise(lambda: loss(mean, log_scale.exp()).sum(), [mean, log_scale])
    return mean.detach(), log_scale.detach().exp()


def _density(points: Tensor, mean: float | Tensor, scale: float | Tensor) -> Tensor:
    return (-0.5 * ((points - mean) / scale).square()).exp() / (scale * math.sqrt(2 * math.pi))


_LANDSCAPE_STEPS: Final = (0, 2, 5, 20, 200)


def _entropy_figure(alone: Path, whole: Path) -> Figure:
    made = figures.figure(width=9.2, height=3.2)
    spike, settled, widths = figures.axes(made, 1, 3)[0]
    points = torch.linspace(-3, 3, 1201, dtype=torch.float64)
    spread = math.sqrt(posterior_variance(WEIGHT, SCALE))
    posterior = _density(points, WEIGHT * DATUM / (WEIGHT**2 + SCALE**2), spread)
    for axes, path, title in ((spike, alone, "first term alone"), (settled, whole, "with the entropy")):
        axes.fill_between(points, posterior, color=_GREEN, alpha=0.25, linewidth=0, label="$p(x, z)$, scaled")
        for number, step in enumerate(_LANDSCAPE_STEPS):
            label = {0: "$q$, start", len(_LANDSCAPE_STEPS) - 1: "$q$, later"}.get(number)
            axes.plot(
                points,
                _density(points, path.means[step], path.scales[step]),
                color=_BLUE,
                alpha=0.25 + 0.75 * number / (len(_LANDSCAPE_STEPS) - 1),
                label=label,
            )
        axes.set(title=title, xlabel="$z$", ylim=(0, 5.5))
        axes.legend(frameon=False, loc="upper left")
    steps = torch.arange(1, len(alone.scales))
    widths.loglog(steps, alone.scales[1:], color=_RED, label="first term alone")
    widths.loglog(steps, whole.scales[1:], color=_BLUE, label="with the entropy")
    widths.axhline(spread, color=_GREEN, linestyle="--", label="posterior")
    widths.set(title=r"$\sigma$ of $q$", xlabel="step")
    widths.set_yticks([0.03, 0.1, 0.3, 0.6], ["0.03", "0.1", "0.3", "0.6"])
    widths.set_yticks([], minor=True)
    widths.legend(frameon=False, loc="lower left")
    return Figure(
        "entropy",
        f"Gradient ascent over $q$; $q$ is drawn at steps {', '.join(map(str, _LANDSCAPE_STEPS))}, faint to "
        "strong. Left: the first term alone draws $q$ together on the peak of $p(x, z)$, narrower with every "
        "step. Middle: with the entropy it becomes the posterior, which is $p(x, z)$ scaled to area one. "
        "Right: the width against the step; without the entropy it falls for ever.",
        figures.png(made),
    )


# Row 11: two humps

HUMP_DATUM: Final = 2.0
HUMP_SCALE: Final = 0.5
"""Noise of x = z^2 + noise."""


def hump_log_joint(latents: Tensor) -> Tensor:
    """Return log p(x, z) where z is N(0, 1) and x given z is N(z^2, s^2), at the datum of this page."""
    log_likelihood = -0.5 * ((HUMP_DATUM - latents.square()) / HUMP_SCALE).square()
    constant = math.log(2 * math.pi) + math.log(HUMP_SCALE)
    return log_likelihood - 0.5 * latents.square() - constant


def hump_expected_log_joint(mean: Tensor, scale: Tensor) -> Tensor:
    """Return E_q[log p(x, z)] in closed form: the second and fourth moments of a Gaussian."""
    second = mean.square() + scale.square()
    fourth = mean**4 + 6 * mean.square() * scale.square() + 3 * scale**4
    squares = HUMP_DATUM**2 - 2 * HUMP_DATUM * second + fourth
    constant = math.log(2 * math.pi) + math.log(HUMP_SCALE)
    return -0.5 * (squares / HUMP_SCALE**2 + second) - constant


def _hump_bound(mean: Tensor, scale: Tensor) -> Tensor:
    return hump_expected_log_joint(mean, scale) + gaussians.entropy((2 * scale.log()).unsqueeze(-1))


class Humps(NamedTuple):
    """Gaussians fitted to a posterior with two humps; nats."""

    log_evidence: float
    means: Tensor
    """Of the q with the largest bound, from starts on the left, in the middle and on the right."""
    scales: Tensor
    bounds: Tensor
    peak: float
    """Where p(x, z) is largest, z > 0."""

    @classmethod
    def fitted(cls) -> "Humps":
        """Fit by the bound from three starts."""
        line = numerics.grid(-6, 6, 1200)
        mean, scale = best_gaussian(_negative(_hump_bound), [-1.0, 0.0, 1.0], [0.5, 1.0, 0.5])
        return cls(
            log_evidence=float(line.log_integral(hump_log_joint(line.points.squeeze(1)))),
            means=mean,
            scales=scale,
            bounds=_hump_bound(mean, scale),
            peak=math.sqrt(HUMP_DATUM - 0.5 * HUMP_SCALE**2),
        )

    @property
    def gap(self) -> float:
        """What the best of them misses of log p(x)."""
        return self.log_evidence - float(self.bounds.max())


def hump_checks(humps: Humps) -> tuple[Check, ...]:
    """Return that a Gaussian takes one hump, what that costs, and that covering both costs more."""
    side = float(torch.special.ndtr(-humps.means[2] / humps.scales[2]))
    least = math.log(2) + torch.xlogy(torch.tensor([side, 1 - side]), torch.tensor([side, 1 - side])).sum().item()
    spike = float(hump_expected_log_joint(*torch.tensor([[humps.peak], [1e-6]], dtype=torch.float64)))
    grid = torch.linspace(-2.5, 2.5, 5001, dtype=torch.float64)
    return (
        claims.close(
            "peak of p(x, z), on a fine grid",
            float(grid[hump_log_joint(grid).argmax()].abs()),
            humps.peak,
            within=1e-3,
            source="where its derivative is zero; the grid's step",
            unit="",
        ),
        claims.close(
            r"first term of a spike on the peak",
            spike,
            float(hump_log_joint(torch.tensor(humps.peak, dtype=torch.float64))),
            within=1e-6,
            source="the height of the peak, its limit",
        ),
        claims.close(
            "means from left and right, their sum",
            float(humps.means[0] + humps.means[2]),
            0,
            within=1e-6,
            source="symmetry: one hump each",
            unit="",
        ),
        claims.at_most("mass of $q$ on the other hump's side", side, 1e-3, source="zero-forcing", unit=""),
        claims.between(
            "what a $q$ on one hump misses",
            humps.gap,
            least,
            math.log(2) + 0.05,
            source=r"at least $\log \, 2$ less the entropy of the side, by the data-processing inequality",
        ),
        claims.at_most(
            "bound of the best $q$ around zero - bound on one hump",
            float(humps.bounds[1] - humps.bounds[2]),
            -0.1,
            source="the valley costs more than the second hump",
        ),
    )


def _humps_figure(humps: Humps) -> Figure:
    made = figures.figure(width=9.2, height=3.1)
    drawn, surface = figures.axes(made, 1, 2)[0]
    points = torch.linspace(-3, 3, 1201, dtype=torch.float64)
    posterior = (hump_log_joint(points) - humps.log_evidence).exp()
    drawn.fill_between(points, posterior, color=_GREEN, alpha=0.25, linewidth=0, label="posterior")
    labels = ("largest bound, from the right", "best around zero")
    for index, colour, label in zip((2, 1), (_BLUE, _ORANGE), labels, strict=True):
        drawn.plot(points, _density(points, humps.means[index], humps.scales[index]), color=colour, label=label)
    drawn.axvline(humps.peak, color=_RED, linewidth=1.2, label="first term alone: a spike")
    drawn.set(xlabel="$z$", ylim=(0, 3.6))
    drawn.legend(frameon=False, loc="upper left")
    means, scales = torch.linspace(-2, 2, 161), torch.linspace(0.06, 1.2, 120)
    gap = humps.log_evidence - _hump_bound(*torch.meshgrid(means.double(), scales.double(), indexing="ij")).T
    levels = (0, 0.75, 0.9, 1.2, 1.6, 2.2, 3, 5, 9, 20)
    surface.contourf(means, scales, gap, levels=levels, cmap="Blues", extend="max")
    lines = surface.contour(means, scales, gap, levels=levels[1:7], colors=INK, linewidths=0.6)
    surface.clabel(lines, fmt="%g", fontsize=7.5)
    surface.plot(humps.means[[0, 2]], humps.scales[[0, 2]], "*", color=_RED, markersize=11)
    surface.set(xlabel="mean of $q$", ylabel=r"$\sigma$ of $q$", title=r"missed of $\log p(x)$, nats")
    surface.grid(visible=False)
    return Figure(
        "two-humps",
        rf"Left: the posterior of $x \mid z \sim N(z^2, s^2)$ at $x = {HUMP_DATUM:g}$ and three answers to it. "
        "Right: what the bound misses for every Gaussian $q$; there are two best ones (stars), one for each "
        "hump.",
        figures.png(made),
    )


# Row 12: the Kullback-Leibler divergence

_KL_TEXT: Final = r"""
The **Kullback-Leibler divergence** measures how well one distribution stands in for another,

$$\mathrm{KL}(q \parallel p) = \mathbb{E}_q \left[ \log \frac{q(z)}{p(z)} \right]
= -\mathbb{E}_q[\log p(z)] - H(q) ,$$

cross entropy less entropy. It is the price, in nats per symbol, of coding messages from $q$ with a code made for
$p$. It is never negative and zero only if both are the same. For Gaussians

$$\mathrm{KL}(N(\mu_1, \sigma_1^2) \parallel N(\mu_2, \sigma_2^2)) = \log \frac{\sigma_2}{\sigma_1}
+ \frac{\sigma_1^2 + (\mu_1 - \mu_2)^2}{2 \sigma_2^2} - \frac{1}{2} .$$

The average is over the *first* argument, so the order matters. $\mathrm{KL}(q \parallel p)$ is large where $q$ has
mass and $p$ has none: a $q$ that minimises it stays inside $p$, **zero-forcing**. $\mathrm{KL}(p \parallel q)$ is
large where $p$ has mass and $q$ has none: it makes $q$ cover all of $p$, and a Gaussian $q$ then has the mean and
the variance of $p$. Variational inference uses the first order, because averages over $q$ can be had by sampling
and averages over the unknown posterior cannot.
"""

PAIR: Final = ((1.0, 0.5), (0.0, 1.0))
"""Mean and standard deviation of the two Gaussians of the known values."""

HALF_DISTANCES: Final = tuple(0.1 * number for number in range(1, 41))
"""Half the distance between the two parts of the target, in units of their standard deviation."""

_SHOWN: Final = 3.0
_FAR: Final = 3.5
"""Half a distance at which the parts overlap in less than a thousandth of their mass."""


def asymmetry(study: Study) -> Section:
    """Row 12: the divergence, in both orders; what minimising each of them does."""
    fits = fit_both_orders()
    return Section(
        "The Kullback-Leibler divergence and its two orders",
        (12,),
        (
            _KL_TEXT,
            _orders_figure(fits),
            Checks((*known_kl_checks(), *law_checks(study.source(1200)), *order_checks(fits))),
            Correction(
                article="The KL divergence is a distance between distributions.",
                right=r"It is not one: it depends on the order, and it can be larger than the sum over a detour, "
                r"$\mathrm{KL}(N(0, 1) \parallel N(2, 1)) = 2$ although both halves of the way cost "
                r"$\frac{1}{2}$. It is a *divergence*: never negative, and zero only for equal distributions.",
            ),
        ),
    )


def _kl(first: tuple[float, float], second: tuple[float, float]) -> float:
    """Return the divergence between two Gaussians, given by mean and standard deviation, in closed form."""
    values = (value for mean, scale in (first, second) for value in (mean, 2 * math.log(scale)))
    return float(gaussians.kl(*(torch.tensor([value], dtype=torch.float64) for value in values)))


def integrated_kl(first: tuple[float, float], second: tuple[float, float]) -> tuple[float, float]:
    """Return cross entropy and entropy of the first, as integrals; their difference is the divergence."""
    line = numerics.grid(first[0] - 12 * first[1], first[0] + 12 * first[1], 400)
    z = line.points.squeeze(1)
    log_first, log_second = (
        -0.5 * ((z - mean) / scale).square() - math.log(scale * math.sqrt(2 * math.pi))
        for mean, scale in (first, second)
    )
    return -float(line.expectation(log_first, log_second)), -float(line.expectation(log_first, log_first))


def known_kl_checks() -> tuple[Check, ...]:
    """Return closed forms and integrals against known digits, in both orders."""
    first, second = PAIR
    there, back = _kl(first, second), _kl(second, first)
    cross, entropy = integrated_kl(first, second)
    half = _kl((0, 1), (1, 1))
    known = "known to seven decimals"
    return (
        claims.close(r"$\mathrm{KL}(N(1, 0.5^2) \parallel N(0, 1))$", there, 0.8181472, within=6e-8, source=known),
        claims.close(r"$\mathrm{KL}(N(0, 1) \parallel N(1, 0.5^2))$", back, 2.8068528, within=6e-8, source=known),
        claims.close(r"entropy of $N(\cdot, 0.5^2)$, an integral", entropy, 0.7257913, within=6e-8, source=known),
        claims.close(
            "cross entropy - entropy, integrals", cross - entropy, there, within=EXACT, source="closed form"
        ),
        claims.close(
            r"$\mathrm{KL}(N(0, 1) \parallel N(2, 1))$ less both halves of the way",
            _kl((0, 1), (2, 1)) - 2 * half,
            1,
            within=EXACT,
            source="no triangle inequality",
        ),
    )


def law_checks(source: torch.Generator, *, num: int = 100_000) -> tuple[Check, ...]:
    """Return that random divergences are never negative and depend on the order, and those to itself are zero."""
    mean, other_mean, log_var, other_log_var = sampled.noise(source, 4, num, 3)
    there = gaussians.kl(mean, log_var, other_mean, other_log_var)
    back = gaussians.kl(other_mean, other_log_var, mean, log_var)
    return (
        claims.at_least(
            f"smallest of {num} random divergences", float(there.min()), 0, source="Gibbs' inequality"
        ),
        claims.at_most(
            "largest divergence of these from themselves",
            float(gaussians.kl(mean, log_var, mean, log_var).abs().max()),
            1e-12,
            source="equal distributions",
        ),
        claims.at_least(
            "median difference of the two orders", float((there - back).abs().median()), 0.1, source="order"
        ),
    )


class Orders(NamedTuple):
    """Best Gaussians for targets of two parts N(-a, 1), N(a, 1), one for each half distance a."""

    means: Tensor
    """Of the q with the least KL(q, p); the positive one of two."""
    scales: Tensor
    divergences: Tensor
    covering_means: Tensor
    """Of the q with the least KL(p, q)."""
    covering_scales: Tensor


def fit_both_orders(half_distances: tuple[float, ...] = HALF_DISTANCES) -> Orders:
    """Minimise both orders of the divergence to a target of two parts, for many distances at once."""
    halves = torch.tensor(half_distances, dtype=torch.float64)
    noise = numerics.grid(-9, 9, 360)
    masses = _density(noise.points.squeeze(1), 0, 1) * noise.volume

    def divergence(mean: Tensor, scale: Tensor) -> Tensor:
        points = mean.unsqueeze(1) + scale.unsqueeze(1) * noise.points.squeeze(1)
        expected = _log_parts(points, halves.unsqueeze(1)) @ masses
        return -expected - gaussians.entropy((2 * scale.log()).unsqueeze(1))

    line = numerics.grid(-16, 16, 640).points.squeeze(1)
    log_target = _log_parts(line, halves.unsqueeze(1))
    target = log_target.softmax(dim=1)

    def covering(mean: Tensor, scale: Tensor) -> Tensor:
        squares = ((line - mean.unsqueeze(1)) / scale.unsqueeze(1)).square()
        return 0.5 * (target * squares).sum(dim=1) + scale.log()

    starts = [
        best_gaussian(divergence, means.tolist(), scales.tolist())
        for means, scales in ((halves, torch.ones_like(halves)), (0.01 * halves, (1 + halves.square()).sqrt()))
    ]
    values = torch.stack([divergence(*start) for start in starts])
    best = values.argmin(dim=0, keepdim=True)
    means, scales = (torch.stack(parts).gather(0, best).squeeze(0) for parts in zip(*starts, strict=True))
    return Orders(
        means.abs(), scales, values.amin(dim=0), *best_gaussian(covering, [0.5] * len(halves), [1.0] * len(halves))
    )


def _log_parts(points: Tensor, halves: Tensor) -> Tensor:
    """Return the log density of the target of two parts."""
    parts = [-0.5 * (points - sign * halves).square() for sign in (-1, 1)]
    return torch.logaddexp(*parts) - math.log(2 * math.sqrt(2 * math.pi))


def order_checks(fits: Orders) -> tuple[Check, ...]:
    """Return moment matching in one order, and one part of two in the other."""
    halves = torch.tensor(HALF_DISTANCES, dtype=torch.float64)
    far = halves >= _FAR
    side = torch.special.ndtr(-fits.means[far] / fits.scales[far])
    least = math.log(2) + torch.xlogy(side, side) + torch.xlogy(1 - side, 1 - side)
    return (
        claims.at_most(
            r"least $\mathrm{KL}(p \parallel q)$: largest error of the variance, all distances",
            float((fits.covering_scales.square() - 1 - halves.square()).abs().max()),
            1e-6,
            source="moment matching: that of $p$, $1 + a^2$",
            unit="",
        ),
        claims.at_most(
            r"least $\mathrm{KL}(q \parallel p)$: largest error of mean and $\sigma$ when far apart",
            float(torch.maximum((fits.means - halves).abs(), (fits.scales - 1).abs())[far].max()),
            0.02,
            source="one part of two, $N(a, 1)$",
            unit="",
        ),
        claims.at_most(
            r"the same: largest difference of the divergence from $\log \, 2$",
            float((fits.divergences[far] - math.log(2)).abs().max()),
            0.01,
            source="half of $p$ is given up",
        ),
        claims.at_least(
            r"the same: smallest divergence less its limit",
            float((fits.divergences[far] - least).min()),
            0,
            source="data-processing inequality",
        ),
        claims.close(
            r"the same, $a = 0.1$: $\sigma^2$ while the parts are one hump",
            float(fits.scales[0]) ** 2,
            1 + HALF_DISTANCES[0] ** 2,
            within=1e-3,
            source=r"to order $a^4$ the variance of $p$",
            unit="",
        ),
    )


def _orders_figure(fits: Orders) -> Figure:
    made = figures.figure(width=9.2, height=3.1)
    drawn, widths = figures.axes(made, 1, 2)[0]
    index = HALF_DISTANCES.index(min(HALF_DISTANCES, key=lambda half: abs(half - _SHOWN)))
    points = torch.linspace(-9, 9, 801, dtype=torch.float64)
    target = _log_parts(points, torch.tensor(HALF_DISTANCES[index], dtype=torch.float64)).exp()
    drawn.fill_between(points, target, color=_GREEN, alpha=0.25, linewidth=0, label="$p$")
    inside, covering = r"least KL$(q \parallel p)$", r"least KL$(p \parallel q)$"
    drawn.plot(points, _density(points, fits.means[index], fits.scales[index]), color=_BLUE, label=inside)
    drawn.plot(
        points,
        _density(points, fits.covering_means[index], fits.covering_scales[index]),
        color=_RED,
        label=covering,
    )
    drawn.set(xlabel="$z$", ylim=(0, 0.6))
    drawn.legend(frameon=False, ncols=3, loc="upper center", columnspacing=1.2)
    widths.plot(HALF_DISTANCES, fits.covering_scales, color=_RED, label=rf"$\sigma$, {covering}")
    widths.plot(HALF_DISTANCES, fits.scales, color=_BLUE, label=rf"$\sigma$, {inside}")
    widths.plot(HALF_DISTANCES, fits.means, color=_BLUE, linestyle=":", label=f"|mean|, {inside}")
    widths.set(xlabel="half the distance of the two parts of $p$")
    widths.legend(frameon=False, loc="upper left")
    return Figure(
        "kl-orders",
        "Left: a target of two equal parts and the best Gaussian in each order of the divergence. One stays "
        "inside a single part, the other covers both and the empty middle. Right: the best Gaussians while the "
        "parts, each of standard deviation one, move apart. Near each other the two orders nearly agree; from "
        "some distance on the zero-forcing one lets go of one part.",
        figures.png(made),
    )


# Row 17: the gradient of E_q[log p(z)]

_PRIOR_TEXT: Final = r"""
One term of form A was left as a question: what is the gradient of $\mathbb{E}_q[\log p(z)]$ with respect to $q$?
For the standard normal prior and $q = N(\mu, \mathrm{diag}(\sigma^2))$ it needs no sampling, because the
logarithm of a Gaussian is a square and the mean of a square is $\mathbb{E}[z_j^2] = \mu_j^2 + \sigma_j^2$:

$$\mathbb{E}_q[\log p(z)] = -\frac{1}{2} \sum_{j=1}^d \left( \mu_j^2 + \sigma_j^2 \right)
- \frac{d}{2} \log \, 2 \pi, \qquad \frac{\partial}{\partial \mu_j} = -\mu_j,
\qquad \frac{\partial}{\partial \sigma_j} = -\sigma_j .$$

The prior pulls every mean to zero and every standard deviation to zero, with a force in proportion: it is a
spring. What keeps $\sigma$ from going there is once more the entropy, whose gradient $1 / \sigma_j$ pushes
outward. Together they are $-\mathrm{KL}(q \parallel p)$, at rest where $\mu = 0$ and $\sigma = 1$. The two
sampling estimators of this chapter must agree with these gradients on average, and do.
"""


def expected_log_prior(study: Study) -> Section:
    """Row 17: the gradient of E_q[log p(z)], in closed form, by autograd and by sampling."""
    source = study.source(1700)
    mean = torch.tensor([1.5, -0.7, 0.0], dtype=torch.float64)
    scale = torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64)
    num = study.size(quick=100_000, full=2_000_000)
    noise = sampled.noise(source, num, 1, 3)
    return Section(
        r"The gradient of $\mathbb{E}_q[\log p(z)]$",
        (17,),
        (
            _PRIOR_TEXT,
            _spring_figure(study),
            Checks((*autograd_checks(source), *sampling_checks(mean, scale, noise))),
        ),
    )


def autograd_checks(source: torch.Generator) -> tuple[Check, ...]:
    """Return the closed-form gradient against autograd, and the closed form of the value against an integral."""
    mean, log_scale = sampled.noise(source, 2, 1000, 3)
    leaves = mean.requires_grad_(), log_scale.exp().requires_grad_()
    value = gaussians.expected_standard_normal_log_prob(leaves[0], 2 * leaves[1].log())
    slopes = torch.autograd.grad(value.sum(), leaves)
    mean, scale = (leaf.detach() for leaf in leaves)
    error = max(
        float(((slope + leaf) / (1 + leaf.abs())).abs().max())
        for slope, leaf in zip(slopes, (mean, scale), strict=True)
    )
    line = numerics.grid(-10, 10, 400)
    z = line.points.squeeze(1)
    masses = _density(z, 0, 1) * line.volume
    latents = mean[:50, :1] + scale[:50, :1] * z
    integral = -0.5 * ((latents.square() + math.log(2 * math.pi)) @ masses)
    exact = gaussians.expected_standard_normal_log_prob(mean[:50, :1], 2 * scale[:50, :1].log())
    return (
        claims.at_most(
            r"$(-\mu, -\sigma)$ against autograd, 1000 random $q$ in three dimensions",
            error,
            1e-12,
            source="chain rule",
            unit="",
        ),
        claims.at_most(
            "closed form of the value against an integral, 50 random $q$",
            float((integral - exact).abs().max() / exact.abs().max()),
            1e-12,
            source="definition",
            unit="",
        ),
    )


def sampling_checks(mean: Tensor, scale: Tensor, noise: Tensor) -> tuple[Check, ...]:
    """Return value and gradients by sampling against the closed forms, one draw per row of noise.

    Args:
        mean: Of q, shape (d,).
        scale: Standard deviations, shape (d,).
        noise: Standard normal, shape (num, 1, d).
    """
    exact = float(gaussians.expected_standard_normal_log_prob(mean, 2 * scale.log()))
    draws = gaussians.standard_normal_log_prob(gaussians.rsample(mean, 2 * scale.log(), noise.squeeze(1)))
    expected = torch.cat((-mean, -scale))
    return (
        sampled.mean_is(f"value by {len(noise)} samples", draws, exact, source="closed form, 4 standard errors"),
        *(
            sampled.means_are(
                rf"gradient in $(\mu, \sigma)$, {name}, worst entry",
                gradient_draws(estimator, mean, scale, noise),
                expected,
                source=r"$(-\mu, -\sigma)$",
            )
            for name, estimator in ESTIMATORS.items()
        ),
    )


ESTIMATORS: Final[dict[str, variance_probe.Estimator]] = {
    "reparametrised": estimators.reparametrised,
    "score function": estimators.score_function,
}


def gradient_draws(estimator: variance_probe.Estimator, mean: Tensor, scale: Tensor, noise: Tensor) -> Tensor:
    """Return one gradient estimate in mean and standard deviation per row of noise, shape (num, 2 d)."""
    means = mean.expand(len(noise), -1).clone().requires_grad_()
    scales = scale.expand(len(noise), -1).clone().requires_grad_()
    latents = GaussianLatents(means, 2 * scales.log())
    surrogate = estimator(gaussians.standard_normal_log_prob, latents, noise)
    return torch.cat(torch.autograd.grad(surrogate.sum(), (means, scales)), dim=1)


def _spring_figure(study: Study) -> Figure:
    made = figures.figure(width=9.2, height=3.1)
    plain, whole, sampled_slopes = figures.axes(made, 1, 3)[0]
    means, scales = torch.linspace(-2, 2, 11), torch.linspace(0.25, 2.25, 9)
    mean, scale = torch.meshgrid(means, scales, indexing="ij")
    _draw_field(plain, mean, scale, -scale, r"gradient of $E_q[\log p(z)]$")
    _draw_field(whole, mean, scale, 1 / scale - scale, "with the entropy: of −KL")  # noqa: RUF001
    whole.plot(0, 1, "*", color=_RED, markersize=12)
    _draw_sampled(sampled_slopes, study)
    return Figure(
        "prior-gradient",
        r"Left: arrows show where the expected log prior alone pulls mean and width of $q$: to a point at zero. "
        r"Middle: with the entropy, to the prior (star). Right: the slope in $\sigma$ at $\mu = 1$ by 2000 "
        r"samples of each estimator, bars of two standard errors, on the exact line $-\sigma$.",
        figures.png(made),
    )


def _draw_field(axes: Axes, mean: Tensor, scale: Tensor, slope: Tensor, title: str) -> None:
    axes.quiver(mean, scale, -mean, slope, color=_BLUE, angles="xy", scale_units="xy", scale=7, width=0.006)
    axes.set(title=title, xlabel=r"$\mu$", ylabel=r"$\sigma$", xlim=(-2.3, 2.3), ylim=(0, 2.5))


def _draw_sampled(axes: Axes, study: Study) -> None:
    axes.plot([0, 2.2], [0, -2.2], color=_GREEN, label=r"exact, $-\sigma$")
    source, one = study.source(1701), torch.ones(1, dtype=torch.float64)
    for (name, estimator), colour, shift in zip(ESTIMATORS.items(), (_BLUE, _RED), (-0.02, 0.02), strict=True):
        places = torch.linspace(0.25, 2, 8, dtype=torch.float64)
        draws = [
            gradient_draws(estimator, one, place * one, sampled.noise(source, 2000, 1, 1))[:, 1]
            for place in places
        ]
        axes.errorbar(
            places + shift,
            [float(draw.mean()) for draw in draws],
            [2 * float(sampled.standard_error(draw)) for draw in draws],
            fmt="o",
            color=colour,
            markersize=4,
            label=name,
        )
    axes.set(title=r"slope in $\sigma$", xlabel=r"$\sigma$")
    axes.legend(frameon=False, loc="lower left")
