r"""Rows 9, 10, 13 and 14: the evidence lower bound, what it misses, and what climbing it in turn does.

All on linear Gaussian models, where the log evidence, the posterior, the bound and the gap are closed forms, each
computed on its own.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
from matplotlib.axes import Axes
from torch import Tensor

from training import gaussians, objectives
from training.models.linear_vae import LinearVAE
from training.models.ppca import (
    Ascent,
    AscentStep,
    GaussianPosterior,
    ProbabilisticPCA,
    alternate,
    elbo_maximum,
)
from training.study import claims, figures, numerics
from training.study.claims import Check, Checks, Correction, Figure, Section, Table
from training.study.figures import INK, MUTED, PALETTE
from training.study.setup import Study
from training.study.simple_models import equivalent_rows, grey_digits, random_ppca

_BLUE, _RED, _GREEN, _VIOLET, _ORANGE, _ = PALETTE

EXACT: Final = 1e-9
"""Tolerance of two closed forms of one quantity in float64, nats."""

ONE_DATUM: Final = 1.0
"""The x of the smallest example."""

_LOG_EVIDENCE: Final = -0.5 * math.log(4 * math.pi) - 0.25
"""log p(x) there: x is N(0, 2)."""


def one_dimensional(weight: float = 1.0, scale: float = 1.0) -> ProbabilisticPCA:
    """Return the smallest latent variable model: z is N(0, 1), x given z is N(weight z, scale^2)."""
    return ProbabilisticPCA(_exactly([[weight]]), _exactly([0.0]), _exactly(scale**2))


def gaussian(mean: float | Tensor, scale: float | Tensor) -> GaussianPosterior:
    """Return N(mean, scale^2) over one latent, for each entry; in the form that `ProbabilisticPCA.elbo` takes."""
    means, scales = _exactly(mean).reshape(-1, 1), _exactly(scale).reshape(-1, 1, 1)
    return GaussianPosterior(means, scales.square())


def _line(low: float, high: float, num: int) -> Tensor:
    return torch.linspace(low, high, num, dtype=torch.float64)


def _exactly(values: object) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


def _repeated_datum(q: GaussianPosterior) -> Tensor:
    return torch.full((len(q.mean), 1), ONE_DATUM, dtype=torch.float64)


# Rows 9 and 10: Jensen, and the two forms

_JENSEN_TEXT: Final = r"""
We want to make $\log p(x) = \log \int p(x, z) \, dz$ large and cannot do the integral. Take any distribution
$q(z)$, a guess of which $z$ made this $x$, and write the integral as an average over that guess:

$$\log p(x) = \log \int q(z) \, \frac{p(x, z)}{q(z)} \, dz
= \log \mathbb{E}_{q} \left[ \frac{p(x, z)}{q(z)} \right]
\ge \mathbb{E}_{q} \left[ \log \frac{p(x, z)}{q(z)} \right] .$$

The last step is **Jensen's inequality**: the logarithm is concave, so the logarithm of an average is at least the
average of the logarithms. What stands on the right has the logarithm *inside* the average, and averages can be
estimated from a few samples. It is the *evidence lower bound*, **ELBO**: a number below $\log p(x)$, whatever $q$
is.

Split the logarithm in one of two ways and the bound gets two faces. **Form A** keeps the joint density together
and pays for certainty with the entropy $H(q) = -\mathbb{E}_q[\log q(z)]$:

$$\mathrm{ELBO} = \mathbb{E}_q[\log p(x \mid z) + \log p(z)] + H(q) .$$

**Form B** puts $q$ and the prior together into a Kullback-Leibler divergence:

$$\mathrm{ELBO} = \mathbb{E}_q[\log p(x \mid z)] - \mathrm{KL}(q \parallel p(z)) , \qquad
\mathrm{KL}(q \parallel p) = \mathbb{E}_q \left[ \log \frac{q(z)}{p(z)} \right] .$$

Form B reads as a trade: explain the data well (first term), with a $q$ that says as little as possible that the
prior did not know (second). For Gaussians every term has a closed form; with $d$ latent dimensions

$$H(q) = \sum_{j=1}^d \log \sigma_j + \frac{d}{2} \log \, 2 \pi e, \qquad
\mathrm{KL}(q \parallel N(0, I)) = \frac{1}{2} \sum_{j=1}^d \left( \mu_j^2 + \sigma_j^2 - 1
- \log \sigma_j^2 \right) .$$

