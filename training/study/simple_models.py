r"""Rows 1, 4 and 6: what a model is asked for, how simple parts make a complicated density, maximum likelihood.

Every model here has an exact log p(x), so that nothing is taken on trust: not the interface, not the integral, not
where gradient ascent ends.
"""

import inspect
import itertools
import math
from typing import Final, NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from training import presets
from training.models.gaussian_mixture import GaussianMixture, three_clusters
from training.models.linear_vae import LinearVAE
from training.models.mixture_density import ConditionalMixture
from training.models.ppca import GaussianPosterior, ProbabilisticPCA, elbo_maximum
from training.models.vae import VAE
from training.study import claims, figures, numerics, sampled
from training.study.claims import Check, Checks, Correction, Figure, Section, Table
from training.study.figures import INK, MUTED, PALETTE
from training.study.setup import Study

ROUNDING: Final = 1e-9
"""Float64 rounding of sums over some thousand terms, nats."""

_BLUE, _RED, _GREEN, _VIOLET, *_ = PALETTE


# Row 1: the interface

_INTERFACE_TEXT: Final = r"""
A **model** is a probability distribution with parameters $\theta$. There are two forms. If data $x$ are all there
is, it is a distribution of data, $p_\theta(x)$: which images are likely, which are not. If something is given and
something else is asked, it is a conditional distribution, $p_\theta(y \mid x)$: which answers $y$ go with the
question $x$.

Either may have a **latent variable** $z$, something that is never observed but makes the rest easy to explain:
which cluster a point belongs to, which digit was meant. The model then says how $z$ comes about and how $z$ makes
the data, and the data's own distribution follows by adding up all explanations:

$$p(x) = \sum_z p(x, z) = \sum_z p(x \mid z) \, p(z), \qquad p(x) = \int p(x \mid z) \, p(z) \, dz
\quad \mathrm{for\ continuous\ } z .$$

Whatever the model, three things are asked of it, and in this repository they have the same three names:

- `log_prob`, the logarithm of $p(x)$ (or of $p(y \mid x)$): how well does the model explain these data? Fitting is
  making it large.
- `elbo`, a number that is never above it, for any guess $q$ of what $z$ was: what one computes where the sum over
  explanations is out of reach. All later chapters are about it.
- `sample`, new data from the model.
"""

_INTERFACE_CONCLUSION: Final = r"""
The names of the arguments are those in the code; the table was made by reading the classes. What differs is
whether the sum over $z$ can be done. For the first three it can, and `log_prob` is exact. For the VAE it cannot,
so its `log_prob` is an estimate from samples, which is why it is handed `noise`. The checks below hold every
model to the same laws: the bound is never above the density and meets it at the best $q$; and data sampled from a
model have the average log density that the model's own density says.
"""


class _Entry(NamedTuple):
    """A model of the table."""

    kind: type
    name: str
    latent: str
    exactness: str


MODELS: Final = (
    _Entry(GaussianMixture, "Gaussian mixture, $p(x)$", "which cluster", "exact: a sum"),
    _Entry(ConditionalMixture, r"mixture density network at $x$, $p(y \mid x)$", "which branch", "exact: a sum"),
    _Entry(ProbabilisticPCA, "probabilistic PCA, $p(x)$", "a point in space", "exact: a Gaussian integral"),
    _Entry(VAE, "variational autoencoder, $p(x)$", "a point in space", "an estimate"),
)
"""What the table shows."""

INTERFACE: Final = ("log_prob", "elbo", "sample")
"""What every model is asked for."""


def one_interface(study: Study) -> Section:
    """Row 1: the two forms of models, the latent variable, and the three questions that all models answer."""
    checks = (
        claims.holds(
            "every model has `log_prob`, `elbo` and `sample`",
            all(callable(getattr(entry.kind, name, None)) for entry in MODELS for name in INTERFACE),
            source="the classes",
        ),
        *exact_model_checks("Gaussian mixture", *_mixture_answers(study)),
        *exact_model_checks("mixture density", *_conditional_answers(study)),
        *exact_model_checks("probabilistic PCA", *_ppca_answers(study)),
        *_vae_checks(study),
    )
    return Section(
        "One interface for every model",
        (1,),
        (_INTERFACE_TEXT, _interface_table(), _INTERFACE_CONCLUSION, Checks(checks)),
    )


def _interface_table() -> Table:
    def signature(kind: type, name: str) -> str:
        parameters = list(inspect.signature(getattr(kind, name)).parameters)
        return f"`{name}({', '.join(parameters[1:])})`"

    return Table(
        ("model", "$z$", *(f"`{name}`" for name in INTERFACE), r"$\log p$ is"),
        tuple(
            (entry.name, entry.latent, *(signature(entry.kind, name) for name in INTERFACE), entry.exactness)
            for entry in MODELS
        ),
    )


