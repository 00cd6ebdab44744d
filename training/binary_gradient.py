r"""log p(x | z) of binary data with its gradient, in two thirds of the time of the general form; for CPUs.

.. math:: \log p(x \mid z) = -\sum_j \log(1 + e^{(1 - 2 x_j) l_j}), \qquad
    \frac{\partial}{\partial l_j} = x_j - \sigma(l_j)

The gradient needs no intermediate of the value, so none is kept; the value needs one logarithm for sixteen pixels,
see `training.binary_log_prob`, which is for many latents of each row and has no gradient.
"""

from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

_NUM_JOINS: Final = 4
"""Sixteen pixels share a logarithm. Their product is infinite only where together they are 88 nats worse than
certain; the value is then computed pixel by pixel."""


def log_prob(logits: Tensor, data: Tensor) -> Tensor:
    """Return log p(x | z) in nats, shape (...); only the logits have a gradient.

    Args:
        logits: Log odds of a one, shape (..., num_pixels).
        data: Zeros and ones, of the same shape or broadcast to it. Grey values are not refused, and give nonsense.

    Example:
        >>> log_prob(torch.zeros(1, 3), torch.ones(1, 3))
        tensor([-2.0794])
    """
    found: Tensor = _LogProb.apply(logits, data)  # type: ignore[no-untyped-call]
    return found


class _LogProb(torch.autograd.Function):
    """The value and its derivative."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, data: Tensor) -> Tensor:  # noqa: ANN401  # PyTorch's own context
        ctx.save_for_backward(logits, data)
        odds = torch.addcmul(logits, data, logits, value=-2).exp_()
        for _ in range(_NUM_JOINS):
            odds = _joined(odds)
        value = odds.log1p_().sum(dim=-1).neg_()
        if bool(value.isfinite().all()):
            return value
        return (data * logits - functional.softplus(logits)).sum(dim=-1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401  # PyTorch's own context
        logits, data = ctx.saved_tensors
        (gradient,) = gradients
        return torch.sub(data, torch.sigmoid(logits)).mul_(gradient.unsqueeze(-1)), None


def _joined(odds: Tensor) -> Tensor:
    """Return half as many odds with the same product of 1 + odds; a last one without partner is kept."""
    half, rest = divmod(odds.shape[-1], 2)
    first, second = odds[..., :half], odds[..., half : 2 * half]
    pairs = torch.addcmul(first, first, second).add_(second)
    return torch.cat((pairs, odds[..., -1:]), dim=-1) if rest else pairs
