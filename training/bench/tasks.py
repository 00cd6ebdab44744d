"""What a contestant is given and what it gives back, and the yardstick that is the same for all."""

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training import objectives
from training.config import EvaluationConfig, ModelConfig, TrainingConfig
from training.data import MAX_PIXEL, Pixels, binarise_rows
from training.models.vae import VAE
from training.noise import TrainingStream, generator
from training.observations import marginals

EndRound = Callable[[], None]
"""Called by a contestant at the end of each epoch or evaluation; returns when it is its turn again."""

Weights = dict[str, NDArray[np.float32]]


class TrainingTask(NamedTuple):
    """Fit a model, `config.optimizer.epochs` rounds of one epoch each."""

    config: TrainingConfig
    """Networks, step size, batch, number of epochs, seed."""

    pixels: Pixels
    """What to fit to: uint8, shape (n, *data_shape), n a multiple of the batch size."""

    held_out: Pixels
    """What the fitted model is measured on."""

    num_threads: int
    """CPU threads."""

    @property
    def num_rounds(self) -> int:
        """How often the round ends."""
        return self.config.optimizer.epochs

    @property
    def batch_size(self) -> int:
        """Rows in one step."""
        return self.config.optimizer.batch_size

    @property
    def steps_per_epoch(self) -> int:
        """Steps in one round."""
        return len(self.pixels) // self.batch_size

    def start(self) -> VAE:
        """Return the model that every contestant begins with: the one with which our trainer begins."""
        vae = VAE(self.config.model, self.pixels.shape[1:], generator(self.config.seed, TrainingStream.INIT))
        vae.decoder.start_at(*marginals(self.config.model, self.pixels))
        return vae

    def grey(self) -> Tensor:
        """Return the data as the peers' examples fit them: pixels in [0, 1], float32, same shape."""
        return torch.from_numpy(self.pixels).float() / MAX_PIXEL


class EvaluationTask(NamedTuple):
    """Estimate the importance-weighted bound of the same images with the same weights, again and again."""

    weights: Weights
    """Of the model to measure."""

    model: ModelConfig
    """Its networks."""

    pixels: Pixels
    """Images: uint8, shape (n, *data_shape)."""

    config: EvaluationConfig
    """k and the seed of the binarisation."""

    num_rounds: int
    """How often the round ends; the first round measures single images."""

    num_threads: int
    """CPU threads."""

    def vae(self) -> VAE:
        """Return the model to measure."""
        return with_weights(self.model, self.pixels.shape[1:], self.weights)

    def binary(self) -> Tensor:
        """Return the images that our evaluation sees: zeros and ones, float32."""
        return binarise_rows(self.pixels, seed=self.config.seed)


class Fitted(NamedTuple):
    """What came of a training task."""

    weights: Weights
    """Of the fitted model."""

    num_parameters: int
    """Numbers that were fitted."""

    elbo: float
    """Of the fitted model on the held-out rows, nats per image."""


class Measured(NamedTuple):
    """What came of an evaluation task."""

    nll: NDArray[np.float64]
    """Negative bound of each image, nats, shape (n,)."""


Task = TrainingTask | EvaluationTask
Outcome = Fitted | Measured


def held_out_elbo(vae: VAE, pixels: Pixels, *, seed: int) -> float:
    """Return the mean ELBO of binarised rows in nats; the same draws whatever the model."""
    data = binarise_rows(pixels, seed=seed)
    noise = torch.randn((len(data), vae.latent_dim), generator=generator(seed, TrainingStream.VALIDATION))
    with torch.inference_mode():
        return float(objectives.elbo(vae, data, noise).value.mean())


def fitted(vae: VAE, task: TrainingTask) -> Fitted:
    """Return the outcome of a fit: weights, their number, and how good they are."""
    return Fitted(
        weights=weights_of(vae),
        num_parameters=sum(parameter.numel() for parameter in vae.parameters()),
        elbo=held_out_elbo(vae, task.held_out, seed=task.config.seed),
    )


def weights_of(vae: VAE) -> Weights:
    """Return the weights of a model as arrays, which processes can exchange."""
    return {name: weight.detach().numpy().copy() for name, weight in vae.state_dict().items()}


def with_weights(model: ModelConfig, data_shape: tuple[int, ...], weights: Weights) -> VAE:
    """Return a model with these weights."""
    vae = VAE(model, data_shape, generator(0, TrainingStream.INIT))
    vae.load_state_dict({name: torch.from_numpy(weight) for name, weight in weights.items()})
    return vae


def shuffled_batches(data: Tensor, batch_size: int, source: torch.Generator) -> Iterator[Tensor]:
    """Return one epoch of batches, gathered from one tensor in a fresh order."""
    order = torch.randperm(len(data), generator=source)
    for first in itertools.islice(range(0, len(data), batch_size), len(data) // batch_size):
        yield data.index_select(0, order[first : first + batch_size])
