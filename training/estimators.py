r"""Monte Carlo estimates of E_q[f(z)] and of lower bounds whose autograd gradient is the estimator of that name.

Every function returns a *surrogate*, one value per row: its value is the Monte Carlo estimate itself (nats where f
is a log probability), and its gradient is the gradient estimate, both for the parameters of q and for those that f
holds. All take the same noise, so that they can be compared on common noise.

====================== ============================================================== ====================
estimator              gradient for the parameters phi of q                           needs
====================== ============================================================== ====================
score function         mean of (f(z) - b) grad log q(z)                               values of f, log q
reparametrised         mean of grad f(z(phi, noise))                                  f and z differentiable
sticking the landing   the path part of grad (log p(x, z) - log q(z))                 the same
doubly reparametrised  sum of w^2 times that path part, w the normalised weights      the same
====================== ============================================================== ====================

Shapes: parameters of q (..., dim), noise and latents (..., num_samples, dim), f of latents (..., num_samples).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from training import gaussians

Function = Callable[[Tensor], Tensor]
"""f: latents (..., num_samples, dim) to values (..., num_samples), each sample for itself."""

Baseline = Callable[[Tensor], Tensor | float]
"""b: values of f, shape (..., num_samples), to what is subtracted from them; broadcast.

Unbiased as long as the baseline of a sample does not depend on that sample.
"""

_MIN_LEAVE_ONE_OUT_SAMPLES: Final = 2


class NotReparametrisable(TypeError):
    """The pathwise gradient was asked for a distribution whose samples are not differentiable."""

    def __init__(self, latents: object) -> None:
        super().__init__(
            f"{type(latents).__name__} is discrete: its samples jump and have no gradient; use score_function"
        )


class Latents(Protocol):
    """A distribution q(z) whose samples are a function of noise."""

    def sample(self, noise: Tensor) -> Tensor:
        """Return latents through which no gradient flows."""
        ...

    def log_prob(self, latents: Tensor) -> Tensor:
        """Return log q(z) in nats, shape (..., num_samples)."""
        ...


@dataclass(frozen=True)
class GaussianLatents:
    """Independent N(mean, exp(log_var)); its noise is standard normal.

    Args:
        mean: Shape (..., dim).
        log_var: Logarithm of the variance, same shape.
    """

    mean: Tensor
    log_var: Tensor

    def rsample(self, noise: Tensor) -> Tensor:
        """Return latents that are differentiable in both parameters."""
        return gaussians.rsample(self.mean.unsqueeze(-2), self.log_var.unsqueeze(-2), noise)

    def sample(self, noise: Tensor) -> Tensor:
        """Return the same latents as constants."""
        return self.rsample(noise).detach()

    def log_prob(self, latents: Tensor) -> Tensor:
        """Return the log density in nats."""
        return gaussians.log_prob(latents, self.mean.unsqueeze(-2), self.log_var.unsqueeze(-2))

    def entropy(self) -> Tensor:
        """Return the entropy in nats, shape (...)."""
        return gaussians.entropy(self.log_var)

    def detach(self) -> "GaussianLatents":
        """Return the same distribution with constant parameters."""
        return GaussianLatents(self.mean.detach(), self.log_var.detach())


@dataclass(frozen=True)
class BernoulliLatents:
    """Independent zeros and ones; the noise is uniform on [0, 1).

    Args:
        logits: Log odds of a one, shape (..., dim).
    """

    logits: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """Return zeros and ones."""
        return (noise < torch.sigmoid(self.logits.unsqueeze(-2))).to(self.logits.dtype)

    def log_prob(self, latents: Tensor) -> Tensor:
        """Return the log probability in nats."""
        logits = self.logits.unsqueeze(-2)
        return (latents * logits - functional.softplus(logits)).sum(dim=-1)

    def entropy(self) -> Tensor:
        """Return the entropy in nats, shape (...)."""
        return (functional.softplus(self.logits) - self.logits * torch.sigmoid(self.logits)).sum(dim=-1)


@dataclass(frozen=True)
class CategoricalLatent:
    """One state of several, as a one-hot vector; the noise is uniform on [0, 1), shape (..., num_samples, 1).

    Args:
        logits: Unnormalised log probabilities, shape (..., num_states).
    """

    logits: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """Return one-hot vectors, shape (..., num_samples, num_states), by inversion of the distribution."""
        ends = self.logits.softmax(dim=-1).cumsum(dim=-1)
        # The last end is one up to rounding; noise above it must still be the last state.
        states = (noise >= ends[..., :-1].unsqueeze(-2)).sum(dim=-1)
        return functional.one_hot(states, self.logits.shape[-1]).to(self.logits.dtype)

    def log_prob(self, latents: Tensor) -> Tensor:
        """Return the log probability in nats."""
        return (latents * self.logits.log_softmax(dim=-1).unsqueeze(-2)).sum(dim=-1)


def no_baseline(values: Tensor) -> float:  # noqa: ARG001  the signature is that of a baseline
    """Return zero."""
    return 0.0


def constant(value: Tensor | float) -> Baseline:
    """Return a baseline that is known beforehand, for instance E_q[f] (the mean baseline); broadcast to values."""
    return lambda _: value


def leave_one_out(values: Tensor) -> Tensor:
    r"""Return for each sample the mean of f over the other samples.

    .. math:: b_m = \frac{1}{M - 1} \sum_{l \ne m} f(z_l)

    Raises:
        ValueError: If there is a single sample, so that none is left.

    References:
        Kool, van Hoof and Welling, Buy 4 REINFORCE Samples, Get a Baseline for Free, 2019.

    Example:
        >>> leave_one_out(torch.tensor([[1.0, 3.0, 8.0]]))
        tensor([[5.5000, 4.5000, 2.0000]])
    """
    num_samples = values.shape[-1]
    if num_samples < _MIN_LEAVE_ONE_OUT_SAMPLES:
        raise ValueError("leave-one-out needs at least two samples; give noise for more, or use another baseline")
    return (values.sum(dim=-1, keepdim=True) - values) / (num_samples - 1)


class RunningMean:
    """The mean baseline of a training loop: an average of f over earlier calls, independent of today's samples.

    Args:
        decay: Weight of the past at each call, in [0, 1).
    """

    def __init__(self, decay: float = 0.9) -> None:
        self._decay, self._mean = decay, 0.0
        self._past_weight = 0.0

    def __call__(self, values: Tensor) -> float:
        """Return the mean of the calls before this one, zero at first, and then take in this one."""
        # Divided by the weight of what was seen, as in Adam: a young mean is not drawn towards zero.
        before = self._mean / self._past_weight if self._past_weight else 0.0
        self._mean = self._decay * self._mean + (1 - self._decay) * float(values.detach().mean())
        self._past_weight = self._decay * self._past_weight + 1 - self._decay
        return before


def score_function(
    function: Function, latents: Latents, noise: Tensor, *, baseline: Baseline = no_baseline
) -> Tensor:
    r"""Return the surrogate of the score-function (REINFORCE, policy-gradient) estimator, shape (...).

    .. math:: \nabla_\phi E_q[f(z)] \approx \frac1M \sum_m (f(z_m) - b_m) \nabla_\phi \log q_\phi(z_m)

    Works for discrete and continuous latents; z is a constant, f may be a black box. Parameters of f get the plain
    gradient of the mean of f.

    References:
        Williams, Simple statistical gradient-following algorithms, 1992. https://doi.org/10.1007/BF00992696
    """
    samples = latents.sample(noise)
    values = function(samples)
    log_prob = latents.log_prob(samples)
    weights = (values - baseline(values)).detach()
    # The second term is zero in value and carries the score alone in its gradient.
    return (values + weights * (log_prob - log_prob.detach())).mean(dim=-1)


def reparametrised(function: Function, latents: Latents, noise: Tensor) -> Tensor:
    r"""Return the surrogate of the pathwise estimator, shape (...).

    .. math:: \nabla_\phi E_q[f(z)] \approx \frac1M \sum_m \nabla_\phi f(\mu_\phi + \sigma_\phi \epsilon_m)

    Raises:
        NotReparametrisable: If the latents are discrete.

    References:
        Kingma and Welling, Auto-Encoding Variational Bayes, 2014, section 2.4. https://arxiv.org/abs/1312.6114
    """
    if not isinstance(latents, GaussianLatents):
        raise NotReparametrisable(latents)
    return function(latents.rsample(noise)).mean(dim=-1)


def score_function_elbo(
    log_joint: Function, latents: Latents, noise: Tensor, *, baseline: Baseline = no_baseline
) -> Tensor:
    """Return the ELBO estimated by the score function of log p(x, z) - log q(z).

    The gradient of the second term under the expectation has mean zero and is left out.
    """
    return score_function(
        lambda samples: log_joint(samples) - latents.log_prob(samples).detach(), latents, noise, baseline=baseline
    )


def entropy_elbo(log_joint: Function, latents: GaussianLatents, noise: Tensor) -> Tensor:
    """Return the ELBO in the form reparametrised expected log joint + closed-form entropy."""
    return reparametrised(log_joint, latents, noise) + latents.entropy()


def total_derivative(log_joint: Function, latents: GaussianLatents, noise: Tensor) -> Tensor:
    """Return the mean of log p(x, z) - log q(z), differentiated along the path and through q's parameters."""
    return _log_weights(log_joint, latents, latents, noise).mean(dim=-1)


