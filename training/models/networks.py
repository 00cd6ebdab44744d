"""Encoder and decoder architectures."""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from training.config import ModelConfig

_ACTIVATIONS: dict[str, type[nn.Module]] = {"silu": nn.SiLU, "relu": nn.ReLU, "tanh": nn.Tanh}


class Encoder(nn.Module):
    """Maps data to the parameters of q(z | x).

    Args:
        config: Sizes.
        data_shape: Shape of one row of data.
        generator: Source of the initial weights.
    """

    def __init__(self, config: ModelConfig, data_shape: tuple[int, ...], generator: torch.Generator) -> None:
        super().__init__()
        self.log_var_min, self.log_var_max = config.log_var_min, config.log_var_max
        widths = (math.prod(data_shape), *config.hidden_dims)
        self.hidden = _perceptron(widths, config.activation, generator)
        self.head = _linear(widths[-1], 2 * config.latent_dim, generator)

    def forward(self, data: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log variance, both of shape (batch, latent_dim).

        Args:
            data: In [0, 1], shape (batch, *data_shape).
        """
        mean, log_var = self.head(self.hidden(data.flatten(start_dim=1))).chunk(2, dim=1)
        return mean, log_var.clamp(self.log_var_min, self.log_var_max)


class Decoder(nn.Module):
    """Maps latents to the logits of p(x | z).

    Args:
        config: Sizes.
        data_shape: Shape of one row of data.
        generator: Source of the initial weights.
    """

    def __init__(self, config: ModelConfig, data_shape: tuple[int, ...], generator: torch.Generator) -> None:
        super().__init__()
        self.data_shape = data_shape
        widths = (config.latent_dim, *reversed(config.hidden_dims))
        self.hidden = _perceptron(widths, config.activation, generator)
        self.head = _linear(widths[-1], math.prod(data_shape), generator)

    def forward(self, latents: Tensor) -> Tensor:
        """Return logits, shape (batch, *data_shape), for latents of shape (batch, latent_dim)."""
        logits: Tensor = self.head(self.hidden(latents))
        return logits.view(-1, *self.data_shape)

    @torch.no_grad()
    def start_at(self, probabilities: Tensor) -> None:
        """Let every latent decode to about these pixel probabilities; saves the first epoch.

        Args:
            probabilities: Mean of the training data, in [0, 1], shape data_shape.
        """
        # Pixels that are always black would give infinite logits.
        self.head.bias.copy_(torch.logit(probabilities.flatten(), eps=1e-3))


def _perceptron(widths: tuple[int, ...], activation: str, generator: torch.Generator) -> nn.Sequential:
    layers: list[nn.Module] = []
    for num_inputs, num_outputs in pairwise(widths):
        layers += [_linear(num_inputs, num_outputs, generator), _ACTIVATIONS[activation]()]
    return nn.Sequential(*layers)


def _linear(num_inputs: int, num_outputs: int, generator: torch.Generator) -> nn.Linear:
    """Return a layer with PyTorch's usual uniform weights, drawn without the global generator."""
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, num_inputs, num_outputs)  # type: ignore[no-untyped-call]
    bound = 1 / math.sqrt(num_inputs)
    nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
    nn.init.zeros_(layer.bias)
    return layer
