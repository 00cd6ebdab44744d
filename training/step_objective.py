"""What one step climbs, as a module: the scalar whose gradient the settings name, and the terms that are recorded.

A module, for that is what is divided over processes, compiled, or captured as a graph of the device.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from training import binary_gradient, estimators, gaussians, objectives
from training.config import GradientName, OptimizerConfig
from training.estimators import Function, GaussianLatents
from training.likelihoods import Bernoulli, Likelihood
from training.models.vae import VAE

NUM_RECORDED: Final = 3
"""Log-likelihood, KL, and the bound that is climbed without weights on its terms."""

_IMPORTANCE_WEIGHTED: Final[dict[GradientName, Callable[[Function, GaussianLatents, Tensor], Tensor]]] = {
    "reparametrised": estimators.importance_weighted,
    "sticking-the-landing": estimators.importance_weighted_sticking,
    "doubly-reparametrised": estimators.doubly_reparametrised,
}


class _Climbed(NamedTuple):
    """The scalar, and per row what is recorded beside the KL, which has a closed form always."""

    value: Tensor
    log_likelihood: Tensor
    bound: Tensor


def noise_shape(settings: OptimizerConfig, num_rows: int, latent_dim: int) -> tuple[int, ...]:
    """Return the shape of the posterior noise of one step."""
    is_plain = settings.bound == "elbo" and settings.gradient == "reparametrised" and settings.num_samples == 1
    return (num_rows, latent_dim) if is_plain else (num_rows, settings.num_samples, latent_dim)


class StepObjective(nn.Module):
    """The objective of a run, of one batch at a time.

    Args:
        vae: The model whose weights are fitted.
        settings: Which bound and which gradient.
        joined_mean: Turns a mean over this process's rows into that over the rows of all, see
            `objectives.free_bits_kl`.
    """

    def __init__(
        self,
        vae: VAE,
        settings: OptimizerConfig,
        *,
        joined_mean: Callable[[Tensor], Tensor] = lambda mean_of_rows: mean_of_rows,
    ) -> None:
        super().__init__()
        self.vae = vae
        self._settings, self._joined_mean = settings, joined_mean

    def forward(self, data: Tensor, noise: Tensor, kl_weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is climbed, a scalar, and what is recorded, means over the rows, shape (3,), nats.

        Args:
            data: As the likelihood has them, shape (batch, *data_shape).
            noise: Standard normal, of the shape that `noise_shape` gives.
            kl_weight: Weight of the KL term, a tensor without dimensions: a number would be compiled in. The
                importance-weighted bound has none.
        """
        q = GaussianLatents(*self._posterior(data))
        kl = gaussians.kl_to_standard_normal(q.mean, q.log_var)
        climbed = self._climb(data, q, kl, noise, kl_weight)
        recorded = torch.stack((climbed.log_likelihood.mean(), kl.mean(), climbed.bound.mean()))
        return climbed.value, recorded.detach()

    def _climb(self, data: Tensor, q: GaussianLatents, kl: Tensor, noise: Tensor, kl_weight: Tensor) -> _Climbed:
        if self._settings.bound == "importance-weighted":
            return self._importance_weighted(data, q, noise)
        if self._settings.gradient == "reparametrised":
            return self._reparametrised(data, q, kl, noise, kl_weight)
        if self._settings.gradient == "sticking-the-landing":
            value, log_likelihood = self._sticking_the_landing(data, q, noise, kl_weight)
        else:
            value, log_likelihood = self._score_function(data, q, noise, kl_weight)
        return _Climbed(value, log_likelihood, log_likelihood - kl)

    def _reparametrised(
        self, data: Tensor, q: GaussianLatents, kl: Tensor, noise: Tensor, kl_weight: Tensor
    ) -> _Climbed:
        is_plain = noise.dim() == q.mean.dim()
        latents = gaussians.rsample(q.mean, q.log_var, noise) if is_plain else q.rsample(noise)
        log_likelihood = self._log_likelihood(data if is_plain else data.unsqueeze(1), latents)
        if not is_plain:
            log_likelihood = log_likelihood.mean(dim=1)
        bound = objectives.Elbo(log_likelihood, kl)
        value = objectives.weighted_bound(
            bound,
            q.mean,
            q.log_var,
            kl_weight=kl_weight,
            free_nats=self._settings.free_nats,
            joined_mean=self._joined_mean,
        )
        return _Climbed(value, log_likelihood, bound.value)

    def _sticking_the_landing(
        self, data: Tensor, q: GaussianLatents, noise: Tensor, kl_weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return `estimators.sticking_the_landing` with a weight on the KL, which the samples estimate."""
        latents = q.rsample(noise)
        log_likelihood = self._log_likelihood(data.unsqueeze(1), latents)
        divergence = q.detach().log_prob(latents) - gaussians.standard_normal_log_prob(latents)
        return (log_likelihood - kl_weight * divergence).mean(), log_likelihood.mean(dim=1)

    def _score_function(
        self, data: Tensor, q: GaussianLatents, noise: Tensor, kl_weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return `objectives.elbo_by_score_function` with a weight on log p(z) and on the entropy."""
        seen: list[Tensor] = []

        def weighted_log_joint(latents: Tensor) -> Tensor:
            seen.append(self._log_likelihood(data.unsqueeze(1), latents))
            return seen[0] + kl_weight * gaussians.standard_normal_log_prob(latents)

        surrogate = estimators.score_function(weighted_log_joint, q, noise, baseline=self._baseline)
        return (surrogate + kl_weight * q.entropy()).mean(), seen[0].mean(dim=1)

    def _importance_weighted(self, data: Tensor, q: GaussianLatents, noise: Tensor) -> _Climbed:
        seen: list[Tensor] = []

        def log_joint(latents: Tensor) -> Tensor:
            seen.append(self._log_likelihood(data.unsqueeze(1), latents))
            return seen[0] + gaussians.standard_normal_log_prob(latents)

        bound = _IMPORTANCE_WEIGHTED[self._settings.gradient](log_joint, q, noise)
        return _Climbed(bound.mean(), seen[0].mean(dim=1), bound)

    @property
    def _baseline(self) -> estimators.Baseline:
        has_one = self._settings.baseline == "leave-one-out"
        return estimators.leave_one_out if has_one else estimators.no_baseline

    def _posterior(self, data: Tensor) -> tuple[Tensor, Tensor]:
        if self._settings.precision != "bfloat16":
            return self.vae.posterior(data)
        with torch.autocast(data.device.type, dtype=torch.bfloat16):
            mean, log_var = self.vae.posterior(data)
        return mean.float(), log_var.float()

    def _log_likelihood(self, data: Tensor, latents: Tensor) -> Tensor:
        if self._settings.precision != "bfloat16":
            return _log_prob(self.vae.likelihood(latents), data)
        with torch.autocast(latents.device.type, dtype=torch.bfloat16):
            likelihood = self.vae.likelihood(latents)
        return _log_prob(_in_float32(likelihood), data)


def _log_prob(likelihood: Likelihood, data: Tensor) -> Tensor:
    """Return log p(x | z) in nats, by the fastest way that there is."""
    # The fast way reads a number of the device; a compiler joins the operations of the general form itself.
    if isinstance(likelihood, Bernoulli) and data.device.type == "cpu" and not torch.compiler.is_compiling():
        first_dim = -likelihood.event_dims
        return binary_gradient.log_prob(likelihood.logits.flatten(first_dim), data.flatten(first_dim))
    return likelihood.log_prob(data)


def _in_float32(likelihood: Likelihood) -> Likelihood:
    """Return the same distribution with parameters in float32: sums over pixels need its digits."""
    found = {field.name: getattr(likelihood, field.name) for field in dataclasses.fields(likelihood)}
    rounded: dict[str, Any] = {name: value.float() for name, value in found.items() if isinstance(value, Tensor)}
    return dataclasses.replace(likelihood, **rounded)
