r"""Rows 19 to 21: the gradient of an expectation, two ways to estimate it, and how much each of them scatters.

What is measured is held against closed forms, for f(z) = -|z|^2 / 2 and f(z) = sin(w z).
"""

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from training import estimators, gaussians, variance_probe
from training.estimators import Baseline, Function, GaussianLatents
from training.study import claims, figures, sampled
from training.study.claims import Check, Checks, Correction, Figure, Section, Table
from training.study.figures import INK, MUTED, PALETTE
from training.study.sampled import STANDARD_ERRORS
from training.study.setup import Study
from training.variance_probe import Estimator, Measurement

RATIO_TOLERANCE: Final = 0.05
"""Tolerance of a measured variance, relative. The draws are so many that this is five standard errors or more."""

SCORE, MEAN_BASELINE, BEST_BASELINE, LEAVE_ONE_OUT, PATH = (
    "score function",
    "score function, mean baseline",
    "score function, best constant baseline",
    "score function, leave one out",
    "reparametrised",
)
"""Names of the estimators; all but the third are those of `variance_probe.standard_estimators`."""

SHORT: Final = {
    SCORE: "no baseline",
    MEAN_BASELINE: "mean baseline",
    BEST_BASELINE: "best constant",
    LEAVE_ONE_OUT: "leave one out",
    PATH: "reparametrised",
}

LEAVE_ONE_OUT_SAMPLES: Final = 4
"""M of the leave-one-out estimator where the others have one sample; its variance is then given per sample."""

_BLUE, _RED, _, _VIOLET, _ORANGE, _TEAL = PALETTE

COLOURS: Final = {SCORE: _RED, MEAN_BASELINE: _ORANGE, BEST_BASELINE: _VIOLET, LEAVE_ONE_OUT: _TEAL, PATH: _BLUE}


def score_with(baseline: Baseline) -> Estimator:
    """Return the score-function estimator with a baseline."""

    def estimator(function: Function, latents: GaussianLatents, noise: Tensor) -> Tensor:
        return estimators.score_function(function, latents, noise, baseline=baseline)

    return estimator


# Row 19: the score function

_SCORE_TEXT: Final = r"""
To fit $q_\phi$ we climb an expectation, $J(\phi) = \mathbb{E}_{q_\phi}[f(z)]$; for the bound of a latent
variable model $f(z)$ is $\log p(x, z)$. An expectation is estimated by an average over samples. Its *gradient*
is less simple: $\phi$ decides where the samples fall, and the average $\frac{1}{M} \sum_m f(z_m)$ does not tell
how it would have changed had $\phi$ been a little different.

The first way out differentiates the density instead of the samples. Because $\nabla q = q \, \nabla \log q$,

$$\nabla_\phi \int q_\phi(z) f(z) \, dz = \int q_\phi(z) \, f(z) \, \nabla_\phi \log q_\phi(z) \, dz ,$$

which is an expectation again, and may be estimated from samples $z_m \sim q_\phi$:

$$\nabla_\phi J \approx \frac{1}{M} \sum_{m=1}^{M} \left( f(z_m) - b \right) \nabla_\phi \log q_\phi(z_m) .$$

The factor $\nabla \log q$ is the *score*; the estimator is also called REINFORCE or the policy gradient. Read it
as trial and error: make a sample more likely in proportion to the reward $f$ that it brought. It needs values of
$f$ and $\log q$, no derivative of $f$, and $z$ may be discrete.

The *baseline* $b$ may be any number that does not depend on the sample it is used for. The score has mean zero
($\int \nabla q = \nabla \int q = 0$), so $b$ moves single estimates and not their mean. Three choices are used
here: the mean of $f$; the constant that makes the variance least; and *leave-one-out*, the mean of $f$ over the
other samples, which needs to know nothing beforehand:

$$b_m = \frac{1}{M - 1} \sum_{l \neq m} f(z_l) .$$

Whatever the baseline, the mean must be the exact gradient. For $f(z) = -\frac{1}{2} |z|^2$ and a Gaussian $q$ that
gradient is known:
"""

_STEP_TEXT: Final = """
In the last check $f$ is 1 for positive $z$ and 0 otherwise: a step, which no chain rule gets through. The score
function asks only for its values and does not mind.
"""