class Answers(NamedTuple):
    """What a model with an exact density says about its own samples, one value per row, nats."""

    log_prob: Tensor
    bound: Tensor
    """For random q."""
    best_bound: Tensor
    """For q the posterior."""


def exact_model_checks(name: str, answers: Answers, entropy: float) -> tuple[Check, ...]:
    """Return the laws of one model: the bound, where it is tight, and samples that fit the density.

    Args:
        name: Of the model.
        answers: On samples of the model.
        entropy: Of p(x), computed without samples, nats.
    """
    excess = float((answers.bound - answers.log_prob).max())
    miss = float((answers.best_bound - answers.log_prob).abs().max())
    return (
        claims.at_most(f"{name}: largest bound - log p, random $q$", excess, ROUNDING, source="Jensen"),
        claims.at_most(f"{name}: largest error at the best $q$", miss, ROUNDING, source="tight at the posterior"),
        sampled.mean_is(
            f"{name}: mean log p of its samples", answers.log_prob, -entropy, source="the entropy, by an integral"
        ),
    )


def _mixture_answers(study: Study) -> tuple[Answers, float]:
    source, model = study.source(100), three_clusters()
    data = model.sample(5000, source).data
    q = sampled.noise(source, 5000, 3).softmax(dim=1)
    plane = numerics.grid(-12, 12, 240, dim=2)
    log_density = model.log_prob(plane.points)
    entropy = -float(plane.expectation(log_density, log_density))
    return Answers(model.log_prob(data), model.elbo(data, q), model.elbo(data, model.posterior(data))), entropy


def _conditional_answers(study: Study) -> tuple[Answers, float]:
    source = study.source(101)
    answer = ConditionalMixture(
        log_weights=sampled.noise(source, 1, 3).log_softmax(dim=1),
        means=2 * sampled.noise(source, 1, 3, 1),
        log_scales=0.3 * sampled.noise(source, 1, 3, 1),
    )
    targets = answer.sample(5000, source)[0]
    repeated = ConditionalMixture(
        answer.log_weights.expand(5000, -1),
        answer.means.expand(5000, -1, -1),
        answer.log_scales.expand(5000, -1, -1),
    )
    q = sampled.noise(source, 5000, 3).softmax(dim=1)
    line = numerics.grid(-20, 20, 2000)
    log_density = answer.log_joint(line.points.unsqueeze(0))[0].logsumexp(dim=1)
    entropy = -float(line.expectation(log_density, log_density))
    tight = repeated.elbo(targets, repeated.posterior(targets))
    return Answers(repeated.log_prob(targets), repeated.elbo(targets, q), tight), entropy


def _ppca_answers(study: Study) -> tuple[Answers, float]:
    source = study.source(102)
    model = random_ppca(source, num_features=5, latent_dim=2)
    data = model.sample(5000, source)
    factors = sampled.noise(source, 5000, 2, 2)
    q = GaussianPosterior(sampled.noise(source, 5000, 2), factors @ factors.mT + 0.1 * torch.eye(2))
    covariance = model.weight @ model.weight.T + model.variance * torch.eye(5)
    entropy = 0.5 * float(5 * math.log(2 * math.pi * math.e) + torch.logdet(covariance))
    return Answers(model.log_prob(data), model.elbo(data, q), model.elbo(data, model.posterior(data))), entropy


def random_ppca(source: torch.Generator, *, num_features: int, latent_dim: int) -> ProbabilisticPCA:
    """Return a probabilistic PCA with random parameters, float64."""
    return ProbabilisticPCA(
        sampled.noise(source, num_features, latent_dim),
        sampled.noise(source, num_features),
        sampled.noise(source, 1).exp().squeeze(0),
    )


