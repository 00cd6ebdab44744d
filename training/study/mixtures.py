r"""Rows 2 and 3: mixtures of Gaussians, of points in the plane and of answers to a question.

Their latent variable has a handful of values, so that log p, the posterior and the bound are sums; and the best
that any model can reach on these data is known by integrals that are done here.
"""

import itertools
import math
from typing import Final, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from training.models.gaussian_mixture import (
    Draw,
    GaussianMixture,
    MixtureFit,
    initial,
    three_clusters,
    variance_floor,
)
from training.models.mixture_density import MixtureDensityNetwork, inverse_problem
from training.study import claims, figures, numerics, sampled
from training.study.claims import Check, Checks, Correction, Figure, Section, Table
from training.study.figures import INK, MUTED, PALETTE
from training.study.setup import Study

_BLUE, _RED, _GREEN, _VIOLET, _ORANGE, _ = PALETTE
_NUM_SHOWN: Final = 700


# Row 2: three clusters

CLUSTERS_OPTIMUM: Final = -3.911664
"""E[log p(x)] of the three clusters under themselves, nats."""

CLUSTERS_SINGLE: Final = -4.569006
"""The same under the best single Gaussian, nats."""

_NUM_CLUSTERS: Final = 3
_NUM_STARTS: Final = 4
_NUM_PARAMETERS: Final = _NUM_CLUSTERS * (2 + 3) + 2
"""Means, covariances and free weights of three clusters in the plane."""

_CLUSTERS_TEXT: Final = r"""
The oldest latent variable model: points in the plane come in groups. The latent $z \in \{1, \ldots, K\}$ says
which group, and given the group the point is Gaussian,

$$p(z = k) = \pi_k, \qquad p(x \mid z = k) = N(x; m_k, S_k), \qquad p(x) = \sum_{k=1}^K \pi_k N(x; m_k, S_k) .$$

What one is given is the picture on the left: points without colours. Each was *made* by first choosing a colour,
as in the middle, but the colours are gone. Fitting the mixture to the points brings them back, up to their names:
by Bayes' rule the model knows how probable each group is for each point,
$p(z = k \mid x) = \pi_k N(x; m_k, S_k) / p(x)$.
"""

_EM_TEXT: Final = r"""
How is it fitted? If the colours were known, each group's mean and covariance could be read off. If means and
covariances were known, the colours could be guessed. **Expectation maximisation** (EM) does one after the other:

- *the step on* $q$: for every point set $q_i(k) = p(z = k \mid x_i)$ with the model as it is;
- *the step on* $p$: set $\pi_k$, $m_k$, $S_k$ to share, mean and covariance of the points, weighted by $q_i(k)$.

No step ever lowers $\log p(x)$, and keep the pattern in mind: the VAE will do the same two steps at once. The
other way is to climb the gradient of $\log p(x)$ itself; the sum over $k$ can be differentiated like anything
else. From most starts both arrive at the same place.
"""


class Clusters(NamedTuple):
    """A mixture fitted to points of the three clusters."""

    train: Draw
    fit: MixtureFit
    order: list[int]
    """Which fitted component stands where the truth has its first, second, third."""


def three_clusters_found(study: Study) -> Section:
    """Row 2: a Gaussian mixture finds the clusters that made the points, by EM and by gradient."""
    num = study.size(quick=10_000, full=100_000)
    truth = three_clusters()
    train = truth.sample(num, study.source(200))
    test = truth.sample(num, study.source(201)).data
    fit = GaussianMixture.fit(train.data, _NUM_CLUSTERS, study.source(202), num_starts=study.size(quick=2, full=4))
    found = Clusters(train, fit, _order_of(truth.means, fit.model.means))
    source, few = study.source(203), train.data[: study.size(quick=1000, full=10_000)]
    tried = [Paths.of(few, source) for _ in range(_NUM_STARTS)]
    paths = max(tried, key=lambda paths: paths.lower_end)
    models, bounds = steps_of_em(paths)
    return Section(
        "A Gaussian mixture: three clusters",
        (2,),
        (
            _CLUSTERS_TEXT,
            _scatter_figure(found),
            Checks((*known_value_checks(), *fit_checks(found, test))),
            _EM_TEXT,
            _paths_figure(paths, models),
            _starts_text(tried),
            Checks(path_checks(paths, bounds)),
        ),
    )


