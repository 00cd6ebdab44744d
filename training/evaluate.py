"""Measures a finished model on a split: ELBO and its terms, the importance-weighted bound, what both are worth.

All noise is fixed per image index, so figures do not depend on the batch size and can be compared between
models. An image is encoded once; its importance weights are summed up as they come.
"""

import json
import math
from collections.abc import Iterator
from typing import Final, NamedTuple, Self

import torch
from pydantic import Field
from torch import Tensor

from serving.typed_config import Config, ConfigError
from training import checkpoint, collapse, gaussians, pixel_bounds, sample_quality
from training.annealed_importance import Annealing
from training.binary_log_prob import binary_log_prob
from training.bracket import Bracket, bracket
from training.checkpoint import RunFolder, averaged_model, write_atomically
from training.coders import Coder
from training.collapse import Alarm
from training.config import EvaluationConfig, OptimizerConfig
from training.data import Dataset, Pixels, SplitLabels, SplitName
from training.errors import EntropyUndercut
from training.likelihoods import Bernoulli
from training.mean_estimate import Estimate
from training.models.vae import VAE, Posterior
from training.noise import normal_per_row
from training.observations import described, observed_rows
from training.sample_quality import Geometry, Kind, Quality

_IMAGES_AT_ONCE: Final = 250

_ROWS_AT_ONCE: Final = {"cpu": 500, "cuda": 2**16}
"""Latents decoded in one run, by kind of device: on a CPU the logits stay in the cache, a GPU is kept busy."""

_NOISE_AT_ONCE: Final = {"cpu": 2000, "cuda": 2**18}
"""Latents whose noise is drawn in one run: many, for that is a long row of small operations."""

_CERTAIN: Final = 5.0
"""Standard errors beyond which a mean is not on the wrong side of a limit by chance: one in three million."""


class PixelBounds(Config):
    """What is useless and what is impossible: exact NLL of two models of the same binarised images."""

    independent_pixels: Estimate
    """The mean training image as probability of each pixel: what a collapsed posterior reaches."""

    binarisation_entropy: Estimate
    """The grey image itself as probability: no model is below."""


class Evaluation(Config):
    """The figures of one checkpoint on one split, with everything that decides them."""

    split: SplitName
    """Which rows."""

    num_images: int = Field(ge=2)
    """n: the first rows of the split."""

    num_importance_samples: int = Field(ge=1)
    """k: samples of the posterior per image."""

    seed: int
    """Seed of the binarisation and of the samples."""

    binarisation: str = "pixel is one with probability pixel / 255; one draw per image"
    """How pixels became data; for other likelihoods than a Bernoulli nothing is made binary, and this says so."""

    weights: str = "exponential moving average, best validation ELBO"
    """Which weights."""

    checkpoint_sha256: str
    """Digest of the checkpoint that was measured."""

    elbo: Estimate
    """Evidence lower bound; its expectation is over the k samples."""

    log_likelihood: Estimate
    """First term of the ELBO: expected log p(x | z)."""

    kl: Estimate
    """Second term of the ELBO: divergence from the posterior to the prior."""

    nll_iwae: Estimate
    """Negative importance-weighted bound of log p(x): an upper bound of the negative log-likelihood."""

    active_units: int
    """Latent dimensions whose posterior mean varies over the images by more than 0.01."""

    latent_dim: int
    """Latent dimensions in all."""

    alarms: tuple[Alarm, ...] = ()
    """What says that the posterior has collapsed: a KL term below one nat, fewer than a quarter active units."""

    pixel_bounds: PixelBounds | None = None
    """Exact limits of the NLL; null where nothing is binarised."""

    sample_quality: tuple[Quality, ...] = ()
    """Samples beside references; empty unless it was asked for."""

    geometry: Geometry | None = None
    """Smoothness and neighbours of the codes; null without labels, or unless it was asked for."""

    bracket: Bracket | None = None
    """log p(x) of a few images by annealed importance sampling; null unless it was asked for."""

    @property
    def has_collapsed(self) -> bool:
        """Whether any alarm was raised."""
        return bool(self.alarms)

    def to_json(self) -> str:
        """Return the figures as they stand in a run folder."""
        return self.model_dump_json(indent=2) + "\n"

    def metrics(self) -> dict[str, float]:
        """Return the figures as flat numbers, for the manifest of a bundle."""
        figures: dict[str, float] = {}
        for name in ("elbo", "log_likelihood", "kl", "nll_iwae"):
            estimate: Estimate = getattr(self, name)
            figures[name] = estimate.value
            figures[f"{name}_standard_error"] = estimate.standard_error
        return figures | {
            "n": self.num_images,
            "k": self.num_importance_samples,
            "active_units": self.active_units,
        }


