"""Rows 19 and 21: gradients of the bound itself, on models with a known posterior and on an image model."""

import math
from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from training import estimators, gaussians, objectives, presets, variance_probe
from training.config import ModelConfig
from training.data import MAX_PIXEL, Dataset, binarise_rows
from training.estimators import Baseline, Function, GaussianLatents
from training.models.ppca import ProbabilisticPCA
from training.models.vae import VAE
from training.noise import TrainingStream, generator
from training.observations import marginals
from training.study import claims, figures, learning_curves, sampled
from training.study.claims import Check, Checks, Figure, Section, Table
from training.study.figures import INK, MUTED, PALETTE
from training.study.gradients import (
    COLOURS,
    LEAVE_ONE_OUT,
    LEAVE_ONE_OUT_SAMPLES,
    MEAN_BASELINE,
    PATH,
    RATIO_TOLERANCE,
    SCORE,
    score_with,
)
from training.study.image_models import main_config
from training.study.learning_curves import LearningCurve, Recipe
from training.study.sampled import STANDARD_ERRORS
from training.study.setup import Study
from training.variance_probe import Measurement

TOTAL: Final = "reparametrised, total derivative"
ENTROPY_FORM: Final = "reparametrised, closed-form entropy"
STICKING: Final = "sticking the landing"
"""Names of `variance_probe.elbo_estimators`."""

KL_FORM: Final = "reparametrised, closed-form KL"

_BLUE, _RED, _GREEN, _, _ORANGE, _ = PALETTE


# Sticking the landing

_LANDING_TEXT: Final = r"""
The bound is $\mathbb{E}_q[\log p(x, z) - \log q_\phi(z)]$, and $\phi$ enters it twice: through the sample $z$,
and through the density $\log q_\phi$. The second part of the gradient is a score, whose mean is zero. *Sticking
the landing* leaves it out and differentiates along the path only, as if the parameters of the density were
constants:

$$\nabla_\phi \approx \frac{1}{M} \sum_m \nabla_z \left( \log p(x, z_m) - \log q(z_m) \right) \, \nabla_\phi z_m
.$$

The mean stays right. And where $q$ equals the posterior, the bracket is the constant $\log p(x)$ for every $z$,
so each sample gives exactly zero, while the usual gradient goes on shaking the optimiser at its goal. For a
posterior of variance $v$ and a $q$ of variance $c \, v$, the variance of a coordinate for $\mu$ is $(c - 1)^2 /
(c \, v)$ against $c / v$.
"""

_LANDING_CONCLUSION: Final = r"""
Two things are worth keeping. Leave-one-out vanishes at the posterior too, because there all samples have the
same reward, $\log p(x, z) - \log q(z) = \log p(x)$. And sticking the landing is not free: where the variance of
$q$ is less than half of the posterior's, it scatters *more* than the usual gradient.
"""


class KnownPosterior(NamedTuple):
    """A model and one row of data whose posterior is a diagonal Gaussian."""

    log_joint: Function
    posterior: GaussianLatents
    precision: float
    """Mean of the inverse posterior variances."""


def sticking_the_landing(study: Study) -> Section:
    """Row 21: with the path alone, the gradient of the bound has no variance where q is the posterior."""
    known = known_posterior(study.dataset(presets.digits()))
    dim, num_samples = len(known.posterior.mean), 4
    noise = sampled.noise(study.source(2120), study.size(quick=4_000, full=40_000), num_samples, dim)
    still = {
        name: variance_probe.gradients(candidate, known.log_joint, known.posterior, noise)
        for name, candidate in variance_probe.elbo_estimators().items()
    }
    ratios = (0.25, 0.35, 0.5, 0.7, 0.85, 0.95, 1.05, 1.2, 1.5, 2.0, 3.0, 4.0)
    rows = {ratio: landing_rows(known, ratio, noise) for ratio in ratios}
    table = Table(
        ("gradient of the bound", "variance at the posterior"),
        tuple((name, f"{float(draws.var(dim=0).mean()) / known.precision:.3g}") for name, draws in still.items()),
        f"q equal to the posterior of probabilistic PCA for one image of a digit, M = {num_samples}, in units of "
        f"the inverse posterior variance; mean over the {dim} latent dimensions. Numbers like 1e-29 are rounding.",
    )
    caption = (
        f"Variance of the gradient for the mean of $q$, M = {num_samples}, as $q$ is made narrower or wider than "
        "the posterior. Lines without name: closed forms. At the posterior (dotted) sticking the landing falls "
        "to zero."
    )
    return Section(
        "Sticking the landing",
        (21,),
        (
            _LANDING_TEXT,
            table,
            Figure("sticking-the-landing", caption, _landing_picture(rows, known.precision, num_samples)),
            Checks(tuple(landing_checks(still, rows, known.precision, num_samples))),
            _LANDING_CONCLUSION,
        ),
    )