def known_value_checks() -> tuple[Check, ...]:
    """Return the best expected log-likelihoods, by quadrature, against their known values."""
    truth, plane = three_clusters(), numerics.grid(-12, 12, 240, dim=2)
    log_density = truth.log_prob(plane.points)
    mass = log_density.exp() * plane.volume
    mean = mass @ plane.points
    centred = plane.points - mean
    covariance = (mass.unsqueeze(1) * centred).T @ centred
    single = GaussianMixture(torch.ones(1, dtype=torch.float64), mean.unsqueeze(0), covariance.unsqueeze(0))
    return (
        claims.close(
            "expected log p of the true mixture, by an integral",
            float(mass @ log_density),
            CLUSTERS_OPTIMUM,
            within=5.1e-7,
            source="known to six decimals; no model has more",
        ),
        claims.close(
            "expected log p of the best single Gaussian",
            float(mass @ single.log_prob(plane.points)),
            CLUSTERS_SINGLE,
            within=5.1e-7,
            source="known to six decimals",
        ),
    )


def fit_checks(found: Clusters, test: Tensor) -> tuple[Check, ...]:
    """Return the fit against the truth on rows that it has not seen.

    Twice the fit's loss on n training rows is chi-squared with 17 degrees of freedom over n: at most
    (17 + 5 sqrt(34)) / 2n; and it shows on as many test rows with a deviation of sqrt(2 loss / n).
    """
    num, truth, model = len(test), three_clusters(), found.fit.model
    loss = (_NUM_PARAMETERS + 5 * math.sqrt(2 * _NUM_PARAMETERS)) / (2 * num)
    ours, theirs = float(model.log_prob(test).mean()), float(truth.log_prob(test).mean())
    rows = found.train.data
    best = truth.posterior(rows).argmax(dim=1).eq(found.train.clusters).double().mean()
    coloured = model.posterior(rows)[:, found.order].argmax(dim=1).eq(found.train.clusters).double().mean()
    return (
        claims.close(
            f"held-out log p of the fit, {num} points",
            ours,
            theirs,
            within=loss + 5 * math.sqrt(2 * loss / num),
            source="the true mixture on the same points",
        ),
        claims.at_least("the same, in absolute terms", ours, -3.93, source="the optimum less what a sample tells"),
        claims.at_most(
            "largest error of a mean",
            float((model.means[found.order] - truth.means).norm(dim=1).max()),
            0.1,
            source="the true means",
            unit="",
        ),
        claims.close(
            "share of points that get their own colour back",
            float(coloured),
            float(best),
            within=0.003,
            source="what the true model gets",
            unit="",
        ),
    )


class Paths(NamedTuple):
    """EM and gradient ascent from one start on the same points."""

    data: Tensor
    start: GaussianMixture
    em: MixtureFit
    gradient: MixtureFit

    @classmethod
    def of(cls, data: Tensor, source: torch.Generator) -> "Paths":
        """Run both from a random start."""
        start = initial(data, _NUM_CLUSTERS, source)
        em = start.refined(data, floor=variance_floor(data, _NUM_CLUSTERS, 1e-4))
        return cls(data, start, em, start.refined_by_gradient(data))

    @property
    def lower_end(self) -> float:
        """Mean log p where the less lucky of the two ended, nats per point."""
        return min(self.em.log_likelihoods[-1], self.gradient.log_likelihoods[-1])


