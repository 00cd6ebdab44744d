"""log p(x) of a few images without trusting the encoder, and how far that estimate can be off.

On images, annealed importance sampling bounds log p(x) from below, as the importance-weighted bound does: the
higher of the two is closer. On images that the model has drawn itself, whose latents are known, chains that walk
back bound it from above too; the gap says how good the chains are for this decoder (bidirectional Monte Carlo).
"""

from typing import Final, NamedTuple, Self

import torch
from pydantic import Field
from torch import Tensor

from serving.typed_config import Config
from training import annealed_importance
from training.annealed_importance import AnnealedEstimate, Annealing
from training.mean_estimate import Estimate
from training.models.vae import VAE
from training.noise import TrainingStream, generator

NUM_CHAINS: Final = 16


class Bracket(Config):
    """Negative log p(x) of a few images by annealed importance sampling, nats per image."""

    num_images: int = Field(ge=2)
    """The first images of the split, and as many drawn from the model."""

    num_chains: int = Field(ge=2)
    """Chains of each image."""

    num_temperatures: int = Field(ge=1)
    """Intermediate densities between prior and posterior."""

    num_leapfrog_steps: int = Field(ge=1)
    """Steps of each Hamiltonian transition."""

    seed: int
    """Of the chains, and of the images drawn from the model."""

    nll: Estimate
    """On images of the split: an upper bound, on average, that the chains reach."""

    chain_standard_error: float
    """Of that mean, from the finite number of chains alone; the other is from the choice of images."""

    nll_iwae: Estimate
    """Negative importance-weighted bound of the same images."""

    acceptance: float
    """Share of accepted moves; 0.65 is best."""

    drawn_nll_at_most: Estimate
    """On images drawn from the model: forward chains, an upper bound on average."""

    drawn_nll_at_least: Estimate
    """The same images: reverse chains from the latents that made them, a lower bound on average."""

    drawn_gap: Estimate
    """Their difference image by image: what the chains are off by at most, on average. Chains that are few or
    good may give a little less than zero."""


class _Drawn(NamedTuple):
    """Data of the model's own, and what it made them from."""

    data: Tensor
    latents: Tensor

    @classmethod
    def of(cls, vae: VAE, num_images: int, source: torch.Generator) -> Self:
        latents = torch.randn(num_images, vae.latent_dim, generator=source, device=source.device)
        likelihood = vae.likelihood(latents)
        draw = torch.rand if likelihood.noise == "uniform" else torch.randn
        return cls(likelihood.sample(draw(likelihood.mean.shape, generator=source, device=source.device)), latents)


@torch.no_grad()
def bracket(
    vae: VAE,
    data: Tensor,
    iwae: Tensor,
    *,
    seed: int,
    annealing: Annealing | None = None,
    num_chains: int = NUM_CHAINS,
) -> Bracket:
    """Return the bounds of a few images.

    Args:
        vae: The model.
        data: What its likelihood takes for data, on its device, shape (n, *data_shape) with n at least 2.
        iwae: Importance-weighted bound of each, shape (n,).
        seed: Of chains and drawn images.
        annealing: How the chains walk; by default through 500 densities.
        num_chains: Chains of each image.
    """
    walk = annealing or Annealing()
    source = generator(seed, TrainingStream.ANNEALING, device=data.device)

    def forward(rows: Tensor) -> AnnealedEstimate:
        return annealed_importance.estimate(
            vae, rows, latent_dim=vae.latent_dim, num_chains=num_chains, source=source, annealing=walk
        )

    found, drawn = forward(data), _Drawn.of(vae, len(data), source)
    above = forward(drawn.data)
    below = annealed_importance.reverse_estimate(
        vae,
        drawn.data,
        drawn.latents,
        above.step_sizes,
        num_chains=num_chains,
        source=source,
        annealing=walk,
    )
    return Bracket(
        num_images=len(data),
        num_chains=num_chains,
        num_temperatures=walk.num_temperatures,
        num_leapfrog_steps=walk.num_leapfrog_steps,
        seed=seed,
        nll=Estimate.of(-found.log_evidence),
        chain_standard_error=float(found.standard_error.double().square().sum().sqrt() / len(data)),
        nll_iwae=Estimate.of(-iwae),
        acceptance=float(found.acceptance.mean()),
        drawn_nll_at_most=Estimate.of(-above.log_evidence),
        drawn_nll_at_least=Estimate.of(-below.log_evidence),
        drawn_gap=Estimate.of(below.log_evidence - above.log_evidence),
    )