def known_posterior(dataset: Dataset) -> KnownPosterior:
    """Return probabilistic PCA of the training split at its first row.

    The columns of its weight are orthogonal, so that its posterior is diagonal.
    """
    rows = torch.from_numpy(dataset.train).double().flatten(start_dim=1) / MAX_PIXEL
    model, row = ProbabilisticPCA.fit(rows, 8), rows[:1]
    exact = model.posterior(row)
    variances = exact.covariance.diagonal()
    noise_log_var = model.variance.log().expand_as(row)

    def log_joint(latents: Tensor) -> Tensor:
        log_likelihood = gaussians.log_prob(row, latents @ model.weight.T + model.mean, noise_log_var)
        return log_likelihood + gaussians.standard_normal_log_prob(latents)

    return KnownPosterior(
        log_joint, GaussianLatents(exact.mean[0], variances.log()), float((1 / variances).mean())
    )


def landing_checks(
    still: dict[str, Tensor], rows: dict[float, dict[str, Measurement]], precision: float, num_samples: int
) -> list[Check]:
    """Return the checks: silence at the posterior, and the closed forms beside it.

    Args:
        still: Gradients of each estimator at the posterior.
        rows: Variances by the variance of q in units of the posterior's.
        precision: Mean inverse posterior variance.
        num_samples: M.
    """
    errors = [
        abs(found[name].variance - precision * formula(ratio) / num_samples) / found[name].variance_standard_error
        for ratio, found in rows.items()
        for name, formula in ((STICKING, _landing_variance), (TOTAL, float))
    ]
    return [
        claims.at_most(
            "largest gradient of any sample at the posterior, sticking the landing",
            float(still[STICKING].abs().max()),
            1e-12,
            source="zero for each sample (Roeder 2017); rounding in float64",
            unit="",
        ),
        claims.close(
            "variance there of the usual gradient, times the posterior variance",
            float(still[TOTAL].var(dim=0).mean()) / precision,
            1 / num_samples,
            within=RATIO_TOLERANCE / num_samples,
            source="closed form 1/M, within 5 %: it does not vanish",
            unit="",
        ),
        sampled.within_standard_errors(
            "largest error of a variance beside the posterior", max(errors), source="closed forms"
        ),
    ]


def _landing_variance(ratio: float) -> float:
    """Return the variance of one sample for q of `ratio` times the posterior variance, times the latter."""
    return (ratio - 1) ** 2 / ratio


def landing_rows(known: KnownPosterior, ratio: float, noise: Tensor) -> dict[str, Measurement]:
    """Return the estimators by name for a q of `ratio` times the posterior variance."""
    latents = GaussianLatents(known.posterior.mean, known.posterior.log_var + math.log(ratio))
    rows = variance_probe.measure(variance_probe.elbo_estimators(), known.log_joint, latents, noise)
    return {row.estimator: row for row in rows}


def _landing_picture(rows: dict[float, dict[str, Measurement]], precision: float, num_samples: int) -> bytes:
    made = figures.figure(height=3.6)
    (axes,) = figures.axes(made)[0]
    for name, colour, line in (
        (SCORE, COLOURS[SCORE], "-"),
        (LEAVE_ONE_OUT, COLOURS[LEAVE_ONE_OUT], "-"),
        (TOTAL, _BLUE, ""),
        (STICKING, _GREEN, ""),
    ):
        variances = [found[name].variance / precision for found in rows.values()]
        axes.plot(list(rows), variances, "o", ms=4, ls=line, lw=0.8, color=colour, label=name)
    grid = np.geomspace(0.23, 4.3, 400)
    axes.plot(grid, grid / num_samples, color=_BLUE, lw=1)
    axes.plot(grid, [_landing_variance(ratio) / num_samples for ratio in grid], color=_GREEN, lw=1)
    axes.axvline(1, color=MUTED, ls=":", lw=1.2)
    axes.set(xscale="log", yscale="log", ylim=(1e-4, None), ylabel="variance × posterior variance")  # noqa: RUF001 - times
    axes.set_xlabel("variance of q / variance of the posterior")
    figures.plain_ticks(axes, (0.25, 0.5, 1, 2, 4))
    figures.legend_below(made, axes, columns=2)
    return figures.png(made)