def steps_of_em(paths: Paths) -> tuple[list[GaussianMixture], list[float]]:
    """Return EM's mixtures, the start first, and the mean bound after each step on q: its steps one by one."""
    floor = variance_floor(paths.data, _NUM_CLUSTERS, 1e-4)
    models, bounds = [paths.start], []
    for _ in paths.em.log_likelihoods[1:]:
        q = models[-1].posterior(paths.data)
        bounds.append(float(models[-1].elbo(paths.data, q).mean()))
        models.append(models[-1].maximised(paths.data, q, floor=floor))
    return models, bounds


def path_checks(paths: Paths, bounds: list[float]) -> tuple[Check, ...]:
    """Return that EM never loses, that its bound is tight, and that the gradient ends in the same place."""
    em, gradient = paths.em.log_likelihoods, paths.gradient.log_likelihoods
    gains = [after - before for before, after in itertools.pairwise(em)]
    misses = [abs(bound - log_prob) for bound, log_prob in zip(bounds, em, strict=False)]
    return (
        claims.at_least(
            "smallest gain of an EM step", min(gains), -1e-13, source="EM never lowers log p; rounding"
        ),
        claims.at_most(
            "bound after a step on $q$ and log p: largest difference", max(misses), 1e-9, source="tight"
        ),
        claims.close(
            "mean log p by gradient", gradient[-1], em[-1], within=1e-8, source="EM, which stops at gains of 1e-9"
        ),
        claims.holds(
            "both stopped by themselves", paths.em.is_converged and paths.gradient.is_converged, source="fit"
        ),
    )


def _order_of(reference: Tensor, means: Tensor) -> list[int]:
    """Return which of the means is at the first, second, ... of the reference; names of clusters are arbitrary."""
    orders = itertools.permutations(range(len(reference)))
    return list(min(orders, key=lambda order: float((means[list(order)] - reference).square().sum())))


_CLUSTER_COLOURS: Final = (_BLUE, _RED, _GREEN)


def _scatter_figure(found: Clusters) -> Figure:
    made = figures.figure(width=9.2, height=3.3)
    plain, coloured, guessed = figures.axes(made, 1, 3, sharex=True, sharey=True)[0]
    data, clusters = found.train.data[:_NUM_SHOWN], found.train.clusters[:_NUM_SHOWN]
    model = found.fit.model
    shares = model.posterior(data)[:, found.order]
    palette = torch.tensor([_rgb(colour) for colour in _CLUSTER_COLOURS], dtype=torch.float64)
    colours = (INK, palette[clusters].tolist(), (shares @ palette).tolist())
    titles = ("given: points", "hidden: which cluster made each", "found: its probabilities, mixed")
    for axes, colour, title in zip((plain, coloured, guessed), colours, titles, strict=True):
        axes.scatter(*data.T.tolist(), c=colour, s=6, alpha=0.75, linewidths=0)
        axes.set(title=title, aspect="equal")
    for component, colour in zip(found.order, _CLUSTER_COLOURS, strict=True):
        _draw_component(guessed, model, component, colour)
    return Figure(
        "three-clusters",
        f"{_NUM_SHOWN} of the points. Left: what the model is given. Middle: the cluster that made each point, "
        "which the model never sees. Right: the fitted mixture, ellipses at one and two standard deviations; "
        "each point has the colours of the clusters mixed by their probabilities, so that points between two "
        "clusters are purple or brown.",
        figures.png(made),
    )


def _draw_component(
    axes: Axes, model: GaussianMixture, component: int, colour: str, *, width: float = 1.6
) -> None:
    angle = torch.linspace(0, 2 * math.pi, 80, dtype=torch.float64)
    circle = torch.stack((angle.cos(), angle.sin()))
    factor = torch.linalg.cholesky(model.covariances[component])
    for radius in (1, 2):
        ellipse = model.means[component].unsqueeze(1) + radius * factor @ circle
        axes.plot(*ellipse.tolist(), color=colour, linewidth=width / radius)


def _rgb(colour: str) -> tuple[float, ...]:
    return tuple(int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5))


