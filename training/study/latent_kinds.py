"""Row 22: which estimator for which latents: discrete ones, and continuous ones that are not Gaussian."""

import math
from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from training import estimators, presets
from training.data import MAX_PIXEL, Dataset, binarise_rows
from training.discrete_vae import DiscreteVae
from training.estimators import (
    Baseline,
    BernoulliLatents,
    CategoricalLatent,
    GaussianLatents,
    Latents,
    NotReparametrisable,
    RunningMean,
)
from training.likelihoods import Bernoulli
from training.study import claims, figures, learning_curves, sampled
from training.study.claims import Check, Checks, Correction, Figure, Section, Table
from training.study.figures import INK, MUTED, PALETTE
from training.study.gradients import COLOURS, LEAVE_ONE_OUT, MEAN_BASELINE, SCORE, SHORT
from training.study.image_grids import draw_images
from training.study.learning_curves import LearningCurve, Recipe
from training.study.setup import Study

_BLUE, _RED, _GREEN, *_ = PALETTE

_DRAWS_AT_ONCE: Final = 50_000


# A categorical latent

LOGITS: Final = (0.3, -1.2, 0.8, 0.0, -0.5, 1.1, -2.0, 0.4)
VALUES: Final = (1.0, -2.0, 0.5, 3.0, -1.0, 2.0, 4.0, -0.5)
"""f of each of the eight states; any numbers would do."""

_CATEGORICAL_TEXT: Final = r"""
A discrete latent jumps: change its probabilities a little, and a sample either stays where it is or lands in
another state. There is no path to differentiate along, so the pathwise gradient does not exist, although the
expectation $\sum_i p_i f_i$ is a smooth function of the probabilities $p_i = e^{l_i} / \sum_j e^{l_j}$. The
score function does not mind. With eight states the exact gradient can be written down,

$$\frac{\partial}{\partial l_i} \sum_j p_j f_j = p_i \left( f_i - \sum_j p_j f_j \right),$$

and the estimates must average to it.
"""

_RELAXED_TEXT: Final = r"""
There is a way between. The *Gumbel-softmax* replaces the jump by a smooth version: add Gumbel noise $g_i$ to the
logits and take a softmax at temperature $\tau$,

$$z_i = \frac{e^{(l_i + g_i) / \tau}}{\sum_j e^{(l_j + g_j) / \tau}} .$$

Its gradient can be taken along the path, but it is the gradient of another problem: the samples lie between the
states. Towards $\tau = 0$ the bias goes, and the variance grows without bound.
"""


def categorical(study: Study) -> Section:
    """Row 22: the score function on a latent with eight states is unbiased; reparametrisation is refused there."""
    logits, values = (torch.tensor(each, dtype=torch.float64) for each in (LOGITS, VALUES))
    exact = exact_gradient(logits, values)
    draws = categorical_gradients(logits, values, study.size(quick=300_000, full=1_000_000), study.source(2200))
    checks = [
        sampled.means_are(f"largest error of the mean gradient, {SHORT[name]}", found, exact, source="enumeration")
        for name, found in draws.items()
    ]
    message = refusal(CategoricalLatent(logits))
    checks.append(
        claims.holds("reparametrisation of it is refused", bool(message), source="a discrete sample has no path")
    )
    temperatures = (0.1, 0.2, 0.5, 1.0, 2.0, 4.0)
    source, num_draws = study.source(2201), study.size(quick=200_000, full=1_000_000)
    relaxed = {each: relaxed_gradients(logits, values, each, num_draws, source) for each in temperatures}
    return Section(
        "A latent with eight states",
        (22,),
        (
            _CATEGORICAL_TEXT,
            Figure("eight-states", _STATES_CAPTION, _states_picture(draws, exact, relaxed)),
            Checks(tuple(checks)),
            f"Asked for the pathwise gradient, the program says no:\n\n> `{message}`",
            _RELAXED_TEXT,
            Checks(tuple(relaxed_checks(relaxed, exact))),
        ),
    )


