r"""Lower bounds of log p(x): the ELBO in both forms and the importance-weighted bound. All in nats.

.. math:: \log p(x) \ge E_q[\log p(x, z)] + H(q) = E_q[\log p(x \mid z)] - KL(q \,\|\, p(z))

What the bound misses is KL(q || p(z | x)): no more, no less.

.. math:: \log p(x) = ELBO(q) + KL(q \,\|\, p(z \mid x))
"""

import math
from collections.abc import Callable
from typing import Final, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from training import estimators, gaussians
from training.estimators import Baseline, Function, GaussianLatents

Gradient = Literal["plain", "sticking-the-landing", "doubly-reparametrised"]
"""How the importance-weighted bound is differentiated with respect to q; its value is the same."""

_NUM_DIMS_WITH_SAMPLES: Final = 3

_IMPORTANCE_WEIGHTED: Final[dict[Gradient, Callable[[Function, GaussianLatents, Tensor], Tensor]]] = {
    "plain": estimators.importance_weighted,
    "sticking-the-landing": estimators.importance_weighted_sticking,
    "doubly-reparametrised": estimators.doubly_reparametrised,
}


class Likelihood(Protocol):
    """p(x | z) at given latents."""

    def log_prob(self, data: Tensor) -> Tensor:
        """Return log p(x | z) in nats; the shapes of data and latents are broadcast."""
        ...


class Decoding(Protocol):
    """A model p(z) p(x | z) with the prior N(0, I)."""

    def likelihood(self, latents: Tensor) -> Likelihood:
        """Return p(x | z) for latents of shape (..., latent_dim)."""
        ...