The smallest example there is: $z \sim N(0, 1)$, $x \mid z \sim N(z, 1)$, one datum $x = 1$. The posterior is
$N(\frac{1}{2}, \frac{1}{2})$. The table takes four guesses through both forms.
"""

QS: Final = (
    ("the prior", 0.0, 1.0),
    ("the posterior", 0.5, math.sqrt(0.5)),
    ("too sure", 0.5, 0.1),
    ("in the wrong place", -1.0, 0.5),
)
"""The guesses of the table: name, mean, standard deviation."""


class Terms(NamedTuple):
    """The parts of the bound for one q in the smallest example, nats."""

    log_likelihood: float
    log_prior: float
    entropy: float
    kl_to_prior: float

    @property
    def form_a(self) -> float:
        """Expected log joint + entropy."""
        return self.log_likelihood + self.log_prior + self.entropy

    @property
    def form_b(self) -> float:
        """Expected log-likelihood - KL to the prior."""
        return self.log_likelihood - self.kl_to_prior


def terms(mean: float, scale: float) -> Terms:
    """Return the parts of the bound of N(mean, scale^2), each from its own closed form.

    Args:
        mean: Of q.
        scale: Standard deviation of q.
    """
    mean_row, log_var = _exactly([[mean]]), _exactly([[2 * math.log(scale)]])
    spread = (ONE_DATUM - mean) ** 2 + scale**2
    return Terms(
        log_likelihood=-0.5 * (math.log(2 * math.pi) + spread),
        log_prior=float(gaussians.expected_standard_normal_log_prob(mean_row, log_var)),
        entropy=float(gaussians.entropy(log_var)),
        kl_to_prior=float(gaussians.kl_to_standard_normal(mean_row, log_var)),
    )


def two_forms(study: Study) -> Section:
    """Rows 9 and 10: the bound by Jensen's inequality, as expected log joint + entropy and as likelihood - KL."""
    return Section(
        "The evidence lower bound, in two forms",
        (9, 10),
        (
            _JENSEN_TEXT,
            _terms_table(),
            _jensen_figure(),
            Checks((*jensen_checks(study), *form_checks(study))),
            *_DERIVATION_CORRECTIONS,
        ),
    )


def _terms_table() -> Table:
    def cells(name: str, mean: float, scale: float) -> tuple[str, ...]:
        found = terms(mean, scale)
        numbers = (*found, found.form_a, found.form_b, _LOG_EVIDENCE - found.form_b)
        return f"{name}, $N({mean:g}, {scale**2:.3g})$", *(f"{number:.4f}" for number in numbers)

    return Table(
        (
            "$q$",
            r"$\mathbb{E}_q[\log p(x \mid z)]$",
            r"$\mathbb{E}_q[\log p(z)]$",
            "$H(q)$",
            r"$\mathrm{KL}(q, p(z))$",
            "form A",
            "form B",
            r"$\log p(x)$ - bound",
        ),
        tuple(cells(*q) for q in QS),
        caption=rf"$\log p(x) = {_LOG_EVIDENCE:.4f}$. Variances stand second in $N(\cdot, \cdot)$.",
    )


def jensen_checks(study: Study) -> tuple[Check, ...]:
    """Return that no q lifts the bound above log p(x): the smallest example on a grid of q, and random models."""
    source, num = study.source(900), study.size(quick=200, full=5000)
    means, scales = _line(-4, 4, 161), _line(-2, 1, 121).mul(math.log(10)).exp()
    q = gaussian(*(axis.flatten() for axis in torch.meshgrid(means, scales, indexing="ij")))
    excess = float((one_dimensional().elbo(_repeated_datum(q), q) - _LOG_EVIDENCE).max())
    excesses = []
    for _ in range(num):
        model = random_ppca(source, num_features=5, latent_dim=2)
        data = model.sample(10, source)
        q = random_q(model, data, source)
        excesses.append(float((model.elbo(data, q) - model.log_prob(data)).max()))
    return (
        claims.at_most("largest bound - log p(x), 19481 Gaussian q", excess, EXACT, source="Jensen"),
        claims.at_most(
            f"the same, {10 * num} random q, {num} random models", max(excesses), EXACT, source="Jensen"
        ),
    )


def random_q(model: ProbabilisticPCA, data: Tensor, source: torch.Generator) -> GaussianPosterior:
    """Return random Gaussians with full covariances, from a thousandth beside the posterior to far off."""
    posterior, latent_dim = model.posterior(data), model.latent_dim
    distances = _line(math.log(1e-3), math.log(3), len(data)).exp()
    steps = torch.randn((len(data), latent_dim), generator=source, dtype=torch.float64)
    factors = torch.randn((len(data), latent_dim, latent_dim), generator=source, dtype=torch.float64)
    return GaussianPosterior(
        posterior.mean + distances.unsqueeze(1) * steps,
        posterior.covariance + distances.view(-1, 1, 1) * factors @ factors.mT,
    )