_STATES_CAPTION: Final = r"""
Left: the exact gradient for each logit (bars) and the mean of the score-function estimates with leave-one-out,
four standard errors wide. Right: the Gumbel-softmax on the same problem: size of its bias, and standard
deviation of one estimate, against temperature; both summed over the logits. Dotted: the standard deviation of
the unbiased score function with leave-one-out and M = 2.
"""


def exact_gradient(logits: Tensor, values: Tensor) -> Tensor:
    """Return the gradient of the expectation of f for the logits, by enumeration; both of shape (num_states,)."""
    probabilities = logits.softmax(dim=0)
    return probabilities * (values - probabilities @ values)


def categorical_gradients(
    logits: Tensor, values: Tensor, num_draws: int, source: torch.Generator
) -> dict[str, Tensor]:
    """Return score-function gradients from two samples each, by baseline; shape (num_draws, num_states)."""
    baselines: dict[str, Baseline] = {
        SCORE: estimators.no_baseline,
        MEAN_BASELINE: estimators.constant(float(logits.softmax(dim=0) @ values)),
        LEAVE_ONE_OUT: estimators.leave_one_out,
    }
    pieces: dict[str, list[Tensor]] = {name: [] for name in baselines}
    for size in _pieces(num_draws):
        noise = torch.rand((size, 2, 1), generator=source, dtype=torch.float64)
        for name, baseline in baselines.items():
            copies = logits.expand(size, -1).clone().requires_grad_()
            surrogate = estimators.score_function(
                lambda latents: latents @ values, CategoricalLatent(copies), noise, baseline=baseline
            )
            pieces[name] += torch.autograd.grad(surrogate.sum(), copies)
    return {name: torch.cat(found) for name, found in pieces.items()}


def refusal(latents: Latents) -> str:
    """Return what the reparametrised estimator says to latents; empty if it takes them."""
    noise = torch.full((1, 1), 0.5, dtype=torch.float64)
    try:
        estimators.reparametrised(lambda samples: samples.sum(dim=-1), latents, noise)
    except NotReparametrisable as refused:
        return str(refused)
    return ""


def _pieces(num_draws: int) -> list[int]:
    """Return sizes that sum to a number and fit into memory."""
    whole, rest = divmod(num_draws, _DRAWS_AT_ONCE)
    return [_DRAWS_AT_ONCE] * whole + [rest] * bool(rest)


def relaxed_gradients(
    logits: Tensor, values: Tensor, temperature: float, num_draws: int, source: torch.Generator
) -> Tensor:
    """Return pathwise gradients of the relaxed expectation, shape (num_draws, num_states)."""
    pieces: list[Tensor] = []
    for size in _pieces(num_draws):
        copies = logits.expand(size, -1).clone().requires_grad_()
        uniform = torch.rand(copies.shape, generator=source, dtype=torch.float64)
        gumbel = -(-uniform.clamp_min(torch.finfo(torch.float64).tiny).log()).log()
        relaxed = ((copies + gumbel) / temperature).softmax(dim=-1)
        pieces += torch.autograd.grad((relaxed @ values).sum(), copies)
    return torch.cat(pieces)


def _bias(draws: Tensor, exact: Tensor) -> float:
    return float((draws.mean(dim=0) - exact).norm())


def _scatter(draws: Tensor) -> float:
    """Return the standard deviation of an estimate, summed in squares over the logits."""
    return float(draws.var(dim=0).sum().sqrt())


def relaxed_checks(relaxed: dict[float, Tensor], exact: Tensor) -> list[Check]:
    """Return the checks of the Gumbel-softmax by temperature, one of which is 1: biased, or noisy."""
    cold, warm = min(relaxed), 1.0
    errors = (relaxed[warm].mean(dim=0) - exact).abs() / sampled.standard_error(relaxed[warm])
    return [
        claims.at_least(
            rf"bias of the Gumbel-softmax at $\tau = {warm:g}$, largest over the logits",
            float(errors.max()),
            2 * sampled.STANDARD_ERRORS,
            source="it is the gradient of another expectation",
            unit="standard errors",
        ),
        claims.at_most(
            rf"its bias at $\tau = {cold:g}$ over that at $\tau = {warm:g}$",
            _bias(relaxed[cold], exact) / _bias(relaxed[warm], exact),
            0.5,
            source=r"the bias goes with $\tau$",
            unit="",
        ),
        claims.at_least(
            rf"its standard deviation at $\tau = {cold:g}$ over that at $\tau = {warm:g}$",
            _scatter(relaxed[cold]) / _scatter(relaxed[warm]),
            1,
            source=r"the slope of the softmax grows as $1/\tau$",
            unit="",
        ),
    ]