def score_function(study: Study) -> Section:
    """Row 19: the score-function estimator, derived; its mean with every baseline is the exact gradient."""
    mean = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)
    log_var = torch.tensor([-1.0, 0.3, 0.0], dtype=torch.float64)
    expected = float(gaussians.expected_standard_normal_log_prob(mean, log_var)) + 1.5 * math.log(2 * math.pi)
    noise = sampled.noise(study.source(1900), study.size(quick=50_000, full=1_000_000), 3, 3)
    candidates = variance_probe.standard_estimators(expected)
    checks = [
        sampled.means_are(
            f"largest error of the mean gradient, {SHORT[name]}",
            _draws_of_both(candidates[name], mean, log_var, noise),
            torch.cat((-mean, -0.5 * log_var.exp())),
            source=r"exact: $-\mu$, and $-\sigma^2/2$ for $\log \sigma^2$",
        )
        for name in (SCORE, MEAN_BASELINE, LEAVE_ONE_OUT)
    ]
    step = _step_gradients(
        estimators.score_function, study.source(1901), study.size(quick=100_000, full=1_000_000)
    )
    checks.append(
        sampled.mean_is(
            "mean gradient for a step, by the score function", step, _STEP_GRADIENT, source=_STEP_SOURCE
        )
    )
    return Section("The score-function estimator", (19,), (_SCORE_TEXT, Checks(tuple(checks)), _STEP_TEXT))


def _draws_of_both(candidate: Estimator, mean: Tensor, log_var: Tensor, noise: Tensor) -> Tensor:
    """Return gradient estimates of a quadratic for mean and log variance, shape (num_draws, 2 dim)."""
    copies = torch.cat((mean, log_var)).expand(len(noise), -1).clone().requires_grad_()
    latents = GaussianLatents(*copies.chunk(2, dim=1))
    (found,) = torch.autograd.grad(candidate(variance_probe.quadratic, latents, noise).sum(), copies)
    return found


_STEP_MEAN: Final = 0.5
_STEP_GRADIENT: Final = math.exp(-0.5 * _STEP_MEAN**2) / math.sqrt(2 * math.pi)
_STEP_SOURCE: Final = r"closed form: the normal density at $\mu = 1/2$, slope of $P(z > 0)$"


def _step_gradients(estimator: Estimator, source: torch.Generator, num_draws: int) -> Tensor:
    """Return gradients of the probability that z > 0, from values 0 and 1 alone; shape (num_draws,)."""
    mean = torch.tensor([_STEP_MEAN], dtype=torch.float64)

    def step(latents: Tensor) -> Tensor:
        return 0.5 * (1 + torch.sign(latents)).sum(dim=-1)  # its derivative is zero wherever it exists

    noise = sampled.noise(source, num_draws, 1, 1)
    return variance_probe.gradients(estimator, step, GaussianLatents(mean, torch.zeros_like(mean)), noise)[:, 0]


# Row 20: reparametrisation

_PATH_TEXT: Final = r"""
The second way out moves $\phi$ from the density into the sample. Draw noise from a distribution without
parameters, and let the sample be a smooth function of noise and $\phi$:

$$z = \mu_\phi + \sigma_\phi \, \epsilon, \qquad \epsilon \sim N(0, I) .$$

The expectation is now over $\epsilon$, which $\phi$ does not touch, so the gradient goes inside and the chain
rule does the rest:

$$\nabla_\phi \mathbb{E}_{q_\phi}[f(z)] = \mathbb{E}_{\epsilon} \left[ \nabla_\phi f(\mu_\phi + \sigma_\phi
\epsilon) \right] \approx \frac{1}{M} \sum_{m=1}^{M} \nabla_\phi f(\mu_\phi + \sigma_\phi \epsilon_m) ,$$

$$\frac{\partial f}{\partial \mu} = \frac{\partial f}{\partial z}, \qquad
\frac{\partial f}{\partial \sigma} = \frac{\partial f}{\partial z} \, \epsilon .$$

It uses more than the score function does: not only how good a sample was, but in which direction it would have
been better.
"""

_PATH_CAPTION: Final = r"""
Two estimates of one number, for $f(z) = -z^2/2$ and $q = N(1, 0.5^2)$. Left: what a sample that falls at $z$
contributes; the shaded hill is the density of $q$. Both curves average to the true gradient (dotted), but under
the hill the reparametrised one stays closer to it. Right: histogram of single-sample estimates.
"""


