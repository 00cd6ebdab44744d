"""Rows 16 and 24: what is learnt in a VAE, and the objective that it is learnt with."""

import math
from itertools import pairwise
from typing import Final, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from training import gaussians, objectives, presets
from training.config import ModelConfig, TrainingConfig
from training.data import binarise_rows
from training.estimators import GaussianLatents
from training.models.vae import VAE
from training.noise import TrainingStream, generator
from training.study import claims, figures, image_models, sampled
from training.study.claims import Check, Checks, Correction, Figure, Section, Table
from training.study.figures import INK, MUTED, PALETTE
from training.study.image_models import main_config, num_parameters
from training.study.setup import Study, Trained
from training.trainer import Metrics

_BLUE, _RED, _GREEN, *_ = PALETTE

MNIST_ROWS: Final = 60_000


# Row 16: what is learnt

_PARTS_TEXT: Final = r"""
A VAE has two sets of learnt numbers and one distribution that is fixed.

- $\theta$, in the decoder: it turns a latent $z$ into the distribution $p_\theta(x \mid z)$. This is the model.
- $\phi$, in the encoder: it turns an image $x$ into $q_\phi(z \mid x)$. This is the tool that makes learning the
  model feasible. Instead of an encoder, one may store a mean and a variance for each image of the training set;
  then these are what is learnt in its place.
- The prior $p(z) = N(0, I)$ has no parameters here. That is a choice, not a necessity: a prior may be learnt.

Which numbers move can be read off the objective term by term. The likelihood depends on both sets, because $z$
comes from the encoder and goes through the decoder. The KL term compares $q_\phi$ with a fixed prior and knows
nothing of the decoder.
"""

TERMS: Final = (
    r"$\mathbb{E}_q[\log p_\theta(x \mid z)]$",
    r"$\mathrm{KL}(q_\phi, p(z))$",
    r"$\mathbb{E}_q[\log p(z)]$",
    r"entropy of $q_\phi$",
)

BOTH, ENCODER_ALONE = (True, True), (True, False)
"""Whether encoder and decoder get a gradient."""

EXPECTED: Final = dict(zip(TERMS, (BOTH, ENCODER_ALONE, ENCODER_ALONE, ENCODER_ALONE), strict=True))


def learnt_parts(study: Study) -> Section:
    """Row 16: groups of parameters with their counts, and which term of the objective moves which group."""
    config = main_config(study)
    dataset = study.dataset(config)
    vae = VAE(config.model, dataset.data_shape, generator(config.seed, TrainingStream.INIT))
    data = binarise_rows(dataset.test[:8], seed=config.evaluation.seed)
    source = study.source(1600)
    moved = gradients_by_term(vae, data, torch.randn((len(data), vae.latent_dim), generator=source))
    named_in_the_article = presets.mnist_mlp().model.override(["hidden_dims=[400]", "latent_dim=32"])
    mnist = VAE(named_in_the_article, (1, 28, 28), generator(0, TrainingStream.INIT))
    stored = stored_parameters_moved(vae, data, source)
    checks = (
        *(
            claims.holds(
                f"{term} moves {'encoder and decoder' if expected == BOTH else 'the encoder alone'}",
                moved[term] == expected,
                source="what the term depends on",
            )
            for term, expected in EXPECTED.items()
        ),
        claims.holds(
            "one q per image: only the rows of the batch are moved",
            stored == (True, False),
            source="a row is its own q",
        ),
        claims.close(
            "encoder and decoder together are all parameters of the model",
            num_parameters(vae.encoder) + num_parameters(vae.decoder),
            num_parameters(vae),
            within=0,
            source="the prior has none",
            unit="",
        ),
        claims.close(
            "encoder for MNIST, 784-400-(32+32)",
            num_parameters(mnist.encoder),
            339_664,
            within=0,
            source=r"$784 \cdot 400 + 400 + 400 \cdot 64 + 64$",
            unit="",
        ),
        claims.close(
            "one q per image for MNIST: numbers that are stored",
            MNIST_ROWS * 2 * mnist.latent_dim,
            3_840_000,
            within=0,
            source=r"$N \cdot 2 d_z$ with $N = 60{,}000$, $d_z = 32$",
            unit="",
        ),
    )
    return Section(
        "What is learnt",
        (16,),
        (
            _PARTS_TEXT,
            _parts_table((config.name, vae, config.model, len(dataset.train)), ("784-400-32 on MNIST", mnist)),
            _terms_table(moved),
            Checks(checks),
        ),
    )


