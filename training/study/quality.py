"""How good the trained models are, in nats (row 25), and what a collapsed one looks like."""

from typing import Final, NamedTuple

import torch
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from training import collapse, evaluate, gaussians
from training.config import EvaluationConfig, TrainingConfig
from training.data import MAX_PIXEL, Pixels
from training.evaluate import Evaluation
from training.pixel_bounds import Summary, binarisation_entropy, independent_pixels_nll
from training.study import claims, figures
from training.study.claims import Check, Checks, Figure, Section, Table
from training.study.image_grids import draw_images, label_lines
from training.study.image_models import COLLAPSING_BETA, binary, collapsed_config, main_config, second_config
from training.study.setup import Study, Trained

_NUM_STRANGE: Final = 250
"""Images of the wrong kind that are measured."""

_ANCHORS: Final = {"mnist": (205.81, 45.53), "fashion-mnist": (385.02, 189.86)}
"""NLL of independent pixels, and entropy of the binarisation, of the test images; nats."""

_ANCHOR_ROUNDING: Final = 0.006
"""The anchors are given with two digits, and by another rule for pixels that are always black in training."""

_DIGITS_ELBO: Final = -23.6
"""Nats: the preset `digits`, two and a half times as long, has -22.6 on its validation split; the test images are
0.3 worse, the shorter run 0.2, and the rest is three standard errors of seeds."""


class Measured(NamedTuple):
    """A trained model and what is known of its test images."""

    trained: Trained
    evaluation: Evaluation
    independent: Summary
    floor: Summary
    strange: tuple["Strange", ...]

    @property
    def nll(self) -> float:
        """Upper bound of the negative log-likelihood, nats per image."""
        return self.evaluation.nll_iwae.value


class Strange(NamedTuple):
    """Images of another kind, given to the model."""

    name: str
    pixels: Pixels
    elbo: Tensor


def trained_models(study: Study) -> Section:
    """Row 25: train by maximising the mean bound; ELBO and NLL of test images, beside what is known exactly."""
    configs = [config for config in (main_config(study), second_config(study)) if config is not None]
    measured = [_measured(study, config) for config in configs]
    main = measured[0]
    return Section(
        "Training, and how good the model is",
        (25,),
        (
            _TRAINING,
            _learning_figure(main),
            _MEASURES,
            _results_table(measured),
            *(_published_table(main) if study.is_full else ()),
            _ladder_figure(main),
            _STRANGE,
            _strange_figure(main),
            Checks(tuple(check for of_model in measured for check in _checks(study, of_model))),
        ),
    )


def collapsed_model(study: Study) -> Section:
    """Row 25: a KL term so heavy that the latents carry nothing; the alarm that says so."""
    good, bad = study.trained(main_config(study)), study.trained(collapsed_config(study))
    of_good = _evaluation(study, good)
    of_bad = evaluate.evaluate_run(
        bad.run, bad.dataset, EvaluationConfig(num_importance_samples=50), device=study.device
    )
    independent = independent_pixels_nll(bad.dataset.train, bad.dataset.test)
    raised = _alarms(of_bad)
    # Half a nat that tells thick strokes from thin ones helps each of 784 pixels a little, so what is left of the
    # latents may win more nats than it has; but a working model is far away.
    half_way = (of_good.elbo.value - independent.value) / 2
    expected = study.size(
        quick=(-independent.value - 1, -independent.value + 1), full=(-independent.value - 1, half_way)
    )
    return Section(
        "Posterior collapse",
        (25,),
        (
            _COLLAPSE.format(
                beta=COLLAPSING_BETA,
                good=of_good,
                bad=of_bad,
                independent=independent.value,
                said=collapse.described(
                    raised, kl=of_bad.kl.value, active_units=of_bad.active_units, latent_dim=of_bad.latent_dim
                )
                if raised
                else "nothing",
            ),
            _divergences_figure(good, bad),
            Checks(
                (
                    claims.at_most(
                        "KL term of the collapsed model",
                        of_bad.kl.value,
                        collapse.COLLAPSE_KL,
                        source="below a nat the latents carry next to nothing",
                    ),
                    claims.between(
                        "ELBO of the collapsed model",
                        of_bad.elbo.value,
                        *expected,
                        source=study.size(
                            quick="that of independent pixels, up to a nat of sampling and of what is left",
                            full="not half of the way from independent pixels to the measured model",
                        ),
                    ),
                    claims.holds(
                        "the alarm on KL is raised, in training and in evaluation",
                        bad.metrics[-1].has_collapsed and "kl" in raised,
                        source="nothing is encoded any more",
                    ),
                    claims.holds(
                        "no alarm for the measured model",
                        not good.metrics[-1].has_collapsed and not _alarms(of_good),
                        source="its latents carry several nats",
                    ),
                )
            ),
        ),
    )


