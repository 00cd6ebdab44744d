r"""log p(x | z) of binary data for many latents of each row: no gradient, half the time of the general form.

.. math:: \log p(x \mid z) = -\sum_j \log(1 + o_j), \quad o_j = e^{(1 - 2 x_j) l_j}

The odds o_j are those of the value that was not observed. No two terms of the sum cancel, and sixteen of them need
one logarithm: from (1 + a)(1 + b) = 1 + (a + b + a b), pairs of odds are joined before it is taken.
"""

from typing import Final

import torch
from torch import Tensor

from training.likelihoods import Bernoulli

_NUM_JOINS: Final = 4
"""The logarithm's share of the time falls by half with each; the largest number that float32 holds is reached by
2^4 pixels that together are 88 nats worse than certain."""


def binary_log_prob(likelihood: Bernoulli, data: Tensor) -> Tensor:
    """Return log p(x | z) in nats, shape (n, k).

    Args:
        likelihood: At k latents of each row: logits of shape (n, k, *data_shape).
        data: Zeros and ones, shape (n, *data_shape). Grey values are not refused, and give nonsense.

    Example:
        >>> binary_log_prob(Bernoulli(torch.zeros(1, 2, 3)), torch.ones(1, 3))
        tensor([[-2.0794, -2.0794]])
    """
    signs = (1 - 2 * data).flatten(start_dim=1).unsqueeze(1)
    odds = (likelihood.logits.flatten(start_dim=2) * signs).exp_()
    log_prob = log_prob_of_odds(odds)
    if bool(log_prob.isfinite().all()):
        return log_prob
    # Absurdly bad reconstructions: the exponential has overflowed.
    return likelihood.log_prob(data.unsqueeze(1))


def log_prob_of_odds(odds: Tensor) -> Tensor:
    """Return minus the sum of log(1 + odds) over the last dimension; infinite where sixteen odds overflow.

    Args:
        odds: Of the values that were not observed, shape (..., num_pixels); overwritten.
    """
    for _ in range(_NUM_JOINS):
        odds = _joined(odds)
    return odds.log1p_().sum(dim=-1).neg_()


def _joined(odds: Tensor) -> Tensor:
    """Return half as many odds with the same product of 1 + odds; a last one without partner is kept."""
    half, rest = divmod(odds.shape[-1], 2)
    first, second = odds[..., :half], odds[..., half : 2 * half]
    pairs = torch.addcmul(first, first, second).add_(second)
    return torch.cat((pairs, odds[..., -1:]), dim=-1) if rest else pairs
