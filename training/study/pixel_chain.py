r"""A generative model without latents: every pixel is guessed from the pixels before it.

.. math:: p(x) = \prod_j p(x_j \mid x_1, \dots, x_{j-1}), \qquad
    p(x_j = 1 \mid x_1, \dots, x_{j-1}) = \mathrm{sigmoid}(b_j + \sum_{i < j} w_{ji} x_i)

A product of conditional probabilities is a probability: log p(x) is exact, and a sample is drawn pixel by pixel.

References:
    Larochelle and Murray, The Neural Autoregressive Distribution Estimator, 2011: there with a hidden layer, and
    this model beside it as the fully visible sigmoid belief network.
"""

import math
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor, nn

from training.likelihoods import Bernoulli

_ROWS_AT_ONCE: Final = 128


class PixelChain(nn.Module):
    """A chain of logistic regressions over binary pixels, in the order in which an image is read.

    Args:
        data_shape: Shape of one row of data.
    """

    def __init__(self, data_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.data_shape = data_shape
        num_pixels = math.prod(data_shape)
        # Zeros: the objective is concave, no place is better to start from.
        self.weight = nn.Parameter(torch.zeros(num_pixels, num_pixels))
        self.bias = nn.Parameter(torch.zeros(num_pixels))

    def log_prob(self, data: Tensor) -> Tensor:
        """Return log p(x) in nats, exactly, shape (n,), for zeros and ones of shape (n, *data_shape)."""
        flat = data.flatten(start_dim=1)
        return Bernoulli(self._logits(flat)).log_prob(flat)

    @torch.no_grad()
    def sample(self, uniform: Tensor) -> Tensor:
        """Return draws from p(x), zeros and ones.

        Args:
            uniform: Noise on [0, 1), shape (n, *data_shape); a number for each pixel.
        """
        noise = uniform.flatten(start_dim=1)
        drawn = torch.zeros_like(noise)
        weight = self.weight.tril(-1)
        for pixel in range(noise.shape[1]):
            logits = self.bias[pixel] + drawn @ weight[pixel]
            drawn[:, pixel] = (noise[:, pixel] < logits.sigmoid()).to(drawn.dtype)
        return drawn.view_as(uniform)

    def fit(
        self,
        batch: Callable[[Tensor], Tensor],
        num_rows: int,
        source: torch.Generator,
        *,
        num_steps: int,
        learning_rate: float = 1e-2,
    ) -> None:
        """Maximise the mean log p(x) by Adam; the step size falls to zero along a line.

        Args:
            batch: Row numbers to zeros and ones, shape (rows, *data_shape); may binarise afresh each time.
            num_rows: Rows of the data.
            source: Chooses the rows of each step.
            num_steps: Steps of 128 rows.
            learning_rate: First step size.
        """
        optimizer = torch.optim.Adam(self.parameters(), lr=learning_rate)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=num_steps)
        for _ in range(num_steps):
            rows = torch.randint(num_rows, (_ROWS_AT_ONCE,), generator=source, device=source.device)
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(-self.log_prob(batch(rows)).mean())
            optimizer.step()
            schedule.step()

    def _logits(self, flat: Tensor) -> Tensor:
        # Strictly below the diagonal: no pixel sees itself or what comes after it.
        return self.bias + flat @ self.weight.tril(-1).T
