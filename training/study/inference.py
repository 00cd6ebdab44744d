"""Inference: one q for every datapoint, what that costs, and the encoder for all of them (rows 7, 8 and 18)."""

import copy
import math
import time
from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from training import gaussians, objectives, per_datapoint
from training.config import ModelConfig
from training.models.networks import Encoder
from training.models.vae import VAE
from training.noise import TrainingStream, generator
from training.observations import marginals
from training.per_datapoint import Alternation, Ascent, PosteriorTable
from training.study import claims, figures
from training.study.claims import Checks, Correction, Figure, Section, Table
from training.study.image_grids import draw_images, label_lines
from training.study.image_models import binary, main_config, num_parameters, plane_config
from training.study.setup import Study, Trained

_ROUNDING: Final = 1e-5
"""Difference that the order of sums in float32 may make in a network's answer of size one."""

_MNIST_ROWS: Final = 60_000
_MNIST_PIXELS: Final = (1, 28, 28)
_MNIST_MODEL: Final = ModelConfig(latent_dim=32, hidden_dims=(400,))
_MNIST_STORED: Final = 3_840_000
_MNIST_ENCODER: Final = 339_664
"""Row 8 of the checklist: 60,000 x 2 x 32, and 784 x 400 + 400 + 400 x 64 + 64."""


def inference_for_each_image(study: Study) -> Section:
    """Show the algorithm that stores a q for every image and moves q and p in turn (row 7)."""
    trained = study.trained(main_config(study))
    scratch = _fit_in_turns(study, trained)
    fixed = _climb_from_prior(study, trained)
    one_sample = _one_sample_gradients(study)
    difference = fixed.found - fixed.amortised
    return Section(
        "One q for every image",
        (7,),
        (
            _ONE_Q,
            _ALGORITHM,
            Correction(
                "In the update of the model, the gradient of the bound *equals* the gradient of $\\log p(x \\mid "
                "z)$ "
                "at one sample $z$; and the update of $q_i$ is written apart from the bound.",
                "With one sample it is an unbiased *estimate* of the gradient. For one image of the model with "
                "two "
                f"latent dimensions a single sample is off by {one_sample.deviation:.0%} of the gradient's "
                f"length; "
                f"the mean of {one_sample.num_samples} of them is right within its standard error. The update of "
                "$q_i$ climbs the same $L_i$, with respect to $\\mu_i$ and $\\sigma_i$.",
            ),
            Correction(
                "$q$ approximates $p(x_i \\mid z)$, and its distance to $p(x_i \\mid z)$ is measured.",
                "What $q_i(z)$ approximates is the posterior $p(z \\mid x_i)$. As a function of $z$ the "
                "likelihood "
                "$p(x_i \\mid z)$ is not even a density.",
            ),
            _IN_TURNS.format(
                num_images=scratch.num_images,
                num_passes=len(scratch.trace),
                first=scratch.trace[0],
                last=scratch.trace[-1],
                amortised=scratch.amortised,
                num_test=len(difference),
                found=fixed.found.mean(),
                encoder=fixed.amortised.mean(),
            ),
            _climbing_figure(scratch, fixed),
            Checks(
                (
                    claims.at_least(
                        "rise of the ELBO from the first to the last pass of the alternation",
                        scratch.trace[-1] - scratch.trace[0],
                        1.0,
                        source="both steps climb the same bound",
                    ),
                    claims.at_least(
                        "same model: ELBO of stored $q_i$, found from the prior, less that of the encoder's $q$",
                        float(difference.mean()),
                        0.0,
                        source="the best $q_i$ of the family is at least as good as any encoder's",
                    ),
                    claims.close(
                        "mean of one-sample gradients along the exact gradient, over its length",
                        one_sample.mean,
                        1.0,
                        within=4 * one_sample.standard_error,
                        source="exact gradient by Gauss-Hermite quadrature; 4 standard errors",
                        unit="",
                    ),
                    claims.at_least(
                        "relative error of a one-sample gradient, root of the mean square",
                        one_sample.deviation,
                        10 * one_sample.standard_error,
                        source="an estimate, not an equality",
                        unit="",
                    ),
                )
            ),
        ),
    )