@torch.no_grad()
def _vae_checks(study: Study) -> tuple[Check, ...]:
    """Return the laws of a VAE so small that its integral can be done: 2x2 binary pixels, two latents."""
    source, num = study.source(103), 5000
    config = presets.smoke().model.override(["latent_dim=2", "hidden_dims=[8]"])
    vae = VAE(config, (1, 2, 2), source).double()
    for parameter in vae.parameters():
        parameter.mul_(2)
    images = torch.tensor(list(itertools.product((0.0, 1.0), repeat=4)), dtype=torch.float64).view(16, 1, 2, 2)
    plane = numerics.grid(-9, 9, 180, dim=2)
    log_prior = -0.5 * plane.points.square().sum(dim=1) - math.log(2 * math.pi)
    likelihood = vae.likelihood(plane.points).log_prob(images.unsqueeze(1))
    exact = plane.log_integral(likelihood + log_prior)
    noise = sampled.noise(source, 16 * num, 1, 2)
    repeated = images.repeat_interleave(num, dim=0)
    weights = vae.log_prob(repeated, noise).view(16, num) - exact.unsqueeze(1)
    bounds = vae.elbo(repeated, noise).view(16, num) - exact.unsqueeze(1)
    draws = vae.sample(num, source)
    numbers = (draws.flatten(1) @ torch.tensor([8.0, 4.0, 2.0, 1.0], dtype=torch.float64)).long()
    name = "VAE of four binary pixels"
    return (
        claims.close(
            f"{name}: sum of p(x) over all images",
            float(exact.exp().sum()),
            1,
            within=ROUNDING,
            source="a probability",
            unit="",
        ),
        sampled.means_are(
            f"{name}: error of the estimated p(x), worst image",
            weights.exp().T,
            torch.ones(16, dtype=torch.float64),
            source="the integral over $z$",
        ),
        claims.at_most(f"{name}: largest mean bound - log p", float(bounds.mean(dim=1).max()), 0, source="Jensen"),
        sampled.mean_is(
            f"{name}: mean log p of its samples",
            exact[numbers],
            float((exact.exp() * exact).sum()),
            source="the sum over all images",
        ),
    )


# Row 4: complicated = mixture of simple

_MIXTURE_TEXT: Final = r"""
Why bring in a variable that nobody sees? Because it makes complicated distributions out of simple ones. Take any
simple $p(z)$, say a standard normal, and any simple $p(x \mid z)$, say a small round Gaussian whose centre
$f(z)$ moves with $z$. Given $z$ nothing could be simpler. Average over all $z$,

$$p(x) = \int p(x \mid z) \, p(z) \, dz = \int N(x; f(z), s^2 I) \, N(z; 0, 1) \, dz ,$$

and the result can have any shape that $f$ can draw. A Gaussian mixture is the same with finitely many $z$; the
continuous one is a mixture with infinitely many components that share their parameters in $f$. In a VAE $f$ is a
neural network.
"""

SPIRAL_SCALE: Final = 0.22
"""Standard deviation s of the simple part of the spiral."""

_SPIRAL_HALF_WIDTH: Final = 3.6
_NUM_COMPONENTS: Final = (6, 24)


def spiral(shares: Tensor) -> Tensor:
    """Return points of a spiral, shape (n, 2), for positions along it in [0, 1]; z is mapped there by its CDF."""
    angle, radius = 3.5 * math.pi * shares, 0.4 + 2.3 * shares
    return torch.stack((radius * angle.cos(), radius * angle.sin()), dim=1)


def mixture_of_simple(study: Study) -> Section:
    """Row 4: a complicated density is a mixture of simple ones, and the integral over z is log p(x)."""
    plane = numerics.grid(-_SPIRAL_HALF_WIDTH, _SPIRAL_HALF_WIDTH, study.size(quick=120, full=240), dim=2)
    exact = spiral_log_density(plane.points)
    coarse = {num: spiral_log_density(plane.points, num_components=num) for num in _NUM_COMPONENTS}
    losses = {num: float(plane.expectation(exact, exact - density)) for num, density in coarse.items()}
    source, num_draws = study.source(400), study.size(quick=20_000, full=200_000)
    draws = spiral(torch.rand(num_draws, generator=source, dtype=torch.float64))
    draws = draws + SPIRAL_SCALE * sampled.noise(source, num_draws, 2)
    checks = (
        claims.close(
            "mass of the spiral's density",
            float(plane.log_integral(exact).exp()),
            1,
            within=1e-6,
            source="a density integrates to one",
            unit="",
        ),
        sampled.mean_is(
            "mean log p of points drawn in two steps, $z$ then $x$",
            spiral_log_density(draws),
            float(plane.expectation(exact, exact)),
            source="integral of $p \\log p$",
        ),
        *integral_checks(study),
    )
    return Section(
        "Complicated from simple",
        (4,),
        (_MIXTURE_TEXT, _spiral_figure(exact, coarse, losses), _integral_text(losses), Checks(checks)),
    )


def spiral_log_density(points: Tensor, *, num_components: int = 600) -> Tensor:
    """Return log p(x) of the spiral, shape (n,): the mean of its simple parts at equally probable z.

    Args:
        points: Shape (n, 2).
        num_components: Of the mixture. With hundreds of parts neighbours overlap and it is the integral, by the
            midpoint rule; a few are a mixture of few.
    """
    centres = spiral((torch.arange(num_components, dtype=torch.float64) + 0.5) / num_components)
    # Some thousand rows at once: all distances of a fine grid would fill the memory.
    parts = [
        _log_mean_of_parts(points[first : first + 10_000], centres) for first in range(0, len(points), 10_000)
    ]
    return torch.cat(parts)