def sticking_the_landing(log_joint: Function, latents: GaussianLatents, noise: Tensor) -> Tensor:
    r"""Return the ELBO whose gradient is taken along the path only, shape (...).

    .. math:: \nabla_\phi \approx \frac1M \sum_m \nabla_z \left( \log p(x, z) - \log q_{\bar\phi}(z) \right)
        \nabla_\phi z_m, \qquad \bar\phi \text{ constant}

    Unbiased; every single sample gives zero where q is the exact posterior.

    References:
        Roeder, Wu and Duvenaud, Sticking the Landing, 2017. https://arxiv.org/abs/1703.09194
    """
    return _log_weights(log_joint, latents, latents.detach(), noise).mean(dim=-1)


def importance_weighted(log_joint: Function, latents: GaussianLatents, noise: Tensor) -> Tensor:
    r"""Return the importance-weighted bound of each row with its plain reparametrised gradient.

    .. math:: L_k = \log \frac1k \sum_{j=1}^k \frac{p(x, z_j)}{q(z_j)}

    References:
        Burda, Grosse and Salakhutdinov, Importance Weighted Autoencoders, 2016. https://arxiv.org/abs/1509.00519
    """
    return _log_mean_exp(_log_weights(log_joint, latents, latents, noise))


def importance_weighted_sticking(log_joint: Function, latents: GaussianLatents, noise: Tensor) -> Tensor:
    """Return the importance-weighted bound, differentiated along the path only: *biased* for more than one sample.

    Kept for comparison; the score term that it drops does not have mean zero under normalised weights.

    References:
        Tucker et al., Doubly Reparameterized Gradient Estimators, 2018. https://arxiv.org/abs/1810.04152
    """
    return _log_mean_exp(_log_weights(log_joint, latents, latents.detach(), noise))


