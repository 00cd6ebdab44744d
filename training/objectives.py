r"""Lower bounds of log p(x): the ELBO in both forms and the importance-weighted bound. All in nats.

.. math:: \log p(x) \ge E_q[\log p(x, z)] + H(q) = E_q[\log p(x \mid z)] - KL(q \,\|\, p(z))
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from training import gaussians
from training.models.vae import VAE


class Elbo(NamedTuple):
    """The two terms of the bound, one value per row of data."""

    log_likelihood: Tensor
    kl: Tensor

    @property
    def value(self) -> Tensor:
        """The bound: log_likelihood - kl."""
        return self.log_likelihood - self.kl


def elbo(vae: VAE, data: Tensor, noise: Tensor) -> Elbo:
    """Return the bound in the form likelihood - KL, with one reparametrised sample and the closed-form KL.

    Args:
        vae: The model.
        data: Zeros and ones, shape (batch, *data_shape).
        noise: Standard normal, shape (batch, latent_dim).

    References:
        Kingma and Welling, Auto-Encoding Variational Bayes, 2014, equation 10. https://arxiv.org/abs/1312.6114
    """
    mean, log_var = vae.posterior(data)
    latents = gaussians.rsample(mean, log_var, noise)
    return Elbo(
        log_likelihood=vae.likelihood(latents).log_prob(data),
        kl=gaussians.kl_to_standard_normal(mean, log_var),
    )


def elbo_joint_form(vae: VAE, data: Tensor, noise: Tensor) -> Tensor:
    """Return the same bound in the form expected log joint + entropy, one value per row.

    The expectation of log p(z) and the entropy are taken in closed form, so that with common noise both forms
    agree up to rounding.
    """
    mean, log_var = vae.posterior(data)
    latents = gaussians.rsample(mean, log_var, noise)
    log_joint = vae.likelihood(latents).log_prob(data) + gaussians.expected_standard_normal_log_prob(mean, log_var)
    return log_joint + gaussians.entropy(log_var)


def log_mean_exp(log_weights: Tensor, dim: int = -1) -> Tensor:
    """Return the logarithm of the mean weight along one dimension.

    Example:
        >>> log_mean_exp(torch.tensor([[1.0, 3.0]]).log()).exp()
        tensor([2.])
    """
    return torch.logsumexp(log_weights, dim) - math.log(log_weights.shape[dim])


def importance_weighted_bound(log_weights: Tensor) -> Tensor:
    r"""Return the importance-weighted bound of each row; k = 1 gives the ELBO, k to infinity log p(x).

    .. math:: L_k = \log \frac1k \sum_{j=1}^k \frac{p(x, z_j)}{q(z_j \mid x)}

    Args:
        log_weights: log p(x, z_j) - log q(z_j | x), shape (batch, k).

    References:
        Burda, Grosse and Salakhutdinov, Importance Weighted Autoencoders, 2016. https://arxiv.org/abs/1509.00519
    """
    return log_mean_exp(log_weights)