class AmortisedModel(Decoding, Protocol):
    """The same with an encoder, such as `training.models.vae.VAE`."""

    def posterior(self, data: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log variance of q(z | x), both of shape (batch, latent_dim)."""
        ...


class Elbo(NamedTuple):
    """The two terms of the bound, one value per row of data."""

    log_likelihood: Tensor
    kl: Tensor

    @property
    def value(self) -> Tensor:
        """The bound: log_likelihood - kl."""
        return self.log_likelihood - self.kl


def elbo(vae: AmortisedModel, data: Tensor, noise: Tensor) -> Elbo:
    r"""Return the bound in the form likelihood - KL, with reparametrised samples and the closed-form KL.

    .. math:: \frac1M \sum_m \log p(x \mid \mu + \sigma \epsilon_m) - KL(q(z \mid x) \,\|\, p(z))

    Args:
        vae: The model.
        data: Shape (batch, *data_shape); zeros and ones for a Bernoulli likelihood.
        noise: Standard normal, shape (batch, latent_dim), or (batch, M, latent_dim) for M samples of each row.

    References:
        Kingma and Welling, Auto-Encoding Variational Bayes, 2014, equation 10. https://arxiv.org/abs/1312.6114
    """
    mean, log_var = vae.posterior(data)
    return elbo_of_posterior(vae, data, mean, log_var, noise)


def elbo_of_posterior(vae: Decoding, data: Tensor, mean: Tensor, log_var: Tensor, noise: Tensor) -> Elbo:
    """Return the bound of q = N(mean, exp(log_var)), wherever q comes from; arguments as for `elbo`."""
    return Elbo(
        log_likelihood=_expected_log_likelihood(vae, data, mean, log_var, noise),
        kl=gaussians.kl_to_standard_normal(mean, log_var),
    )


def elbo_joint_form(vae: AmortisedModel, data: Tensor, noise: Tensor) -> Tensor:
    """Return the same bound in the form expected log joint + entropy, one value per row.

    The expectation of log p(z) and the entropy are taken in closed form, so that with common noise both forms
    agree up to rounding. Arguments as for `elbo`.
    """
    mean, log_var = vae.posterior(data)
    log_likelihood = _expected_log_likelihood(vae, data, mean, log_var, noise)
    log_joint = log_likelihood + gaussians.expected_standard_normal_log_prob(mean, log_var)
    return log_joint + gaussians.entropy(log_var)


def elbo_by_score_function(
    vae: AmortisedModel, data: Tensor, noise: Tensor, *, baseline: Baseline = estimators.no_baseline
) -> Tensor:
    """Return the bound of each row with the score-function gradient for the encoder; noisy, for comparison.

    Args:
        vae: The model; its decoder gets the plain gradient.
        data: Shape (batch, *data_shape).
        noise: Standard normal, shape (batch, M, latent_dim).
        baseline: What is subtracted from log p(x, z), see `training.estimators`.
    """
    latents = GaussianLatents(*vae.posterior(data))
    surrogate = estimators.score_function(log_joint(vae, data), latents, noise, baseline=baseline)
    return surrogate + latents.entropy()


def importance_weighted_elbo(
    vae: AmortisedModel, data: Tensor, noise: Tensor, *, gradient: Gradient = "plain"
) -> Tensor:
    """Return the importance-weighted bound of each row as a training objective, shape (batch,).

    Args:
        vae: The model.
        data: Shape (batch, *data_shape).
        noise: Standard normal, shape (batch, k, latent_dim).
        gradient: Of the encoder: plain; sticking the landing (biased for k > 1); doubly reparametrised (unbiased,
            and its signal does not drown as k grows). The decoder's is the same for all.
    """
    return _IMPORTANCE_WEIGHTED[gradient](log_joint(vae, data), GaussianLatents(*vae.posterior(data)), noise)


def log_joint(vae: Decoding, data: Tensor) -> Function:
    """Return the function from latents (batch, num_samples, latent_dim) to log p(x, z), (batch, num_samples)."""

    def of_latents(latents: Tensor) -> Tensor:
        log_likelihood = vae.likelihood(latents).log_prob(data.unsqueeze(1))
        return log_likelihood + gaussians.standard_normal_log_prob(latents)

    return of_latents


def kl_weight(step: int, *, num_warm_up_steps: int, beta: float = 1.0) -> float:
    r"""Return the weight of the KL term at a step: a line to beta over the warm-up, then constant.

    .. math:: \beta \min(1, (t + 1) / T)

    Args:
        step: t, from 0.
        num_warm_up_steps: T; 0 for none.
        beta: Final weight; any other than 1 trains another objective than the ELBO.

    References:
        Bowman et al., Generating Sentences from a Continuous Space, 2016. https://arxiv.org/abs/1511.06349
        Higgins et al., beta-VAE, 2017. https://openreview.net/forum?id=Sy2fzU9gl

    Example:
        >>> [kl_weight(step, num_warm_up_steps=4) for step in (0, 1, 3, 9)]
        [0.25, 0.5, 1.0, 1.0]
    """
    return beta * min(1.0, (step + 1) / max(1, num_warm_up_steps))


def free_bits_kl(
    mean: Tensor,
    log_var: Tensor,
    free_nats: float,
    *,
    joined_mean: Callable[[Tensor], Tensor] = lambda mean_of_rows: mean_of_rows,
) -> Tensor:
    r"""Return the KL term that leaves every latent dimension some information for free; a scalar.

    .. math:: \sum_j \max\left( \lambda, \frac1B \sum_i KL(q(z_j \mid x_i) \,\|\, p(z_j)) \right)

    Below lambda a dimension has no KL gradient, so that it is not switched off early in training.

    Args:
        mean: Of q, shape (batch, latent_dim).
        log_var: Logarithm of the variance, same shape.
        free_nats: lambda in nats per dimension, >= 0; 0 gives the mean KL.
        joined_mean: Where several processes share a batch: turns the mean over one's own rows, without gradient,
            into that over all. The gradients of the processes then average to that of the joined batch.

    Raises:
        ValueError: If lambda is negative.

    References:
        Kingma et al., Improving Variational Inference with Inverse Autoregressive Flow, 2016, appendix C.8.
        https://arxiv.org/abs/1606.04934
    """
    if free_nats < 0:
        raise ValueError(f"free_nats must be at least 0, got {free_nats}")
    # The divergence sums over the last dimension; one more makes each latent dimension a row of its own.
    per_dim = gaussians.kl_to_standard_normal(mean.unsqueeze(-1), log_var.unsqueeze(-1)).mean(dim=0)
    is_charged = joined_mean(per_dim.detach()) >= free_nats
    return torch.where(is_charged, per_dim, free_nats).sum()


def training_objective(
    vae: AmortisedModel, data: Tensor, noise: Tensor, *, kl_weight: float = 1.0, free_nats: float = 0.0
) -> Tensor:
    """Return what training maximises, a mean over the batch; with the default weights exactly the mean ELBO.

    Args:
        vae: The model.
        data: Shape (batch, *data_shape).
        noise: Standard normal, shape (batch, latent_dim) or (batch, M, latent_dim).
        kl_weight: Weight of the KL term, see the function `kl_weight`.
        free_nats: Nats of KL that every latent dimension has for free, see `free_bits_kl`.
    """
    mean, log_var = vae.posterior(data)
    bound = elbo_of_posterior(vae, data, mean, log_var, noise)
    return weighted_bound(bound, mean, log_var, kl_weight=kl_weight, free_nats=free_nats)


def weighted_bound(
    bound: Elbo,
    mean: Tensor,
    log_var: Tensor,
    *,
    kl_weight: float | Tensor = 1.0,
    free_nats: float = 0.0,
    joined_mean: Callable[[Tensor], Tensor] = lambda mean_of_rows: mean_of_rows,
) -> Tensor:
    """Return what is maximised of a bound whose terms are recorded too; arguments as for `training_objective`.

    `joined_mean` is that of `free_bits_kl`.
    """
    charged = free_bits_kl(mean, log_var, free_nats, joined_mean=joined_mean) if free_nats else bound.kl.mean()
    return bound.log_likelihood.mean() - kl_weight * charged


class InferenceGap(NamedTuple):
    r"""What the amortised bound misses of log p(x), in two parts, one value per row; both >= 0 in expectation.

    .. math:: \log p(x) - L(q_\phi) = [\log p(x) - L(q^*)] + [L(q^*) - L(q_\phi)]

    References:
        Cremer, Li and Duvenaud, Inference Suboptimality in Variational Autoencoders, 2018.
        https://arxiv.org/abs/1801.03558
    """

    approximation: Tensor
    """What no member of q's family can reach."""

    amortisation: Tensor
    """What the encoder misses of the best member."""

    @property
    def total(self) -> Tensor:
        """The whole gap, KL(q, posterior)."""
        return self.approximation + self.amortisation


def inference_gap(log_evidence: Tensor, refined_elbo: Tensor, amortised_elbo: Tensor) -> InferenceGap:
    """Return the gap in two parts.

    Args:
        log_evidence: log p(x), or the best lower bound of it that there is (the gap is then a lower bound too).
        refined_elbo: Bound of the best q in the family, see `training.per_datapoint.refine`.
        amortised_elbo: Bound of the encoder's q.
    """
    return InferenceGap(approximation=log_evidence - refined_elbo, amortisation=refined_elbo - amortised_elbo)


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


def _expected_log_likelihood(vae: Decoding, data: Tensor, mean: Tensor, log_var: Tensor, noise: Tensor) -> Tensor:
    """Return the mean of log p(x | z) over the samples of each row, shape (batch,)."""
    if noise.dim() < _NUM_DIMS_WITH_SAMPLES:
        return vae.likelihood(gaussians.rsample(mean, log_var, noise)).log_prob(data)
    latents = GaussianLatents(mean, log_var).rsample(noise)
    return vae.likelihood(latents).log_prob(data.unsqueeze(1)).mean(dim=1)