_TRAINING: Final = r"""
Training maximises the mean bound over the images with respect to both networks at once,
$$\max_{\theta, \phi} \frac{1}{N} \sum_{i=1}^{N} \left[ \mathbb{E}_{q_\phi(z \mid x_i)}[\log p_\theta(x_i \mid z)]
{} - \mathrm{KL}(q_\phi(z \mid x_i), p(z)) \right].$$
Each step takes some images, draws one $z$ for each, and follows the gradient. The images are *binarised* afresh
at each visit: a pixel becomes white with a probability equal to its brightness, since the decoder gives
probabilities of black and white. The picture shows the bound on images that are not trained on.
"""

_MEASURES: Final = r"""
How good is that? The likelihood of a model is known only in bounds: the ELBO, and the tighter
importance-weighted bound, whose negative is reported as *NLL*. Two numbers are known exactly and enclose all
others. Pixels that are drawn **independently**, each with its own brightness, know nothing of shapes; a useful
model is better. And binarisation is random: its **entropy** is what no model can undercut, not even one that
knows the grey image.
"""

_STRANGE: Final = r"""
A model that gives everything a high probability has learnt nothing. Images of another kind must get a far lower
bound; the picture shows how many nats lower.
"""

_COLLAPSE: Final = r"""
The two terms of the bound pull against each other: the likelihood wants latents that say much, the KL term
wants them to say nothing. If the second wins, $q(z \mid x) = p(z)$ for every image, the decoder ignores $z$,
and the model falls back to independent pixels: **posterior collapse**. Here it is provoked by a weight of
{beta:g} on the KL term, where the bound has 1. The latents then carry {bad.kl.value:.2f} nats instead of
{good.kl.value:.2f}, and the ELBO falls from {good.elbo.value:.2f} to {bad.elbo.value:.2f}; independent pixels
have -{independent:.2f}. Of the latent dimensions {bad.active_units} of {bad.latent_dim}
still count as active (their mean varies by more than 0.01), against {good.active_units} in the good model. That
count alone would be a poor alarm, for a dimension can vary a little and carry nothing. The program watches the
KL term too, and says: "{said}".
"""

_PUBLISHED: Final = (
    ("tutorial VAE (altosaar/variational-autoencoder)", "static", "97.10"),
    ("pylearn2, VAE example", "static", "93.8"),
    ("VAE as quoted from Rezende and Mohamed 2015", "static", "89.9"),
    (
        "IWAE paper, VAE with one layer, 1 / 5 / 50 samples (Burda et al., arXiv 1509.00519)",
        "dynamic",
        "86.76 / 86.47 / 86.35",
    ),
    ("the same in TensorFlow (nbip/IWAE)", "dynamic", "86.35 / 86.10 / 86.06"),
    ("the same in PyTorch (xqding), 1 sample", "dynamic", "87.78"),
    ("IWAE paper, IWAE with one layer, k = 50", "dynamic", "84.78"),
    ("Ladder VAE, 12 convolutional layers (addtt/ladder-vae-pytorch)", "static", "78.30"),
    ("PixelRNN / PixelCNN, no latents, exact", "static", "79.2 / 81.3"),
)
"""Section 3.1 of the facts: those whose source was read."""


def _measured(study: Study, config: TrainingConfig) -> Measured:
    trained = study.trained(config)
    test = trained.dataset.test
    return Measured(
        trained,
        _evaluation(study, trained),
        independent_pixels_nll(trained.dataset.train, test),
        binarisation_entropy(test),
        _strange(study, trained),
    )


def _evaluation(study: Study, trained: Trained) -> Evaluation:
    """Measure a model on its test images, or return what an interrupted study has measured."""
    config = EvaluationConfig(
        num_importance_samples=study.size(quick=500, full=5000),
        # All of them, as the literature has it, take a quarter of an hour on a CPU.
        max_images=study.size(quick=250, full=1000 if study.device.type == "cpu" else 10_000),
    )
    known = evaluate.recorded_evaluation(trained.run)
    wanted = (config.num_importance_samples, config.max_images)
    if known is not None and (known.num_importance_samples, known.num_images) == wanted:
        return known
    return evaluate.evaluate_run(trained.run, trained.dataset, config, device=study.device)


def _strange(study: Study, trained: Trained) -> tuple[Strange, ...]:
    """Give the model test images that it was not made for."""
    test = trained.dataset.test[:_NUM_STRANGE]
    order = torch.randperm(test[0].size, generator=study.source(2500)).numpy()
    kinds = {
        "test images": test,
        "inverted": MAX_PIXEL - test,
        "pixels in another order": test.reshape(len(test), -1)[:, order].reshape(test.shape),
    }
    other = second_config(study)
    if other is not None and trained.config.name != other.name:
        kinds["Fashion-MNIST"] = study.dataset(other).test[:_NUM_STRANGE]
    return tuple(Strange(name, pixels, _elbo(trained, pixels)) for name, pixels in kinds.items())


