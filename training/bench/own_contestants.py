"""Contestants that need nothing but this package: our trainer and evaluation, and the loop that tutorials show."""

import itertools
import tempfile
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from training import gaussians
from training.bench.tasks import EndRound, EvaluationTask, TrainingTask, with_weights
from training.checkpoint import RunFolder
from training.data import MAX_PIXEL, Dataset, Pixels
from training.evaluate import evaluate, terms
from training.models.vae import VAE
from training.trainer import fit

_CPU = torch.device("cpu")


def train_ours(task: TrainingTask, end_round: EndRound) -> VAE:
    """Fit as `vae-train fit` does, moving average of the weights included; return the raw weights."""
    step = itertools.count(1)

    def after_step() -> bool:
        if next(step) % task.steps_per_epoch == 0:
            end_round()
        return False

    dataset = Dataset("bench", task.pixels, task.held_out, task.held_out, sha256="", split="")
    with tempfile.TemporaryDirectory() as folder:
        result = fit(task.config, dataset, RunFolder(Path(folder)), device=_CPU, should_stop=after_step)
    weights = {name: weight.numpy() for name, weight in result.checkpoint.weights.items()}
    return with_weights(task.config.model, dataset.data_shape, weights)


def evaluate_ours(task: EvaluationTask, end_round: EndRound) -> NDArray[np.float64]:
    """Measure as `vae-train evaluate` does; return the negative bound of each image."""
    vae = task.vae()
    with torch.inference_mode():
        nll = -terms(vae, task.pixels, task.config, first_row=0).iwae
    end_round()
    for _ in range(1, task.num_rounds):
        evaluate(vae, task.pixels, task.config, split="test", checkpoint_sha256="")
        end_round()
    return nll.double().numpy()


class SampleBySample(TorchDataset[tuple[Tensor, int]]):
    """Images as torchvision hands them out: each one made a PIL image, then a tensor, when it is asked for."""

    def __init__(self, pixels: Pixels) -> None:
        self._pixels = pixels

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._pixels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return one image in [0, 1], shape (1, height, width), and a label."""
        image = Image.fromarray(self._pixels[index, 0])
        values = torch.from_numpy(np.array(image, copy=True)).unsqueeze(0)
        return values.contiguous().float().div(MAX_PIXEL), 0


def train_like_tutorial(task: TrainingTask, end_round: EndRound) -> VAE:
    """Fit in the style of pytorch/examples: samples one by one, probabilities, the loss read at each step."""
    torch.manual_seed(task.config.seed)
    vae = task.start()
    loader = DataLoader(SampleBySample(task.pixels), batch_size=task.batch_size, shuffle=True)
    optimizer = torch.optim.Adam(vae.parameters(), lr=task.config.optimizer.learning_rate)
    for _ in range(task.num_rounds):
        total = 0.0
        for data, _label in loader:
            optimizer.zero_grad()
            loss = _tutorial_loss(vae, data)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
            optimizer.step()
        end_round()
    return vae


def _tutorial_loss(vae: VAE, data: Tensor) -> Tensor:
    """Return the negative ELBO summed over the batch, from probabilities and grey pixels."""
    mean, log_var = vae.posterior(data)
    latents = gaussians.rsample(mean, log_var, torch.randn_like(mean))
    probabilities = torch.sigmoid(vae.decoder(latents))
    cross_entropy = functional.binary_cross_entropy(probabilities, data, reduction="sum")
    divergence = -0.5 * torch.sum(1 + log_var - mean.pow(2) - log_var.exp())
    return cross_entropy + divergence
