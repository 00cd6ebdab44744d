"""Encoder and decoder architectures: perceptrons, and convolutions that halve an image a few times before one."""

import math
from itertools import pairwise
from typing import Any, Final, NamedTuple, Self

import torch
from torch import Tensor, nn

from training.config import ModelConfig
from training.errors import ShapeUnsuitable
from training.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood, quantised

_ACTIVATIONS: dict[str, type[nn.Module]] = {"silu": nn.SiLU, "relu": nn.ReLU, "tanh": nn.Tanh}


_KERNEL, _STRIDE, _PADDING = 4, 2, 1

_RARE: Final = 1e-3
"""Probability that a decoder gives at the start to what no training pixel showed."""

_SMALLEST_EXCESS: Final = 1e-2
"""Distance from its lower bound at which a Gaussian's log variance starts at least: there is a gradient yet."""


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
        self.num_levels = config.num_levels if config.likelihood == "categorical" else None
        self.log_var_min, self.log_var_max = config.log_var_min, config.log_var_max
        pyramid = Pyramid.of(data_shape, config.channels)
        self.convolutions = pyramid.down(config.activation, generator)
        widths = (math.prod(pyramid.shapes[-1]), *config.hidden_dims)
        self.hidden = _perceptron(widths, config.activation, generator)
        self.head = _linear(widths[-1], 2 * config.latent_dim, generator)

    def forward(self, data: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log variance, both of shape (batch, latent_dim).

        Args:
            data: In [0, 1], shape (batch, *data_shape). For a categorical likelihood each pixel is moved to its
                nearest level first, so that the posterior is one of what the likelihood sees.
        """
        if self.num_levels is not None:
            data = quantised(data, self.num_levels)
        features = self.convolutions(data).flatten(start_dim=1)
        mean, log_var = self.head(self.hidden(features)).chunk(2, dim=1)
        return mean, log_var.clamp(self.log_var_min, self.log_var_max)


class Decoder(nn.Module):
    """Maps latents to the parameters of p(x | z).

    What the layers answer has one number per pixel: for a Bernoulli the log odds of a one; for a Gaussian those of
    the mean, which therefore stays in [0, 1], where intensities are. So what is served as the mean is the mean of
    the density, with nothing clipped; and on digits it also fits better than an unbounded one. For a categorical
    likelihood there is one number per pixel and level, the logits.

    Args:
        config: Sizes and likelihood.
        data_shape: Shape of one row of data.
        generator: Source of the initial weights.
    """

    def __init__(self, config: ModelConfig, data_shape: tuple[int, ...], generator: torch.Generator) -> None:
        super().__init__()
        self.data_shape = data_shape
        self.num_levels = config.num_levels if config.likelihood == "categorical" else None
        self.noise_log_var_min = config.noise_log_var_min
        self.excess_log_var = nn.Parameter(torch.zeros(())) if config.likelihood == "gaussian" else None
        """What a softplus turns into the distance of the noise's log variance from its lower bound."""
        pyramid = Pyramid.of(data_shape, config.channels)
        bottom = ((self.num_levels or 1) * data_shape[0], *data_shape[1:])
        pyramid = Pyramid((bottom, *pyramid.shapes[1:]))
        self.top_shape = pyramid.shapes[-1]
        widths = (config.latent_dim, *reversed(config.hidden_dims))
        self.hidden = _perceptron(widths, config.activation, generator)
        self.head = _linear(widths[-1], math.prod(self.top_shape), generator)
        self.convolutions = pyramid.up(config.activation, generator)
        self.offset = nn.Parameter(torch.zeros(self.parameter_shape)) if config.channels else None

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        """Shape of what the layers answer for one row: data_shape, or (num_levels, *data_shape)."""
        return self.data_shape if self.num_levels is None else (self.num_levels, *self.data_shape)

    def forward(self, latents: Tensor) -> Tensor:
        """Return what the layers answer, shape (batch, *parameter_shape), for latents (batch, latent_dim)."""
        features = self.head(self.hidden(latents)).view(-1, *self.top_shape)
        answer: Tensor = self.convolutions(features)
        if self.num_levels is not None:
            answer = answer.view(-1, *self.parameter_shape)
        return answer if self.offset is None else answer + self.offset

    def distribution(self, answer: Tensor) -> Likelihood:
        """Return p(x | z) for what the layers answered, shape (..., *parameter_shape)."""
        event_dims = len(self.data_shape)
        if self.num_levels is not None:
            return Categorical(answer, event_dims)
        if self.excess_log_var is None:
            return Bernoulli(answer, event_dims)
        # A hard clamp would have no gradient below the bound: a variance that fell there could not come back.
        log_var = self.noise_log_var_min + nn.functional.softplus(self.excess_log_var)
        per_row = log_var.expand(*answer.shape[:-event_dims], *(1,) * event_dims)
        return Gaussian(torch.sigmoid(answer), per_row, event_dims)

    @torch.no_grad()
    def start_at(self, probabilities: Tensor, log_var: float | None = None) -> None:
        """Let every latent decode to about the same distribution of each pixel; saves the first epoch.

        Args:
            probabilities: Of the training data. Mean intensity of each pixel, in [0, 1], shape data_shape; for a
                categorical likelihood the frequency of each level, shape (num_levels, *data_shape).
            log_var: Logarithm of the variance around the mean, for a Gaussian likelihood.
        """
        # Pixels that are always black would give infinite logits.
        if self.num_levels is not None:
            start = probabilities.clamp_min(_RARE / self.num_levels).log()
        else:
            start = torch.logit(probabilities, eps=_RARE)
        if self.offset is None:
            self.head.bias.copy_(start.flatten())
        else:
            self.offset.copy_(start)
        if self.excess_log_var is not None and log_var is not None:
            excess = max(log_var - self.noise_log_var_min, _SMALLEST_EXCESS)
            self.excess_log_var.fill_(math.log(math.expm1(excess)))


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