def cost_of_one_q_for_each_image(study: Study) -> Section:
    """Count and time what a stored q per image costs (row 8)."""
    trained = study.trained(main_config(study))
    counts = _counts(trained)
    times = _times(study, trained)
    return Section(
        "What one q for every image costs",
        (8,),
        (
            _COST.format(stored=counts.mnist_stored, encoder=counts.mnist_encoder, crossing=counts.mnist_crossing),
            Table(
                ("data set", "images N", "latent dimensions d", "stored, 2 N d", "an encoder's"),
                (
                    (
                        "MNIST, perceptron 784-400-(32+32)",
                        f"{_MNIST_ROWS:,}",
                        "32",
                        f"{counts.mnist_stored:,}",
                        f"{counts.mnist_encoder:,}",
                    ),
                    (
                        f"`{trained.config.name}` of this study",
                        f"{counts.num_rows:,}",
                        f"{counts.latent_dim}",
                        f"{counts.stored:,}",
                        f"{counts.encoder:,}",
                    ),
                ),
                "Learnt numbers of both ways, counted on the objects themselves.",
            ),
            _growth_figure(counts),
            Table(
                ("what", "one q each", "encoder"),
                (
                    (f"one pass over {times.num_rows:,} images", f"{times.turns:.2f} s", f"{times.epoch:.2f} s"),
                    (
                        f"a new image, among {times.num_new}",
                        f"{1e3 * times.search:.1f} ms",
                        f"{1e3 * times.encoding:.3f} ms",
                    ),
                ),
                f"Time on this machine. A pass has {_NUM_Q_STEPS} q steps and a p step for each batch, or one "
                f"step "
                f"of encoder and decoder; a new image takes {_num_search_steps(study)} q steps, or one encoding.",
            ),
            Checks(
                (
                    claims.close(
                        "numbers stored for MNIST",
                        counts.mnist_stored,
                        _MNIST_STORED,
                        within=0,
                        source="60,000 · 2 · 32",
                        unit="",
                    ),
                    claims.close(
                        "numbers of MNIST's encoder 784-400-(32+32)",
                        counts.mnist_encoder,
                        _MNIST_ENCODER,
                        within=0,
                        source="784 · 400 + 400 + 400 · 64 + 64",
                        unit="",
                    ),
                    claims.at_least(
                        "time to infer a new image, over the time to encode it",
                        times.search / times.encoding,
                        10,
                        source=f"{_num_search_steps(study)} steps, each of them through the decoder and back",
                        unit="",
                    ),
                )
            ),
        ),
    )


def amortised_inference(study: Study) -> Section:
    """Show the encoder: one network that answers for every image, seen or not (row 18)."""
    trained = study.trained(main_config(study))
    ways = _three_ways(study, trained)
    alone = _difference_alone(trained)
    return Section(
        "Amortised inference: the encoder",
        (18,),
        (
            _AMORTISED,
            _AMORTISED_ALGORITHM,
            Correction(
                "The algorithm of amortised inference is announced; its block is empty.",
                "It is the one above. How to compute its gradient $\\nabla_\\phi$ is the subject of the chapter "
                "on "
                "estimators.",
            ),
            _UNSEEN.format(
                num_images=len(ways.amortised),
                prior=ways.prior.mean(),
                amortised=ways.amortised.mean(),
                refined=ways.refined.mean(),
                share=ways.share,
                gap=ways.gap.mean(),
            ),
            _encoding_figure(trained),
            _gap_figure(ways),
            Checks(
                (
                    claims.at_least(
                        "share of the way from the prior to the best q found that one encoding goes",
                        ways.share,
                        0.9,
                        source="an encoder that generalises; images it never saw",
                        unit="",
                    ),
                    claims.at_least(
                        "amortisation gap, mean over images",
                        float(ways.gap.mean()),
                        0.0,
                        source="no $q$ of the family is better than the best",
                    ),
                    claims.at_most(
                        "largest difference between an image encoded alone and among others",
                        alone,
                        _ROUNDING,
                        source="q of an image depends on that image alone; rounding of float32",
                        unit="",
                    ),
                )
            ),
        ),
    )