def form_checks(study: Study) -> tuple[Check, ...]:
    """Return the difference of both forms, and of both to integrals over z that know no closed form."""
    gaps = [abs(found.form_a - found.form_b) for found in (terms(mean, scale) for _, mean, scale in QS)]
    integrals = [abs(terms(mean, scale).form_b - integrated_bound(mean, scale)) for _, mean, scale in QS]
    return (
        claims.at_most("form A - form B, the four q of the table", max(gaps), EXACT, source="one quantity"),
        claims.at_most(
            "form B against an integral over $z$, the four q", max(integrals), EXACT, source="definition"
        ),
        claims.at_most(
            "form A - form B, random linear VAEs with eight features",
            largest_form_difference(study.source(901), num=study.size(quick=100, full=1000)),
            EXACT,
            source="one quantity, two closed forms",
        ),
    )


def integrated_bound(mean: float, scale: float) -> float:
    """Return E_q[log p(x, z) - log q(z)] of the smallest example as an integral over z."""
    line = numerics.grid(mean - 12 * scale, mean + 12 * scale, 400)
    z = line.points.squeeze(1)
    log_q = -0.5 * (((z - mean) / scale).square() + math.log(2 * math.pi * scale**2))
    log_joint = -0.5 * ((ONE_DATUM - z).square() + z.square()) - math.log(2 * math.pi)
    return float(line.expectation(log_q, log_joint - log_q))


@torch.no_grad()
def largest_form_difference(source: torch.Generator, *, num: int) -> float:
    """Return the largest |form A - form B| over random linear VAEs: likelihood - KL, and log joint + entropy."""
    differences = []
    for _ in range(num):
        vae = LinearVAE(8, 3, source)
        for parameter in vae.parameters():
            parameter.copy_(0.7 * torch.randn(parameter.shape, generator=source, dtype=torch.float64))
        data = torch.randn((20, 8), generator=source, dtype=torch.float64)
        form_a = vae.as_ppca().elbo(data, vae.as_gaussian_posterior(data))
        differences.append(float((form_a - vae.elbo(data)).abs().max()))
    return max(differences)


_DERIVATION_CORRECTIONS: Final = (
    Correction(
        article=r"In the derivation of the KL divergence the fourth line ends in $+H(q_i)$, the argument of the "
        r"divergence is written $q_i(x_i)$ twice, and the bound is once called the variance lower bound.",
        right=r"$\mathrm{KL}(q_i \parallel p(z \mid x_i)) = -\mathbb{E}_{q_i}[\log p(x_i, z)] - H(q_i) + "
        r"\log p(x_i)$, with a minus before the entropy; $q_i$ is a distribution of $z$, so it is $q_i(z)$; and "
        "the bound is the *variational* lower bound, after the calculus of variations. The checks of "
        "*What the bound misses*, below, hold the sign to account.",
    ),
)


def _jensen_figure() -> Figure:
    made = figures.figure(width=9.2, height=3.2)
    concave, trade = figures.axes(made, 1, 2)[0]
    _draw_concavity(concave)
    scales = _line(-1.3, 0.7, 200).mul(math.log(10)).exp()
    found = [terms(0.5, float(scale)) for scale in scales]
    trade.plot(scales, [part.log_likelihood for part in found], color=_ORANGE, label=r"$E_q[\log p(x \mid z)]$")
    trade.plot(scales, [-part.kl_to_prior for part in found], color=_VIOLET, label="−KL(q, prior)")  # noqa: RUF001
    trade.plot(scales, [part.form_b for part in found], color=_BLUE, label="their sum, the ELBO")
    trade.axhline(_LOG_EVIDENCE, color=_GREEN, linestyle="--", label=r"$\log p(x)$")
    trade.axvline(math.sqrt(0.5), color=MUTED, linewidth=0.8, linestyle=":")
    trade.set(xscale="log", ylim=(-4.6, 1.6), xlabel=r"$\sigma$ of $q = N(\frac{1}{2}, \sigma^2)$", ylabel="nats")
    trade.legend(frameon=False, ncols=2, loc="upper center")
    figures.plain_ticks(trade, (0.05, 0.1, 0.2, 0.5, 1, 2, 5))
    return Figure(
        "jensen",
        "Left: Jensen's inequality for a weight that is 0.05 or 1.6 with equal probability. The average of the "
        "logarithms lies on the chord, the logarithm of the average on the curve above it. Right: form B while "
        "the width of $q$ changes and its mean stays right. A narrow $q$ explains the datum best and pays for "
        r"saying so much; a wide one says nothing. The bound is largest, and touches $\log p(x)$, at the width "
        "of the posterior (dotted line).",
        figures.png(made),
    )


def _draw_concavity(axes: Axes) -> None:
    low, high = 0.05, 1.6
    weights = torch.linspace(0.05, 1.8, 200)
    axes.plot(weights, weights.log(), color=INK, label=r"$\log w$")
    axes.plot([low, high], [math.log(low), math.log(high)], "o--", color=MUTED)
    middle, of_logs = 0.5 * (low + high), 0.5 * (math.log(low) + math.log(high))
    axes.plot(middle, math.log(middle), "o", color=_GREEN, markersize=9, label=r"$\log E[w]$")
    axes.plot(middle, of_logs, "o", color=_BLUE, markersize=9, label=r"$E[\log w]$, the bound")
    axes.annotate(
        "",
        xy=(middle, math.log(middle) - 0.08),
        xytext=(middle, of_logs + 0.08),
        arrowprops={"arrowstyle": "<->", "color": _RED},
    )
    axes.text(middle + 0.05, 0.5 * (of_logs + math.log(middle)), "gap", color=_RED)
    axes.set(xlabel="weight $w = p(x, z) / q(z)$", ylabel="nats")
    axes.legend(frameon=False, loc="lower right")