def _starts_text(tried: list[Paths]) -> str:
    top = max(max(paths.em.log_likelihoods[-1], paths.gradient.log_likelihoods[-1]) for paths in tried)
    reached = {
        name: sum(fit.log_likelihoods[-1] > top - 1e-6 for fit in fits)
        for name, fits in (
            ("EM", [paths.em for paths in tried]),
            ("the gradient", [paths.gradient for paths in tried]),
        )
    }
    counts = " and ".join(f"{name} from {num} of {len(tried)}" for name, num in reached.items())
    return (
        "Neither way is safe from ending on a lower hill, where one component covers two clusters and two share "
        f"the third. Random starts reached the highest maximum found as follows: {counts}. So one starts several "
        "times and keeps the best."
    )


def _paths_figure(paths: Paths, models: list[GaussianMixture]) -> Figure:
    made = figures.figure(width=9.2, height=3.2)
    where, how_far = figures.axes(made, 1, 2, width_ratios=(1, 1.1))[0]
    where.scatter(*paths.data[:_NUM_SHOWN].T.tolist(), color=MUTED, s=4, alpha=0.4, linewidths=0)
    order = _order_of(three_clusters().means, models[-1].means)
    for component, colour in zip(order, _CLUSTER_COLOURS, strict=True):
        steps = torch.stack([model.means[component] for model in models])
        where.plot(*steps.T.tolist(), "o-", color=colour, markersize=3.5)
        where.plot(*steps[0].tolist(), "s", color=colour, markersize=8, markerfacecolor="none")
        _draw_component(where, models[-1], component, colour)
    where.set(title="means, from the start (squares) on", aspect="equal")
    top = max(paths.em.log_likelihoods[-1], paths.gradient.log_likelihoods[-1])
    for name, fit, colour in (("EM", paths.em, _BLUE), ("gradient (L-BFGS)", paths.gradient, _RED)):
        missing = [max(top - value, 1e-14) for value in fit.log_likelihoods]
        how_far.semilogy(missing, "o-", color=colour, markersize=3.5, label=name)
    how_far.set(xlabel="step", ylabel="nats per point below the maximum", ylim=(1e-11, 10))
    how_far.legend(frameon=False)
    return Figure(
        "three-clusters-fit",
        "Left: the means of the three components at each step of EM, from a start on three data points, and the "
        "ellipses at the end. Right: how far the mean log-likelihood is from its maximum after each step. Both "
        "ways pass a plateau, as long as two components share one cluster, and then converge quickly to the same "
        "place.",
        figures.png(made),
    )


# Row 3: mixture density network

INVERSE_ENTROPY: Final = -1.282348
"""H(t given x) of the inverse problem, nats."""

INVERSE_SINGLE: Final = -0.655320
"""Expected negative log-likelihood of the best regression with a single Gaussian, nats."""

MDN_GATE: Final = -1.10
"""Largest negative log-likelihood of the mixture on new rows, nats."""

QUESTION: Final = 0.35
"""The x at which the answers are drawn: two separate ranges of t explain it."""

_NOISE_HALF_WIDTH: Final = 0.1

_TURN: Final = math.acos(-1 / (0.6 * math.pi)) / (2 * math.pi)
"""t where the curve turns down; at 1 - t it turns up again."""

_DENSITY_TEXT: Final = r"""
The same idea for questions and answers: given $x$, what is $y$? Regression answers with one number, at best with a
Gaussian around it. That fails where one question has several right answers. Bishop's example runs a harmless
function backwards: $t$ is uniform on $(0, 1)$, $x = t + 0.3 \sin(2 \pi t) + u$ with noise $u$ uniform on
$(-0.1, 0.1)$, and the question is: given $x$, which $t$? The function goes up, down and up again, so some $x$ have
three ranges of answers.

A **mixture density network** (MDN) answers with a mixture, all of whose parameters a neural network computes
from the question:

$$p(t \mid x) = \sum_{k=1}^K \pi_k(x) \, N(t; m_k(x), \sigma_k^2(x)) .$$

The latent $z = k$ is which branch the answer is on. The network is fitted by maximum likelihood. How good can it
be? The mean negative log-likelihood of any model is at least the entropy $H(t \mid x)$; given $x$ the true $t$ is
uniform on its ranges, so both that entropy and the limit for single Gaussians are integrals over $x$.
"""


