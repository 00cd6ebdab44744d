r"""Annealed importance sampling: log p(x) of a decoder with prior N(0, I), without trusting an encoder.

A chain starts at the prior and walks through intermediate densities to the posterior,

.. math:: \pi_t(z) \propto p(z) \, p(x \mid z)^{\beta_t}, \qquad 0 = \beta_0 < \dots < \beta_T = 1,

.. math:: \log w = \sum_{t=1}^{T} (\beta_t - \beta_{t-1}) \log p(x \mid z_{t-1}), \qquad E[w] = p(x),

with a Hamiltonian transition that leaves pi_t alone between two summands. The mean weight is unbiased for any
number of temperatures and any step sizes that are fixed beforehand, so its logarithm is below log p(x) on average.
A chain that starts at an exact posterior sample (data simulated by the model) and walks back gives an upper bound.

References:
    Neal, Annealed Importance Sampling, 2001. https://arxiv.org/abs/physics/9803008
    Wu, Burda, Salakhutdinov and Grosse, On the Quantitative Analysis of Decoder-Based Generative Models, 2017.
    https://arxiv.org/abs/1611.04273
    Grosse, Ghahramani and Adams, Sandwiching the marginal likelihood using bidirectional Monte Carlo, 2015.
    https://arxiv.org/abs/1511.02543
"""

import math
from collections.abc import Callable
from typing import Final, NamedTuple

import torch
from torch import Tensor

from training import gaussians, objectives
from training.objectives import Decoding

_LogLikelihood = Callable[[Tensor], Tensor]

_ACCEPTANCE_AIM: Final = 0.65
"""Neal, MCMC using Hamiltonian dynamics, 2011, section 4.4: the share of accepted moves at the best step size."""

_ADAPTATION: Final = 1.1
"""Factor by which a pilot chain lengthens its step after more accepted moves than the aim, or shortens it."""


class Annealing(NamedTuple):
    """How the chains walk."""

    num_temperatures: int = 500
    """T: intermediate densities after the prior; the bias of the logarithm falls as 1/T."""
    num_leapfrog_steps: int = 5
    """Gradients of log p(x | z) per transition, less one."""
    step_size: float = 0.1
    """Leapfrog step in units of the prior's deviation; where a pilot run begins, else of all transitions."""
    has_pilot: bool = True
    """Whether chains with noise of their own find the step sizes first. They are then fixed, which keeps the mean
    weight unbiased; sizes adapted on the run would not."""


class AnnealedEstimate(NamedTuple):
    """Chains of every row; nats where it is logarithms."""

    log_weights: Tensor
    """Shape (batch, num_chains)."""
    acceptance: Tensor
    """Share of accepted moves of each row, shape (batch,)."""
    step_sizes: Tensor
    """Of each transition and row, shape (num_temperatures, batch)."""
    is_reverse: bool = False
    """Whether the chains walked from the posterior to the prior."""

    @property
    def log_evidence(self) -> Tensor:
        """Return the estimate of log p(x), shape (batch,): on average below it, above it for reverse chains."""
        if self.is_reverse:
            return -objectives.log_mean_exp(-self.log_weights)
        return objectives.log_mean_exp(self.log_weights)

    @property
    def standard_error(self) -> Tensor:
        """Return that of each log_evidence by the delta method, shape (batch,): deviation / mean of the weights.

        Reverse chains of a row share their first state, so for them it is too small.
        """
        signed = -self.log_weights if self.is_reverse else self.log_weights
        weights = (signed - signed.amax(dim=1, keepdim=True)).exp()
        return weights.std(dim=1) / weights.mean(dim=1) / math.sqrt(weights.shape[1])

    @property
    def effective_sample_size(self) -> Tensor:
        r"""Return how many equally weighted chains a row's chains are worth, in [1, num_chains], shape (batch,).

        .. math:: \left( \sum_j w_j \right)^2 / \sum_j w_j^2
        """
        signed = -self.log_weights if self.is_reverse else self.log_weights
        return (2 * torch.logsumexp(signed, 1) - torch.logsumexp(2 * signed, 1)).exp()


def sigmoid_schedule(num_temperatures: int, *, steepness: float = 4.0) -> Tensor:
    r"""Return beta_0 = 0 to beta_T = 1, dense at both ends, shape (T + 1,), float64.

    .. math:: \beta_t = \frac{s_t - s_0}{s_T - s_0}, \qquad s_t = \mathrm{sigmoid}(\delta (2t/T - 1))

    Args:
        num_temperatures: T, at least 1.
        steepness: delta.

    Raises:
        ValueError: If there is no temperature.

    Example:
        >>> sigmoid_schedule(2)
        tensor([0.0000, 0.5000, 1.0000], dtype=torch.float64)
    """
    if num_temperatures < 1:
        raise ValueError(f"num_temperatures must be at least 1, got {num_temperatures}")
    raw = torch.sigmoid(steepness * torch.linspace(-1, 1, num_temperatures + 1, dtype=torch.float64))
    return (raw - raw[0]) / (raw[-1] - raw[0])


def estimate(
    model: Decoding,
    data: Tensor,
    *,
    latent_dim: int,
    num_chains: int,
    source: torch.Generator,
    annealing: Annealing | None = None,
) -> AnnealedEstimate:
    """Estimate log p(x) of every row by chains from the prior.

    Args:
        model: p(x | z), with prior N(0, I).
        data: Shape (batch, *data_shape); zeros and ones for a Bernoulli likelihood.
        latent_dim: Dimensions of z.
        num_chains: Chains of each row.
        source: Draws first states, momenta and acceptances, of the pilot run too.
        annealing: How the chains walk.
    """
    annealing = annealing or Annealing()
    shape = (len(data), num_chains, latent_dim)
    sizes = _first_sizes(annealing, data)
    if annealing.has_pilot:
        sizes = _walk(
            model, data, _normal(shape, data, source), sizes, annealing, source, is_pilot=True
        ).step_sizes
    return _walk(model, data, _normal(shape, data, source), sizes, annealing, source)