# Row 13: the identity

_IDENTITY_TEXT: Final = r"""
How much does the bound miss? Write $p(x, z) = p(z \mid x) \, p(x)$ inside it and the answer falls out:

$$\mathrm{ELBO} = \mathbb{E}_q \left[ \log \frac{p(z \mid x) \, p(x)}{q(z)} \right]
= \log p(x) - \mathrm{KL}(q(z) \parallel p(z \mid x)) ,$$

$$\log p(x) = \mathrm{ELBO} + \mathrm{KL}(q(z) \parallel p(z \mid x)) .$$

The gap is the KL divergence from $q$ to the **posterior** $p(z \mid x)$, no more and no less. Three things
follow. The gap is never negative. It is zero for exactly one $q$, the posterior. And since $\log p(x)$ does not
depend on $q$, making the ELBO large by choice of $q$ *is* making $q$ like the posterior, although nobody knows
the posterior: that is variational inference. Whether the gap gets small depends on whether $q$ may take the
posterior's shape.
"""


def evidence_identity(study: Study) -> Section:
    """Row 13: log p(x) is the bound plus the divergence from q to the posterior, exactly."""
    return Section(
        "What the bound misses",
        (13,),
        (
            _IDENTITY_TEXT,
            _identity_figure(),
            Checks((*known_identity_checks(), *sign_checks(), *random_identity_checks(study), *best_q_checks())),
            Correction(
                article=r"$q_i(z)$ approximates $p(x_i \mid z)$, and its distance to $p(x_i \mid z)$ is made "
                "small (three sentences).",
                right=r"It approximates the posterior $p(z \mid x_i)$, a distribution of $z$. $p(x_i \mid z)$ is "
                "a distribution of data; as a function of $z$ it need not even integrate to one. The best $q$ of "
                "the smallest example, in the last check, is the posterior $N(0.5, 0.5)$ and not $N(1, 1)$, which "
                r"is what $p(x \mid z)$ is there as a function of $z$. And where the divergence is *defined*, "
                "$p(z)$ stands for any distribution, not for the prior.",
            ),
        ),
    )


def known_identity_checks() -> tuple[Check, ...]:
    """Return the smallest example against its known digits, for q the prior and q the posterior."""
    model, data = one_dimensional(), torch.full((1, 1), ONE_DATUM, dtype=torch.float64)
    prior, posterior = gaussian(0, 1), gaussian(0.5, math.sqrt(0.5))
    log_prob = float(model.log_prob(data))
    bound, gap = float(model.elbo(data, prior)), float(model.kl_to_posterior(data, prior))
    known = (
        (r"$\log p(x)$", log_prob, -1.5155121235),
        ("ELBO, $q$ the prior", bound, -1.9189385332),
        ("KL from the prior to the posterior", gap, 0.4034264097),
    )
    return (
        *(
            claims.close(name, value, digits, within=6e-11, source="known to ten decimals")
            for name, value, digits in known
        ),
        claims.close("their sum - log p(x)", bound + gap - log_prob, 0, within=1e-12, source="the identity"),
        claims.close(
            "ELBO - log p(x), $q$ the posterior",
            float(model.elbo(data, posterior)) - log_prob,
            0,
            within=1e-12,
            source="tight",
        ),
        claims.close(
            "KL to the posterior from itself",
            float(model.kl_to_posterior(data, posterior)),
            0,
            within=1e-12,
            source="tight",
        ),
    )


def sign_checks() -> tuple[Check, ...]:
    """Return the divergence to the posterior from the parts of the bound, with either sign of the entropy."""
    data, errors, wrong = _exactly([[ONE_DATUM]]), [], []
    for _, mean, scale in QS:
        found, exact = terms(mean, scale), float(one_dimensional().kl_to_posterior(data, gaussian(mean, scale)))
        cross = _LOG_EVIDENCE - found.log_likelihood - found.log_prior
        errors.append(abs(cross - found.entropy - exact))
        wrong.append(abs(cross + found.entropy - exact))
    return (
        claims.at_most(
            r"error of KL $= -\mathbb{E}_q[\log p(x, z)] - H(q) + \log p(x)$, the four $q$",
            max(errors),
            EXACT,
            source="KL in closed form",
        ),
        claims.at_least("the same with $+H(q)$: smallest error", min(wrong), 1, source="twice the entropy"),
    )


