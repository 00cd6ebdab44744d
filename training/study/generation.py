"""Generation: models that generate and models with latents are two things (row 5); samples of the VAE (row 26)."""

import math
from typing import Final, NamedTuple

import torch
from torch import Tensor

from training import data, evaluate, gaussians, pictures, sample_quality
from training.coders import Coder, intensities
from training.config import EvaluationConfig
from training.data import Dataset, binarise
from training.models.autoencoder import Autoencoder
from training.models.vae import VAE
from training.pixel_bounds import independent_pixels_nll
from training.sample_quality import ImageSet, Quality
from training.study import claims, figures
from training.study.claims import Checks, Correction, Figure, Section, Table
from training.study.image_grids import draw_images
from training.study.image_models import autoencoder, binary, main_config
from training.study.pixel_chain import PixelChain
from training.study.setup import Study, Trained

_SMALL_CHAIN: Final = 10
"""Pixels of a chain all of whose images can be enumerated: 1024."""

_EXACT: Final = 1e-12
"""Rounding of float64 in a sum of a thousand probabilities."""

_NUM_SHOWN: Final = 30


def generative_or_latent(study: Study) -> Section:
    """Row 5: a model that generates without latents, and one that has latents and does not generate."""
    trained = study.trained(main_config(study))
    chain = _fitted_chain(study, trained.dataset)
    law = _small_chain_law(study)
    density = _code_density(trained, autoencoder(study, trained.config))
    vae_bound = float(_weighted_bound(trained).mean())
    chain_value = float(chain.log_prob(binary(trained.dataset.test).to(study.device)).mean())
    independent = -independent_pixels_nll(trained.dataset.train, trained.dataset.test).value
    return Section(
        "A generative model is not the same as a latent variable model",
        (5,),
        (
            _TWO_THINGS,
            _KINDS,
            _CHAIN_TEXT.format(chain=chain_value, vae=vae_bound, independent=independent),
            _chain_figure(study, trained, chain),
            _CODES_TEXT.format(autoencoder=density.of_autoencoder, vae=density.of_vae),
            Checks(
                (
                    claims.close(
                        f"pixel chain over {_SMALL_CHAIN} pixels: sum of p(x) over all images, less one",
                        law.total - 1,
                        0.0,
                        within=_EXACT,
                        source="probabilities sum to one; by enumeration",
                        unit="",
                    ),
                    claims.close(
                        "the same chain: mean log p(x) of its samples",
                        law.mean_of_samples,
                        law.expected,
                        within=4 * law.standard_error,
                        source="exact expectation by enumeration; 4 standard errors",
                    ),
                    claims.at_least(
                        "pixel chain, mean log p(x) of test images, above independent pixels",
                        chain_value - independent,
                        1.0,
                        source="pixels depend on each other",
                    ),
                    claims.holds(
                        "the autoencoder defines no p(x): no likelihood, no bound, no sampler",
                        not any(hasattr(Autoencoder, name) for name in _GENERATIVE)
                        and all(hasattr(VAE, name) for name in _GENERATIVE),
                        source="a latent alone is no generative model",
                    ),
                    claims.at_least(
                        "KL from the autoencoder's codes to N(0, I), over that of the VAE's latents",
                        density.of_autoencoder / density.of_vae,
                        2.0,
                        source="nothing in its loss says where codes should lie",
                        unit="",
                    ),
                )
            ),
        ),
    )


def samples(study: Study) -> Section:
    """Row 26: draw z from the prior, then x from the decoder; how far the draws are from images."""
    trained = study.trained(main_config(study))
    labels = data.load_labels(trained.config.data, data_dir=study.data_dir)
    coders = {"VAE": Coder.of(trained.vae)}
    quality = sample_quality.measure(coders, trained.dataset, labels, kind="draws", seed=study.seed)
    of_prior, of_fitted = quality.samples
    *_, independent = quality.references
    held_out = quality.references[1]
    shown = pictures.prior_samples(trained.vae, _NUM_SHOWN, seed=study.seed)
    return Section(
        "Generation",
        (26,),
        (
            _GENERATION,
            Correction(
                "Once the model is trained, $q$ is not needed any more.",
                "It is not needed to *generate*. It is needed to encode new data: to compress, to compare, to "
                "interpolate, to score. And the prior $p(z) = N(0, I)$ is a choice; it may be learnt as well.",
            ),
            _samples_figure(study, trained, shown),
            _FRECHET.format(features=quality.features, num_samples=quality.num_samples, bias=quality.bias),
            _CLASSIFIER.format(accuracy=quality.held_out_accuracy or 0.0),
            quality_table(
                quality,
                f"Black and white images, {quality.num_samples} in each set. References first, then the model.",
            ),
            Checks(
                (
                    claims.at_most(
                        "Frechet distance of the VAE's draws, on a scale from 0, held-out images, to 1, "
                        "independent pixels",
                        (of_prior.frechet - held_out.frechet) / (independent.frechet - held_out.frechet),
                        0.5,
                        source="nearer to images than to what only has the right pixels",
                        unit="",
                    ),
                    claims.at_least(
                        "inception score of the VAE's draws over that of independent pixels",
                        _score(of_prior) / _score(independent),
                        1.2,
                        source="draws look like classes, and like all of them",
                        unit="",
                    ),
                    claims.between(
                        "Frechet distance of draws from the prior over draws from a Gaussian fitted to the codes",
                        of_prior.frechet / of_fitted.frechet,
                        1 / 3,
                        3.0,
                        source="the KL term has moved the codes to the prior: fitting adds little",
                        unit="",
                    ),
                    claims.holds(
                        "the same seed gives the same samples",
                        torch.equal(shown, pictures.prior_samples(trained.vae, _NUM_SHOWN, seed=study.seed)),
                        source="noise is a function of seed, row and dimension",
                    ),
                )
            ),
        ),
    )


