r"""A variational autoencoder with binary latents: what the score function can train and reparametrisation cannot.

.. math:: p(z) = \prod_j \mathrm{Bernoulli}(z_j; \tfrac12), \quad
    p(x \mid z) = \prod_i \mathrm{Bernoulli}(x_i; f(z)_i), \quad
    q(z \mid x) = \prod_j \mathrm{Bernoulli}(z_j; g(x)_j)

Few latents can be enumerated: bound, evidence and gradient are then exact.

References:
    Mnih and Gregor, Neural Variational Inference and Learning in Belief Networks, 2014.
    https://arxiv.org/abs/1402.0030
"""

import math
from typing import Final

import torch
from torch import Tensor, nn

from training import estimators
from training.estimators import Baseline, BernoulliLatents
from training.likelihoods import Bernoulli

MAX_ENUMERATED_LATENTS: Final = 12
"""4096 states for each row of data; beyond that enumeration is refused."""


class DiscreteVae(nn.Module):
    """Bernoulli latents, uniform prior, Bernoulli likelihood; one hidden layer in both networks.

    Args:
        num_pixels: Length of a row of data.
        num_latents: Binary latents.
        hidden_dim: Width of the hidden layers.
        generator: Source of the initial weights.
    """

    def __init__(self, num_pixels: int, num_latents: int, hidden_dim: int, generator: torch.Generator) -> None:
        super().__init__()
        self.num_latents = num_latents
        self.encoder = _perceptron((num_pixels, hidden_dim, num_latents), generator)
        self.decoder = _perceptron((num_latents, hidden_dim, num_pixels), generator)

    def posterior(self, data: Tensor) -> BernoulliLatents:
        """Return q(z | x) for zeros and ones, shape (batch, num_pixels)."""
        return BernoulliLatents(self.encoder(data))

    def likelihood(self, latents: Tensor) -> Bernoulli:
        """Return p(x | z) for latents of shape (..., num_latents)."""
        return Bernoulli(self.decoder(latents))

    def log_joint(self, data: Tensor, latents: Tensor) -> Tensor:
        """Return log p(x, z) in nats, shape (batch, num_samples).

        Args:
            data: Zeros and ones, shape (batch, num_pixels).
            latents: Zeros and ones, shape (batch, num_samples, num_latents), or batch 1 for all rows alike.
        """
        return self.likelihood(latents).log_prob(data.unsqueeze(-2)) - self.num_latents * math.log(2)

    def elbo(self, data: Tensor, noise: Tensor, *, baseline: Baseline = estimators.leave_one_out) -> Tensor:
        """Return the sampled bound of each row; its gradient is the score function's for the encoder.

        The entropy of q is taken in closed form.

        Args:
            data: Zeros and ones, shape (batch, num_pixels).
            noise: Uniform on [0, 1), shape (batch, num_samples, num_latents).
            baseline: What is subtracted from log p(x, z); leave-one-out needs two samples.
        """
        latents = self.posterior(data)
        surrogate = estimators.score_function(
            lambda samples: self.log_joint(data, samples), latents, noise, baseline=baseline
        )
        return surrogate + latents.entropy()

    def exact_elbo(self, data: Tensor) -> Tensor:
        """Return the bound of each row as a sum over all states, differentiable, shape (batch,).

        Raises:
            ValueError: If there are too many states.
        """
        states, latents = self._states(data), self.posterior(data)
        log_q = latents.log_prob(states)
        return (log_q.exp() * (self.log_joint(data, states) - log_q)).sum(dim=-1)

    def log_prob(self, data: Tensor) -> Tensor:
        """Return log p(x) of each row as a sum over all states, shape (batch,).

        Raises:
            ValueError: If there are too many states.
        """
        return torch.logsumexp(self.log_joint(data, self._states(data)), dim=-1)

    def sample(self, num_rows: int, generator: torch.Generator) -> Tensor:
        """Return data drawn from the model: zeros and ones, shape (num_rows, num_pixels)."""
        latents = torch.rand((num_rows, self.num_latents), generator=generator).round()
        likelihood = self.likelihood(latents.to(next(self.parameters())))
        noise = torch.rand(likelihood.logits.shape, generator=generator)
        return likelihood.sample(noise.to(likelihood.logits))

    def _states(self, data: Tensor) -> Tensor:
        """Return all values of the latents, shape (1, 2^num_latents, num_latents)."""
        if self.num_latents > MAX_ENUMERATED_LATENTS:
            raise ValueError(
                f"{self.num_latents} binary latents have too many states to enumerate; at most "
                f"{MAX_ENUMERATED_LATENTS}, use elbo for more"
            )
        numbers = torch.arange(2**self.num_latents, device=data.device).unsqueeze(1)
        bits = numbers >> torch.arange(self.num_latents, device=data.device)
        return (bits & 1).to(data.dtype).unsqueeze(0)


def _perceptron(widths: tuple[int, int, int], generator: torch.Generator) -> nn.Sequential:
    first, second = (_linear(*pair, generator) for pair in (widths[:2], widths[1:]))
    return nn.Sequential(first, nn.Tanh(), second)


def _linear(num_inputs: int, num_outputs: int, generator: torch.Generator) -> nn.Linear:
    """Return a layer with Glorot's uniform weights, drawn without the global generator."""
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, num_inputs, num_outputs)  # type: ignore[no-untyped-call]
    nn.init.xavier_uniform_(layer.weight, generator=generator)
    nn.init.zeros_(layer.bias)
    return layer