def gradients_by_term(vae: VAE, data: Tensor, noise: Tensor) -> dict[str, tuple[bool, bool]]:
    """Return for each term of the objective whether encoder and decoder get a gradient from it."""
    mean, log_var = vae.posterior(data)
    bound = objectives.elbo_of_posterior(vae, data, mean, log_var, noise)
    values = (
        bound.log_likelihood,
        bound.kl,
        gaussians.expected_standard_normal_log_prob(mean, log_var),
        gaussians.entropy(log_var),
    )
    return {
        term: (_is_moved(vae.encoder, value), _is_moved(vae.decoder, value))
        for term, value in zip(TERMS, values, strict=True)
    }


def _is_moved(part: nn.Module, value: Tensor) -> bool:
    found = torch.autograd.grad(
        value.sum(), tuple(part.parameters()), retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return any(bool(each.any()) for each in found)


def stored_parameters_moved(vae: VAE, data: Tensor, source: torch.Generator) -> tuple[bool, bool]:
    """Return whether stored rows inside and outside of a batch get a gradient; the batch is the first half."""
    mean = torch.zeros((len(data), vae.latent_dim), requires_grad=True)
    log_var = torch.zeros_like(mean, requires_grad=True)
    batch = torch.arange(len(data) // 2)
    noise = torch.randn((len(batch), vae.latent_dim), generator=source)
    bound = objectives.elbo_of_posterior(vae, data[batch], mean[batch], log_var[batch], noise)
    moved = torch.stack(torch.autograd.grad(bound.value.sum(), (mean, log_var))).abs().sum(dim=(0, 2)) > 0
    return bool(moved[: len(batch)].all()), bool(moved[len(batch) :].any())


def _parts_table(main: tuple[str, VAE, ModelConfig, int], mnist: tuple[str, VAE]) -> Table:
    name, vae, model, num_rows = main
    rows = [
        _parts_row(name, vae, num_rows),
        *([_parts_row(mnist[0], mnist[1], MNIST_ROWS)] if mnist[0] != name else []),
    ]
    return Table(
        ("model", r"$\theta$: decoder", r"$\phi$: encoder", "or: stored $\\mu_i, \\sigma_i$", "prior"),
        tuple(rows),
        f"Numbers that are learnt. The stored ones grow with the data, the encoder does not. {name}: "
        f"{model.latent_dim} latent dimensions, {num_rows:,} training images.",
    )


def _parts_row(name: str, vae: VAE, num_rows: int) -> tuple[str, ...]:
    stored = num_rows * 2 * vae.latent_dim
    return (
        name,
        f"{num_parameters(vae.decoder):,}",
        f"{num_parameters(vae.encoder):,}",
        rf"${num_rows} \cdot 2 \cdot {vae.latent_dim}$ = {stored:,}",
        "0",
    )


def _terms_table(moved: dict[str, tuple[bool, bool]]) -> Table:
    return Table(
        ("term", r"moves $\phi$ (encoder)", r"moves $\theta$ (decoder)"),
        tuple((term, *("yes" if each else "no" for each in found)) for term, found in moved.items()),
        "Read off the gradients of the model on a batch of images.",
    )


# Row 24: the objective

_OBJECTIVE_TEXT: Final = r"""
Everything is together now. With the reparametrised sample and the closed-form KL, the objective of a VAE is

$$\max_{\theta, \phi} \; \frac{1}{N} \sum_{i=1}^{N} \left[ \frac{1}{M} \sum_{m=1}^{M} \log p_\theta(x_i \mid
z_{im}) - \mathrm{KL} \left( q_\phi(z \mid x_i) \, \| \, p(z) \right) \right],$$

$$z_{im} = \mu_\phi(x_i) + \sigma_\phi(x_i) \, \epsilon_{im}, \qquad \epsilon_{im} \sim N(0, I) .$$

The first term asks for latents from which the image can be told; the second is their price, in nats: how much
$q$ says that the prior does not. For a diagonal Gaussian $q$ and a standard normal prior the price needs no
sampling:

$$\mathrm{KL} = \frac{1}{2} \sum_{j=1}^{d} \left( \mu_j^2 + \sigma_j^2 - 1 - \log \sigma_j^2 \right) .$$

Three details decide whether such an objective is a bound or something else. Pixels and latent dimensions are
*summed*, images are averaged: a mean over $P$ pixels would multiply the weight of the KL term by $P$ without
saying so. The likelihood of binary pixels is one of *binary* data: grey pixels are drawn as zeros and ones
first. And the KL belongs inside the mean over the images, for each image has its own.
"""

_CORRECTIONS: Final = (
    Correction(
        "The final objective adds the KL term behind the mean over the images, without brackets.",
        "The bracket closes after the KL: every image has its own $q_\\phi(z \\mid x_i)$, and the mean is over "
        "the difference of both terms.",
    ),
    Correction(
        r"$J(\phi)$ is introduced as a gradient, and then its gradient is taken.",
        r"$J(\phi) = \mathbb{E}_{q_\phi}[f(z)]$ is the expectation itself; what the estimators approximate is "
        r"$\nabla_\phi J$.",
    ),
    Correction(
        "The bound is called variance lower bound, and the gradient of one sample is set equal to that of the "
        "bound.",
        "It is the *variational* lower bound. The gradient of one sample is an unbiased estimate of that of the "
        "bound, not equal to it.",
    ),
)


class FormsOnImages(NamedTuple):
    """The bound on images, computed in three ways."""

    difference: float
    """Largest difference of forms A and B over the images, common noise, nats."""
    kl_difference: Tensor
    """Sampled minus closed-form KL of each image, nats."""
    deviations: dict[str, float]
    """Standard deviation over the noise of one sample of the bound, root mean square over the images, nats."""


def objective(study: Study) -> Section:
    """Row 24: the objective of the VAE, both of its forms on images, and its terms in the course of training."""
    trained = study.trained(main_config(study))
    data = binarise_rows(
        trained.dataset.test[: study.size(quick=250, full=1_000)], seed=trained.config.evaluation.seed
    )
    vae = trained.vae.to(torch.device("cpu"))
    forms = forms_on_images(vae, data, study.size(quick=100, full=200), study.source(2400))
    image_models.history(study)  # fits the run, and keeps the snapshots of it that other experiments look at
    course = study.trained(image_models.history_config(study))
    return Section(
        "The objective of the VAE",
        (24,),
        (
            _OBJECTIVE_TEXT,
            Checks((*known_values(), *form_checks(forms), _mean_check(vae, data, study.source(2401)))),
            _forms_table(forms),
            *_CORRECTIONS,
            Figure("training-curve", _course_caption(course), _course_picture(course.metrics)),
            Checks(tuple(course_checks(course.metrics))),
            _course_text(trained.metrics[-1], trained.config),
            Figure("posteriors-and-kl", _POSTERIORS_CAPTION, _posteriors_picture(vae, data)),
        ),
    )


def known_values() -> list[Check]:
    """Return the checks of the closed forms, in float64, for N(1, 0.5^2) and N(0, 1)."""
    mean, log_var = (torch.tensor([each], dtype=torch.float64) for each in (1.0, 2 * math.log(0.5)))
    zero = torch.zeros_like(mean)
    return [
        claims.close(name, float(value), expected, within=1e-7, source="closed form, to seven decimals")
        for name, value, expected in (
            (
                r"$\mathrm{KL}(N(1, 0.5^2), N(0, 1))$, form of the objective",
                gaussians.kl_to_standard_normal(mean, log_var),
                0.8181472,
            ),
            (r"the same, general form", gaussians.kl(mean, log_var, zero, zero), 0.8181472),
            (r"$\mathrm{KL}(N(0, 1), N(1, 0.5^2))$", gaussians.kl(zero, zero, mean, log_var), 2.8068528),
            (r"entropy of $N(1, 0.5^2)$", gaussians.entropy(log_var), 0.7257913),
        )
    ]


@torch.no_grad()
def forms_on_images(vae: VAE, data: Tensor, num_samples: int, source: torch.Generator) -> FormsOnImages:
    """Return what the forms of the bound give on images.

    Args:
        vae: The model.
        data: Zeros and ones, shape (n, *data_shape).
        num_samples: Noise per image.
        source: Where it comes from.
    """
    noise = torch.randn((len(data), num_samples, vae.latent_dim), generator=source)
    mean, log_var = vae.posterior(data)
    latents = GaussianLatents(mean, log_var)
    samples = latents.rsample(noise)
    log_likelihood = vae.likelihood(samples).log_prob(data.unsqueeze(1))
    log_prior, log_q = gaussians.standard_normal_log_prob(samples), latents.log_prob(samples)
    divergence = gaussians.kl_to_standard_normal(mean, log_var)
    values = {
        "all sampled": log_likelihood + log_prior - log_q,
        "form A, entropy in closed form": log_likelihood + log_prior + latents.entropy().unsqueeze(1),
        "form B, KL in closed form": log_likelihood - divergence.unsqueeze(1),
    }
    single = noise[:, 0]
    difference = objectives.elbo_joint_form(vae, data, single) - objectives.elbo(vae, data, single).value
    return FormsOnImages(
        difference=float(difference.abs().max()),
        kl_difference=(log_q - log_prior).mean(dim=1) - divergence,
        deviations={name: float(value.var(dim=1).mean().sqrt()) for name, value in values.items()},
    )


def form_checks(forms: FormsOnImages) -> list[Check]:
    """Return the checks of the forms of the bound on images."""
    return [
        claims.at_most(
            "form A minus form B on images, common noise, largest",
            forms.difference,
            1e-4,
            source="equal; 1e-4 for rounding in float32",
        ),
        sampled.mean_is(
            "sampled minus closed-form KL, mean over the images, nats",
            forms.kl_difference,
            0.0,
            source="the closed form is the expectation",
        ),
    ]


def _mean_check(vae: VAE, data: Tensor, source: torch.Generator) -> Check:
    """Check that the objective of a batch is the mean over its rows of the whole bracket."""
    noise = torch.randn((len(data), vae.latent_dim), generator=source)
    with torch.no_grad():
        batch = float(objectives.training_objective(vae, data, noise))
        alone = [
            float(objectives.training_objective(vae, row.unsqueeze(0), each.unsqueeze(0)))
            for row, each in zip(data[:16], noise[:16], strict=True)
        ]
        some = float(objectives.training_objective(vae, data[:16], noise[:16]))
        bound = float(objectives.elbo(vae, data, noise).value.mean())
    return claims.at_most(
        "objective of a batch against the mean of its rows, and against the mean bound, largest difference",
        max(abs(some - float(np.mean(alone))), abs(batch - bound)),
        1e-4,
        source="the bracket is inside the mean; 1e-4 for rounding in float32",
    )


def _forms_table(forms: FormsOnImages) -> Table:
    return Table(
        ("one sample of the bound", "standard deviation over the noise, nats"),
        tuple((name, f"{deviation:.2f}") for name, deviation in forms.deviations.items()),
        "The same bound of the trained model in three forms, root mean square over the images. All have one "
        "mean. That a closed form scatters less is no law either: where $q$ is near the posterior, the sampled "
        "$\\log p(x, z)$ and $\\log q(z)$ move together, and their difference hardly moves.",
    )


# The course of training


def course_checks(metrics: tuple[Metrics, ...]) -> list[Check]:
    """Return the checks of what a run recorded."""
    terms = [each for line in metrics for each in (line.train, line.validation)]
    return [
        claims.at_most(
            "largest difference of the recorded bound and its two terms",
            max(abs(each.elbo - (each.log_likelihood - each.kl)) for each in terms),
            1e-9,
            source="bound = likelihood term - KL",
        ),
        claims.at_least("smallest recorded KL", min(each.kl for each in terms), 0, source=r"$\mathrm{KL} \geq 0$"),
        claims.at_least(
            "rise of the validation bound from the first to the last record",
            metrics[-1].validation.elbo - metrics[0].validation.elbo,
            0,
            source="it is what is maximised",
        ),
        claims.holds(
            "records are in order of the steps",
            all(before.step < after.step for before, after in pairwise(metrics)),
            source="one line per validation",
        ),
    ]


def _course_caption(course: Trained) -> str:
    return (
        f"The first {course.metrics[-1].epoch} epochs of training. Left: the bound on training images (each "
        "step, before it) and on held-out ones (moving average of the weights). Right: its two terms on held-out "
        "images, the likelihood term with its sign changed, so that both are costs: latents that say more (KL "
        "up) let the image be told better (likelihood cost down)."
    )


def _course_picture(metrics: tuple[Metrics, ...]) -> bytes:
    made = figures.figure(height=3.2)
    left, right = figures.axes(made, 1, 2)[0]
    epochs = [line.epoch for line in metrics]
    left.plot(epochs, [line.train.elbo for line in metrics], color=MUTED, label="training")
    left.plot(epochs, [line.validation.elbo for line in metrics], color=_BLUE, label="held out")
    left.set(xlabel="epochs", ylabel="nats per image", title="Bound")
    left.legend(frameon=False, loc="lower right")
    right.plot(
        epochs, [-line.validation.log_likelihood for line in metrics], color=_RED, label="minus likelihood term"
    )
    right.plot(epochs, [line.validation.kl for line in metrics], color=_GREEN, label="KL")
    right.set(xlabel="epochs", ylabel="nats per image", title="Its two terms", ylim=(0, None))
    right.legend(frameon=False)
    return figures.png(made)


def _course_text(last: Metrics, config: TrainingConfig) -> str:
    return (
        f"The model that is measured in this study was trained for {config.optimizer.epochs} epochs. On held-out "
        f"images it ends at a bound of {last.validation.elbo:.2f} nats: {last.validation.log_likelihood:.2f} for "
        f"the likelihood term, minus {last.validation.kl:.2f} for the KL."
    )


_POSTERIORS_CAPTION: Final = r"""
Where the encoder puts its posteriors: a point for each latent dimension of each held-out image, at its mean and
standard deviation. Lines join places of equal KL, in nats per dimension. A narrow posterior away from zero says
much and costs much; dimensions that are not used sit at the prior, at 0 and 1, where the price is zero.
"""


@torch.no_grad()
def _posteriors_picture(vae: VAE, data: Tensor) -> bytes:
    mean, log_var = vae.posterior(data[:250])
    scale = (0.5 * log_var).exp()
    made = figures.figure(width=6.4, height=3.8)
    (axes,) = figures.axes(made)[0]
    reach = float(mean.abs().max()) * 1.05
    means = torch.linspace(-reach, reach, 121)
    scales = torch.logspace(math.log10(float(scale.min()) * 0.8), math.log10(max(1.6, float(scale.max()))), 121)
    grid_mean, grid_scale = torch.meshgrid(means, scales, indexing="xy")
    costs = gaussians.kl_to_standard_normal(grid_mean.unsqueeze(-1), 2 * grid_scale.log().unsqueeze(-1))
    lines = axes.contour(
        grid_mean.numpy(),
        grid_scale.numpy(),
        costs.numpy(),
        levels=(0.1, 0.5, 1, 2, 3, 5, 8),
        colors=MUTED,
        linewidths=0.8,
    )
    axes.clabel(lines, fontsize=7.5, fmt="%g")
    axes.plot(mean.flatten().numpy(), scale.flatten().numpy(), ".", ms=2.5, alpha=0.35, color=_BLUE)
    axes.plot([0], [1], "+", ms=11, mew=1.8, color=INK)
    axes.annotate("prior", (0, 1), xytext=(6, 5), textcoords="offset points", fontsize=8.5)
    axes.set(yscale="log", xlabel="posterior mean", ylabel="posterior standard deviation")
    axes.set_yticks([0.1, 0.25, 0.5, 1, 1.5], ["0.1", "0.25", "0.5", "1", "1.5"])
    axes.set_yticks([], minor=True)
    axes.set_ylim(float(scales[0]), float(scales[-1]))
    axes.grid(visible=False)
    return figures.png(made)