_ONE_Q: Final = r"""
A latent variable model says how an unseen $z$ makes an image $x$. To learn it we need the way back: which $z$
may have made this image? The exact answer, the posterior $p(z \mid x_i)$, cannot be computed for a neural
network. So give every image $x_i$ a simple distribution of its own, a Gaussian with independent dimensions,
$$q_i(z) = N(z; \mu_i, \sigma_i^2),$$
store its two vectors $\mu_i$ and $\sigma_i$, and move them until the image's evidence lower bound is as high as
it gets:
$$L_i(\theta, q_i) = \mathbb{E}_{q_i}[\log p_\theta(x_i \mid z)] - \mathrm{KL}(q_i(z), p(z)).$$
The bound misses $\log p_\theta(x_i)$ by exactly $\mathrm{KL}(q_i(z), p_\theta(z \mid x_i))$. A step in $q_i$
makes that gap smaller; a step in the model's parameters $\theta$ makes the model better. Take them in turn.
"""

_ALGORITHM: Final = r"""
**Algorithm: variational inference with one q per image.** For each batch of images:

1. *q step*, some times: draw noise $\epsilon \sim N(0, I)$, set $z = \mu_i + \sigma_i \epsilon$, and move
   $(\mu_i, \sigma_i)$ uphill along the gradient of $\log p_\theta(x_i \mid z) - \mathrm{KL}(q_i, p(z))$, with
   $\theta$ fixed;
2. *p step*, once: draw fresh noise, and move $\theta$ uphill along $\nabla_\theta \log p_\theta(x_i \mid z)$,
   averaged over the batch, with all $q_i$ fixed.

Only the rows of the batch move, so every row needs an optimiser state of its own.
"""

_IN_TURNS: Final = """
The left picture shows the algorithm at work on {num_images} training images, with a decoder that has learnt
nothing yet and every $q_i$ at the prior. In {num_passes} passes the mean ELBO rises from {first:.2f} to
{last:.2f} nats per image. The dashed line is the VAE of this study on the same images, {amortised:.2f}: its
encoder and decoder were trained together, for longer.

To compare the two kinds of *inference* alone, the model must be the same. The right picture takes the decoder
of the trained VAE, fixed, and {num_test} test images. Their $q_i$ start at the prior and take q steps only.
They end at {found:.2f} nats, the encoder's answers lie at {encoder:.2f}: with the same model, a q fitted to
each image is at least as good.
"""

_COST: Final = """
One Gaussian per image stores $2 N d$ numbers for $N$ images and $d$ latent dimensions. For MNIST with $d = 32$
that is {stored:,}, more than ten times the {encoder:,} of an encoder with one hidden layer of 400 units; from
{crossing:,} images on the encoder is the smaller one. Worse than the space is the time: a *new* image has no
$q$ yet, and needs an optimisation of its own.
"""

_AMORTISED: Final = r"""
Images that look alike have posteriors that look alike. So do not store the answers, learn the *question*: a
network, the **encoder**, that maps an image to the parameters of its $q$,
$$(\mu, \log \sigma^2) = \mathrm{encoder}_\phi(x), \qquad q_\phi(z \mid x) = N(z; \mu, \sigma^2).$$
Its size does not depend on the number of images. The work of inference is paid once, in training, and spread
over all images: it is *amortised*. The price is a third kind of error. An encoder cannot give every image its
best $q$; what is lost,
$$L(q^*_i) - L(q_\phi(z \mid x_i)) \ge 0,$$
is the **amortisation gap**.
"""