# The importance-weighted bound

PLAIN, BIASED, DREG = tuple(variance_probe.importance_weighted_estimators())
_SHORT: Final = {PLAIN: "plain", BIASED: "sticking the landing (biased)", DREG: "doubly reparametrised"}
_WEIGHTED_COLOURS: Final = {PLAIN: _RED, BIASED: _ORANGE, DREG: _BLUE}

SHIFT: Final = 0.3
"""How far the mean of q is from the posterior's."""

POSTERIOR_VARIANCE: Final = 0.5

Q_VARIANCE: Final = 2 / 3
"""Variance of q: wider than the posterior, so that importance weights are bounded."""

_FIRST_ASYMPTOTIC: Final = 8
"""From this k on the slopes are fitted."""

_SLOPE_TOLERANCE: Final = 0.1

_WEIGHTED_TEXT: Final = r"""
A tighter bound takes $k$ samples for each datapoint,

$$L_k = \mathbb{E} \left[ \log \frac{1}{k} \sum_{j=1}^{k} w_j \right], \qquad w_j = \frac{p(x,
z_j)}{q_\phi(z_j)},$$

and grows with $k$ towards $\log p(x)$. For the *encoder* this has a catch: a bound that is tight for any $q$ has
little to say about which $q$ is good. Its gradient falls as $1/k$, but the noise of the plain reparametrised
estimate only as $1/\sqrt{k}$, so the signal drowns. Dropping the score term, as sticking the landing does, is
not allowed for $k > 1$: under normalised weights its mean is not zero. The *doubly reparametrised* gradient
(DReG) takes that term along the path once more; with $\bar w_j = w_j / \sum_l w_l$,

$$\nabla_\phi L_k = \mathbb{E} \left[ \sum_{j=1}^{k} \bar w_j^2 \; \nabla_{z_j} \log w_j \; \nabla_\phi z_j
\right] .$$
"""

_WEIGHTED_CAPTION: Final = """
Gradient for the mean of $q$ against $k$; two latent dimensions, posterior $N(0.5, 0.5)$, and a $q$ that is
shifted and too wide. Left: its mean, with bars of two standard errors. Plain and doubly reparametrised agree and
fall as $1/k$; sticking the landing goes to a wrong limit (dashed, closed form). Right: mean over standard
deviation of one estimate, with dotted lines of slope $-1/2$ and $+1/2$.
"""


class Signal(NamedTuple):
    """One estimator at one k: mean gradient, its standard error, and the standard deviation of one estimate."""

    mean: float
    standard_error: float
    deviation: float


class WeightedRow(NamedTuple):
    """All estimators at one k, on common noise."""

    signals: dict[str, Signal]
    difference: Signal
    """DReG minus plain."""

    def signal_to_noise(self, name: str) -> float:
        """Return |mean| / standard deviation; the plain mean, lost in its noise, is taken from DReG, its equal."""
        return abs(self.signals[DREG if name == PLAIN else name].mean) / self.signals[name].deviation