def reparametrised(study: Study) -> Section:
    """Row 20: the reparametrised estimator, derived; same mean as the score function, far less scatter."""
    mean, scale, num_draws = 1.0, 0.5, study.size(quick=200_000, full=1_000_000)
    location = torch.tensor([mean], dtype=torch.float64)
    latents = GaussianLatents(location, torch.full_like(location, 2 * math.log(scale)))
    noise = sampled.noise(study.source(2000), num_draws, 1, 1)
    candidates = variance_probe.standard_estimators(0.0)
    found = {
        name: variance_probe.gradients(candidates[name], variance_probe.quadratic, latents, noise)[:, 0]
        for name in (SCORE, PATH)
    }
    checks = [
        sampled.mean_is(f"mean gradient, {name}", draws, -mean, source=r"closed form $-\mu$, for both")
        for name, draws in found.items()
    ]
    difference = found[SCORE] - found[PATH]
    checks += [
        sampled.mean_is("mean difference on common noise", difference, 0.0, source="both are unbiased"),
        _several_samples(study),
        _step_has_no_path(study),
    ]
    ratio = float(found[SCORE].var() / found[PATH].var())
    return Section(
        "The reparametrised estimator",
        (20,),
        (
            _PATH_TEXT,
            Figure("two-estimators", _PATH_CAPTION, _two_estimators(found, mean=mean, scale=scale)),
            (
                f"Here the standard deviation of one estimate is {float(found[SCORE].std()):.2f} for the score "
                f"function and {float(found[PATH].std()):.2f} after reparametrisation: the first needs "
                f"{ratio:.0f} times as many samples for the same accuracy."
            ),
            Checks(tuple(checks)),
            (
                "The last check shows the price. Where $f$ jumps, the derivative along the path is zero, "
                f"although the true gradient is {_STEP_GRADIENT:.3f}."
            ),
            Correction(
                "Once $z$ is a function of noise, the gradient may be moved into the expectation.",
                "It may if $f$ is differentiable along the path, with a derivative that stays below something "
                "integrable. A step, a rounding or a discrete $z$ breaks this, even where the expectation is a "
                "finite sum.",
            ),
        ),
    )


def _several_samples(study: Study) -> Check:
    """Check that M samples of one estimate divide its variance by M."""
    num_samples, zero = 5, torch.zeros(3, dtype=torch.float64)
    noise = sampled.noise(study.source(2001), study.size(quick=40_000, full=200_000), num_samples, 3)
    (row,) = variance_probe.measure(
        {PATH: estimators.reparametrised}, variance_probe.quadratic, GaussianLatents(zero, zero), noise
    )
    return claims.close(
        f"variance of a reparametrised gradient from M = {num_samples} samples",
        row.variance,
        variance_probe.reparametrised_variance(1.0, num_samples),
        within=STANDARD_ERRORS * row.variance_standard_error,
        source=r"closed form $\sigma^2 / M$",
        unit="",
    )


def _step_has_no_path(study: Study) -> Check:
    found = _step_gradients(estimators.reparametrised, study.source(2002), 1000)
    return claims.close(
        "mean gradient for a step, reparametrised: wrong",
        float(found.mean()),
        0.0,
        within=0.0,
        source="a step has no slope, so its jump is missed",
        unit="",
    )


def _two_estimators(found: dict[str, Tensor], *, mean: float, scale: float) -> bytes:
    made = figures.figure(height=3.1)
    left, right = figures.axes(made, 1, 2)[0]
    low, high = -6, 4
    latents = np.linspace(mean - 4 * scale, mean + 4 * scale, 200)
    density = np.exp(-0.5 * ((latents - mean) / scale) ** 2)
    left.fill_between(latents, low, low + 4 * density, color="#dde6ef", lw=0)
    left.plot(latents, -0.5 * latents**2 * (latents - mean) / scale**2, color=COLOURS[SCORE])
    left.plot(latents, -latents, color=COLOURS[PATH])
    left.axhline(-mean, color=INK, ls=":", lw=1.2)
    left.set(xlabel="where the sample falls, z", ylabel="its contribution", ylim=(low, high), title="One sample")
    bins = np.linspace(low, high, 81).tolist()
    for name, draws in found.items():
        right.hist(draws.numpy(), bins=bins, density=True, color=COLOURS[name], alpha=0.6, label=name)
    right.axvline(-mean, color=INK, ls=":", lw=1.2, label="true gradient")
    right.set(xlabel="estimate of the gradient", ylabel="density", title="Many estimates")
    figures.legend_below(made, right)
    return figures.png(made)