_AMORTISED_ALGORITHM: Final = r"""
**Algorithm: amortised variational inference.** For each batch of images:

1. encode the batch, $(\mu_i, \log \sigma_i^2) = \mathrm{encoder}_\phi(x_i)$;
2. draw $\epsilon_i \sim N(0, I)$ and set $z_i = \mu_i + \sigma_i \epsilon_i$;
3. estimate the bound $L_i = \log p_\theta(x_i \mid z_i) - \mathrm{KL}(q_\phi(z \mid x_i), p(z))$;
4. move $\phi$ *and* $\theta$ uphill along the gradient of the mean of $L_i$.

No step waits for another: one optimiser moves both networks.
"""

_UNSEEN: Final = """
The encoder was never shown the test images, and no optimisation is done for them: one pass through the network
answers. On {num_images} of them a $q$ equal to the prior, which knows nothing of the image, has an ELBO of
{prior:.2f} nats. The encoder's answer has {amortised:.2f}; 400 steps of optimisation for each image, from
there, reach {refined:.2f}. The encoder thus goes {share:.1%} of the way, and the amortisation gap is {gap:.2f}
nats per image.
"""

_NUM_Q_STEPS: Final = 5
_SEARCH_STEPS: Final = (400, 2000)
"""q steps of a search from the prior, quick and full. After 400 the q of an MNIST image with 32 latents is 2.2
nats below the encoder's on average, after 2000 it is 2.0 above it, and above it for each of 200 images."""


class _Turns(NamedTuple):
    """Alternation from scratch."""

    num_images: int
    trace: list[float]
    amortised: float


class _Climb(NamedTuple):
    """q steps alone, from the prior; the last two are bounds of the same images."""

    trace: list[float]
    found: Tensor
    amortised: Tensor


class _OneSample(NamedTuple):
    """One-sample gradients of one image, against the exact one."""

    num_samples: int
    mean: float
    standard_error: float
    deviation: float


class _Counts(NamedTuple):
    """Learnt numbers."""

    num_rows: int
    latent_dim: int
    stored: int
    encoder: int
    mnist_stored: int
    mnist_encoder: int

    @property
    def mnist_crossing(self) -> int:
        """Number of images from which on MNIST's encoder is the smaller one."""
        return math.ceil(self.mnist_encoder * _MNIST_ROWS / self.mnist_stored)


class _Times(NamedTuple):
    """Seconds: of a pass, and for a new image."""

    num_rows: int
    num_new: int
    turns: float
    epoch: float
    search: float
    encoding: float


class _Ways(NamedTuple):
    """Bounds of the same unseen images with three kinds of q, each of shape (n,)."""

    prior: Tensor
    amortised: Tensor
    refined: Tensor

    @property
    def gap(self) -> Tensor:
        """Amortisation gap of each image."""
        return self.refined - self.amortised

    @property
    def share(self) -> float:
        """How much of the way from the prior to the refined q the encoder goes."""
        return float((self.amortised - self.prior).mean() / (self.refined - self.prior).mean())


def _fit_in_turns(study: Study, trained: Trained) -> _Turns:
    """Run the algorithm on training images, from an untrained decoder and the prior."""
    num_images, num_epochs = study.size(quick=(512, 30), full=(10_000, 30))
    pixels = trained.dataset.train[:num_images]
    data = binary(pixels).to(study.device)
    config = trained.config.model
    model = VAE(config, trained.dataset.data_shape, generator(study.seed, TrainingStream.INIT))
    model.decoder.start_at(*marginals(config, pixels))
    model.to(study.device)
    trace = per_datapoint.alternate(
        model,
        data,
        _at_prior(len(data), model, study),
        torch.optim.Adam(model.decoder.parameters(), lr=2e-3),
        Alternation(num_epochs=num_epochs, batch_size=64, num_q_steps=_NUM_Q_STEPS),
        study.source(700, device=study.device),
        # The model moves too, so that the q_i must follow it faster than a fixed one.
        ascent=Ascent(learning_rate=5e-2),
    )
    amortised = _bound(study, trained.vae, data, trained.vae.posterior(data), 701)
    return _Turns(len(data), trace, float(amortised.mean()))


