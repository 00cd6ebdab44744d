r"""log p(x | z) of binary data with its gradient, in two thirds of the time of the general form; for CPUs.

.. math:: \log p(x \mid z) = -\sum_j \log(1 + e^{(1 - 2 x_j) l_j}), \qquad
    \frac{\partial}{\partial l_j} = x_j - \sigma(l_j)

The gradient needs no intermediate of the value, so none is kept; the value needs one logarithm for sixteen pixels,
see `training.binary_log_prob`, which is for many latents of each row and has no gradient.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from training.binary_log_prob import log_prob_of_odds


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
        value = log_prob_of_odds(odds)
        if bool(value.isfinite().all()):
            return value
        return (data * logits - functional.softplus(logits)).sum(dim=-1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401  # PyTorch's own context
        logits, data = ctx.saved_tensors
        (gradient,) = gradients
        return torch.sub(data, torch.sigmoid(logits)).mul_(gradient.unsqueeze(-1)), None