def _log_mean_of_parts(points: Tensor, centres: Tensor) -> Tensor:
    squares = torch.cdist(points, centres, compute_mode="donot_use_mm_for_euclid_dist").square()
    log_parts = -0.5 * squares / SPIRAL_SCALE**2 - math.log(2 * math.pi * SPIRAL_SCALE**2)
    return log_parts.logsumexp(dim=1) - math.log(len(centres))


def integral_checks(study: Study) -> tuple[Check, ...]:
    """Return log p(x) by the integral over z against the closed form, in one and in two latent dimensions."""
    one = ProbabilisticPCA(*(torch.ones(shape, dtype=torch.float64) for shape in ((1, 1), (1,), ())))
    one = ProbabilisticPCA(one.weight, torch.zeros_like(one.mean), one.variance)
    data = torch.ones((1, 1), dtype=torch.float64)
    source = study.source(401)
    two = random_ppca(source, num_features=5, latent_dim=2)
    rows = two.sample(20, source)
    return (
        claims.close(
            r"integral over $z$: $z \sim N(0, 1)$, $x \mid z \sim N(z, 1)$, log p at $x = 1$",
            float(integrated_log_prob(one, data, numerics.grid(-12, 12, 240))),
            -0.5 * math.log(4 * math.pi) - 0.25,
            within=1e-6,
            source="$x \\sim N(0, 2)$",
        ),
        claims.at_most(
            "largest error of the integral over two latents, five features, 20 rows",
            float(
                (integrated_log_prob(two, rows, numerics.grid(-9, 9, 900, dim=2)) - two.log_prob(rows)).abs().max()
            ),
            1e-6,
            source="$x \\sim N(b, W W^T + s^2 I)$",
        ),
    )


def integrated_log_prob(model: ProbabilisticPCA, data: Tensor, latents: numerics.Grid) -> Tensor:
    """Return log p(x) as the integral of p(x given z) p(z) over a grid of latents, shape (n,)."""
    centres = model.mean + latents.points @ model.weight.T
    num_features = len(model.mean)
    log_prior = -0.5 * (latents.points.square().sum(dim=1) + model.latent_dim * math.log(2 * math.pi))
    constant = num_features * (2 * math.pi * model.variance).log()
    squares = torch.stack([(row - centres).square().sum(dim=1) for row in data])
    return latents.log_integral(log_prior - 0.5 * (squares / model.variance + constant))


def _integral_text(losses: dict[int, float]) -> str:
    numbers = " and ".join(f"{loss:.2f} nats with {num}" for num, loss in losses.items())
    return (
        "How far the mixture of few is from the integral is a number too, the expected loss of log density: "
        f"{numbers} components. The checks hold the integral, done on a grid over $z$, against densities that "
        "are known in closed form."
    )


def _spiral_figure(exact: Tensor, coarse: dict[int, Tensor], losses: dict[int, float]) -> Figure:
    made = figures.figure(width=9.2, height=2.9)
    parts, *heat = figures.axes(made, 1, 2 + len(coarse))[0]
    shares = torch.linspace(0, 1, 400, dtype=torch.float64)
    parts.scatter(*spiral(shares).T.tolist(), c=shares.tolist(), s=3)
    for share in (torch.arange(12) + 0.5) / 12:
        centre = spiral(share.view(1).double())[0].tolist()
        for radius in (1, 2):
            ring = _circle(centre, radius * SPIRAL_SCALE)
            parts.plot(*ring.T.tolist(), color=MUTED, linewidth=0.7)
    parts.set_title(r"$p(x \mid z)$ at twelve $z$")
    side = round(math.sqrt(len(exact)))
    titles = [f"{num} parts: {losses[num]:.2f} nats short" for num in coarse] + ["the integral $p(x)$"]
    extent = (-_SPIRAL_HALF_WIDTH, _SPIRAL_HALF_WIDTH) * 2
    for axes, density, title in zip(heat, (*coarse.values(), exact), titles, strict=True):
        axes.imshow(density.exp().view(side, side).T.numpy(), origin="lower", extent=extent, cmap="Blues")
        axes.set_title(title)
    for axes in (parts, *heat):
        axes.set(xlim=extent[:2], ylim=extent[:2], aspect="equal", xticks=[], yticks=[])
        axes.grid(visible=False)
    return Figure(
        "complicated-from-simple",
        "Left: the curve $f(z)$, coloured by $z$ from its lowest values (dark) to its highest, and the round "
        r"Gaussians $p(x \mid z)$ at twelve values of $z$ (circles at one and two standard deviations). Right of "
        "it: their average. A mixture of few shows its parts; the mixture of all is a smooth spiral that no "
        "simple distribution resembles.",
        figures.png(made),
    )