def quality_table(quality: Quality, caption: str) -> Table:
    """Return references and samples, each with its distance and what the classifier says."""
    return Table(
        ("images", "Frechet distance", "classifier's confidence", "diversity, nats", "inception score"),
        tuple(
            (
                found.name,
                *(
                    "" if value is None else f"{value:.2f}"
                    for value in (found.frechet, found.confidence, found.diversity, found.inception_score)
                ),
            )
            for found in (*quality.references, *quality.samples)
        ),
        caption,
    )


_GENERATIVE: Final = ("likelihood", "elbo", "sample")
"""What a generative model of ours can be asked for."""

_TWO_THINGS: Final = r"""
A **generative model** is a distribution $p(x)$ that can be drawn from. A **latent variable model** explains
data by something unseen. The two are often named in one breath; neither implies the other.
"""

_KINDS: Final = Table(
    ("model", "has latents", "has a $p(z)$", "$\\log p(x)$", "draws samples"),
    (
        ("Gaussian mixture", "yes, discrete", "yes", "exact", "yes"),
        ("probabilistic PCA", "yes", "yes", "exact", "yes"),
        ("variational autoencoder", "yes", "yes", "bounds", "yes"),
        ("chain of pixels", "**no**", "", "exact", "yes"),
        ("autoencoder", "yes", "**no**", "none", "**no**, unless a density of its codes is added"),
    ),
    "Latents and generation, in all four combinations but one: a model with neither would be of no use here.",
)

_CHAIN_TEXT: Final = r"""
**Generation without a latent.** The product rule writes any distribution as a chain,
$$p(x) = \prod_j p(x_j \mid x_1, \ldots, x_{{j-1}}),$$
so it is enough to guess each pixel from those before it; here by a logistic regression for each. There is no
$z$, no integral and no bound: $\log p(x)$ is exact, and a sample is drawn pixel by pixel. On test images this
small chain has {chain:.2f} nats per image; the VAE's $\log p(x)$ is at least {vae:.2f}, and pixels that are
drawn independently have {independent:.2f}.
"""

_CODES_TEXT: Final = r"""
**A latent without generation.** An autoencoder has a code for every image, but no distribution of codes: its
loss asks for good reconstructions, wherever the codes lie. Fit a Gaussian to the codes of the training images:
its KL divergence to $N(0, I)$ is {autoencoder:.0f} nats. For the latents of the VAE, whose loss has a term for
just that, it is {vae:.2f}. What an autoencoder decodes from $N(0, I)$, and how it becomes a sampler all the
same, is shown below.
"""

_GENERATION: Final = r"""
Generation reads the model from left to right: draw $z \sim p(z) = N(0, I)$, then $x \sim p_\theta(x \mid z)$.
The decoder gives the *probability* of each pixel to be white. Pictures of VAEs usually show these probabilities
in grey, the mean of $p(x \mid z)$; a draw from the model takes one more step and is black and white. The means
look smoother than any real image, for they are averages: say which of the two is shown.
"""

_FRECHET: Final = r"""
How near are the samples to images? The **Frechet distance** fits a Gaussian to features of each set and
measures how far the two Gaussians are apart; zero means equal means and covariances. The features are here
{features}. They are not those of the "FID" of the literature, so the numbers compare with each other only. Even
two samples of *one* distribution are not at zero: with {num_samples} images on each side, about {bias:.2f} is
chance. Hence the references.
"""

_CLASSIFIER: Final = r"""
A second judge is a **classifier**, fitted to the training images; it names {accuracy:.1%} of unseen ones
rightly. If samples look like digits it is sure of each (confidence), and if they are varied it finds all
classes (diversity, at most $\log(10) = 2.30$). The inception score joins both. A classifier is sure of many an
image that nobody could read, so a high score proves little; a low one says something.
"""