def _num_search_steps(study: Study) -> int:
    return study.size(quick=_SEARCH_STEPS[0], full=_SEARCH_STEPS[1])


def _climb_from_prior(study: Study, trained: Trained) -> _Climb:
    """Find the q_i of test images by q steps alone, for the decoder of the trained model."""
    vae = trained.vae
    data = binary(trained.dataset.test[:200]).to(study.device)
    table, rows = _at_prior(len(data), vae, study), torch.arange(len(data), device=study.device)
    source = study.source(702, device=study.device)
    trace, num_steps = [], _num_search_steps(study)
    for step in range(num_steps):
        noise = torch.randn((len(data), 2, vae.latent_dim), generator=source, device=study.device)
        rate = Ascent(learning_rate=5e-2 * 0.5 * (1 + math.cos(math.pi * step / num_steps)))
        trace.append(per_datapoint.q_step(vae, data, table, rows, noise, rate).mean())
    return _Climb(
        torch.stack(trace).tolist(),
        found=_bound(study, vae, data, (table.mean, table.log_var), 703),
        amortised=_bound(study, vae, data, vae.posterior(data), 703),
    )


def _one_sample_gradients(study: Study, *, num_samples: int = 4_000) -> _OneSample:
    r"""Compare estimates of a gradient from one sample each with the exact gradient.

    It is that of E_q[log p(x | z)] with respect to the biases of the last layer, one for each pixel,

    .. math:: x - E_q[\mathrm{sigmoid}(l(z))],

    whose expectation over two latent dimensions is a sum over the nodes of Gauss and Hermite.
    """
    trained = study.trained(plane_config(study))
    vae = copy.deepcopy(trained.vae).cpu().double()
    data = binary(trained.dataset.test[:1]).double()
    mean, log_var = vae.posterior(data)

    def gradients(noise: Tensor) -> Tensor:
        latents = gaussians.rsample(mean, log_var, noise)
        return (data - vae.likelihood(latents).mean).flatten(start_dim=1)

    nodes, weights = (torch.from_numpy(values) for values in np.polynomial.hermite_e.hermegauss(40))
    product = torch.cartesian_prod(weights, weights).prod(dim=1) / weights.sum().square()
    exact = product @ gradients(torch.cartesian_prod(nodes, nodes))
    drawn = gradients(torch.randn((num_samples, 2), generator=study.source(704), dtype=torch.float64))
    along = drawn @ exact / exact.square().sum()
    return _OneSample(
        num_samples,
        mean=float(along.mean()),
        standard_error=float(along.std() / math.sqrt(num_samples)),
        deviation=float(((drawn - exact).square().sum(dim=1).mean() / exact.square().sum()).sqrt()),
    )


def _counts(trained: Trained) -> _Counts:
    encoder = Encoder(_MNIST_MODEL, _MNIST_PIXELS, generator(0, TrainingStream.INIT))
    num_rows, dim = len(trained.dataset.train), trained.vae.latent_dim
    return _Counts(
        num_rows=num_rows,
        latent_dim=dim,
        stored=PosteriorTable.at_prior(num_rows, dim).num_parameters,
        encoder=num_parameters(trained.vae.encoder),
        mnist_stored=PosteriorTable.at_prior(_MNIST_ROWS, _MNIST_MODEL.latent_dim).num_parameters,
        mnist_encoder=num_parameters(encoder),
    )