def doubly_reparametrised(log_joint: Function, latents: GaussianLatents, noise: Tensor) -> Tensor:
    r"""Return the importance-weighted bound with the doubly reparametrised gradient (DReG), shape (...).

    .. math:: \nabla_\phi L_k \approx \sum_j w_j^2 \nabla_z \left( \log p(x, z_j) - \log q_{\bar\phi}(z_j) \right)
        \nabla_\phi z_j, \qquad w_j = \frac{p(x, z_j) / q(z_j)}{\sum_l p(x, z_l) / q(z_l)}

    Unbiased; parameters of log p(x, z) get the plain gradient of the bound; one sample is sticking the landing.

    References:
        Tucker et al., Doubly Reparameterized Gradient Estimators, 2018. https://arxiv.org/abs/1810.04152
    """
    samples = latents.rsample(noise)
    log_weights = log_joint(samples) - latents.detach().log_prob(samples)
    if samples.requires_grad:
        # The bound's own derivative brings the first factor w_j, for every parameter; the second one belongs to
        # the path to phi alone, so it is put where only that path comes by.
        normalised = log_weights.detach().softmax(dim=-1).unsqueeze(-1)
        samples.register_hook(lambda gradient: gradient * normalised)  # type: ignore[no-untyped-call]
    return _log_mean_exp(log_weights)


def _log_weights(log_joint: Function, latents: GaussianLatents, density: GaussianLatents, noise: Tensor) -> Tensor:
    samples = latents.rsample(noise)
    return log_joint(samples) - density.log_prob(samples)


def _log_mean_exp(log_weights: Tensor) -> Tensor:
    return torch.logsumexp(log_weights, dim=-1) - math.log(log_weights.shape[-1])