def best_q_checks() -> tuple[Check, ...]:
    """Return where climbing the bound over q ends, in the smallest example."""
    mean, log_scale = _exactly(-2.0).requires_grad_(), _exactly(1.0).requires_grad_()
    data = _exactly([[ONE_DATUM]])
    numerics.minimise(
        lambda: -one_dimensional().elbo(data, gaussian(mean, log_scale.exp())).sum(), [mean, log_scale]
    )
    variance = math.exp(2 * log_scale.item())
    source = "the posterior $N(0.5, 0.5)$"
    return (
        claims.close(
            "mean of the $q$ with the largest ELBO", mean.item(), 0.5, within=1e-6, source=source, unit=""
        ),
        claims.close("its variance", variance, 0.5, within=1e-6, source=source, unit=""),
    )


def random_identity_checks(study: Study) -> tuple[Check, ...]:
    """Return the identity on random models with five features, two latents and random full q."""
    source, num = study.source(1300), study.size(quick=200, full=5000)
    errors, gaps = [], []
    for _ in range(num):
        model = random_ppca(source, num_features=5, latent_dim=2)
        data = model.sample(10, source)
        q = random_q(model, data, source)
        gap = model.kl_to_posterior(data, q)
        errors.append(float((model.log_prob(data) - model.elbo(data, q) - gap).abs().max()))
        gaps.append(float(gap.min()))
    name = f"{num} random models, {10 * num} random q"
    return (
        claims.at_most(f"largest error of the identity, {name}", max(errors), EXACT, source="the identity"),
        claims.at_least(f"smallest gap, {name}", min(gaps), -1e-12, source="never negative; rounding"),
    )


def _identity_figure() -> Figure:
    made = figures.figure(width=8.6, height=3.3)
    heat, stack = figures.axes(made, 1, 2, width_ratios=(1.25, 1))[0]
    means, scales = _line(-1.2, 2.2, 120), _line(0.15, 1.7, 120)
    q = gaussian(*(axis.flatten() for axis in torch.meshgrid(means, scales, indexing="ij")))
    gaps = one_dimensional().kl_to_posterior(_repeated_datum(q), q).view(len(means), len(scales)).T
    levels = (0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4)
    heat.contourf(means, scales, gaps, levels=levels, cmap="Blues", extend="max")
    lines = heat.contour(means, scales, gaps, levels=levels[2:8], colors=INK, linewidths=0.6)
    heat.clabel(lines, fmt="%g", fontsize=7.5)
    heat.plot(0.5, math.sqrt(0.5), "*", color=_RED, markersize=12, label="posterior")
    heat.legend(frameon=False, loc="lower left", handletextpad=0)
    heat.set(xlabel=r"mean of $q$", ylabel=r"$\sigma$ of $q$", title="gap of the bound, nats")
    heat.grid(visible=False)
    names = [name for name, _, _ in QS]
    bounds = [terms(mean, scale).form_b for _, mean, scale in QS]
    places = range(len(QS))
    stack.barh(places, [bound - _FLOOR for bound in bounds], left=_FLOOR, color=_BLUE, label="ELBO")
    stack.barh(
        places, [_LOG_EVIDENCE - bound for bound in bounds], left=bounds, color=_RED, label="KL(q, posterior)"
    )
    stack.axvline(_LOG_EVIDENCE, color=_GREEN, linestyle="--")
    stack.set(yticks=places, yticklabels=names, xlim=(_FLOOR, _LOG_EVIDENCE + 0.3), xlabel="nats")
    stack.invert_yaxis()
    stack.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.4, 1.17), ncols=2)
    return Figure(
        "evidence-identity",
        r"Left: what the bound misses of $\log p(x)$ for every Gaussian $q$ in the smallest example. There is "
        "one best $q$, the posterior, where nothing is missed. Right: the four guesses from the start. ELBO "
        r"(blue) and divergence to the posterior (red) always add up to $\log p(x)$ (dashed).",
        figures.png(made),
    )


_FLOOR: Final = -4.5
"""Where the bars begin; a bound has no zero that means anything."""


# Row 13 again: many samples tighten the bound

IMPORTANCE_BOUNDS: Final = {
    1: -1.918939,
    2: -1.653474,
    3: -1.594067,
    5: -1.557411,
    10: -1.534942,
    20: -1.524906,
    50: -1.519199,
    100: -1.517344,
    500: -1.515877,
    1000: -1.515694,
    5000: -1.515549,
}
"""k to the bound with k samples of the prior in the smallest example, nats."""

_STANDARD_ERRORS: Final = 3.7
"""Tolerance of the worst of eleven sampled bounds: it is further off as rarely as one of them is off by 3."""