def _times(study: Study, trained: Trained) -> _Times:
    """Time a pass of both algorithms, and inference for new images."""
    vae = copy.deepcopy(trained.vae).requires_grad_()
    num_rows, num_new = study.size(quick=(1024, 64), full=(10_000, 100))
    data = binary(trained.dataset.train[:num_rows]).to(study.device)
    new = binary(trained.dataset.test[:num_new]).to(study.device)
    source = study.source(800, device=study.device)
    table = _at_prior(len(data), vae, study)
    turns = Alternation(num_epochs=1, batch_size=128, num_q_steps=_NUM_Q_STEPS)
    decoder = torch.optim.Adam(vae.decoder.parameters(), lr=1e-5)
    both = torch.optim.Adam(vae.parameters(), lr=1e-5)
    prior = (torch.zeros((num_new, vae.latent_dim), device=study.device),) * 2
    # The first pass warms caches and is not counted; so for each.
    return _Times(
        num_rows=len(data),
        num_new=num_new,
        turns=_seconds(lambda: per_datapoint.alternate(vae, data, table, decoder, turns, source)),
        epoch=_seconds(lambda: _amortised_pass(vae, data, both, source, batch_size=turns.batch_size)),
        search=_seconds(
            lambda: per_datapoint.refine(
                vae, new, prior, source, num_steps=_num_search_steps(study), num_samples=1
            )
        )
        / num_new,
        encoding=_seconds(lambda: vae.posterior(new)) / num_new,
    )


def _amortised_pass(
    vae: VAE, data: Tensor, optimizer: torch.optim.Optimizer, source: torch.Generator, *, batch_size: int
) -> None:
    order = torch.randperm(len(data), generator=source, device=data.device)
    for rows in torch.split(order, batch_size):
        noise = torch.randn((len(rows), vae.latent_dim), generator=source, device=data.device)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(-objectives.elbo(vae, data[rows], noise).value.mean())
        optimizer.step()


def _seconds(act: Callable[[], object]) -> float:
    """Return how long something takes the second time."""
    act()
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def _three_ways(study: Study, trained: Trained) -> _Ways:
    """Return the bounds of test images with the prior, the encoder's answer, and that refined."""
    vae = trained.vae
    data = binary(trained.dataset.test[:100]).to(study.device)
    encoded = vae.posterior(data)
    prior = (torch.zeros_like(encoded.mean), torch.zeros_like(encoded.mean))
    refined = per_datapoint.refine(
        vae, data, encoded, study.source(1800, device=study.device), num_steps=_num_search_steps(study)
    )
    bounds = (_bound(study, vae, data, parameters, 1801) for parameters in (prior, encoded, refined))
    return _Ways(*bounds)


def _difference_alone(trained: Trained) -> float:
    """Return the largest difference that it makes to a posterior mean what else is encoded at the same time."""
    data = binary(trained.dataset.test[:50]).to(next(trained.vae.parameters()).device)
    together = trained.vae.posterior(data).mean
    alone = torch.cat([trained.vae.posterior(image[None]).mean for image in data])
    return float((together - alone).abs().max())


@torch.no_grad()
def _bound(study: Study, vae: VAE, data: Tensor, parameters: tuple[Tensor, Tensor], experiment: int) -> Tensor:
    """Return the ELBO of each image from 200 samples, with noise that is common to all calls of one experiment."""
    source = study.source(experiment, device=study.device)
    values = []
    for some, mean, log_var in zip(*(torch.split(rows, 50) for rows in (data, *parameters)), strict=True):
        noise = torch.randn((len(some), 200, vae.latent_dim), generator=source, device=study.device)
        values.append(objectives.elbo_of_posterior(vae, some, mean, log_var, noise).value)
    return torch.cat(values).cpu()


def _at_prior(num_rows: int, vae: VAE, study: Study) -> PosteriorTable:
    zeros = torch.zeros((num_rows, vae.latent_dim), device=study.device)
    return PosteriorTable(zeros, zeros)