class Terms(NamedTuple):
    """Figures of single images, each of shape (n,), and their posterior means, shape (n, latent_dim)."""

    log_likelihood: Tensor
    kl: Tensor
    iwae: Tensor
    mean: Tensor


class Extras(NamedTuple):
    """What is measured beyond the figures that an export needs; nothing by default."""

    num_samples: int = 0
    """Samples that are compared with images, see `training.sample_quality`; 0: none."""

    labels: SplitLabels | None = None
    """Classes of the data set, for what is said of samples and codes by class."""

    num_annealed: int = 0
    """Images whose log p(x) is bracketed, see `training.bracket`, at least 2; 0: none."""

    num_temperatures: int = 500
    """Densities that their chains walk through; more are closer to log p(x)."""


def evaluate_run(
    run: RunFolder,
    dataset: Dataset,
    config: EvaluationConfig,
    *,
    split: SplitName = "test",
    device: torch.device,
    extras: Extras | None = None,
) -> Evaluation:
    """Measure the best checkpoint of a run and record the figures in its folder.

    Args:
        run: The run folder.
        dataset: The data set of the run.
        config: How many images and samples, and the seed.
        split: Which rows.
        device: Where to compute.
        extras: What else to measure.

    Raises:
        EntropyUndercut: If the NLL is lower than that of any model can be.
    """
    best = checkpoint.load(run.best)
    vae = averaged_model(best, dataset.data_shape, device)
    rows = dataset.rows(split)
    evaluation = evaluate(vae, rows, config, split=split, checkpoint_sha256=best.sha256(), train=dataset.train)
    evaluation = evaluation.model_copy(update={"weights": _which_weights(best.config.optimizer)})
    if extras is not None:
        evaluation = with_extras(evaluation, vae, dataset, config, extras)
    write_atomically(run.evaluation, evaluation.to_json().encode())
    return evaluation


def _which_weights(optimizer: OptimizerConfig) -> str:
    """Say which weights of a run are its result."""
    kind = "exponential moving average" if optimizer.ema_decay else "raw"
    bound = "ELBO" if optimizer.bound == "elbo" else "importance-weighted bound"
    when = f"best validation {bound}" if optimizer.selection == "validation" else "last epoch"
    return f"{kind}, {when}"


def recorded_evaluation(run: RunFolder) -> Evaluation | None:
    """Return the recorded figures on the test split, if they are those of the best checkpoint."""
    try:
        recorded = Evaluation.parse(json.loads(run.evaluation.read_text()))
    except (FileNotFoundError, ValueError, ConfigError):
        return None
    is_current = recorded.checkpoint_sha256 == checkpoint.load(run.best).sha256()
    return recorded if is_current and recorded.split == "test" else None