def importance_weighted(study: Study) -> Section:
    """Row 21: signal and noise of the encoder's gradient as the importance-weighted bound becomes tighter."""
    source, values = study.source(2130), study.size(quick=4_000_000, full=40_000_000)
    rows = {}
    for number in (2**power for power in range(study.size(quick=8, full=11))):
        rows[number] = weighted_row(sampled.noise(source, min(20_000, values // (4 * number)), number, 2))
    most = max(rows)
    right, wrong = rows[most].signals[DREG].mean, rows[most].signals[BIASED].mean
    return Section(
        "Gradients of the importance-weighted bound",
        (21,),
        (
            _WEIGHTED_TEXT,
            Figure("signal-to-noise", _WEIGHTED_CAPTION, _weighted_picture(rows)),
            _weighted_table(rows),
            Checks(tuple(weighted_checks(rows))),
            (
                f"At $k = {most}$ the gradient is {right:.4f}; sticking the landing gives {wrong:.4f} on "
                f"average, {wrong / right:.0f} times too much. Its high signal-to-noise ratio is the confidence "
                "of a wrong answer."
            ),
        ),
    )


def weighted_log_joint(latents: Tensor) -> Tensor:
    """Return log p(x, z) of z ~ N(0, 1), x | z ~ N(z, 1) at x = 1, summed over the dimensions."""
    return gaussians.standard_normal_log_prob(latents) + gaussians.standard_normal_log_prob(1 - latents)


def weighted_row(noise: Tensor) -> WeightedRow:
    """Return all estimators of the gradient for the first coordinate; noise of shape (num_draws, k, dim)."""
    mean = torch.full((noise.shape[-1],), 0.5 + SHIFT, dtype=torch.float64)
    latents = GaussianLatents(mean, torch.full_like(mean, math.log(Q_VARIANCE)))
    draws = {
        name: variance_probe.gradients(candidate, weighted_log_joint, latents, noise)[:, 0]
        for name, candidate in variance_probe.importance_weighted_estimators().items()
    }
    return WeightedRow(
        {name: _signal(found) for name, found in draws.items()}, _signal(draws[DREG] - draws[PLAIN])
    )


def weighted_checks(rows: dict[int, WeightedRow]) -> list[Check]:
    """Return the checks: exact at k = 1, equal means, the bias and its limit, the growth of signal to noise."""
    several = {number: row for number, row in rows.items() if number > 1}
    most, limit = max(rows), -SHIFT / Q_VARIANCE
    checks = [
        claims.close(
            f"mean gradient at $k = 1$, {_SHORT[name]}",
            signal.mean,
            -SHIFT / POSTERIOR_VARIANCE,
            within=STANDARD_ERRORS * signal.standard_error,
            source="closed form: minus the shift over the posterior variance",
            unit="",
        )
        for name, signal in rows[1].signals.items()
    ]
    checks += [
        sampled.within_standard_errors(
            "largest mean difference of doubly reparametrised and plain, $k > 1$",
            max(abs(row.difference.mean) / row.difference.standard_error for row in several.values()),
            source="both are unbiased (Tucker 2018)",
        ),
        claims.at_least(
            "smallest bias of sticking the landing, $k > 1$",
            min(_bias(row) for row in several.values()),
            2 * STANDARD_ERRORS,
            source="biased for $k > 1$ (Tucker 2018)",
            unit="standard errors",
        ),
        claims.close(
            f"mean gradient of sticking the landing at $k = {most}$",
            rows[most].signals[BIASED].mean,
            limit,
            within=STANDARD_ERRORS * rows[most].signals[BIASED].standard_error + abs(limit) / most,
            source="its limit in closed form, reached as $1/k$: minus the shift over the variance of $q$",
            unit="",
        ),
    ]
    return checks + [
        _growth_check(rows, name, slope, paper)
        for name, slope, paper in ((PLAIN, -0.5, "Rainforth 2018"), (DREG, 0.5, "Tucker 2018"))
    ]


def _bias(row: WeightedRow) -> float:
    """Return how far sticking the landing is off, in standard errors."""
    wrong, right = row.signals[BIASED], row.signals[DREG]
    return abs(wrong.mean - right.mean) / math.hypot(wrong.standard_error, right.standard_error)


def _growth_check(rows: dict[int, WeightedRow], name: str, slope: float, paper: str) -> Check:
    numbers = [number for number in rows if number >= _FIRST_ASYMPTOTIC]
    ratios = [rows[number].signal_to_noise(name) for number in numbers]
    return claims.close(
        f"slope of log signal-to-noise against log $k$ from {_FIRST_ASYMPTOTIC} on, {_SHORT[name]}",
        float(np.polyfit(np.log(numbers), np.log(ratios), 1)[0]),
        slope,
        within=_SLOPE_TOLERANCE,
        source=f"{paper}, for large $k$; {_SLOPE_TOLERANCE} for what is not large",
        unit="",
    )


def _signal(draws: Tensor) -> Signal:
    return Signal(float(draws.mean()), float(sampled.standard_error(draws)), float(draws.std()))


def _weighted_table(rows: dict[int, WeightedRow]) -> Table:
    return Table(
        (
            "$k$",
            *(f"mean, {short}" for short in _SHORT.values()),
            *(f"signal/noise, {s}" for s in _SHORT.values()),
        ),
        tuple(
            (
                str(number),
                *(f"{row.signals[name].mean:.3g} ± {row.signals[name].standard_error:.1g}" for name in _SHORT),
                *(f"{row.signal_to_noise(name):.3g}" for name in _SHORT),
            )
            for number, row in rows.items()
        ),
        "Gradient for one coordinate of the mean of q, ± one standard error. STL: sticking the landing, biased. "
        "Signal to noise of the plain gradient is that of its exact mean, taken from DReG.",
    )


def _weighted_picture(rows: dict[int, WeightedRow]) -> bytes:
    made = figures.figure(height=3.6)
    left, right = figures.axes(made, 1, 2)[0]
    numbers = np.array(list(rows))
    for name, colour in _WEIGHTED_COLOURS.items():
        signals = [row.signals[name] for row in rows.values()]
        means, errors = [-signal.mean for signal in signals], [2 * signal.standard_error for signal in signals]
        left.errorbar(numbers, means, yerr=errors, fmt="o-", ms=4, lw=1.2, color=colour, label=_SHORT[name])
        right.plot(numbers, [row.signal_to_noise(name) for row in rows.values()], "o-", ms=4, lw=1.2, color=colour)
    left.axhline(SHIFT / Q_VARIANCE, color=_ORANGE, ls="--", lw=1)
    left.set(
        xscale="log", yscale="log", xlabel="k", ylabel="minus the mean gradient", ylim=(1e-4, 2), title="Signal"
    )
    for name, slope in ((PLAIN, -0.5), (DREG, 0.5)):
        last = rows[int(numbers[-1])].signal_to_noise(name)
        right.plot(numbers, last * (numbers / numbers[-1]) ** slope, color=INK, ls=":", lw=1, zorder=1)
    right.set(
        xscale="log", yscale="log", xlabel="k", ylabel="|mean| / standard deviation", title="Signal to noise"
    )
    for axes in (left, right):
        figures.plain_ticks(axes, numbers[::2].tolist())
    figures.legend_below(made, left)
    return figures.png(made)


# The image model

_IMAGE_TEXT: Final = r"""
Does the quadratic tell the truth about a real objective? Here the same estimators are put on a VAE of images:
$f(z)$ is $\log p(x, z)$ with the decoder inside, $q$ is what the encoder says about one image, and the gradient
is that for $\mu$, before it goes on into the encoder's weights. Each number is a variance divided by that of the
reparametrised estimator with the entropy in closed form. *Closed-form KL* is the gradient with which the models
of this study are trained.
"""

_START, _END = "at initialisation", "after training"

ImageRows = dict[str, list[dict[str, Measurement]]]
"""By state of the model: for each image, the estimators by name."""


def image_model_variance(study: Study) -> Section:
    """Row 21: the variances on the trained image model, before and after training."""
    trained = study.trained(main_config(study))
    start = VAE(
        trained.config.model, trained.dataset.data_shape, generator(trained.config.seed, TrainingStream.INIT)
    )
    start.decoder.start_at(*marginals(trained.config.model, trained.dataset.train))
    images = binarise_rows(trained.dataset.test[:3], seed=trained.config.evaluation.seed)
    source, num_draws = study.source(2140), study.size(quick=4_000, full=20_000)
    rows = {
        state: [image_rows(vae, image.unsqueeze(0), num_draws, source) for image in images]
        for state, vae in ((_START, start), (_END, trained.vae.to(torch.device("cpu"))))
    }
    return Section(
        "The variances on an image model",
        (21,),
        (_IMAGE_TEXT, _image_table(rows), Checks(tuple(image_checks(rows))), _image_conclusion(rows)),
    )


def image_rows(vae: VAE, image: Tensor, num_draws: int, source: torch.Generator) -> dict[str, Measurement]:
    """Return all estimators for one image on common noise; leave-one-out takes it in groups.

    Args:
        vae: The model.
        image: Zeros and ones, shape (1, *data_shape).
        num_draws: Gradients per estimator, a multiple of four.
        source: Where the noise comes from.
    """
    with torch.no_grad():
        latents = GaussianLatents(*(parameter[0] for parameter in vae.posterior(image)))
    log_joint = objectives.log_joint(vae, image)
    dim = len(latents.mean)
    # A baseline must not have seen the noise that it is used with.
    with torch.no_grad():
        expected = float(log_joint(latents.sample(torch.randn((1, 500, dim), generator=source))).mean())
    noise = torch.randn((num_draws, 1, dim), generator=source)
    single = {
        SCORE: estimators.score_function,
        MEAN_BASELINE: score_with(estimators.constant(expected)),
        ENTROPY_FORM: estimators.entropy_elbo,
        KL_FORM: _kl_form,
        STICKING: estimators.sticking_the_landing,
    }
    in_groups = {LEAVE_ONE_OUT: score_with(estimators.leave_one_out)}
    rows = variance_probe.measure(single, log_joint, latents, noise)
    rows += variance_probe.measure(in_groups, log_joint, latents, noise.view(-1, LEAVE_ONE_OUT_SAMPLES, dim))
    return {row.estimator: row for row in rows}


def _kl_form(log_joint: Function, latents: GaussianLatents, noise: Tensor) -> Tensor:
    """Return the bound as a VAE is trained on it: reparametrised likelihood minus closed-form KL."""

    def log_likelihood(samples: Tensor) -> Tensor:
        return log_joint(samples) - gaussians.standard_normal_log_prob(samples)

    divergence = gaussians.kl_to_standard_normal(latents.mean, latents.log_var)
    return estimators.reparametrised(log_likelihood, latents, noise) - divergence


def _image_ratio(found: dict[str, Measurement], name: str) -> float:
    return found[name].num_samples * found[name].variance / found[ENTROPY_FORM].variance


def _image_ratios(rows: ImageRows, state: str, name: str) -> tuple[float, float]:
    """Return the smallest and the largest ratio of the images."""
    ratios = [_image_ratio(found, name) for found in rows[state]]
    return min(ratios), max(ratios)


def _image_table(rows: ImageRows) -> Table:
    names = (SCORE, MEAN_BASELINE, LEAVE_ONE_OUT, KL_FORM, STICKING)
    cells = {
        state: [" to ".join(_readable(ratio) for ratio in _image_ratios(rows, state, name)) for name in names]
        for state in rows
    }
    return Table(
        ("state", *names),
        tuple((state, *found) for state, found in cells.items()),
        f"Smallest and largest of three test images; variance per sample relative to *{ENTROPY_FORM}*. "
        f"Leave-one-out with M = {LEAVE_ONE_OUT_SAMPLES}, times M.",
    )


def _readable(ratio: float) -> str:
    """Return three digits, without an exponent where there are thousands."""
    return f"{ratio:,.0f}" if ratio >= 100 else f"{ratio:.3g}"  # noqa: PLR2004 - three digits


def image_checks(rows: ImageRows) -> list[Check]:
    """Return the checks of each state: the order of the variances, and equal means."""
    checks = []
    for state, images in rows.items():
        order = all(
            _image_ratio(found, SCORE) > _image_ratio(found, baseline) > 1
            for found in images
            for baseline in (MEAN_BASELINE, LEAVE_ONE_OUT)
        )
        errors = [
            abs(row.mean - found[STICKING].mean)
            / math.hypot(row.mean_standard_error, found[STICKING].mean_standard_error)
            for found in images
            for name, row in found.items()
            if name != STICKING
        ]
        checks += [
            claims.holds(
                f"{state}: score function > with either baseline > reparametrised",
                order,
                source="order of variances",
            ),
            claims.at_most(
                f"{state}: sticking the landing over reparametrised, largest ratio",
                _image_ratios(rows, state, STICKING)[1],
                1,
                source="less variance near the posterior (Roeder 2017)",
                unit="",
            ),
            sampled.within_standard_errors(
                f"{state}: largest difference of mean gradients", max(errors), source="all are unbiased"
            ),
        ]
    return checks


def _image_conclusion(rows: ImageRows) -> str:
    first, last = (_image_ratios(rows, state, SCORE) for state in (_START, _END))
    landing_first, landing_last = (_image_ratios(rows, state, STICKING) for state in (_START, _END))
    return (
        f"Without a baseline the score function needs {first[0]:,.0f} to {first[1]:,.0f} samples at the start, "
        f"and {last[0]:,.0f} to {last[1]:,.0f} after training, to do what one reparametrised sample does. That "
        "is why VAEs are trained with the latter. Sticking the landing is almost silent at the start (ratio "
        f"{landing_first[1]:.2g} at most): the decoder does not use the latents yet, so that the posterior is "
        f"the prior, and $q$ begins near it. After training its ratio is {landing_last[0]:.2f} to "
        f"{landing_last[1]:.2f}; how much it still saves tells how near $q$ is to the posterior."
    )


# Training with either estimator


def training_with_each(study: Study) -> Section:
    """Row 19: the score function trains a VAE, slowly; a baseline helps; reparametrisation is far ahead."""
    num_samples, num_steps = 4, study.size(quick=400, full=1_500)
    choices = {SCORE: estimators.no_baseline, LEAVE_ONE_OUT: estimators.leave_one_out, PATH: None}
    curves = [
        gaussian_curve(study, name, baseline, num_steps=num_steps, num_samples=num_samples)
        for name, baseline in choices.items()
    ]
    plain, leave_one_out, path = (curve.elbo[-1] for curve in curves)
    caption = (
        "Bound on held-out 8x8 digits. Three copies of a VAE with 8 latent dimensions, same initial weights, "
        f"same batches, M = {num_samples}; only the gradient for the encoder differs."
    )
    return Section(
        "Training a VAE with either estimator",
        (19, 21),
        (
            (
                "The variance decides how fast a model learns. Three copies of a small VAE start from the same "
                f"weights and take {num_steps} steps of Adam on the same objective. The decoder gets the same "
                "kind of gradient in all three; they differ in nothing but the estimator for the encoder."
            ),
            Figure(
                "training-with-each", caption, learning_curves.picture(curves, [COLOURS[name] for name in choices])
            ),
            Checks(tuple(training_checks(*curves))),
            (
                f"After {num_steps} steps the reparametrised run stands at {path:.2f} nats, leave-one-out at "
                f"{leave_one_out:.2f}, and the score function without baseline at {plain:.2f}, after a start at "
                f"{curves[0].elbo[0]:.2f}."
            ),
        ),
    )


def training_checks(plain: LearningCurve, leave_one_out: LearningCurve, path: LearningCurve) -> list[Check]:
    """Return the checks of the three runs: all learn, in the order of their scatter."""
    return [
        claims.at_least(
            "rise of the held-out bound, score function without baseline",
            plain.elbo[-1] - plain.elbo[0],
            0,
            source="unbiased, so it learns",
        ),
        claims.holds(
            "at the end: score function < with leave-one-out < reparametrised",
            plain.elbo[-1] < leave_one_out.elbo[-1] < path.elbo[-1],
            source="the less scatter, the faster",
        ),
    ]


def gaussian_curve(
    study: Study, name: str, baseline: Baseline | None, *, num_steps: int, num_samples: int
) -> LearningCurve:
    """Return a run of a small VAE on digits; without any baseline it is reparametrised."""
    dataset = study.dataset(presets.digits())
    # Fresh generators of equal numbers: the runs share initial weights, batches and binarisation.
    config = ModelConfig(latent_dim=8, hidden_dims=(64,))
    vae = VAE(config, dataset.data_shape, study.source(1910))
    vae.decoder.start_at(*marginals(config, dataset.train))

    def objective(batch: Tensor, source: torch.Generator) -> Tensor:
        noise = torch.randn((len(batch), num_samples, vae.latent_dim), generator=source)
        if baseline is None:
            return objectives.elbo(vae, batch, noise).value
        return objectives.elbo_by_score_function(vae, batch, noise, baseline=baseline)

    return learning_curves.learning_curve(
        name,
        vae,
        objective=objective,
        measure=_held_out(study, vae, dataset),
        pixels=torch.from_numpy(dataset.train),
        recipe=Recipe(num_steps),
        source=study.source(1912),
    )


def _held_out(study: Study, vae: VAE, dataset: Dataset) -> Callable[[], float]:
    data = binarise_rows(dataset.validation, seed=study.seed)
    noise = torch.randn((len(data), 8, vae.latent_dim), generator=study.source(1911))

    @torch.no_grad()
    def measure() -> float:
        return float(objectives.elbo(vae, data, noise).value.mean())

    return measure