_IMPORTANCE_TEXT: Final = r"""
If $q$ cannot be made better, the bound still can. Average $k$ weights *before* taking the logarithm:

$$L_k = \mathbb{E} \left[ \log \frac{1}{k} \sum_{j=1}^k \frac{p(x, z_j)}{q(z_j)} \right], \qquad z_j \sim q .$$

$L_1$ is the ELBO. The average of many weights scatters less, so Jensen's inequality costs less: $L_k$ never falls
with $k$ and tends to $\log p(x)$. This is the **importance-weighted bound**. It serves as a better objective, and
as the usual way to report how likely test data are under a model whose integral cannot be done: for large $k$ the
gap is about $\mathrm{Var}(w) / (2 k \, \mathbb{E}[w]^2)$, in inverse proportion to $k$.

In the smallest example, with the prior as a poor $q$, $L_k$ can be had exactly for any $k$, by an identity that
turns the expected logarithm of a sum into an integral over Laplace transforms, $\mathbb{E}[\log S] =
\int_0^\infty ( e^{-t} - \mathbb{E}[e^{-t S}] ) \, t^{-1} \, dt$. Beside it stands what averages over random
samples give.
"""


class Sampled(NamedTuple):
    """A sampled bound with its standard error, nats."""

    value: float
    standard_error: float


def importance_weighting(study: Study) -> Section:
    """Row 13: the importance-weighted bound closes the gap from below, exactly and by sampling."""
    exact = exact_importance_bounds(tuple(IMPORTANCE_BOUNDS))
    source, num = study.source(1301), study.size(quick=1_000_000, full=50_000_000)
    drawn = {k: sampled_importance_bound(k, source, num_weights=max(num, 200 * k)) for k in exact}
    return Section(
        "More samples, a tighter bound",
        (13,),
        (
            _IMPORTANCE_TEXT,
            _importance_table(exact, drawn),
            _importance_figure(exact, drawn),
            Checks(importance_checks(exact, drawn)),
        ),
    )


def exact_importance_bounds(nums: Sequence[int]) -> dict[int, float]:
    """Return k to the bound with k samples of the prior in the smallest example."""
    line = numerics.grid(-12, 13, 1000)
    z = line.points.squeeze(1)
    probabilities = (-0.5 * z.square()).exp() / math.sqrt(2 * math.pi) * line.volume
    return dict(zip(nums, numerics.expected_log_means(_log_weight(z), probabilities, nums), strict=True))


def _log_weight(latents: Tensor) -> Tensor:
    """Return log p(x, z) - log q(z) for q the prior: log p(x given z)."""
    return -0.5 * ((ONE_DATUM - latents).square() + math.log(2 * math.pi))