class Nll(NamedTuple):
    """Mean negative log-likelihood of new rows with its standard error, nats."""

    value: float
    standard_error: float


def mixture_density(study: Study) -> Section:
    """Row 3: a network that answers with a mixture, against one that answers with a Gaussian."""
    networks = {num: _fitted_network(study, num) for num in (8, 1)}
    entropy, single = inverse_problem_limits()
    nll = {num: held_out(network, study) for num, network in networks.items()}
    return Section(
        "A conditional mixture: the mixture density network",
        (3,),
        (
            _DENSITY_TEXT,
            _answers_figure(networks[8], networks[1], study),
            Checks((*limit_checks(entropy, single), *nll_checks(nll[8], nll[1]), *_answer_checks(networks))),
            _single_text(nll, networks),
            *_decompositions(study.source(304)),
        ),
    )


def _fitted_network(study: Study, num_components: int) -> MixtureDensityNetwork:
    source = study.source(300 + num_components)
    network = MixtureDensityNetwork(1, 1, num_components, (32,), source)
    rows, steps = study.size(quick=(4000, 600), full=(6000, 5000))
    network.fit(inverse_problem(rows, source), source, num_steps=steps, learning_rate=2e-2)
    return network


@torch.no_grad()
def held_out(network: MixtureDensityNetwork, study: Study) -> Nll:
    """Return the loss on 10,000 rows that no fit has seen, the same for all networks."""
    test = inverse_problem(10_000, study.source(300))
    values = -network.log_prob(test.targets, test.inputs).double()
    return Nll(float(values.mean()), float(sampled.standard_error(values)))


def inverse_curve(targets: Tensor) -> Tensor:
    """Return x = t + 0.3 sin(2 pi t), the inverse problem without its noise."""
    return targets + 0.3 * (2 * math.pi * targets).sin()