def reverse_estimate(
    model: Decoding,
    data: Tensor,
    latents: Tensor,
    step_sizes: Tensor,
    *,
    num_chains: int,
    source: torch.Generator,
    annealing: Annealing | None = None,
) -> AnnealedEstimate:
    """Bound log p(x) of simulated data from above, by chains from the latents that made them.

    Args:
        model: p(x | z), with prior N(0, I).
        data: Drawn from p(x | z) at `latents`, shape (batch, *data_shape). On other data the bound does not hold.
        latents: Drawn from the prior, shape (batch, latent_dim); given the data, exact samples of the posterior.
        step_sizes: Of the forward run, shape (num_temperatures, batch).
        num_chains: Chains of each row, all from its latents.
        source: Draws momenta and acceptances.
        annealing: As in the forward run.
    """
    states = latents.unsqueeze(1).expand(-1, num_chains, -1)
    return _walk(model, data, states, step_sizes, annealing or Annealing(), source, is_reverse=True)


def _walk(
    model: Decoding,
    data: Tensor,
    states: Tensor,
    step_sizes: Tensor,
    annealing: Annealing,
    source: torch.Generator,
    *,
    is_pilot: bool = False,
    is_reverse: bool = False,
) -> AnnealedEstimate:
    """Walk all chains through all temperatures.

    Forwards, weight t is taken before the transition at temperature t; the reverse walk reads that backwards.
    """
    betas = sigmoid_schedule(annealing.num_temperatures).tolist()

    def log_likelihood(latents: Tensor) -> Tensor:
        return model.likelihood(latents).log_prob(data.unsqueeze(1))

    num_temperatures = annealing.num_temperatures
    log_weights = torch.zeros(states.shape[:2], dtype=states.dtype, device=states.device)
    accepted = torch.zeros(len(data), dtype=states.dtype, device=states.device)
    used = step_sizes.clone()
    size = step_sizes[0]
    for number in reversed(range(num_temperatures)) if is_reverse else range(num_temperatures):
        increment = betas[number + 1] - betas[number]
        # At beta = 1 the last forward transition would change no weight; it is left out both ways.
        has_move = number + 1 < num_temperatures
        if not is_reverse:
            log_weights += increment * _values(log_likelihood, states)
        if has_move:
            if not is_pilot:
                size = step_sizes[number]
            used[number] = size
            states, is_accepted = _hamiltonian_move(
                log_likelihood, states, betas[number + 1], size[:, None, None], annealing, source
            )
            share = is_accepted.to(states.dtype).mean(dim=1)
            accepted += share
            if is_pilot:
                size = torch.where(share > _ACCEPTANCE_AIM, size * _ADAPTATION, size / _ADAPTATION)
        if is_reverse:
            log_weights += increment * _values(log_likelihood, states)
    return AnnealedEstimate(log_weights, accepted / max(1, num_temperatures - 1), used, is_reverse)


def _hamiltonian_move(
    log_likelihood: _LogLikelihood,
    states: Tensor,
    beta: float,
    size: Tensor,
    annealing: Annealing,
    source: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Return the next states and which chains accepted; leaves p(z) p(x | z)^beta alone.

    Args:
        log_likelihood: Latents (batch, num_chains, dim) to (batch, num_chains).
        states: z, shape (batch, num_chains, dim).
        beta: Inverse temperature, in (0, 1].
        size: Leapfrog step, shape (batch, 1, 1).
        annealing: Number of leapfrog steps.
        source: Draws momenta and acceptances.
    """
    momentum = _normal(tuple(states.shape), states, source)
    log_density, slope = _tempered(log_likelihood, states, beta)
    energy = log_density + gaussians.standard_normal_log_prob(momentum)
    position, momentum = states, momentum + 0.5 * size * slope
    for step in range(annealing.num_leapfrog_steps):
        position = position + size * momentum
        log_density, slope = _tempered(log_likelihood, position, beta)
        is_last = step + 1 == annealing.num_leapfrog_steps
        momentum = momentum + (0.5 if is_last else 1.0) * size * slope
    change = log_density + gaussians.standard_normal_log_prob(momentum) - energy
    uniform = torch.rand(change.shape, generator=source, dtype=change.dtype, device=change.device)
    # A diverged path gives nan here, and nan is not larger than anything: it is refused.
    is_accepted = change > uniform.log()
    return torch.where(is_accepted.unsqueeze(-1), position, states), is_accepted


@torch.enable_grad()
def _tempered(log_likelihood: _LogLikelihood, states: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Return log p(z) + beta log p(x | z) and its gradient in z."""
    states = states.detach().requires_grad_()
    log_density = gaussians.standard_normal_log_prob(states) + beta * log_likelihood(states)
    (slope,) = torch.autograd.grad(log_density.sum(), states)
    return log_density.detach(), slope


@torch.no_grad()
def _values(log_likelihood: _LogLikelihood, states: Tensor) -> Tensor:
    return log_likelihood(states)


def _first_sizes(annealing: Annealing, data: Tensor) -> Tensor:
    shape = (annealing.num_temperatures, len(data))
    return torch.full(shape, annealing.step_size, dtype=data.dtype, device=data.device)


def _normal(shape: tuple[int, ...], like: Tensor, source: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=source, dtype=like.dtype, device=like.device)