def sampled_importance_bound(num: int, source: torch.Generator, *, num_weights: int) -> Sampled:
    """Return the mean of independent estimates with k samples each.

    Args:
        num: k.
        source: Of the samples.
        num_weights: How many samples to spend altogether.
    """
    repetitions, parts = num_weights // num, []
    while repetitions > 0:
        rows = min(repetitions, max(1, 2_000_000 // num))
        latents = torch.randn((rows, num), generator=source, dtype=torch.float64)
        parts.append(objectives.importance_weighted_bound(_log_weight(latents)))
        repetitions -= rows
    values = torch.cat(parts)
    return Sampled(float(values.mean()), float(values.std()) / math.sqrt(len(values)))


def importance_checks(exact: dict[int, float], drawn: dict[int, Sampled]) -> tuple[Check, ...]:
    """Return the exact bounds against known values, their order, the law of large k, and the sampled bounds."""
    known = (
        claims.close(f"$L_{{{k}}}$, exact", exact[k], value, within=5.1e-7, source="known to six decimals")
        for k, value in IMPORTANCE_BOUNDS.items()
    )
    ladder = [*exact.values(), _LOG_EVIDENCE]
    largest = max(exact)
    # E[w^2] is the integral of N(z; 0, 1) N(1; z, 1)^2.
    second_moment = math.exp(-1 / 3) / (2 * math.pi * math.sqrt(3))
    relative_variance = second_moment / math.exp(2 * _LOG_EVIDENCE) - 1
    return (
        *known,
        claims.holds(
            "more samples, a larger bound, below log p(x)", ladder == sorted(set(ladder)), source="Jensen"
        ),
        claims.close(
            rf"gap at $k = {largest}$, times $2 k \, \mathbb{{E}}[w]^2 / \mathrm{{Var}}(w)$",
            (_LOG_EVIDENCE - exact[largest]) * 2 * largest / relative_variance,
            1,
            within=10 / largest,
            source="the first term of a series in $1 / k$",
            unit="",
        ),
        claims.at_most(
            "largest error of a sampled bound",
            max(abs(found.value - exact[k]) / found.standard_error for k, found in drawn.items()),
            _STANDARD_ERRORS,
            source="exact; 3 standard errors for one, as rare for the worst of eleven",
            unit="standard errors",
        ),
    )


def _importance_table(exact: dict[int, float], drawn: dict[int, Sampled]) -> Table:
    def cells(k: int) -> tuple[str, ...]:
        deviation = (drawn[k].value - exact[k]) / drawn[k].standard_error
        numbers = f"{exact[k]:.6f}", f"{drawn[k].value:.6f} ± {drawn[k].standard_error:.6f}", f"{deviation:+.1f}"
        return str(k), *numbers, f"{_LOG_EVIDENCE - exact[k]:.6f}"

    return Table(
        ("$k$", "$L_k$, exact", "sampled", "off by, standard errors", r"$\log p(x) - L_k$"),
        (*(cells(k) for k in exact), (r"$\infty$", f"{_LOG_EVIDENCE:.6f}", "", "", "0")),
        caption="Nats.",
    )


def _importance_figure(exact: dict[int, float], drawn: dict[int, Sampled]) -> Figure:
    made = figures.figure(width=8.6, height=3.0)
    bounds, gaps = figures.axes(made, 1, 2)[0]
    ks = list(exact)
    bounds.axhline(_LOG_EVIDENCE, color=_GREEN, linestyle="--", label=r"$\log p(x)$")
    bounds.plot(ks, list(exact.values()), color=_BLUE, label="$L_k$, exact")
    errors = [3 * found.standard_error for found in drawn.values()]
    values = [found.value for found in drawn.values()]
    bounds.errorbar(ks, values, errors, fmt="o", color=_RED, markersize=4, label="sampled")
    bounds.set(xscale="log", xlabel="$k$", ylabel="nats")
    bounds.legend(frameon=False, loc="lower right")
    gaps.loglog(ks, [_LOG_EVIDENCE - value for value in exact.values()], "o-", color=_BLUE, markersize=4)
    gaps.loglog(ks, [0.3 / k for k in ks], color=MUTED, linestyle=":", label="slope of $1 / k$")
    gaps.set(xlabel="$k$", ylabel=r"$\log p(x) - L_k$, nats")
    gaps.legend(frameon=False)
    for axes in (bounds, gaps):
        figures.plain_ticks(axes, (1, 10, 100, 1000))
    return Figure(
        "importance-weighted-bound",
        "The importance-weighted bound of the smallest example against the number of samples $k$, with the "
        r"prior as $q$. Left: from the ELBO at $k = 1$ up to $\log p(x)$; the sampled values (bars: three "
        "standard errors, mostly smaller than the dots) lie on the exact ones. Right: the gap falls as $1 / k$.",
        figures.png(made),
    )


# Row 14: steps in turn

_ALTERNATION_TEXT: Final = r"""
The identity tells what climbing the bound does. It has two arguments, the model $\theta$ and the guess $q$:

$$\mathrm{ELBO}(\theta, q) = \log p_\theta(x) - \mathrm{KL}(q \parallel p_\theta(z \mid x)) .$$

- **A step on** $q$ leaves $\log p_\theta(x)$ alone, for $q$ is not in it. All that it gains is taken from the
  gap: the bound gets tighter.
- **A step on** $p$, with $q$ fixed, lifts the bound. If the gap was zero before, $\log p_\theta(x)$ rises by at
  least as much, because the gap can only have grown: the model gets better.

In turn they give the EM algorithm. For pPCA both steps are exact, and so is everything that is drawn: eight
latents fitted to all digits, from a random start.
"""

_RESTRICTED_TEXT: Final = r"""
The second rule has an *if*. When $q$ may not take the shape of the posterior, the gap stays open, and a step on
$p$ may lift the bound by making the posterior look more like $q$, at the price of $\log p$. The picture on the
right shows it happen. It begins with the best pPCA there is, only that its latents are rotated at random, which
changes nothing in $p(x)$; and $q$ may only have independent dimensions, as in most VAEs, while the rotated
posterior has dependent ones. Step by step the bound rises, and $\log p$ *falls* below the maximum at which it
began. What is climbed is the bound; the model follows it only as closely as the bound is tight.
"""

_NUM_LATENTS: Final = 8


def alternation(study: Study) -> Section:
    """Row 14: a step on q tightens the bound, a step on p improves the model, as far as the bound is tight."""
    digits, source = grey_digits(), study.source(1400)
    # The same means over all digits, at a fourteenth of the price.
    rows, num_rounds = equivalent_rows(digits), study.size(quick=400, full=2000)
    weight = 0.3 * torch.randn((digits.shape[1], _NUM_LATENTS), generator=source, dtype=torch.float64)
    start = ProbabilisticPCA(weight, digits.mean(dim=0), _exactly(0.1))
    full = alternate(start, rows, num_rounds=num_rounds)
    best = rotated(ProbabilisticPCA.fit(digits, _NUM_LATENTS), source)
    restricted = alternate(best, rows, num_rounds=num_rounds, is_diagonal=True)
    maximum = elbo_maximum(digits, _NUM_LATENTS)
    return Section(
        "Steps on $q$ and on $p$, in turn",
        (14,),
        (
            _ALTERNATION_TEXT,
            _alternation_figure(full, restricted, maximum),
            Checks(alternation_checks(full, maximum)),
            _RESTRICTED_TEXT,
            Checks(restricted_checks(restricted, maximum)),
        ),
    )


def rotated(model: ProbabilisticPCA, source: torch.Generator) -> ProbabilisticPCA:
    """Return a model with its latents turned at random: the same p(x), another posterior."""
    square = torch.randn((model.latent_dim, model.latent_dim), generator=source, dtype=torch.float64)
    return ProbabilisticPCA(model.weight @ torch.linalg.qr(square).Q, model.mean, model.variance)


def _moves(ascent: Ascent, moved: str) -> list[tuple[AscentStep, AscentStep]]:
    """Return lines of the trace before and after each step of a kind."""
    return [pair for pair in itertools.pairwise(ascent.trace) if pair[1].moved == moved]


def shared_checks(ascent: Ascent) -> tuple[Check, ...]:
    """Return what holds for any family of q: log p stands still in steps on q, and the bound never falls."""
    still = max(abs(after.log_prob - before.log_prob) for before, after in _moves(ascent, "q"))
    gain = min(after.elbo - before.elbo for before, after in itertools.pairwise(ascent.trace))
    error = max(abs(step.log_prob - step.elbo - step.kl) for step in ascent.trace)
    return (
        claims.at_most("largest change of log p in a step on $q$", still, 0, source="$q$ is not in it"),
        claims.at_least(
            "smallest gain of the bound in a step", gain, -1e-12, source="coordinate ascent; rounding"
        ),
        claims.at_most("largest error of log p = ELBO + KL along the way", error, EXACT, source="the identity"),
    )


def alternation_checks(ascent: Ascent, maximum: float) -> tuple[Check, ...]:
    """Return what holds when q is the exact posterior after each of its steps."""
    gap = max(after.kl for _, after in _moves(ascent, "q"))
    excess = min(
        (after.log_prob - before.log_prob) - (after.elbo - before.elbo) for before, after in _moves(ascent, "p")
    )
    return (
        *shared_checks(ascent),
        claims.at_most("largest gap after a step on $q$", gap, EXACT, source="$q$ is the posterior"),
        claims.at_least(
            "smallest rise of log p less rise of the bound, steps on $p$",
            excess,
            -1e-12,
            source="the gap was zero; rounding",
        ),
        claims.close(
            f"log p after {len(_moves(ascent, 'p'))} rounds",
            ascent.trace[-1].log_prob,
            maximum,
            within=1e-6,
            source="the maximum in closed form",
        ),
    )


def restricted_checks(ascent: Ascent, maximum: float) -> tuple[Check, ...]:
    """Return what a q without correlations does to a model that was the best."""
    gap = min(after.kl for _, after in _moves(ascent, "q")[:3])
    lowest = min(step.log_prob for step in ascent.trace)
    first = ascent.trace[0].log_prob
    return (
        *shared_checks(ascent),
        claims.close("log p at the start", first, maximum, within=EXACT, source="rotations leave p(x) alone"),
        claims.at_least(
            "smallest gap after each of three steps on $q$", gap, 1e-3, source="the posterior is correlated"
        ),
        claims.at_most(
            "lowest log p - log p at the start", lowest - first, -1e-3, source="the bound was not tight"
        ),
    )


def _alternation_figure(full: Ascent, restricted: Ascent, maximum: float) -> Figure:
    made = figures.figure(width=9.2, height=3.4)
    free, bound_to = figures.axes(made, 1, 2)[0]
    for axes, ascent, first, num in ((free, full, 2, 16), (bound_to, restricted, 1, 80)):
        trace = ascent.trace[first : first + num + 1]
        steps = range(first, first + len(trace))
        axes.fill_between(
            steps,
            [step.elbo for step in trace],
            [step.log_prob for step in trace],
            color=_RED,
            alpha=0.15,
            label="KL",
        )
        axes.plot(steps, [step.log_prob for step in trace], ".-", color=_GREEN, label=r"$\log p(x)$")
        axes.plot(steps, [step.elbo for step in trace], ".-", color=_BLUE, label="ELBO")
        axes.axhline(maximum, color=MUTED, linestyle=":", label="largest possible")
        axes.set(xlabel="step: $q$ odd, $p$ even", ylabel="nats per image")
    free.set_title("any Gaussian $q$")
    bound_to.set_title("$q$ of independent dimensions")
    free.legend(frameon=False, loc="lower right")
    return Figure(
        "alternation",
        r"Means over all digits. Left: each step on $q$ lifts the ELBO to $\log p(x)$, which stands still; each "
        "step on $p$ lifts both and opens the gap (red) again. Right: with a restricted $q$ the gap stays open; "
        r"the bound rises while $\log p(x)$ falls, and comes back only as the latents turn to where such a $q$ "
        "fits.",
        figures.png(made),
    )