@torch.inference_mode()
def evaluate(
    vae: VAE,
    pixels: Pixels,
    config: EvaluationConfig,
    *,
    split: SplitName,
    checkpoint_sha256: str,
    train: Pixels | None = None,
) -> Evaluation:
    """Return the figures of a model.

    Args:
        vae: The model, on the device that computes.
        pixels: Rows of the split, uint8, shape (n, *data_shape).
        config: How many images and samples, and the seed.
        split: Name of the split, recorded.
        checkpoint_sha256: Digest of the model's checkpoint, recorded.
        train: Training split, for the NLL of its mean image; without it no limits of the NLL are given.

    Raises:
        EntropyUndercut: If the NLL is lower than that of any model can be.
    """
    rows = pixels[: config.max_images]
    pieces = [
        terms(vae, rows[first : first + _IMAGES_AT_ONCE], config, first_row=first)
        for first in range(0, len(rows), _IMAGES_AT_ONCE)
    ]
    log_likelihood, kl, iwae, mean = (torch.cat(piece) for piece in zip(*pieces, strict=True))
    if vae.config.likelihood == "bernoulli":
        _check_entropy(rows, iwae)
    active_units, mean_kl = collapse.num_active_units(mean), Estimate.of(kl)
    return Evaluation(
        split=split,
        num_images=len(rows),
        num_importance_samples=config.num_importance_samples,
        seed=config.seed,
        binarisation=described(vae.config),
        checkpoint_sha256=checkpoint_sha256,
        elbo=Estimate.of(log_likelihood - kl),
        log_likelihood=Estimate.of(log_likelihood),
        kl=mean_kl,
        nll_iwae=Estimate.of(-iwae),
        active_units=active_units,
        latent_dim=vae.latent_dim,
        alarms=collapse.alarms(kl=mean_kl.value, active_units=active_units, latent_dim=vae.latent_dim),
        pixel_bounds=_pixel_bounds(vae, train, rows),
    )


def with_extras(
    evaluation: Evaluation, vae: VAE, dataset: Dataset, config: EvaluationConfig, extras: Extras
) -> Evaluation:
    """Return the evaluation with what else is asked for.

    Args:
        evaluation: Of the model, on a split of the data set.
        vae: The model.
        dataset: Images to compare with; the bracket is of the first rows of the split.
        config: The seed, and samples of the bound beside the bracket.
        extras: What to measure.
    """
    found: dict[str, object] = {}
    if extras.num_samples:
        coders = {"VAE": Coder.of(vae)}
        # What a Gaussian or a categorical likelihood draws are grey images with noise, compared with nothing here.
        kinds: tuple[Kind, ...] = ("means", "draws") if vae.config.likelihood == "bernoulli" else ("means",)
        found["sample_quality"] = tuple(
            sample_quality.measure(
                coders, dataset, extras.labels, kind=kind, num_samples=extras.num_samples, seed=config.seed
            )
            for kind in kinds
        )
        if extras.labels is not None:
            measured = sample_quality.measure_geometry(coders, dataset, extras.labels, seed=config.seed)
            found["geometry"] = measured[0]
    if extras.num_annealed:
        rows = dataset.rows(evaluation.split)[: extras.num_annealed]
        data = observed_rows(vae.config, rows, seed=config.seed).to(next(vae.parameters()).device)
        iwae = terms(vae, rows, config, first_row=0).iwae
        annealing = Annealing(num_temperatures=extras.num_temperatures)
        found["bracket"] = bracket(vae, data, iwae, seed=config.seed, annealing=annealing)
    return evaluation.model_copy(update=found)


def _check_entropy(rows: Pixels, iwae: Tensor) -> None:
    """Raise if binarised images cost less than their binarisation alone does.

    Image by image the expected NLL of any model is at least the entropy; their differences vary by the draws.
    """
    entropies = pixel_bounds.binarisation_entropies(rows)
    excess = Estimate.of(-iwae.double() - entropies)
    if excess.value < -_CERTAIN * excess.standard_error:
        raise EntropyUndercut(
            nll=float(-iwae.mean()),
            entropy=float(entropies.mean()),
            standard_error=excess.standard_error,
        )


def _pixel_bounds(vae: VAE, train: Pixels | None, rows: Pixels) -> PixelBounds | None:
    if train is None or vae.config.likelihood != "bernoulli":
        return None
    return PixelBounds(
        independent_pixels=Estimate(**pixel_bounds.independent_pixels_nll(train, rows)._asdict()),
        binarisation_entropy=Estimate(**pixel_bounds.binarisation_entropy(rows)._asdict()),
    )