def true_ranges(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return the ranges of t in (0, 1) that explain each x: low and high ends, (n, 3), equal where there is none.

    The curve rises, falls and rises; on each piece it is inverted by bisection.

    Args:
        inputs: x, shape (n,), float64.
    """
    turn = math.acos(-1 / (0.6 * math.pi)) / (2 * math.pi)
    lows, highs = [], []
    for start, end, sign in ((0.0, turn, 1), (turn, 1 - turn, -1), (1 - turn, 1.0, 1)):
        ends = [
            _solved(inputs + sign * shift, start, end, sign) for shift in (-_NOISE_HALF_WIDTH, _NOISE_HALF_WIDTH)
        ]
        lows.append(ends[0])
        highs.append(ends[1])
    return torch.stack(lows, dim=1), torch.stack(highs, dim=1)


def _solved(values: Tensor, start: float, end: float, sign: int) -> Tensor:
    """Return t in [start, end] where the curve, monotone there, has each value; the nearer end if it has not."""
    low, high = torch.full_like(values, start), torch.full_like(values, end)
    for _ in range(52):
        middle = 0.5 * (low + high)
        is_below = sign * (inverse_curve(middle) - values) < 0
        low, high = torch.where(is_below, middle, low), torch.where(is_below, high, middle)
    return 0.5 * (low + high)


def inverse_problem_limits(num_nodes: int = 100) -> tuple[float, float]:
    """Return the least expected negative log-likelihoods: of any model, and of a single Gaussian for each x.

    Given x, t is uniform on its ranges; they have the total length |A(x)|, and x has the density |A(x)| / 0.2.

    Args:
        num_nodes: Of the integral over each stretch of x without a corner.
    """
    inputs, widths = _smooth_stretches(num_nodes)
    low, high = true_ranges(inputs)
    length = (high - low).sum(dim=1)
    mean = 0.5 * ((high - low) * (high + low)).sum(dim=1) / length
    # Within a range, and between the ranges: a difference of second moments would lose the digits of short ones.
    squares = (high - low).square() / 12 + (0.5 * (high + low) - mean.unsqueeze(1)).square()
    variance = ((high - low) * squares).sum(dim=1) / length
    density = widths * length / (2 * _NOISE_HALF_WIDTH)
    return float(density @ length.log()), float(density @ (0.5 * (2 * math.pi * math.e * variance).log()))


def _smooth_stretches(num_nodes: int) -> tuple[Tensor, Tensor]:
    """Return nodes and weights of an integral over x that is exact although ranges appear and vanish.

    At the ends of the stretches lengths go as the square root of x; after x = a + (b - a) sin^2 they are smooth.
    """
    ends = torch.tensor([0.0, _TURN, 1 - _TURN, 1.0], dtype=torch.float64)
    corners = inverse_curve(ends)
    corners = torch.cat((corners - _NOISE_HALF_WIDTH, corners + _NOISE_HALF_WIDTH)).sort().values
    nodes, weights = (torch.from_numpy(values) for values in np.polynomial.legendre.leggauss(num_nodes))
    angles, spans = 0.25 * math.pi * (nodes + 1), corners.diff().unsqueeze(1)
    inputs = corners[:-1].unsqueeze(1) + spans * angles.sin().square()
    widths = spans * 0.25 * math.pi * weights * (2 * angles).sin()
    return inputs.flatten(), widths.flatten()


def limit_checks(entropy: float, single: float) -> tuple[Check, ...]:
    """Return the limits against their known values."""
    source = "known to six decimals"
    return (
        claims.close(
            r"entropy $H(t \mid x)$, by an integral", entropy, INVERSE_ENTROPY, within=6e-7, source=source
        ),
        claims.close(
            "limit of single Gaussians, by an integral", single, INVERSE_SINGLE, within=6e-7, source=source
        ),
    )


def nll_checks(mixture: Nll, single: Nll) -> tuple[Check, ...]:
    """Return both networks against the gate and against what is impossible."""
    errors = 3 * mixture.standard_error, 3 * single.standard_error
    return (
        claims.at_most(
            "MDN: negative log-likelihood of new rows", mixture.value, MDN_GATE, source="to be reached"
        ),
        claims.at_least(
            "MDN: not better than possible",
            mixture.value,
            INVERSE_ENTROPY - errors[0],
            source="the entropy less 3 SE",
        ),
        claims.at_least(
            "single Gaussian: not better than possible",
            single.value,
            INVERSE_SINGLE - errors[1],
            source="its limit less 3 SE",
        ),
        claims.at_least(
            "what the mixture gains over the single Gaussian",
            single.value - mixture.value,
            0.4,
            source="bimodality",
        ),
    )


@torch.no_grad()
def _answer_checks(networks: dict[int, MixtureDensityNetwork]) -> tuple[Check, ...]:
    question = torch.tensor([[QUESTION]])
    low, high = true_ranges(question.flatten().double())

    def is_possible(answer: float) -> bool:
        return bool(((low < answer) & (answer < high)).any())

    best = float(networks[8](question).modes().values[0, 0, 0])
    middle = float(networks[1](question).mean)
    return (
        claims.holds(f"at $x = {QUESTION}$ the MDN's best answer is possible", is_possible(best), source=_RANGES),
        claims.holds(
            f"at $x = {QUESTION}$ the single Gaussian's best answer is impossible",
            not is_possible(middle),
            source=_RANGES,
        ),
    )


_RANGES: Final = "the ranges of $t$ that explain $x$"


def _single_text(nll: dict[int, Nll], networks: dict[int, MixtureDensityNetwork]) -> str:
    with torch.no_grad():
        middle = float(networks[1](torch.tensor([[QUESTION]])).mean)
    return (
        f"On new rows the mixture costs {nll[8].value:.3f} ± {nll[8].standard_error:.3f} nats per answer and the "
        f"single Gaussian {nll[1].value:.3f} ± {nll[1].standard_error:.3f}; less is better, and "
        f"{INVERSE_ENTROPY:.3f} is the least possible. At $x = {QUESTION}$ the single Gaussian prefers $t = "
        f"{middle:.2f}$, an answer between the right ones that is never right: the mean of good answers need not "
        "be one."
    )


@torch.no_grad()
def _answers_figure(mixture: MixtureDensityNetwork, single: MixtureDensityNetwork, study: Study) -> Figure:
    made = figures.figure(width=9.2, height=3.3)
    left, middle, right = figures.axes(made, 1, 3)[0]
    rows = inverse_problem(600, study.source(305))
    questions = torch.linspace(-0.02, 1.02, 105).unsqueeze(1)
    gaussian, modes = single(questions), mixture(questions).modes()
    centre, scale = gaussian.mean.squeeze(1), gaussian.log_scales.exp().flatten()
    left.plot(questions.flatten(), centre, color=_RED)
    left.fill_between(questions.flatten(), centre - scale, centre + scale, color=_RED, alpha=0.15, linewidth=0)
    left.set_title("single Gaussian: mean ± deviation")
    found = modes.is_distinct & (modes.log_density > modes.log_density[:, :1] - 3)
    middle.scatter(
        questions.expand(-1, found.shape[1])[found], modes.values.squeeze(2)[found], color=_BLUE, s=9, zorder=3
    )
    middle.set_title("MDN: its modes")
    for axes in (left, middle):
        axes.scatter(rows.inputs, rows.targets, color=MUTED, s=4, alpha=0.45, linewidths=0)
        axes.axvline(QUESTION, color=INK, linewidth=0.8, linestyle=":")
        axes.set(xlabel="$x$, the question", ylabel="$t$, the answer", ylim=(-0.15, 1.15))
    _draw_answer(right, mixture, single)
    return Figure(
        "mixture-density",
        "Grey: rows of the inverse problem. Left: what regression with a Gaussian answers; where the data fold "
        "back its mean runs between the branches. Middle: the modes of the mixture, those within 3 nats of the "
        f"highest, follow the branches. Right: all three densities at $x = {QUESTION}$ (dotted line on the left).",
        figures.png(made),
    )


def _draw_answer(axes: Axes, mixture: MixtureDensityNetwork, single: MixtureDensityNetwork) -> None:
    answers = torch.linspace(-0.1, 1.1, 601)
    low, high = true_ranges(torch.tensor([QUESTION], dtype=torch.float64))
    inside = ((answers.unsqueeze(1) > low) & (answers.unsqueeze(1) < high)).any(dim=1)
    question = torch.tensor([[QUESTION]])
    axes.fill_between(answers, inside / (high - low).sum(), color=_GREEN, alpha=0.25, step="mid", label="truth")
    for network, colour, name in ((mixture, _BLUE, "MDN"), (single, _RED, "single Gaussian")):
        log_density = network(question).log_joint(answers.view(1, -1, 1))[0].logsumexp(dim=1)
        axes.plot(answers, log_density.exp(), color=colour, label=name)
    axes.set(title=rf"$p(t \mid x = {QUESTION})$", xlabel="$t$")
    axes.set_ylim(top=1.5 * axes.get_ylim()[1])
    axes.legend(frameon=False, loc="upper right")


def _decompositions(source: torch.Generator) -> tuple[Correction, Table, Checks]:
    """Return which ways of adding up a latent variable give p(y given x), on random tables of probabilities."""
    errors = decomposition_errors(source)
    return (
        Correction(
            article=r"A conditional latent variable model is $p(y \mid x) = \sum_z p(y \mid x, z) \, p(z)$ or "
            r"$\sum_z p(y \mid z) \, p(z \mid x)$, and the mixture density network is an example.",
            right=r"The rule that always holds is $\sum_z p(y \mid x, z) \, p(z \mid x)$. The first form needs "
            "$z$ independent of $x$, the second needs $y$ independent of $x$ given $z$. The mixture density "
            r"network is neither: its weights $\pi_k(x) = p(z = k \mid x)$ and its components $p(y \mid x, z = "
            "k)$ both depend on $x$.",
        ),
        Table(
            ("sum", *(name for name in next(iter(errors.values())))),
            tuple((form, *(f"{error:.1e}" for error in row.values())) for form, row in errors.items()),
            caption=r"Largest error of each sum against $p(y \mid x)$, on a random $p(x, y, z)$ of each kind.",
        ),
        Checks(decomposition_checks(errors)),
    )


_ANY, _Z_FREE, _Y_FREE = "any joint distribution", "$z$ independent of $x$", "$y$ independent of $x$ given $z$"
_FORMS: Final = (
    r"$\sum_z p(y \mid x, z) \, p(z \mid x)$",
    r"$\sum_z p(y \mid x, z) \, p(z)$",
    r"$\sum_z p(y \mid z) \, p(z \mid x)$",
)


def decomposition_errors(source: torch.Generator) -> dict[str, dict[str, float]]:
    """Return form to kind of joint distribution to the largest error against p(y given x)."""

    def drawn(*shape: int) -> Tensor:
        return torch.rand(shape, generator=source, dtype=torch.float64) + 0.05

    # Axes are x, y, z; sizes differ so that a wrong axis cannot go unnoticed.
    of_x, of_z = drawn(3, 1, 1), drawn(1, 1, 5)
    joints = {
        _ANY: drawn(3, 4, 5),
        _Z_FREE: of_x * of_z * _normalised(drawn(3, 4, 5), 1),
        _Y_FREE: of_x * _normalised(drawn(3, 1, 5), 2) * _normalised(drawn(1, 4, 5), 1),
    }
    errors: dict[str, dict[str, float]] = {form: {} for form in _FORMS}
    for kind, table in joints.items():
        joint = table / table.sum()
        y_given_x = (joint / joint.sum(dim=(1, 2), keepdim=True)).sum(dim=2)
        y_given_xz = joint / joint.sum(dim=1, keepdim=True)
        z_given_x = joint.sum(dim=1, keepdim=True) / joint.sum(dim=(1, 2), keepdim=True)
        z_alone = joint.sum(dim=(0, 1), keepdim=True)
        y_given_z = joint.sum(dim=0, keepdim=True) / z_alone
        sums = y_given_xz * z_given_x, y_given_xz * z_alone, y_given_z * z_given_x
        for form, terms in zip(_FORMS, sums, strict=True):
            errors[form][kind] = float((terms.sum(dim=2) - y_given_x).abs().max())
    return errors


def decomposition_checks(errors: dict[str, dict[str, float]]) -> tuple[Check, ...]:
    """Return that each sum is right exactly where its independence holds."""
    right = {(_FORMS[0], kind) for kind in (_ANY, _Z_FREE, _Y_FREE)} | {(_FORMS[1], _Z_FREE), (_FORMS[2], _Y_FREE)}
    cells = {(form, kind): error for form, row in errors.items() for kind, error in row.items()}
    return (
        claims.at_most(
            "largest error where the sum must be right",
            max(error for cell, error in cells.items() if cell in right),
            1e-12,
            source="rules of probability",
            unit="",
        ),
        claims.at_least(
            "smallest error where it need not be",
            min(error for cell, error in cells.items() if cell not in right),
            1e-3,
            source="the independence is missing",
            unit="",
        ),
    )


def _normalised(table: Tensor, axis: int) -> Tensor:
    return table / table.sum(dim=axis, keepdim=True)