def _circle(centre: list[float], radius: float) -> Tensor:
    """Return a closed circle, shape (60, 2)."""
    angle = torch.linspace(0, 2 * math.pi, 60, dtype=torch.float64)
    return torch.tensor(centre) + radius * torch.stack((angle.cos(), angle.sin()), dim=1)


# Row 6: maximum likelihood

DIGITS_MAXIMA: Final = {
    1: (-3.748464, 0.06340349),
    2: (0.005707, 0.05411698),
    4: (6.830337, 0.04011661),
    8: (14.209788, 0.02732943),
    16: (23.929443, 0.01472491),
    32: (35.247022, 0.00493466),
}
"""Latent dimensions to largest mean log p per row, nats, and noise variance there: all 1797 digits / 16."""

GATE: Final = 4.8e-4
"""Largest shortfall of a linear VAE with exact expectations, nats per row."""

SAMPLED_GATE: Final = 14.15
"""Mean ELBO at eight latents that training with one sample per row must reach; noise leaves hundredths."""

AXES_DIM: Final = 8
"""Latents of the linear VAE whose axes are shown; the quick study fits none with more."""

_SIDE: Final = 8

_LIKELIHOOD_TEXT: Final = r"""
**Maximum likelihood** fits a model by asking which parameters make the data that we have most probable,

$$\max_\theta \; \frac{1}{N} \sum_{i=1}^N \log p_\theta(x_i) = \max_\theta \; \frac{1}{N} \sum_{i=1}^N
\log \int p_\theta(x_i \mid z) \, p(z) \, dz ,$$

and climbs the gradient. The obstacle is the integral. We begin where there is none, with **probabilistic PCA**
(pPCA): $z \sim N(0, I)$ and a straight $f$, so $x \mid z \sim N(W z + b, s^2 I)$. Sums of Gaussians are Gaussian,
hence $x \sim N(b, W W^T + s^2 I)$ with no integral left; and even the best parameters are known. With the
eigenvalues $l_1 \ge l_2 \ge \ldots$ of the data's covariance, $d$ features and $d_z$ latents, the best noise
$s^2$ is the mean of the eigenvalues that are left out and the columns of $W$ are the leading principal axes, so
that

$$\max_\theta \frac{1}{N} \sum_i \log p_\theta(x_i) = -\frac{1}{2} \Big( d \log \, 2 \pi
+ \sum_{j \le d_z} \log l_j + (d - d_z) \log s^2 + d \Big) .$$

So there is a number that no training can exceed and good training must reach. Two kinds of training are tried on
1797 images of digits, 8x8 pixels each. The first climbs the exact $\log p_\theta$. The second never sees it: it is
a **linear VAE**, which climbs a lower bound, the ELBO of the next section, with a guess
$q(z \mid x) = N(V x + c, \mathrm{diag}(\sigma^2))$ that it learns at the same time.
"""

_INTRACTABLE_TEXT: Final = r"""
For any model but a handful the integral has no formula. One can still *sample* it: draw $z_1, \ldots, z_k$ from
the prior and average, $p(x) \approx \frac{1}{k} \sum_j p(x \mid z_j)$. That is unbiased and useless. A given
image is explained by a tiny part of the latent space, samples from the prior hardly ever fall there, and the more
dimensions there are the rarer it gets. pPCA lets us see by how much it misses, because its integral is known
(picture on the right). A grid is worse: with ten points along each axis, 32 latents need $10^{32}$ of them.

The last line of the checks shows the way out. Weigh samples of the *posterior* instead, $p(x) = p(x \mid z) \,
p(z) / p(z \mid x)$: one single sample gives $\log p(x)$ to the last digit. Hence the plan of variational
inference: find a $q(z)$ near the posterior.
"""


class Rung(NamedTuple):
    """Fits with one number of latents; nats per row."""

    latent_dim: int
    maximum: float
    variance: float
    """Noise variance of the closed form."""

    by_gradient: float
    """Mean log p where gradient ascent of log p ended."""

    vae: LinearVAE | None
    """A linear VAE at the end of its fit, if one was fitted."""

    linear: tuple[float, float] | None
    """Its mean ELBO and log p."""


def maximum_likelihood(study: Study) -> Section:
    """Row 6: gradient ascent reaches the known maximum of log p; what the integral costs elsewhere."""
    digits = grey_digits()
    rungs = tuple(_rung(study, digits, latent_dim) for latent_dim in DIGITS_MAXIMA)
    [shown] = [rung.vae for rung in rungs if rung.vae is not None and rung.latent_dim == AXES_DIM]
    misses = prior_sampling(study, digits)
    return Section(
        "Maximum likelihood, and the integral in it",
        (6,),
        (
            _LIKELIHOOD_TEXT,
            _rung_table(rungs),
            Checks((*rung_checks(rungs), *_axes_checks(shown), *_sampled_checks(study, digits))),
            _axes_figure(digits, shown),
            Correction(
                article="The likelihood of a latent variable model is intractable when $z$ is continuous.",
                right="It depends on the model. Where all is linear and Gaussian, as here, the integral over a "
                "continuous $z$ is exact; and a discrete $z$ with very many states can be as hopeless as any "
                "integral.",
            ),
            _INTRACTABLE_TEXT,
            _likelihood_figure(rungs, misses),
            Checks(tuple(_prior_sampling_checks(misses))),
        ),
    )