def _states_picture(draws: dict[str, Tensor], exact: Tensor, relaxed: dict[float, Tensor]) -> bytes:
    made = figures.figure(height=3.2)
    left, right = figures.axes(made, 1, 2)[0]
    found = draws[LEAVE_ONE_OUT]
    states = np.arange(1, len(exact) + 1)
    left.bar(states, exact.numpy(), color="#cfe3d7", label="exact")
    errors = sampled.STANDARD_ERRORS * sampled.standard_error(found)
    left.errorbar(
        states, found.mean(dim=0).numpy(), yerr=errors.numpy(), fmt="_", color=_RED, label="score function"
    )
    left.axhline(0, color=INK, lw=0.8)
    left.set(xlabel="logit", ylabel="gradient", title="Unbiased: score function", xticks=states)
    left.legend(frameon=False)
    temperatures = list(relaxed)
    right.plot(
        temperatures, [_bias(each, exact) for each in relaxed.values()], "o-", ms=4, color=_RED, label="bias"
    )
    scatter = [_scatter(each) for each in relaxed.values()]
    right.plot(temperatures, scatter, "o-", ms=4, color=_BLUE, label="standard deviation")
    right.axhline(_scatter(found), color=MUTED, ls=":", lw=1.2)
    right.set(xscale="log", yscale="log", xlabel="temperature", title="Biased: Gumbel-softmax")
    figures.plain_ticks(right, temperatures)
    right.legend(frameon=False)
    return figures.png(made)


# A VAE with binary latents

NUM_BITS: Final = 6
"""Latents: 64 codes, few enough to sum over and to look at."""

_NUM_SAMPLES: Final = 4

ENUMERATED: Final = "exact gradient by enumeration"

_BINARY_TEXT: Final = rf"""
Here is a VAE whose latent is a string of {NUM_BITS} bits: $p(z)$ gives each of the {2**NUM_BITS} codes the same
probability, the decoder turns a code into pixel probabilities, and the encoder gives each bit a probability,
$q_\phi(z \mid x) = \prod_j \mathrm{{Bernoulli}}(z_j; g_j(x))$. Reparametrisation cannot train its encoder, the
score function can. Because there are so few codes, everything can also be computed exactly by summing over all
of them: the bound, $\log p(x)$, and even the gradient, which shows what a perfect estimator would achieve.
"""


class BinaryRun(NamedTuple):
    """A trained model and how it got there; exact numbers on held-out rows, nats."""

    curve: LearningCurve
    model: DiscreteVae
    elbo: Tensor
    log_prob: Tensor


def binary_vae(study: Study) -> Section:
    """Row 22: a VAE with binary latents, trained by the score function with several baselines."""
    dataset = study.dataset(presets.digits())
    choices: dict[str, Baseline | None] = {
        SCORE: estimators.no_baseline,
        MEAN_BASELINE: RunningMean(),
        LEAVE_ONE_OUT: estimators.leave_one_out,
        ENUMERATED: None,
    }
    num_steps = study.size(quick=600, full=2_000)
    runs = {name: binary_run(study, name, baseline, num_steps=num_steps) for name, baseline in choices.items()}
    independent = independent_pixels(dataset, seed=study.seed)
    colours = [COLOURS[SCORE], COLOURS[MEAN_BASELINE], COLOURS[LEAVE_ONE_OUT], _GREEN]
    curves = [run.curve for run in runs.values()]
    picture = learning_curves.picture(curves, colours, level=("independent pixels", independent))
    best = runs[LEAVE_ONE_OUT]
    return Section(
        "A VAE with binary latents",
        (19, 22),
        (
            _BINARY_TEXT,
            Figure("binary-latents", _binary_caption(len(dataset.validation)), picture),
            _binary_table(runs, independent),
            Checks(tuple(binary_checks(runs, independent))),
            Figure("all-codes", _CODES_CAPTION, _codes_picture(best.model, dataset)),
            (
                f"The leave-one-out run ends {runs[ENUMERATED].curve.elbo[-1] - best.curve.elbo[-1]:.2f} nats "
                "below the one with exact gradients, the run without baseline "
                f"{best.curve.elbo[-1] - runs[SCORE].curve.elbo[-1]:.2f} nats below that: for discrete latents "
                "the baseline is no refinement but what makes training work."
            ),
        ),
    )


