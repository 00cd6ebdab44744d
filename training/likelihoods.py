"""p(x | z): the distributions that a decoder's output parametrises."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Bernoulli:
    """Independent binary pixels.

    A likelihood of *binary* data: binarise grey pixels first, with pixel / 255 as probability. On grey values
    the same formula is not the logarithm of a probability.

    Args:
        logits: Log odds of a one, shape (..., *data_shape).
        event_dims: Dimensions of one row of data, at the end of the shape; they are summed over.
    """

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