def grey_digits() -> Tensor:
    """Return all digits of scikit-learn divided by 16, float64 in [0, 1], shape (1797, 64)."""
    return torch.from_numpy(load_digits().data) / 16


def equivalent_rows(data: Tensor) -> Tensor:
    r"""Return 2d rows with the same mean and (1/n) covariance as the data, shape (2d, d).

    A linear Gaussian model sees nothing else of its data, neither in mean log p(x) nor in the mean ELBO of a
    linear q: steps on these rows are steps on all, at a fraction of the price.

    .. math:: b \pm \sqrt{d \, l_j} \, u_j
    """
    mean = data.mean(dim=0)
    centred = data - mean
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(data))
    spread = (vectors * (data.shape[1] * values.clamp_min(0)).sqrt()).T
    return torch.cat((mean + spread, mean - spread))


def ppca_by_gradient(rows: Tensor, latent_dim: int, source: torch.Generator) -> ProbabilisticPCA:
    """Return what gradient ascent (L-BFGS) of the exact mean log p(x) finds from a random start.

    Args:
        rows: Shape (n, d).
        latent_dim: Of the model.
        source: Of the start.
    """
    mean = rows.mean(dim=0)
    weight = (sampled.noise(source, rows.shape[1], latent_dim) / math.sqrt(rows.shape[1])).requires_grad_()
    bias = mean.clone().requires_grad_()
    log_variance = (rows - mean).square().mean().log().requires_grad_()

    def model() -> ProbabilisticPCA:
        return ProbabilisticPCA(weight, bias, log_variance.exp())

    numerics.minimise(lambda: -model().log_prob(rows).mean(), [weight, bias, log_variance], num_steps=1000)
    return ProbabilisticPCA(weight.detach(), bias.detach(), log_variance.detach().exp())


def linear_vae(study: Study, digits: Tensor, latent_dim: int) -> LinearVAE:
    """Return a linear VAE fitted to the digits by its exact ELBO, from a random start."""
    rows = equivalent_rows(digits)
    vae = LinearVAE(rows.shape[1], latent_dim, study.source(600 + latent_dim))
    vae.start_at(rows)
    # Encoder and decoder pull at each other: with more latents the valley is longer.
    vae.fit(rows, max_gradients=study.size(quick=max(500, 150 * latent_dim), full=max(2000, 400 * latent_dim)))
    return vae


def _rung(study: Study, digits: Tensor, latent_dim: int) -> Rung:
    closed = ProbabilisticPCA.fit(digits, latent_dim)
    climbed = ppca_by_gradient(equivalent_rows(digits), latent_dim, study.source(640 + latent_dim))
    vae = linear = None
    if study.is_full or latent_dim <= AXES_DIM:
        vae = linear_vae(study, digits, latent_dim)
        with torch.no_grad():
            linear = float(vae.elbo(digits).mean()), float(vae.as_ppca().log_prob(digits).mean())
    return Rung(
        latent_dim,
        maximum=elbo_maximum(digits, latent_dim),
        variance=float(closed.variance),
        by_gradient=float(climbed.log_prob(digits).mean()),
        vae=vae,
        linear=linear,
    )


def rung_checks(rungs: tuple[Rung, ...]) -> list[Check]:
    """Return each maximum against its known value, and the fits against the maxima, the worst of each kind."""
    fitted = [(rung.maximum, *rung.linear) for rung in rungs if rung.linear is not None]
    return [
        *(
            claims.close(
                f"largest mean log p, $d_z = {rung.latent_dim}$, closed form",
                rung.maximum,
                DIGITS_MAXIMA[rung.latent_dim][0],
                within=5.1e-7,
                source=_TIPPING,
            )
            for rung in rungs
        ),
        claims.at_most(
            "its noise variance, largest error",
            max(abs(rung.variance - DIGITS_MAXIMA[rung.latent_dim][1]) for rung in rungs),
            5.1e-9,
            source=f"{_TIPPING}, to eight decimals",
            unit="",
        ),
        claims.at_most(
            "log p by gradient, largest distance from the maximum",
            max(abs(rung.by_gradient - rung.maximum) for rung in rungs),
            1e-8,
            source="the closed form",
        ),
        claims.at_most(
            "what the ELBO of a linear VAE lacks, at most",
            max(maximum - bound for maximum, bound, _ in fitted),
            GATE,
            source="the closed form",
        ),
        claims.holds(
            "linear VAE: ELBO ≤ log p ≤ maximum",
            all(bound <= log_prob + ROUNDING <= maximum + 2 * ROUNDING for maximum, bound, log_prob in fitted),
            source="Jensen; the closed form",
        ),
    ]