def _binary_caption(num_rows: int) -> str:
    return (
        f"Exact bound on {num_rows} held-out 8x8 digits, summed over all codes. Same initial weights and "
        f"batches, M = {_NUM_SAMPLES} samples per image, of the encoder's gradient. Dashed: pixels that are "
        "independent of each other, which is what a model without latents can reach."
    )


_CODES_CAPTION: Final = f"""
The whole latent space of the leave-one-out run: each of the {2**NUM_BITS} codes, decoded to pixel probabilities.
Codes in one row share their first three bits, codes in one column their last three.
"""


def binary_run(study: Study, name: str, baseline: Baseline | None, *, num_steps: int) -> BinaryRun:
    """Return a run on digits; without any baseline the gradient is enumerated."""
    dataset = study.dataset(presets.digits())
    num_pixels = math.prod(dataset.data_shape)
    # Fresh generators of equal numbers: the runs share initial weights, batches and binarisation.
    model = DiscreteVae(num_pixels, NUM_BITS, 64, study.source(2210))
    _start_at(model, dataset)
    held_out = binarise_rows(dataset.validation, seed=study.seed).flatten(start_dim=1)

    def objective(batch: Tensor, source: torch.Generator) -> Tensor:
        rows = batch.flatten(start_dim=1)
        noise = torch.rand((len(rows), _NUM_SAMPLES, NUM_BITS), generator=source)
        return model.exact_elbo(rows) if baseline is None else model.elbo(rows, noise, baseline=baseline)

    @torch.no_grad()
    def measure() -> float:
        return float(model.exact_elbo(held_out).mean())

    curve = learning_curves.learning_curve(
        name,
        model,
        objective=objective,
        measure=measure,
        pixels=torch.from_numpy(dataset.train),
        recipe=Recipe(num_steps),
        source=study.source(2211),
    )
    with torch.no_grad():
        return BinaryRun(curve, model, model.exact_elbo(held_out), model.log_prob(held_out))


@torch.no_grad()
def _start_at(model: DiscreteVae, dataset: Dataset) -> None:
    """Let every code decode to the mean image; the same for all runs, it saves the first steps."""
    means = torch.from_numpy(dataset.train.mean(axis=0) / MAX_PIXEL).float().flatten()
    last = model.decoder[-1]
    last.get_parameter("bias").copy_(torch.logit(means, eps=1e-3))


def independent_pixels(dataset: Dataset, *, seed: int) -> float:
    """Return the mean log probability of held-out rows if pixels were independent, nats."""
    means = torch.from_numpy(dataset.train.mean(axis=0) / MAX_PIXEL).float()
    likelihood = Bernoulli(torch.logit(means, eps=1e-3), len(dataset.data_shape))
    return float(likelihood.log_prob(binarise_rows(dataset.validation, seed=seed)).mean())


def binary_checks(runs: dict[str, BinaryRun], independent: float) -> list[Check]:
    """Return the checks: the bound is one, baselines help, and the latents are used."""
    plain, leave_one_out, exact = (runs[name].curve.elbo[-1] for name in (SCORE, LEAVE_ONE_OUT, ENUMERATED))
    return [
        claims.at_least(
            "smallest gap of log p(x) and the bound, any row and run",
            min(float((run.log_prob - run.elbo).min()) for run in runs.values()),
            -1e-4,
            source=r"$\log p(x) - \mathrm{ELBO} = \mathrm{KL} \geq 0$; 1e-4 for rounding in float32",
        ),
        claims.holds("no baseline < leave-one-out", plain < leave_one_out, source="the less scatter, the faster"),
        claims.at_least(
            "leave-one-out above independent pixels",
            leave_one_out - independent,
            0,
            source="the bits carry something",
        ),
        claims.at_most(
            "exact gradients above leave-one-out, as a share of their rise",
            (exact - leave_one_out) / (exact - runs[ENUMERATED].curve.elbo[0]),
            0.25,
            source="an unbiased estimator with a good baseline comes near",
            unit="",
        ),
    ]