def _elbo(trained: Trained, pixels: Pixels) -> Tensor:
    config = EvaluationConfig(num_importance_samples=20, max_images=len(pixels))
    terms = evaluate.terms(trained.vae, pixels, config, first_row=0)
    return terms.log_likelihood - terms.kl


def _alarms(evaluation: Evaluation) -> tuple[collapse.Alarm, ...]:
    return collapse.alarms(
        kl=evaluation.kl.value, active_units=evaluation.active_units, latent_dim=evaluation.latent_dim
    )


def _checks(study: Study, measured: Measured) -> list[Check]:
    name, evaluation = measured.trained.config.name, measured.evaluation
    usual, *others = measured.strange
    return [
        claims.between(
            f"`{name}`: NLL of test images",
            measured.nll,
            measured.floor.value,
            measured.independent.value - 1,
            source="above the entropy of the binarisation, a nat below independent pixels at least; both exact",
        ),
        claims.at_least(
            f"`{name}`: importance-weighted bound less ELBO",
            -measured.nll - evaluation.elbo.value,
            0.0,
            source="Jensen: on common samples",
        ),
        *_quality_checks(study, measured),
        *(_strange_check(name, usual, strange) for strange in others),
    ]


def _strange_check(name: str, usual: Strange, strange: Strange) -> Check:
    if strange.name == "Fashion-MNIST":
        return claims.at_most(
            f"`{name}`: ELBO of Fashion-MNIST",
            float(strange.elbo.mean()),
            -500,
            source="images of another kind are improbable",
        )
    return claims.at_least(
        f"`{name}`: ELBO of test images less ELBO, {strange.name}",
        float(usual.elbo.mean() - strange.elbo.mean()),
        10.0,
        source="images of another kind are improbable",
    )


def _quality_checks(study: Study, measured: Measured) -> list[Check]:
    """Return the gates of the data set, and its two anchors where they are published."""
    trained, evaluation = measured.trained, measured.evaluation
    name = trained.dataset.name
    if name not in _ANCHORS:
        return [
            claims.at_least(
                f"`{trained.config.name}`: ELBO of test images",
                evaluation.elbo.value,
                _DIGITS_ELBO,
                source="what the preset has reached, see training/README.md",
            )
        ]
    independent, floor = _ANCHORS[name]
    checks = [
        claims.close(
            f"{name}: independent pixels",
            measured.independent.value,
            independent,
            within=_ANCHOR_ROUNDING,
            source="closed form, as measured before by another program",
        ),
        claims.close(
            f"{name}: entropy of the binarisation",
            measured.floor.value,
            floor,
            within=_ANCHOR_ROUNDING,
            source="closed form, as measured before by another program",
        ),
    ]
    if trained.config.name == main_config(study).name:
        checks += [
            claims.at_least(
                f"`{trained.config.name}`: ELBO of test images",
                evaluation.elbo.value,
                -96,
                source="target of this project",
            ),
            claims.at_most(
                f"`{trained.config.name}`: NLL of test images",
                measured.nll,
                89.5,
                source="target of this project for five minutes on two cores",
            ),
        ]
    return checks


def _results_table(measured: list[Measured]) -> Table:
    first = measured[0].evaluation
    return Table(
        ("model", "ELBO", "likelihood term", "KL term", "NLL", "active units", "independent pixels", "entropy"),
        tuple(_results(of_model) for of_model in measured),
        f"Nats per image, mean ± standard error over the first n = {first.num_images} test images; NLL by k = "
        f"{first.num_importance_samples} samples; {first.binarisation}, seed {first.seed}; weights: "
        f"{first.weights}.",
    )


def _results(measured: Measured) -> tuple[str, ...]:
    found = measured.evaluation
    estimates = (found.elbo, found.log_likelihood, found.kl, found.nll_iwae)
    return (
        f"`{measured.trained.config.name}`",
        *(f"{estimate.value:.2f} ± {estimate.standard_error:.2f}" for estimate in estimates),
        f"{found.active_units} of {found.latent_dim}",
        f"{measured.independent.value:.2f}",
        f"{measured.floor.value:.2f}",
    )


def _published_table(measured: Measured) -> tuple[Table]:
    ours = (
        f"**this study, `{measured.trained.config.name}`**",
        "dynamic",
        f"**{measured.nll:.2f}**, by k = {measured.evaluation.num_importance_samples}",
    )
    return (
        Table(
            ("MNIST", "binarisation", "NLL"),
            (ours, *_PUBLISHED),
            "Published values, nats per image; lower is better. Static: every image is binarised once and for "
            "all, which "
            "costs about two nats more than dynamic, so the two do not compare.",
        ),
    )