_TIPPING: Final = "Tipping & Bishop 1999, recomputed"


def _rung_table(rungs: tuple[Rung, ...]) -> Table:
    def cells(rung: Rung) -> tuple[str, ...]:
        bound, log_prob = (f"{value:.6f}" for value in rung.linear) if rung.linear else ("not in quick", "")
        numbers = f"{rung.maximum:.6f}", f"{rung.by_gradient:.6f}", log_prob, bound
        return str(rung.latent_dim), *numbers, f"{rung.variance:.8f}"

    return Table(
        (
            "$d_z$",
            r"largest mean $\log p$",
            r"by gradient of $\log p$",
            r"linear VAE: $\log p$",
            "its ELBO",
            "$s^2$",
        ),
        tuple(cells(rung) for rung in rungs),
        caption="Nats per image. The density of grey values may exceed one, so that its logarithm is positive.",
    )


def _axes_checks(vae: LinearVAE) -> tuple[Check, ...]:
    weight = vae.as_ppca().weight
    gram = weight.T @ weight
    off_diagonal = float((gram - gram.diagonal().diag()).abs().max() / gram.diagonal().max())
    return (
        claims.at_most(
            "linear VAE, $d_z = 8$: largest off-diagonal of $W^T W$ / largest diagonal",
            off_diagonal,
            1e-2,
            source="a diagonal $q$ is exact only for orthogonal axes",
            unit="",
        ),
    )


def _sampled_checks(study: Study, digits: Tensor) -> tuple[Check, ...]:
    """Return checks of a linear VAE trained as VAEs are: Adam, one random latent per image and step."""
    source = study.source(690)
    vae = LinearVAE(digits.shape[1], AXES_DIM, source)
    vae.start_at(digits)
    steps, rate = study.size(quick=(600, 4e-2), full=(6000, 1e-2))
    bound = vae.fit_sampled(digits, source, num_steps=steps, learning_rate=rate).elbo
    log_prob = float(vae.as_ppca().log_prob(digits).mean())
    name = f"linear VAE, $d_z = {AXES_DIM}$, one sample per image, {steps} steps of Adam"
    return (
        claims.at_least(f"{name}: ELBO", bound, SAMPLED_GATE, source="reached before, noise left"),
        claims.between(
            f"{name}: log p", log_prob, bound, DIGITS_MAXIMA[AXES_DIM][0] + 5.1e-7, source="ELBO; closed form"
        ),
    )


class Miss(NamedTuple):
    """What sampling the integral lacks of log p(x), a mean over images, nats."""

    latent_dim: int
    from_prior: dict[int, float]
    """Number of samples to what their average lacks."""

    from_posterior: float
    """Largest error of a single weighted posterior sample."""


def prior_sampling(study: Study, digits: Tensor) -> tuple[Miss, ...]:
    """Return what averages over prior samples lack of log p(x), at the best pPCA of each size."""
    nums = study.size(quick=(10, 1000), full=(10, 1000, 100_000))
    return tuple(_miss(ProbabilisticPCA.fit(digits, dim), digits[::18], nums, study) for dim in DIGITS_MAXIMA)


def _miss(model: ProbabilisticPCA, data: Tensor, nums: tuple[int, ...], study: Study) -> Miss:
    source, exact = study.source(620 + model.latent_dim), model.log_prob(data)
    latents = sampled.noise(source, max(nums), model.latent_dim)
    log_likelihood = _log_likelihood(model, data, model.mean + latents @ model.weight.T)
    misses = {
        num: float((exact - log_likelihood[:, :num].logsumexp(dim=1) + math.log(num)).mean()) for num in nums
    }
    posterior = model.posterior(data)
    factor = torch.linalg.cholesky(posterior.covariance)
    noise = sampled.noise(source, len(data), model.latent_dim)
    drawn = posterior.mean + noise @ factor.T
    log_prior = -0.5 * (drawn.square().sum(dim=1) + model.latent_dim * math.log(2 * math.pi))
    log_q = -0.5 * (noise.square().sum(dim=1) + model.latent_dim * math.log(2 * math.pi))
    log_q = log_q - factor.diagonal().log().sum()
    likelihood = _log_likelihood(model, data, model.mean + drawn @ model.weight.T).diagonal()
    return Miss(model.latent_dim, misses, float((likelihood + log_prior - log_q - exact).abs().max()))