def _binary_table(runs: dict[str, BinaryRun], independent: float) -> Table:
    rows = [
        (
            name,
            f"{float(run.elbo.mean()):.2f}",
            f"{float(run.log_prob.mean()):.2f}",
            f"{float((run.log_prob - run.elbo).mean()):.2f}",
        )
        for name, run in runs.items()
    ]
    return Table(
        ("gradient of the encoder", "bound", r"$\log p(x)$", r"gap $\mathrm{KL}(q, p(z \mid x))$"),
        (*rows, ("independent pixels", "", f"{independent:.2f}", "")),
        "Held-out rows, exact, nats per image.",
    )


@torch.no_grad()
def _codes_picture(model: DiscreteVae, dataset: Dataset) -> bytes:
    numbers = torch.arange(2**NUM_BITS).unsqueeze(1)
    codes = (numbers >> torch.arange(NUM_BITS - 1, -1, -1) & 1).float()
    images = model.likelihood(codes).mean.view(-1, *dataset.data_shape)
    made = figures.figure(width=4.6, height=4.6)
    draw_images(figures.axes(made)[0, 0], images, num_columns=2 ** (NUM_BITS // 2))
    return figures.png(made)


# Families beyond the Gaussian

_FAMILIES_TEXT: Final = r"""
Continuous latents need not be Gaussian to be reparametrised. Three constructions cover most families:

- **Location and scale.** $z = \mu + s \, \epsilon$ for noise of any fixed shape: logistic, Laplace, Student's $t$.
- **Inverse distribution function.** $z = F_\phi^{-1}(u)$ with $u$ uniform, where $F^{-1}$ has a formula:
  exponential, Weibull, Gumbel; the logistic below is drawn in this way.
- **Implicit.** Where $F^{-1}$ has none, as for Gamma and Beta, the derivative of a sample still follows from $F$,
  because $F_\phi(z) = u$ stays constant along the path:

$$\frac{\partial z}{\partial \phi} = - \frac{\partial F_\phi(z) / \partial \phi}{q_\phi(z)} .$$

Two of them, against expectations that are known:
"""


class Family(NamedTuple):
    """A family whose pathwise gradient is held against a closed form."""

    name: str
    path: str
    expectation: str
    gradient: Callable[[int, torch.Generator], Tensor]
    """Number of draws and source to gradients, shape (num_draws, num_parameters)."""
    exact: Tensor


def other_families(study: Study) -> Section:
    """Row 22: reparametrised families beyond the Gaussian, and the table of estimators and latents."""
    num_draws = study.size(quick=200_000, full=1_000_000)
    families = (logistic(), gamma())
    draws = {each.name: each.gradient(num_draws, study.source(2220)) for each in families}
    checks = [
        sampled.means_are(
            f"largest error of the mean pathwise gradient, {each.name}",
            draws[each.name],
            each.exact,
            source="closed form",
        )
        for each in families
    ]
    table = Table(
        ("family", "path", "expectation", "exact gradient", "mean of the estimates"),
        tuple(
            (each.name, each.path, each.expectation, _numbers(each.exact), _numbers(draws[each.name].mean(dim=0)))
            for each in families
        ),
        f"{num_draws:,} draws each.",
    )
    kinds, works = _kinds_table()
    return Section(
        "Which estimator for which latents",
        (22,),
        (
            _FAMILIES_TEXT,
            table,
            Checks((*checks, *works)),
            "The article's table, filled in by asking the program:",
            kinds,
            Correction(
                "For the reparametrised estimator, $q$ has to be a Gaussian.",
                "Any family whose samples are a differentiable function of noise will do: location-scale "
                "families, those with a known inverse distribution function, and by implicit differentiation "
                "Gamma, Beta and others. Discrete latents can be relaxed (Gumbel-softmax), at the price of a "
                "bias.",
            ),
            Correction(
                "With continuous $z$ the integral is intractable, with discrete $z$ it is a sum.",
                "Not quite. Linear Gaussian models have a continuous $z$ and an exact $\\log p(x)$. A discrete "
                f"$z$ of many bits is as hard as any integral: {NUM_BITS} bits are {2**NUM_BITS} terms, 100 bits "
                "more than can be summed.",
            ),
        ),
    )


def logistic() -> Family:
    """Return the logistic family under f = -z^2 / 2; its variance is scale^2 pi^2 / 3."""
    parameters = torch.tensor([0.7, 0.4], dtype=torch.float64)

    def gradient(num_draws: int, source: torch.Generator) -> Tensor:
        copies = parameters.expand(num_draws, -1).clone().requires_grad_()
        uniform = torch.rand(num_draws, generator=source, dtype=torch.float64)
        # A zero has probability 2^-53 and an infinite logit.
        latents = copies[:, 0] + copies[:, 1] * torch.logit(uniform, eps=1e-15)
        (found,) = torch.autograd.grad(-0.5 * latents.square().sum(), copies)
        return found

    mean, scale = parameters
    return Family(
        "logistic",
        r"$z = \mu + s \log \frac{u}{1 - u}$",
        r"$\mathbb{E}[-z^2/2] = -\frac{1}{2} (\mu^2 + s^2 \pi^2 / 3)$",
        gradient,
        torch.stack((-mean, -scale * math.pi**2 / 3)),
    )


def gamma() -> Family:
    """Return the Gamma family of rate one under f = log z, whose mean is the digamma function of the shape."""
    shape = torch.tensor([2.5], dtype=torch.float64)

    def gradient(num_draws: int, source: torch.Generator) -> Tensor:
        copies = shape.expand(num_draws, -1).clone().requires_grad_()
        # torch.distributions draws from the global generator alone: it is borrowed, and put back as it was.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**62, (), generator=source)))
            latents = torch.distributions.Gamma(copies, torch.ones_like(copies)).rsample()
        (found,) = torch.autograd.grad(latents.log().sum(), copies)
        return found

    return Family(
        "Gamma, rate 1",
        "implicit",
        r"$\mathbb{E}[\log z] = \psi(\alpha)$",
        gradient,
        torch.special.polygamma(1, shape),
    )


def _kinds_table() -> tuple[Table, list[Check]]:
    """Return which estimator takes which latents, as it is found, and the checks of it."""
    half = torch.zeros(2, dtype=torch.float64)
    kinds: dict[str, Latents] = {
        "Gaussian": GaussianLatents(half, half),
        "Bernoulli": BernoulliLatents(half),
        "categorical": CategoricalLatent(half),
    }
    refused = {name: bool(refusal(latents)) for name, latents in kinds.items()}
    scored = {name: _takes_score_function(latents) for name, latents in kinds.items()}
    table = Table(
        ("latents", "score function", "reparametrised"),
        tuple((name, _word(scored[name]), _word(not refused[name])) for name in kinds),
    )
    return table, [
        claims.holds(
            "score function: takes all three kinds of latents", all(scored.values()), source="needs only log q"
        ),
        claims.holds(
            "reparametrised: takes Gaussian, refuses Bernoulli and categorical",
            refused == {"Gaussian": False, "Bernoulli": True, "categorical": True},
            source="a discrete sample has no path",
        ),
    ]


def _takes_score_function(latents: Latents) -> bool:
    """Return whether a surrogate comes out that is a finite number."""
    noise = torch.full((1, 1), 0.5, dtype=torch.float64)
    return bool(estimators.score_function(lambda samples: samples.sum(dim=-1), latents, noise).isfinite().all())


def _word(works: bool) -> str:  # noqa: FBT001 - the word for it
    return "yes" if works else "refused"


def _numbers(values: Tensor) -> str:
    return ", ".join(f"{value:.4f}" for value in values.tolist())
