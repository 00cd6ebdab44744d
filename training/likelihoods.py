"""p(x | z): the distributions that a decoder's output parametrises.

All three say the same things: `log_prob` in nats, summed over the pixels of a row; `mean`, the expected intensity
in [0, 1]; `sample` from noise that is handed in, of the kind that `noise` names.

| | data | log p(x given z) is the logarithm of | |
|---|---|---|---|
| `Bernoulli` | zeros and ones | a probability | never positive |
| `Gaussian` | intensities in [0, 1] | a density over [0, 1]^d | positive where the density exceeds one |
| `Categorical` | intensities on a grid of levels | a probability | never positive |

So bounds of different families are of different data, and must not be compared.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Final, Literal

import torch
from torch import Tensor
from torch.nn import functional

_LOG_TWO_PI: Final = math.log(2 * math.pi)

NoiseKind = Literal["uniform", "normal"]


@dataclass(frozen=True)
class Bernoulli:
    """Independent binary pixels.

    A likelihood of *binary* data: binarise grey pixels first, with pixel / 255 as probability. On grey values
    the same formula is not the logarithm of a probability.

    Args:
        logits: Log odds of a one, shape (..., *data_shape).
        event_dims: Dimensions of one row of data, at the end of the shape; they are summed over.
    """

    noise: ClassVar[NoiseKind] = "uniform"
    """Kind of noise that `sample` takes."""

    logits: Tensor
    event_dims: int = 1

    def log_prob(self, data: Tensor) -> Tensor:
        r"""Return log p(x | z) in nats, shape (...).

        .. math:: \sum_j x_j l_j - \log(1 + e^{l_j})

        Args:
            data: Zeros and ones, shape (..., *data_shape); shapes are broadcast.

        Example:
            >>> Bernoulli(torch.zeros(1, 3)).log_prob(torch.ones(1, 3))
            tensor([-2.0794])
        """
        terms = data * self.logits - functional.softplus(self.logits)
        return terms.flatten(start_dim=-self.event_dims).sum(dim=-1)

    @property
    def mean(self) -> Tensor:
        """Return the probability of a one, in [0, 1]."""
        return torch.sigmoid(self.logits)

    def sample(self, noise: Tensor) -> Tensor:
        """Return zeros and ones, drawn with noise that is uniform on [0, 1)."""
        return (noise < self.mean).to(self.logits.dtype)


@dataclass(frozen=True)
class Gaussian:
    """Independent pixels N(mean, exp(log_var)): a *density*, in units of intensities in [0, 1].

    Its logarithm grows without bound where the variance goes to zero, so whoever learns the variance must bound
    it from below. The density also covers values outside [0, 1], which no pixel has.

    Args:
        mean: Shape (..., *data_shape).
        log_var: Natural logarithm of the variance; shapes are broadcast. One value for all pixels is the
            sigma-VAE of Rybkin et al.
        event_dims: Dimensions of one row of data, at the end of the shape; they are summed over.

    References:
        Rybkin, Daniilidis and Levine, Simple and Effective VAE Training with Calibrated Decoders, 2021.
        https://arxiv.org/abs/2006.13202
        Lucas, Tucker, Grosse and Norouzi, Don't Blame the ELBO!, 2019. https://arxiv.org/abs/1911.02469
    """

    noise: ClassVar[NoiseKind] = "normal"
    """Kind of noise that `sample` takes."""

    mean: Tensor
    log_var: Tensor
    event_dims: int = 1

    def log_prob(self, data: Tensor) -> Tensor:
        r"""Return log p(x | z) in nats, shape (...): the logarithm of a density, positive where that exceeds one.

        .. math:: -\tfrac12 \sum_j \left( (x_j - \mu_j)^2 / \sigma_j^2 + \log \sigma_j^2 + \log 2 \pi \right)

        Args:
            data: Intensities, shape (..., *data_shape); shapes are broadcast.

        Example:
            >>> Gaussian(torch.zeros(1, 2), torch.tensor(0.01).log()).log_prob(torch.zeros(1, 2))
            tensor([2.7673])
        """
        terms = (data - self.mean).square() * (-self.log_var).exp() + self.log_var + _LOG_TWO_PI
        return -0.5 * terms.flatten(start_dim=-self.event_dims).sum(dim=-1)

    def sample(self, noise: Tensor) -> Tensor:
        """Return values drawn with standard normal noise; a few lie outside [0, 1], as the density says."""
        return self.mean + (0.5 * self.log_var).exp() * noise


@dataclass(frozen=True)
class Categorical:
    """Independent pixels, each on one of L levels with intensities 0, 1 / (L - 1), ..., 1: a probability mass.

    Args:
        logits: Unnormalised log probabilities of the levels, shape (..., L, *data_shape). The levels come before
            the pixels, as channels do in a convolution.
        event_dims: Dimensions of one row of data, at the end of the shape; they are summed over.
    """

    noise: ClassVar[NoiseKind] = "uniform"
    """Kind of noise that `sample` takes."""

    logits: Tensor
    event_dims: int = 1

    @property
    def num_levels(self) -> int:
        """L."""
        return self.logits.shape[self._axis]

    def log_prob(self, data: Tensor) -> Tensor:
        r"""Return log p(x | z) in nats, shape (...).

        .. math:: \sum_j l_{x_j j} - \log \sum_k e^{l_{k j}}

        Args:
            data: Intensities in [0, 1], shape (..., *data_shape); shapes are broadcast. Each counts as its nearest
                level.

        Example:
            >>> Categorical(torch.zeros(1, 4, 3)).log_prob(torch.ones(1, 3))
            tensor([-4.1589])
        """
        totals = self.logits.logsumexp(dim=self._axis)
        levels, _ = torch.broadcast_tensors(level_of(data, self.num_levels), totals)  # type: ignore[no-untyped-call]
        logits = self.logits.expand(*levels.shape[: -self.event_dims], *self.logits.shape[self._axis :])
        terms = logits.gather(self._axis, levels.unsqueeze(self._axis)).squeeze(self._axis) - totals
        return terms.flatten(start_dim=-self.event_dims).sum(dim=-1)

    @property
    def mean(self) -> Tensor:
        """Return the expected intensity, in [0, 1], shape (..., *data_shape)."""
        intensities = torch.linspace(0, 1, self.num_levels, dtype=self.logits.dtype, device=self.logits.device)
        probabilities = self.logits.softmax(dim=self._axis).flatten(start_dim=-self.event_dims)
        # A product of matrices: over a sum ONNX Runtime takes another order where a row is alone, and a vector
        # beside a transposed matrix it multiplies wrongly (version 1.31).
        expected = (intensities.unsqueeze(0) @ probabilities).view(self.logits.select(self._axis, 0).shape)
        return expected.clamp(0, 1)  # probabilities that round upwards sum to above one

    def sample(self, noise: Tensor) -> Tensor:
        """Return intensities of levels, drawn with noise that is uniform on [0, 1), shape (..., *data_shape)."""
        edges = self.logits.softmax(dim=self._axis).cumsum(dim=self._axis)
        last = self.num_levels - 1
        # The last edge is one up to rounding; nothing is above it.
        levels = (noise.unsqueeze(self._axis) >= edges.narrow(self._axis, 0, last)).sum(dim=self._axis)
        return levels.to(self.logits.dtype) / last

    @property
    def _axis(self) -> int:
        return -self.event_dims - 1


Likelihood = Bernoulli | Gaussian | Categorical


def level_of(data: Tensor, num_levels: int) -> Tensor:
    """Return the number of the nearest of equally spaced levels, int64 in [0, num_levels), for data in [0, 1].

    Example:
        >>> level_of(torch.tensor([0.0, 0.3, 0.9]), 3)
        tensor([0, 1, 2])
    """
    return (data * (num_levels - 1)).round().long()


def quantised(data: Tensor, num_levels: int) -> Tensor:
    """Return the intensity of the nearest level, in [0, 1]; what is on a level stays there.

    Example:
        >>> quantised(torch.tensor([0.0, 0.3, 0.9]), 3)
        tensor([0.0000, 0.5000, 1.0000])
    """
    return (data * (num_levels - 1)).round() / (num_levels - 1)