def _climbing_figure(scratch: _Turns, fixed: _Climb) -> Figure:
    made = figures.figure(height=3.1)
    left, right = figures.axes(made, 1, 2)[0]
    left.plot(range(1, len(scratch.trace) + 1), scratch.trace, label="one q per image, in turns")
    left.axhline(scratch.amortised, color=figures.PALETTE[1], linestyle="--", label="trained VAE, encoder's q")
    left.set(title="q and p in turns, from scratch", xlabel="pass over the images", ylabel="ELBO, nats per image")
    right.plot(range(1, len(fixed.trace) + 1), fixed.trace, label="one q per image, from the prior")
    amortised = float(fixed.amortised.mean())
    right.axhline(amortised, color=figures.PALETTE[1], linestyle="--", label="encoder's q")
    right.set(title="q steps alone, the trained model fixed", xlabel="q steps")
    # The first steps are so far below that nothing else would be seen.
    right.set_ylim(bottom=amortised - 5, top=amortised + 1)
    for part in (left, right):
        part.legend(loc="lower right", frameon=False)
    return Figure(
        "one-q-per-image",
        "Left: the bound rises pass by pass while stored $q_i$ and model move in turn. Right: with the model of "
        "the "
        "trained VAE fixed, q steps alone lift the $q_i$ from the prior to the encoder's level and a little "
        "above.",
        figures.png(made),
    )


def _growth_figure(counts: _Counts) -> Figure:
    made = figures.figure(width=5.2, height=2.9)
    where = figures.axes(made)[0, 0]
    images = np.array([100, 1_000_000])
    where.loglog(images, images * counts.mnist_stored / _MNIST_ROWS, label="one q per image: 2 · 32 · N")
    where.loglog(
        images, np.full(2, counts.mnist_encoder), color=figures.PALETTE[1], label="encoder 784-400-(32+32)"
    )
    where.plot(_MNIST_ROWS, counts.mnist_stored, "o", color=figures.INK, zorder=3)
    where.annotate("MNIST", (_MNIST_ROWS, counts.mnist_stored), (-8, 4), textcoords="offset points", ha="right")
    where.set(xlabel="number of images N", ylabel="learnt numbers")
    where.legend(loc="upper left", frameon=False)
    return Figure(
        "cost-of-one-q-per-image",
        f"What is stored grows with the data; the encoder does not. The lines cross at {counts.mnist_crossing:,} "
        f"images.",
        figures.png(made),
    )


def _encoding_figure(trained: Trained) -> Figure:
    vae = trained.vae
    device = next(vae.parameters()).device
    pixels = trained.dataset.test[:10]
    data = binary(pixels).to(device)
    mean, log_var = vae.posterior(data)
    noise = torch.randn((2, *mean.shape), generator=torch.Generator().manual_seed(18)).to(device)
    decoded = [vae.likelihood(latents).mean for latents in (mean, *(mean + (0.5 * log_var).exp() * noise))]
    lines = torch.cat((data, *decoded))
    made = figures.figure(width=7.6, height=3.2)
    where = figures.axes(made)[0, 0]
    draw_images(where, lines, num_columns=len(data))
    label_lines(where, ("image", "decoded mean", "one draw of q", "another"), lines.shape[-2])
    return Figure(
        "encoded-without-optimisation",
        "Unseen images. First line: what the encoder sees, black and white pixels. Second: the decoded mean of "
        "$q$. "
        "Third and fourth: decoded draws from $q$; they differ where the image leaves the latents uncertain.",
        figures.png(made),
    )


def _gap_figure(ways: _Ways) -> Figure:
    made = figures.figure(width=5.2, height=2.9)
    where = figures.axes(made)[0, 0]
    where.plot(ways.amortised, ways.gap, ".", alpha=0.7)
    where.axhline(0, color=figures.MUTED, linewidth=1)
    where.set(xlabel="ELBO with the encoder's q, nats", ylabel="what 400 steps add, nats")
    return Figure(
        "amortisation-gap-by-image",
        "Every point is a test image: to the right, its bound with the encoder's $q$; upwards, what an "
        "optimisation of its "
        "own adds to that, the amortisation gap.",
        figures.png(made),
    )