def _learning_figure(measured: Measured) -> Figure:
    metrics = measured.trained.metrics
    epochs = [line.epoch for line in metrics]
    made = figures.figure(height=2.8)
    left, right = figures.axes(made, 1, 2)[0]
    left.plot(epochs, [line.validation.elbo for line in metrics], label="ELBO, validation")
    left.plot(
        epochs,
        [line.train.elbo for line in metrics],
        color=figures.PALETTE[0],
        linestyle=":",
        label="ELBO, training",
    )
    left.set(xlabel="epochs", ylabel="nats per image")
    right.plot(
        epochs,
        [line.validation.log_likelihood for line in metrics],
        color=figures.PALETTE[2],
        label="likelihood term",
    )
    right.plot(epochs, [-line.validation.kl for line in metrics], color=figures.PALETTE[1], label="- KL term")
    right.set(xlabel="epochs")
    for where in (left, right):
        where.legend(frameon=False)
    return Figure(
        "learning-curve",
        "Left: the bound over training. Right: its two terms on validation images. The latents come to carry more "
        "(the KL term "
        "grows), and the reconstructions gain more than that costs.",
        figures.png(made),
    )


def _ladder_figure(measured: Measured) -> Figure:
    rows = {
        "entropy of the binarisation:\nimpossible below": (measured.floor.value, figures.PALETTE[2]),
        "VAE, NLL": (measured.nll, figures.PALETTE[0]),
        "VAE, negative ELBO": (-measured.evaluation.elbo.value, figures.PALETTE[0]),
        "independent pixels:\nuseless from here": (measured.independent.value, figures.PALETTE[1]),
    }
    made = figures.figure(width=6.4, height=2.2)
    where = figures.axes(made)[0, 0]
    bars = where.barh(
        list(rows), [value for value, _ in rows.values()], color=[color for _, color in rows.values()]
    )
    where.bar_label(bars, fmt="%.2f", padding=4)
    where.set(xlabel="nats per image", xlim=(0, 1.15 * measured.independent.value))
    where.invert_yaxis()
    where.grid(visible=False, axis="y")
    return Figure(
        "between-impossible-and-useless",
        "Where the model stands between what is impossible and what is useless; shorter is better.",
        figures.png(made),
    )


def _strange_figure(measured: Measured) -> Figure:
    num, kinds = 8, measured.strange
    made = figures.figure(height=0.5 + 0.75 * len(kinds))
    lines = figures.axes(made, len(kinds), 2, width_ratios=(1.2, 1))
    for (left, right), kind in zip(lines, kinds, strict=True):
        images = binary(kind.pixels[:num])
        draw_images(left, images, num_columns=num)
        label_lines(left, (kind.name,), images.shape[-2])
        right.hist(kind.elbo, bins=40, color=figures.PALETTE[0] if kind is kinds[0] else figures.PALETTE[1])
        right.set(yticks=[])
        right.sharex(lines[0, 1])
        right.tick_params(labelbottom=kind is kinds[-1])
    lines[-1, 1].set_xlabel("ELBO, nats per image")
    return Figure(
        "images-of-another-kind",
        "Left: what the model is given. Right: how often which ELBO occurs among such images.",
        figures.png(made),
    )


def _divergences_figure(good: Trained, bad: Trained) -> Figure:
    """Draw the KL term dimension by dimension."""
    made = figures.figure(height=2.6)
    panels = figures.axes(made, 1, 2, sharey=True)[0]
    for where, trained, title in zip(panels, (good, bad), ("measured model", "collapsed model"), strict=True):
        values = _divergences(trained).sort(descending=True).values
        color = figures.PALETTE[0] if trained is good else figures.PALETTE[1]
        where.bar(range(1, len(values) + 1), values.tolist(), color=color)
        where.set(title=f"{title}: {float(values.sum()):.2f} nats in all", xlabel="latent dimensions, sorted")
        where.xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].set_ylabel("KL, nats")
    return Figure(
        "kl-by-dimension",
        "What each latent dimension carries, mean over test images. Left: some dimensions carry much, others are "
        "not used. Right: "
        "none carries anything.",
        figures.png(made),
    )


def _divergences(trained: Trained) -> Tensor:
    """Return the mean KL of each latent dimension over test images, shape (latent_dim,)."""
    data = binary(trained.dataset.test[:1000]).to(next(trained.vae.parameters()).device)
    mean, log_var = (half.unsqueeze(-1) for half in trained.vae.posterior(data))
    # The divergence sums over the last dimension: one more makes each latent dimension a row of its own.
    return gaussians.kl_to_standard_normal(mean, log_var).mean(dim=0).cpu()