@torch.inference_mode()
def terms(vae: VAE, pixels: Pixels, config: EvaluationConfig, *, first_row: int) -> Terms:
    """Return the figures of single images.

    Args:
        vae: The model.
        pixels: uint8, shape (n, *data_shape).
        config: Number of samples and seed.
        first_row: Index of the first image in its split, which fixes the noise.
    """
    device = next(vae.parameters()).device
    data = observed_rows(vae.config, pixels, seed=config.seed, first_row=first_row).to(device)
    posterior = Posterior(*vae.posterior(data))
    sums = _Sums.empty(len(data), device)
    # A row of a categorical likelihood has a number for each level.
    rows_at_once = max(1, _ROWS_AT_ONCE[device.type] // (vae.decoder.num_levels or 1))
    for block in _blocks(len(data), config.num_importance_samples, _NOISE_AT_ONCE[device.type]):
        noise = normal_per_row(
            config.seed,
            block.num_rows,
            block.num_samples,
            vae.latent_dim,
            first_row=first_row + block.first_row,
            first_sample=block.first_sample,
            device=device,
        )
        for part in _blocks(block.num_rows, block.num_samples, rows_at_once):
            rows = slice(block.first_row + part.first_row, block.first_row + part.first_row + part.num_rows)
            samples = slice(part.first_sample, part.first_sample + part.num_samples)
            of_part = Posterior(posterior.mean[rows], posterior.log_var[rows])
            piece = noise[part.first_row : part.first_row + part.num_rows, samples]
            sums.add(rows, *_log_weights(vae, data[rows], of_part, piece))
    return Terms(
        log_likelihood=(sums.log_likelihood / config.num_importance_samples).cpu(),
        kl=gaussians.kl_to_standard_normal(*posterior).double().cpu(),
        iwae=(sums.log_weight.double() - math.log(config.num_importance_samples)).cpu(),
        mean=posterior.mean.cpu(),
    )


class _Sums(NamedTuple):
    """What is known of each image so far: shape (n,)."""

    log_likelihood: Tensor
    """Sum over the samples, float64."""
    log_weight: Tensor
    """Logarithm of the sum of the importance weights."""

    @classmethod
    def empty(cls, num_rows: int, device: torch.device) -> Self:
        zeros = torch.zeros(num_rows, dtype=torch.float64, device=device)
        return cls(zeros, torch.full((num_rows,), -math.inf, device=device))

    def add(self, rows: slice, log_likelihood: Tensor, log_weights: Tensor) -> None:
        self.log_likelihood[rows] += log_likelihood.double().sum(dim=1)
        self.log_weight[rows] = torch.logaddexp(self.log_weight[rows], torch.logsumexp(log_weights, dim=1))


def _log_weights(vae: VAE, data: Tensor, posterior: Posterior, noise: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return log p(x | z) and log p(x, z) / q(z | x) at the latents of the noise, both of shape (n, samples).

    With z = mu + sigma eps the ratio of the two densities of z needs no division by sigma:

    .. math:: \log p(z) - \log q(z \mid x) = \tfrac12 \sum_j (\epsilon_j^2 + \log \sigma_j^2 - z_j^2)
    """
    mean, log_var = (parameter.unsqueeze(1) for parameter in posterior)
    latents = gaussians.rsample(mean, log_var, noise)
    likelihood = vae.likelihood(latents)
    if isinstance(likelihood, Bernoulli):
        log_likelihood = binary_log_prob(likelihood, data)
    else:
        log_likelihood = likelihood.log_prob(data.unsqueeze(1))
    log_ratio = 0.5 * (noise.square() + log_var - latents.square()).sum(dim=-1)
    return log_likelihood, log_likelihood + log_ratio


class _Block(NamedTuple):
    """Some samples of some images."""

    first_row: int
    num_rows: int
    first_sample: int
    num_samples: int


def _blocks(num_rows: int, num_samples: int, size: int) -> Iterator[_Block]:
    """Cut the table of images and samples into pieces of at most `size` cells, of whole images if they fit."""
    width = min(num_samples, size)
    height = max(1, size // width)
    for row in range(0, num_rows, height):
        for sample in range(0, num_samples, width):
            yield _Block(row, min(height, num_rows - row), sample, min(width, num_samples - sample))