# Row 21: closed forms on a quadratic


class Cell(NamedTuple):
    """One q of the table: dimensions, and every coordinate of its mean in units of its scale."""

    dim: int
    shift: float


SCALE: Final = 0.5
"""Scale of q in the table; the ratios do not depend on it."""

CELLS: Final = (*(Cell(dim, shift) for shift in (0.0, 1.0, 3.0) for dim in (1, 2, 10, 50)), Cell(10, 2.0))
"""The last one is the published case of ten coordinates at 1 with scale 0.5."""

KNOWN: Final[dict[str, dict[Cell, float]]] = {
    SCORE: {
        Cell(1, 0.0): 3.75,
        Cell(2, 0.0): 6,
        Cell(10, 0.0): 42,
        Cell(50, 0.0): 702,
        Cell(1, 1.0): 7.5,
        Cell(1, 3.0): 55.5,
        Cell(10, 2.0): 726,
    },
    MEAN_BASELINE: {Cell(1, 0.0): 2.5, Cell(2, 0.0): 3, Cell(10, 0.0): 7, Cell(50, 0.0): 27},
    BEST_BASELINE: {Cell(1, 0.0): 1.5, Cell(2, 0.0): 2, Cell(10, 0.0): 6, Cell(50, 0.0): 26},
}
"""Variances in units of the reparametrised estimator's, computed by hand."""

_VARIANCE_TEXT: Final = r"""
Both estimators have the right mean; what tells them apart is the variance, and for $f(z) = -\frac{1}{2} |z|^2$
and $q = N(\mu, \sigma^2 I)$ in $D$ dimensions it is known. With $r^2 = |\mu|^2$, per coordinate $i$ of the
gradient for $\mu$ and for one sample,

$$\mathrm{Var}_{\mathrm{path}} = \sigma^2,$$

$$\frac{\mathrm{Var}_{\mathrm{score}}}{\mathrm{Var}_{\mathrm{path}}} =
\frac{r^4 + 2 \sigma^2 r^2 (D + 4) + 4 \sigma^2 \mu_i^2 + \sigma^4 (D + 2)(D + 4)}{4 \sigma^4} .$$

At the top of the quadratic ($\mu = 0$) that ratio is $(D + 2)(D + 4) / 4$. It falls to $(D + 4) / 2$ with the
mean of $f$ as baseline, and to $(D + 2) / 2$ with the best constant. Leave-one-out comes close to the mean
baseline; its variance with $M$ samples is

$$\frac{1}{M} \left[ \mathrm{Var}_{\mathrm{mean}} + \frac{\mu_i^2 + r^2 + \sigma^2 D / 2}{M - 1} \right],$$

where $\mathrm{Var}_{\mathrm{mean}}$ belongs to the mean baseline and one sample.
"""

_VARIANCE_CONCLUSION: Final = """
These two figures answer the question that the article leaves open. Averaging more samples helps every estimator
alike, by $1/M$. What separates them is the number of latent dimensions: a score function without baseline pays
with $D^2$, a baseline brings that down to $D$, and reparametrisation does not pay at all, because each
coordinate gets a derivative of its own instead of a share of one common reward.
"""


