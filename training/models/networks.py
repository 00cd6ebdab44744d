"""Encoder and decoder architectures: perceptrons, and convolutions that halve an image a few times before one."""

import math
from itertools import pairwise
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from training.config import ModelConfig
from training.errors import ShapeUnsuitable

_ACTIVATIONS: dict[str, type[nn.Module]] = {"silu": nn.SiLU, "relu": nn.ReLU, "tanh": nn.Tanh}


_KERNEL, _STRIDE, _PADDING = 4, 2, 1


class Pyramid(NamedTuple):
    """Shapes of the features from the data up, (channels, height, width) each; or the data's shape alone."""

    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, data_shape: tuple[int, ...], channels: tuple[int, ...]) -> Self:
        """Return the pyramid over data with so many channels in each layer; each halves height and width.

        Raises:
            ShapeUnsuitable: If the data are no images, or too small to be halved so often.
        """
        if channels and len(data_shape) != 3:  # noqa: PLR2004 - channels, height, width
            raise ShapeUnsuitable(data_shape, problem="convolutions need (channels, height, width)")
        shapes = [data_shape]
        for number in channels:
            _, height, width = shapes[-1]
            if min(height, width) < _STRIDE:
                raise ShapeUnsuitable(data_shape, problem=f"it cannot be halved {len(channels)} times")
            shapes.append((number, height // _STRIDE, width // _STRIDE))
        return cls(tuple(shapes))

    def down(self, activation: str, generator: torch.Generator) -> nn.Sequential:
        """Return the convolutions from the data to the top, each followed by the activation."""
        layers: list[nn.Module] = []
        for below, above in pairwise(self.shapes):
            layers += [_convolution(nn.Conv2d, below[0], above[0], generator), _ACTIVATIONS[activation]()]
        return nn.Sequential(*layers)

    def up(self, activation: str, generator: torch.Generator) -> nn.Sequential:
        """Return the transposed convolutions from the top to the data, each preceded by the activation."""
        layers: list[nn.Module] = []
        for above, below in pairwise(reversed(self.shapes)):
            odd = below[1] % _STRIDE, below[2] % _STRIDE  # what halving has dropped
            layer = _convolution(nn.ConvTranspose2d, above[0], below[0], generator, output_padding=odd)
            layers += [_ACTIVATIONS[activation](), layer]
        return nn.Sequential(*layers)


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
        pyramid = Pyramid.of(data_shape, config.channels)
        self.convolutions = pyramid.down(config.activation, generator)
        widths = (math.prod(pyramid.shapes[-1]), *config.hidden_dims)
        self.hidden = _perceptron(widths, config.activation, generator)
        self.head = _linear(widths[-1], 2 * config.latent_dim, generator)

    def forward(self, data: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log variance, both of shape (batch, latent_dim).

        Args:
            data: In [0, 1], shape (batch, *data_shape).
        """
        features = self.convolutions(data).flatten(start_dim=1)
        mean, log_var = self.head(self.hidden(features)).chunk(2, dim=1)
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
        pyramid = Pyramid.of(data_shape, config.channels)
        self.top_shape = pyramid.shapes[-1]
        widths = (config.latent_dim, *reversed(config.hidden_dims))
        self.hidden = _perceptron(widths, config.activation, generator)
        self.head = _linear(widths[-1], math.prod(self.top_shape), generator)
        self.convolutions = pyramid.up(config.activation, generator)
        self.offset = nn.Parameter(torch.zeros(data_shape)) if config.channels else None

    def forward(self, latents: Tensor) -> Tensor:
        """Return logits, shape (batch, *data_shape), for latents of shape (batch, latent_dim)."""
        features = self.head(self.hidden(latents)).view(-1, *self.top_shape)
        logits: Tensor = self.convolutions(features)
        return logits if self.offset is None else logits + self.offset

    @torch.no_grad()
    def start_at(self, probabilities: Tensor) -> None:
        """Let every latent decode to about these pixel probabilities; saves the first epoch.

        Args:
            probabilities: Mean of the training data, in [0, 1], shape data_shape.
        """
        # Pixels that are always black would give infinite logits.
        logits = torch.logit(probabilities, eps=1e-3)
        if self.offset is None:
            self.head.bias.copy_(logits.flatten())
        else:
            self.offset.copy_(logits)


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


def _convolution(
    kind: type[nn.Conv2d | nn.ConvTranspose2d],
    num_inputs: int,
    num_outputs: int,
    generator: torch.Generator,
    **options: Any,  # noqa: ANN401 - those of the layer
) -> nn.Module:
    """Return a layer that halves or doubles an image, with weights as `_linear` draws them."""
    layer: nn.Module = nn.utils.skip_init(  # type: ignore[no-untyped-call]
        kind, num_inputs, num_outputs, _KERNEL, stride=_STRIDE, padding=_PADDING, **options
    )
    # Inputs that reach one output: all of the kernel going down, a quarter of it going up.
    fan_in = num_inputs * _KERNEL**2 // (1 if kind is nn.Conv2d else _STRIDE**2)
    bound = 1 / math.sqrt(fan_in)
    weight, bias = layer.get_parameter("weight"), layer.get_parameter("bias")
    nn.init.uniform_(weight, -bound, bound, generator=generator)
    nn.init.zeros_(bias)
    return layer