class _ChainLaw(NamedTuple):
    """A chain so small that all its images can be enumerated."""

    total: float
    expected: float
    mean_of_samples: float
    standard_error: float


class _CodeDensity(NamedTuple):
    """KL from a Gaussian fitted to codes to N(0, I), nats."""

    of_autoencoder: float
    of_vae: float


def _fitted_chain(study: Study, dataset: Dataset) -> PixelChain:
    chain = PixelChain(dataset.data_shape).to(study.device)
    source = study.source(500, device=study.device)
    pixels = torch.tensor(dataset.train, device=study.device)
    chain.fit(
        lambda rows: binarise(pixels[rows], source),
        len(pixels),
        source,
        num_steps=study.size(quick=800, full=20_000),
        learning_rate=study.size(quick=3e-2, full=1e-2),
    )
    return chain.requires_grad_(requires_grad=False)


def _small_chain_law(study: Study) -> _ChainLaw:
    """Compare the samples of a chain with drawn weights with the probabilities of all its images."""
    source = study.source(501)
    chain = PixelChain((_SMALL_CHAIN,)).double().requires_grad_(requires_grad=False)
    chain.weight.normal_(0, 1.5, generator=source)
    chain.bias.normal_(0, 0.5, generator=source)
    images = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * _SMALL_CHAIN)
    log_prob = chain.log_prob(images)
    drawn = chain.sample(torch.rand((20_000, _SMALL_CHAIN), generator=source, dtype=torch.float64))
    of_samples = chain.log_prob(drawn)
    return _ChainLaw(
        total=float(log_prob.exp().sum()),
        expected=float((log_prob.exp() * log_prob).sum()),
        mean_of_samples=float(of_samples.mean()),
        standard_error=float(of_samples.std() / math.sqrt(len(of_samples))),
    )


def _code_density(trained: Trained, plain: Autoencoder) -> _CodeDensity:
    """Return how far codes are from N(0, I). For the VAE they are draws from q, as many as images."""
    images = intensities(trained.dataset.train)
    device = next(trained.vae.parameters()).device
    mean, log_var = (half.cpu() for half in trained.vae.posterior(images.to(device)))
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(5))
    latents = gaussians.rsample(mean, log_var, noise)
    return _CodeDensity(_kl_of_fit(Coder.of(plain).encode(images)), _kl_of_fit(latents))


def _kl_of_fit(codes: Tensor) -> float:
    r"""Return KL(N(m, S) || N(0, I)) of the Gaussian fitted to codes.

    .. math:: \tfrac12 (tr S + m^T m - d - \log |S|)
    """
    exact = codes.double()
    mean, covariance = exact.mean(dim=0), exact.T.cov()
    terms = covariance.trace() + mean.square().sum() - len(mean) - torch.logdet(covariance)
    return float(0.5 * terms)


def _weighted_bound(trained: Trained) -> Tensor:
    """Return the importance-weighted bound of test images, 100 samples each."""
    config = EvaluationConfig(num_importance_samples=100, max_images=250)
    return evaluate.terms(trained.vae, trained.dataset.test[: config.max_images], config, first_row=0).iwae


def _score(found: ImageSet) -> float:
    return math.nan if found.inception_score is None else found.inception_score


def _chain_figure(study: Study, trained: Trained, chain: PixelChain) -> Figure:
    num = _NUM_SHOWN
    uniform = torch.rand((num, *trained.dataset.data_shape), generator=study.source(502, device=study.device))
    made = figures.figure(height=2.6)
    left, middle, right = figures.axes(made, 1, 3)[0]
    draw_images(left, binary(trained.dataset.test[:num]), num_columns=6, title="test images")
    draw_images(middle, chain.sample(uniform.to(study.device)), num_columns=6, title="chain of pixels")
    drawn = trained.vae.sample(num, study.source(503, device=study.device))
    draw_images(right, drawn, num_columns=6, title="VAE")
    return Figure(
        "generation-without-latents",
        "Black and white test images, draws from the chain of pixels, and draws from the VAE.",
        figures.png(made),
    )


def _samples_figure(study: Study, trained: Trained, means: Tensor) -> Figure:
    drawn = (torch.rand(means.shape, generator=study.source(2602)) < means).float()
    made = figures.figure(height=2.6)
    left, middle, right = figures.axes(made, 1, 3)[0]
    draw_images(left, intensities(trained.dataset.test[: len(means)]), num_columns=6, title="test images, grey")
    draw_images(middle, means, num_columns=6, title="VAE, means of p(x | z)")
    draw_images(right, drawn, num_columns=6, title="VAE, draws from p(x | z)")
    return Figure(
        "samples-from-the-prior",
        "Left: real images. Middle: decoded means of draws from the prior, as VAEs are usually shown. Right: what "
        "the model of "
        "black and white images really draws, for the same latents.",
        figures.png(made),
    )