def variance_in_closed_form(study: Study) -> Section:
    """Row 21: the variances of all estimators on a quadratic, measured beside their closed forms."""
    source = study.source(2100)
    # A variance from so many draws has a standard error of a hundredth, a fifth of the tolerance.
    most, values = study.size(quick=(500_000, 1_500_000), full=(1_000_000, 20_000_000))
    measured = {cell: _measured(cell, min(most, values // cell.dim), source) for cell in CELLS}
    return Section(
        "How much the estimators scatter",
        (21,),
        (
            _VARIANCE_TEXT,
            _ratio_table(measured),
            Checks(tuple(ratio_checks(measured))),
            *_against_samples(study),
            *_against_dimension(study),
            _VARIANCE_CONCLUSION,
        ),
    )


def exact_ratios(cell: Cell) -> dict[str, float]:
    """Return the variances of all estimators at one q, per sample, in units of the reparametrised one's."""
    mean = torch.full((cell.dim,), cell.shift * SCALE, dtype=torch.float64)
    baselines = {
        SCORE: 0.0,
        MEAN_BASELINE: variance_probe.quadratic_expectation(mean, SCALE),
        BEST_BASELINE: variance_probe.best_constant_baseline(mean, SCALE),
    }
    variances = {
        name: float(variance_probe.score_function_variance(mean, SCALE, baseline=baseline)[0])
        for name, baseline in baselines.items()
    }
    leave_one_out = variance_probe.leave_one_out_variance(mean, SCALE, LEAVE_ONE_OUT_SAMPLES)[0]
    variances[LEAVE_ONE_OUT] = LEAVE_ONE_OUT_SAMPLES * float(leave_one_out)
    variances[PATH] = variance_probe.reparametrised_variance(SCALE)
    return {name: variance / SCALE**2 for name, variance in variances.items()}


def ratio_checks(measured: dict[Cell, dict[str, Measurement]]) -> list[Check]:
    """Return the checks of a table: the formulas, the worst measurement of each estimator, and the worst mean."""
    known = claims.at_most(
        "largest error of the formulas against ratios that were computed by hand",
        max(
            abs(exact_ratios(cell)[name] - expected)
            for name, cells in KNOWN.items()
            for cell, expected in cells.items()
        ),
        1e-9,
        source="(D + 2)(D + 4) / 4, (D + 4) / 2, (D + 2) / 2 and the like; rounding",
        unit="",
    )
    worst = [
        claims.at_most(
            f"largest relative error of a variance in the table, {SHORT[name]}",
            max(abs(_ratio(found[name]) / exact_ratios(cell)[name] - 1) for cell, found in measured.items()),
            RATIO_TOLERANCE,
            source="closed form",
            unit="",
        )
        for name in SHORT
    ]
    mean = sampled.within_standard_errors(
        "largest error of a mean gradient in the table",
        max(
            abs(row.mean + cell.shift * SCALE) / row.mean_standard_error
            for cell, found in measured.items()
            for row in found.values()
        ),
        source=r"closed form $-\mu$, for all",
    )
    return [known, *worst, mean]


def _measured(cell: Cell, num_draws: int, source: torch.Generator) -> dict[str, Measurement]:
    """Return every estimator at one q, on common noise; leave-one-out takes it in groups."""
    mean = torch.full((cell.dim,), cell.shift * SCALE, dtype=torch.float64)
    latents = GaussianLatents(mean, torch.full_like(mean, 2 * math.log(SCALE)))
    candidates = variance_probe.standard_estimators(variance_probe.quadratic_expectation(mean, SCALE))
    best = estimators.constant(variance_probe.best_constant_baseline(mean, SCALE))
    candidates[BEST_BASELINE] = score_with(best)
    in_groups = {LEAVE_ONE_OUT: candidates.pop(LEAVE_ONE_OUT)}
    noise = sampled.noise(source, num_draws - num_draws % LEAVE_ONE_OUT_SAMPLES, 1, cell.dim)
    rows = variance_probe.measure(candidates, variance_probe.quadratic, latents, noise)
    grouped = noise.view(-1, LEAVE_ONE_OUT_SAMPLES, cell.dim)
    rows += variance_probe.measure(in_groups, variance_probe.quadratic, latents, grouped)
    return {row.estimator: row for row in rows}


def _ratio(row: Measurement) -> float:
    """Return the variance per sample in units of the exact reparametrised one."""
    return row.num_samples * row.variance / SCALE**2


def _ratio_table(measured: dict[Cell, dict[str, Measurement]]) -> Table:
    rows = tuple(
        (
            str(cell.dim),
            rf"${cell.shift:g} \sigma$" if cell.shift else "0",
            *(f"{_ratio(found[name]):.4g} ({exact_ratios(cell)[name]:.4g})" for name in SHORT),
        )
        for cell, found in measured.items()
    )
    return Table(
        ("$D$", r"each $\mu_i$", *SHORT.values()),
        rows,
        "Variance of a coordinate of the gradient, in units of the reparametrised one; the closed form in "
        f"brackets. Leave-one-out with M = {LEAVE_ONE_OUT_SAMPLES}, times M.",
    )


def log_log_slope(sizes: Sequence[float], rows: Sequence[Measurement]) -> tuple[float, float]:
    """Return the least-squares slope of log variance against log size, and its standard error."""
    places = np.log(np.array(sizes, dtype=np.float64))
    leverage = (places - places.mean()) / np.square(places - places.mean()).sum()
    values = np.log([row.variance for row in rows])
    errors = np.array([row.variance_standard_error / row.variance for row in rows])
    return float(leverage @ values), float(np.sqrt(np.square(leverage * errors).sum()))


def _against_samples(study: Study) -> tuple[Figure, Checks]:
    """Return the variances against M, and their slopes."""
    dim, numbers, source = 10, (1, 2, 4, 8, 16, 32), study.source(2101)
    mean = torch.full((dim,), SCALE, dtype=torch.float64)
    latents = GaussianLatents(mean, torch.full_like(mean, 2 * math.log(SCALE)))
    rows = list[Measurement]()
    for number in numbers:
        candidates = variance_probe.standard_estimators(variance_probe.quadratic_expectation(mean, SCALE))
        if number == 1:
            del candidates[LEAVE_ONE_OUT]
        noise = sampled.noise(source, study.size(quick=10_000, full=100_000), number, dim)
        rows += variance_probe.measure(candidates, variance_probe.quadratic, latents, noise)
    by_name = {
        name: [row for row in rows if row.estimator == name]
        for name in (SCORE, LEAVE_ONE_OUT, MEAN_BASELINE, PATH)
    }
    caption = (
        f"Points: measured at D = {dim}, every coordinate of the mean one standard deviation away from the top. "
        "Lines: closed forms. With logarithmic axes a fall like $1/M$ is a line of slope $-1$; leave-one-out "
        "starts above the mean baseline and joins it."
    )
    checks = tuple(_slope_in_samples(name, by_name[name]) for name in (SCORE, MEAN_BASELINE, PATH))
    return Figure("variance-against-samples", caption, _samples_picture(by_name, mean)), Checks(checks)


def _slope_in_samples(name: str, rows: Sequence[Measurement]) -> Check:
    slope, error = log_log_slope([row.num_samples for row in rows], rows)
    return claims.close(
        f"slope of log variance against log M, {name}",
        slope,
        -1,
        within=STANDARD_ERRORS * error,
        source="the variance of a mean of M independent terms falls as 1/M",
        unit="",
    )


def _samples_picture(rows: dict[str, list[Measurement]], mean: Tensor) -> bytes:
    made = figures.figure(height=3.6)
    (axes,) = figures.axes(made)[0]
    exact = exact_ratios(Cell(len(mean), 1.0))
    for name, found in rows.items():
        numbers = [row.num_samples for row in found]
        axes.plot(numbers, [row.variance for row in found], "o", ms=4, color=COLOURS[name], label=name)
        grid = np.geomspace(numbers[0], numbers[-1], 60).tolist()
        known = [exact[name] * SCALE**2 / number for number in grid]
        if name == LEAVE_ONE_OUT:
            known = [float(variance_probe.leave_one_out_variance(mean, SCALE, number)[0]) for number in grid]
        axes.plot(grid, known, color=COLOURS[name], lw=1)
    axes.set(xscale="log", yscale="log", xlabel="samples in one gradient, M", ylabel="variance of a coordinate")
    figures.plain_ticks(axes, [row.num_samples for row in rows[PATH]])
    figures.legend_below(made, axes, columns=2)
    return figures.png(made)


def _against_dimension(study: Study) -> tuple[Figure, Checks]:
    """Return the variances against D at the top of the quadratic, and how fast they grow at the end."""
    dims, source = (1, 2, 4, 8, 16, 32, 64, 128, 256), study.source(2102)
    values = study.size(quick=1_000_000, full=10_000_000)
    found = {dim: _measured(Cell(dim, 0.0), values // max(dim, 10), source) for dim in dims}
    caption = (
        "At the top of the quadratic. Points: measured. Lines: closed forms, which grow as $D^2$ without a "
        "baseline, as $D$ with one, and not at all when reparametrised."
    )
    low, high = dims[-2:]
    checks = []
    for name, growth in ((SCORE, "D^2"), (MEAN_BASELINE, "D"), (PATH, "1")):
        slope, error = log_log_slope((low, high), [found[low][name], found[high][name]])
        exact = exact_ratios(Cell(high, 0.0))[name] / exact_ratios(Cell(low, 0.0))[name]
        checks.append(
            claims.close(
                f"slope of log variance against log D, from {low} to {high}, {name}",
                slope,
                math.log(exact) / math.log(high / low),
                within=STANDARD_ERRORS * error,
                source=f"closed form, which grows as ${growth}$",
                unit="",
            )
        )
    return Figure("variance-against-dimension", caption, _dimension_picture(found)), Checks(tuple(checks))


def _dimension_picture(found: dict[int, dict[str, Measurement]]) -> bytes:
    made = figures.figure(height=3.6)
    (axes,) = figures.axes(made)[0]
    dims = list(found)
    for name in (SCORE, MEAN_BASELINE, BEST_BASELINE, PATH):
        measured = [_ratio(rows[name]) for rows in found.values()]
        axes.plot(dims, measured, "o", ms=4, color=COLOURS[name], label=name)
        axes.plot(dims, [exact_ratios(Cell(dim, 0.0))[name] for dim in dims], color=COLOURS[name], lw=1)
    axes.set(
        xscale="log", yscale="log", xlabel="latent dimensions, D", ylabel="variance / reparametrised variance"
    )
    figures.plain_ticks(axes, dims)
    figures.legend_below(made, axes, columns=2)
    return figures.png(made)


# Row 21: where the score function wins

_SINE_TEXT: Final = r"""
That reparametrisation scatters less is the rule, not a theorem. Take $q = N(0, 1)$ and $f(z) = \sin(w z)$. The
slope of $f$ grows with $w$ while its values stay between $-1$ and $1$, so the derivative becomes the noisier
witness:

$$\mathrm{Var}_{\mathrm{path}} = \frac{w^2}{2} \left( 1 + e^{-2 w^2} \right) - w^2 e^{-w^2},$$

$$\mathrm{Var}_{\mathrm{score}} = \frac{1}{2} \left( 1 - (1 - 4 w^2) e^{-2 w^2} \right) - w^2 e^{-w^2} .$$

Both estimate the same gradient, $w \, e^{-w^2/2}$.
"""


def sine_path_variance(frequency: float | Tensor) -> Tensor:
    r"""Return the variance of the reparametrised gradient for f(z) = sin(w z), q = N(0, 1), one sample.

    .. math:: \tfrac{w^2}{2} (1 + e^{-2 w^2}) - w^2 e^{-w^2}

    Example:
        >>> sine_path_variance(5.0)
        tensor(12.5000, dtype=torch.float64)
    """
    square = torch.as_tensor(frequency, dtype=torch.float64).square()
    return square / 2 * (1 + torch.exp(-2 * square)) - square * torch.exp(-square)


def sine_score_variance(frequency: float | Tensor) -> Tensor:
    r"""Return the variance of the score-function gradient for f(z) = sin(w z), q = N(0, 1), one sample.

    .. math:: \tfrac12 \left( 1 - (1 - 4 w^2) e^{-2 w^2} \right) - w^2 e^{-w^2}

    Example:
        >>> sine_score_variance(5.0)
        tensor(0.5000, dtype=torch.float64)
    """
    square = torch.as_tensor(frequency, dtype=torch.float64).square()
    return 0.5 * (1 - (1 - 4 * square) * torch.exp(-2 * square)) - square * torch.exp(-square)


def sine_counterexample(study: Study) -> Section:
    """Row 21: lower variance of reparametrisation is usual, not a theorem; sin(w z) turns it round."""
    source, num_draws = study.source(2110), study.size(quick=100_000, full=1_000_000)
    rows = {frequency: _sine_rows(frequency, num_draws, source) for frequency in (0.5, 1.0, 1.5, 2.0, 3.0, 5.0)}
    crossing = sine_crossing()
    caption = (
        "Left: the function for a slow and a fast wave, over the density of $q$ (shaded). Right: variance of one "
        "estimate against $w$; lines are closed forms, points are measured. The curves cross at $w = "
        f"{crossing:.2f}$; to the right of it the score function is the better estimator."
    )
    return Section(
        "A function where the score function wins",
        (21,),
        (
            _SINE_TEXT,
            Figure("sine-counterexample", caption, _sine_picture(rows, crossing)),
            Checks(tuple(_sine_checks(rows))),
            Correction(
                "The reparametrised estimator has lower variance.",
                r"Usually, and on the smooth objectives of a VAE by far, but not always: for $\sin(w z)$ with "
                f"$w > {crossing:.2f}$ the score function has the lower one, {float(sine_score_variance(5)):.2f} "
                f"against {float(sine_path_variance(5)):.1f} at $w = 5$.",
            ),
        ),
    )


def sine_crossing() -> float:
    """Return the w at which both variances are equal, by bisection between 1 and 2."""
    low, high = 1.0, 2.0
    for _ in range(50):
        middle = (low + high) / 2
        if sine_path_variance(middle) < sine_score_variance(middle):
            low = middle
        else:
            high = middle
    return low


def _sine_rows(frequency: float, num_draws: int, source: torch.Generator) -> dict[str, Measurement]:
    candidates, zero = variance_probe.standard_estimators(0.0), torch.zeros(1, dtype=torch.float64)
    rows = variance_probe.measure(
        {name: candidates[name] for name in (SCORE, PATH)},
        lambda latents: torch.sin(frequency * latents).squeeze(-1),
        GaussianLatents(zero, zero),
        sampled.noise(source, num_draws, 1, 1),
    )
    return {row.estimator: row for row in rows}


def _sine_checks(rows: dict[float, dict[str, Measurement]]) -> list[Check]:
    known = [
        claims.close(
            f"variance at $w = {frequency}$, {name}",
            float(formula(frequency)),
            expected,
            within=0.5 * 10**-digits,
            source=f"closed form, computed by hand to {digits} decimals",
            unit="",
        )
        for name, formula, frequency, expected, digits in (
            (PATH, sine_path_variance, 1, 0.20, 2),
            (SCORE, sine_score_variance, 1, 0.34, 2),
            (PATH, sine_path_variance, 5, 12.5, 1),
            (SCORE, sine_score_variance, 5, 0.50, 2),
        )
    ]
    worst = [
        sampled.within_standard_errors(
            f"largest error of a measured variance, {name}",
            max(
                abs(found[name].variance - float(formula(frequency))) / found[name].variance_standard_error
                for frequency, found in rows.items()
            ),
            source="closed form",
        )
        for name, formula in ((PATH, sine_path_variance), (SCORE, sine_score_variance))
    ]
    mean = sampled.within_standard_errors(
        "largest error of a mean gradient, both",
        max(
            abs(row.mean - frequency * math.exp(-(frequency**2) / 2)) / row.mean_standard_error
            for frequency, found in rows.items()
            for row in found.values()
        ),
        source=r"closed form $w \, e^{-w^2/2}$",
    )
    order = claims.holds(
        "measured: reparametrised is the better one at $w = 1$, the score function at $w = 5$",
        rows[1.0][PATH].variance < rows[1.0][SCORE].variance
        and rows[5.0][PATH].variance > rows[5.0][SCORE].variance,
        source="closed form",
    )
    return [*known, *worst, mean, order]


def _sine_picture(rows: dict[float, dict[str, Measurement]], crossing: float) -> bytes:
    made = figures.figure(height=3.2)
    left, right = figures.axes(made, 1, 2)[0]
    latents = np.linspace(-3, 3, 400)
    left.fill_between(latents, -1.2, -1.2 + 1.2 * np.exp(-0.5 * latents**2), color="#dde6ef", lw=0)
    for frequency, colour in ((1, _VIOLET), (5, _TEAL)):
        left.plot(latents, np.sin(frequency * latents), color=colour, lw=1.4)
        left.text(0.02 + 0.2 * (frequency > 1), 0.93, f"w = {frequency}", color=colour, transform=left.transAxes)
    left.set(xlabel="z", ylabel="sin(w z)", ylim=(-1.2, 1.5))
    frequencies = torch.linspace(0.2, 5.5, 200, dtype=torch.float64)
    for name, formula in ((SCORE, sine_score_variance), (PATH, sine_path_variance)):
        right.plot(frequencies.numpy(), formula(frequencies).numpy(), color=COLOURS[name], label=name)
        right.plot(list(rows), [found[name].variance for found in rows.values()], "o", ms=4, color=COLOURS[name])
    right.axvline(crossing, color=MUTED, ls=":", lw=1.2)
    right.set(xlabel="w", ylabel="variance", yscale="log", ylim=(1e-3, 30))
    figures.legend_below(made, right)
    return figures.png(made)