def _log_likelihood(model: ProbabilisticPCA, data: Tensor, centres: Tensor) -> Tensor:
    """Return log N(x; centre, s^2 I) for all pairs, shape (rows, centres)."""
    squares = torch.cdist(data, centres).square() / model.variance
    return -0.5 * (squares + data.shape[1] * (2 * math.pi * model.variance).log())


def _prior_sampling_checks(misses: tuple[Miss, ...]) -> list[Check]:
    lost = [miss.from_prior[1000] for miss in misses]
    return [
        claims.holds(
            "what 1000 prior samples miss grows with every doubling of four latents or more",
            all(after > before > 0 for before, after in itertools.pairwise(lost[2:])),
            source="the posterior shrinks against the prior",
        ),
        claims.at_least(
            f"missed by 1000 prior samples, $d_z = {misses[-1].latent_dim}$",
            lost[-1],
            100,
            source="out of reach, not merely inaccurate",
        ),
        claims.at_most(
            "largest error of one weighted sample of the posterior, all images and sizes",
            max(miss.from_posterior for miss in misses),
            1e-8,
            source=r"$p(x \mid z) p(z) / p(z \mid x) = p(x)$ for every $z$",
        ),
    ]


def _likelihood_figure(rungs: tuple[Rung, ...], misses: tuple[Miss, ...]) -> Figure:
    made = figures.figure(width=8.6, height=3.2)
    reached, missed = figures.axes(made, 1, 2)[0]
    dims = [rung.latent_dim for rung in rungs]
    reached.plot(dims, [rung.maximum for rung in rungs], color=_GREEN, label="largest possible")
    reached.plot(dims, [rung.by_gradient for rung in rungs], "o", color=_BLUE, label=r"gradient of $\log p$")
    fitted = [(rung.latent_dim, rung.linear[0]) for rung in rungs if rung.linear is not None]
    reached.plot(*zip(*fitted, strict=True), "x", color=_RED, markersize=9, label="linear VAE, ELBO")
    reached.set(xscale="log", xlabel="latent dimensions", ylabel=r"mean $\log p$, nats per image")
    reached.legend(loc="upper left", frameon=False)
    for shade, num in enumerate(misses[0].from_prior):
        lost = [miss.from_prior[num] for miss in misses]
        missed.plot(dims, lost, "o-", color=PALETTE[(1, 4, 3)[shade]], label=f"{num} samples of the prior")
    missed.plot(dims, [miss.from_posterior for miss in misses], "o-", color=_GREEN, label="1 of the posterior")
    missed.set(xscale="log", xlabel="latent dimensions", ylabel=r"missed of $\log p$, nats")
    missed.set_yscale("symlog", linthresh=1)
    missed.set(ylim=(-0.3, 20_000), yticks=[0, 1, 10, 100, 1000])
    missed.legend(loc="upper left", frameon=False)
    for axes in (reached, missed):
        figures.plain_ticks(axes, dims)
    return Figure(
        "maximum-likelihood",
        "Left: the largest mean log-likelihood that any pPCA of the digits can have, and where training ended. "
        r"Right: what is missed of $\log p(x)$ when the integral over $z$ is replaced by an average over samples "
        "of the prior; more samples help little against more dimensions, while a single weighted sample of the "
        "posterior is exact.",
        figures.png(made),
    )


def _axes_figure(digits: Tensor, vae: LinearVAE) -> Figure:
    exact = ProbabilisticPCA.fit(digits, vae.latent_dim).weight
    learnt = vae.as_ppca().weight
    learnt = learnt[:, learnt.norm(dim=0).argsort(descending=True)]
    learnt = learnt * (exact * learnt).sum(dim=0).sign()
    made = figures.figure(width=8.6, height=2.5)
    grid = figures.axes(made, 2, vae.latent_dim)
    limit = float(exact.abs().max())
    for row, (name, weight) in zip(grid, (("closed form", exact), ("linear VAE", learnt)), strict=True):
        for axes, column in zip(row, weight.T, strict=True):
            axes.imshow(column.view(_SIDE, _SIDE).numpy(), cmap="RdBu", vmin=-limit, vmax=limit)
            axes.set(xticks=[], yticks=[])
            axes.grid(visible=False)
        row[0].set_ylabel(name, color=INK)
    return Figure(
        "principal-axes",
        "What each latent dimension adds to an image: the columns of $W$, longest first (blue adds ink, red "
        "removes it). Above the principal axes in closed form; below what a linear VAE learnt from its bound "
        "alone, columns in order of length and up to sign. A full posterior would allow any rotation of the "
        "axes; the diagonal one picks these.",
        figures.png(made),
    )
