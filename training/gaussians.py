r"""Diagonal Gaussians N(mean, exp(log_var)): sampling, density, entropy, divergences. All in nats.

The last dimension of every tensor is the latent dimension; it is summed over.
"""

import math
from typing import Final

import torch
from torch import Tensor

_LOG_TWO_PI: Final = math.log(2 * math.pi)


def rsample(mean: Tensor, log_var: Tensor, noise: Tensor) -> Tensor:
    r"""Return latents that are differentiable in both parameters.

    .. math:: z = \mu + \sigma \epsilon, \quad \epsilon \sim N(0, I)

    Args:
        mean: Shape (..., latent_dim).
        log_var: Logarithm of the variance, same shape.
        noise: Standard normal values; shapes are broadcast.

    References:
        Kingma and Welling, Auto-Encoding Variational Bayes, 2014, section 2.4. https://arxiv.org/abs/1312.6114

    Example:
        >>> rsample(torch.ones(1, 2), torch.zeros(1, 2), torch.tensor([[-1.0, 2.0]]))
        tensor([[0., 3.]])
    """
    return mean + (0.5 * log_var).exp() * noise


def log_prob(latents: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
    r"""Return the log density of N(mean, exp(log_var)).

    .. math:: -\tfrac12 \sum_j \left( (z_j - \mu_j)^2 / \sigma_j^2 + \log \sigma_j^2 + \log 2\pi \right)

    Args:
        latents: Where to evaluate, shape (..., latent_dim).
        mean: Shapes are broadcast.
        log_var: Logarithm of the variance.

    Returns:
        One value per row, shape (...).

    Example:
        >>> log_prob(torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1, 1))
        tensor([-0.9189])
    """
    squares = (latents - mean).square() * (-log_var).exp()
    return -0.5 * (squares + log_var + _LOG_TWO_PI).sum(dim=-1)


def standard_normal_log_prob(latents: Tensor) -> Tensor:
    """Return the log density of N(0, I), one value per row."""
    return -0.5 * (latents.square() + _LOG_TWO_PI).sum(dim=-1)


def expected_standard_normal_log_prob(mean: Tensor, log_var: Tensor) -> Tensor:
    r"""Return the expected log density of the standard normal prior under N(mean, exp(log_var)).

    .. math:: E_q[\log p(z)] = -\tfrac12 \sum_j (\mu_j^2 + \sigma_j^2) - \tfrac{d}{2} \log 2\pi

    Its gradient is (-mean, -scale) with respect to (mean, scale).
    """
    return -0.5 * (mean.square() + log_var.exp() + _LOG_TWO_PI).sum(dim=-1)


def entropy(log_var: Tensor) -> Tensor:
    r"""Return the differential entropy.

    .. math:: \sum_j \log \sigma_j + \tfrac{d}{2} \log 2 \pi e

    Example:
        >>> entropy(torch.tensor([[0.25]]).log())
        tensor([0.7258])
    """
    return 0.5 * (log_var + _LOG_TWO_PI + 1).sum(dim=-1)


def kl_to_standard_normal(mean: Tensor, log_var: Tensor) -> Tensor:
    r"""Return the KL divergence from N(mean, exp(log_var)) to N(0, I).

    .. math:: \tfrac12 \sum_j (\mu_j^2 + \sigma_j^2 - \log \sigma_j^2 - 1)

    Args:
        mean: Posterior mean, shape (..., latent_dim).
        log_var: Logarithm of the posterior variance, same shape.

    Returns:
        One value per row, shape (...); zero only at the prior.

    References:
        Kingma and Welling, Auto-Encoding Variational Bayes, 2014, appendix B. https://arxiv.org/abs/1312.6114

    Example:
        >>> kl_to_standard_normal(torch.ones(1, 1), torch.tensor([[0.25]]).log())
        tensor([0.8181])
    """
    # expm1 keeps the digits that exp(x) - 1 loses near the prior, where the KL of an unused dimension lies.
    return 0.5 * (mean.square() + torch.expm1(log_var) - log_var).sum(dim=-1)


def kl(mean: Tensor, log_var: Tensor, other_mean: Tensor, other_log_var: Tensor) -> Tensor:
    r"""Return the KL divergence from the first Gaussian to the second.

    .. math:: \tfrac12 \sum_j \left( \frac{\sigma_{1j}^2 + (\mu_{1j} - \mu_{2j})^2}{\sigma_{2j}^2}
        - 1 + \log \frac{\sigma_{2j}^2}{\sigma_{1j}^2} \right)

    Example:
        >>> zero, one = torch.zeros(1, 1), torch.ones(1, 1)
        >>> kl(zero, zero, one, torch.tensor([[0.25]]).log())
        tensor([2.8069])
    """
    log_ratio = log_var - other_log_var
    squares = (mean - other_mean).square() * (-other_log_var).exp()
    return 0.5 * (torch.expm1(log_ratio) - log_ratio + squares).sum(dim=-1)
