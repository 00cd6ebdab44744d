"""Measures a finished model on a split: ELBO and its terms, the importance-weighted bound, active units.

All noise is fixed per image index, so figures do not depend on the batch size and can be compared between
models. An image is encoded once; its importance weights are summed up as they come.
"""

import json
import math
from typing import Final, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from serving.typed_config import Config, ConfigError
from training import checkpoint, gaussians
from training.checkpoint import RunFolder, averaged_model, write_atomically
from training.config import EvaluationConfig
from training.data import Dataset, Pixels, SplitName, binarise_rows
from training.models.vae import VAE
from training.noise import normal_per_row

ACTIVE_VARIANCE: Final = 0.01
"""A latent dimension is active if its posterior mean varies over the data by more than this.

Burda, Grosse and Salakhutdinov, 2016, section 5.2. https://arxiv.org/abs/1509.00519
"""

_IMAGES_AT_ONCE: Final = 20
_SAMPLES_AT_ONCE: Final = 50


class Estimate(Config):
    """A mean over images with its standard error, nats per image."""

    value: float
    """Mean over the images."""

    standard_error: float
    """Standard deviation over the images, divided by the square root of their number."""


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
    """How grey pixels became binary data."""

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


def evaluate_run(
    run: RunFolder,
    dataset: Dataset,
    config: EvaluationConfig,
    *,
    split: SplitName = "test",
    device: torch.device,
) -> Evaluation:
    """Measure the best checkpoint of a run and record the figures in its folder."""
    best = checkpoint.load(run.best)
    vae = averaged_model(best, dataset.data_shape, device)
    evaluation = evaluate(vae, dataset.rows(split), config, split=split, checkpoint_sha256=best.sha256())
    write_atomically(run.evaluation, evaluation.to_json().encode())
    return evaluation


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
    vae: VAE, pixels: Pixels, config: EvaluationConfig, *, split: SplitName, checkpoint_sha256: str
) -> Evaluation:
    """Return the figures of a model.

    Args:
        vae: The model, on the device that computes.
        pixels: Rows of the split, uint8, shape (n, *data_shape).
        config: How many images and samples, and the seed.
        split: Name of the split, recorded.
        checkpoint_sha256: Digest of the model's checkpoint, recorded.
    """
    rows = pixels[: config.max_images]
    pieces = [
        terms(vae, rows[first : first + _IMAGES_AT_ONCE], config, first_row=first)
        for first in range(0, len(rows), _IMAGES_AT_ONCE)
    ]
    log_likelihood, kl, iwae, mean = (torch.cat(piece) for piece in zip(*pieces, strict=True))
    return Evaluation(
        split=split,
        num_images=len(rows),
        num_importance_samples=config.num_importance_samples,
        seed=config.seed,
        checkpoint_sha256=checkpoint_sha256,
        elbo=_estimate(log_likelihood - kl),
        log_likelihood=_estimate(log_likelihood),
        kl=_estimate(kl),
        nll_iwae=_estimate(-iwae),
        active_units=int((mean.var(dim=0) > ACTIVE_VARIANCE).sum()),
        latent_dim=vae.latent_dim,
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
    data = binarise_rows(pixels, seed=config.seed, first_row=first_row).to(device)
    mean, log_var = (parameter.unsqueeze(1) for parameter in vae.posterior(data))
    num_samples = config.num_importance_samples
    log_weight_sum = torch.full((len(data),), -math.inf, device=device)
    log_likelihood_sum = torch.zeros(len(data), dtype=torch.float64, device=device)
    for first in range(0, num_samples, _SAMPLES_AT_ONCE):
        noise = normal_per_row(
            config.seed,
            len(data),
            min(_SAMPLES_AT_ONCE, num_samples - first),
            vae.latent_dim,
            first_row=first_row,
            first_sample=first,
        ).to(device)
        latents = gaussians.rsample(mean, log_var, noise)
        log_likelihood = vae.likelihood(latents).log_prob(data.unsqueeze(1))
        log_ratio = gaussians.standard_normal_log_prob(latents) - gaussians.log_prob(latents, mean, log_var)
        log_likelihood_sum += log_likelihood.double().sum(dim=1)
        log_weight_sum = torch.logaddexp(log_weight_sum, torch.logsumexp(log_likelihood + log_ratio, dim=1))
    return Terms(
        log_likelihood=(log_likelihood_sum / num_samples).cpu(),
        kl=gaussians.kl_to_standard_normal(mean, log_var).squeeze(1).double().cpu(),
        iwae=(log_weight_sum.double() - math.log(num_samples)).cpu(),
        mean=mean.squeeze(1).cpu(),
    )


def _estimate(values: Tensor) -> Estimate:
    return Estimate(value=float(values.mean()), standard_error=float(values.std() / math.sqrt(len(values))))
