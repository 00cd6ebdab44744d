r"""Mixture density network: p(y | x) as a mixture of Gaussians whose parameters a network computes from x.

.. math:: p(y \mid x) = \sum_k \pi_k(x) \prod_j N(y_j; m_{kj}(x), \sigma_{kj}^2(x))

A regression that can answer "either here or there". With one component it is Gaussian regression with a learned
variance. All densities in nats. Symbols: n rows, d outputs, K components.

References:
    Bishop, Mixture Density Networks, 1994. https://publications.aston.ac.uk/id/eprint/373/
"""

import math
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from training.config import ModelConfig
from training.models.networks import Decoder
from training.models.ppca import checked_rows

_LOG_TWO_PI: Final = math.log(2 * math.pi)
_MATRIX: Final = 2
_SAME_MODE: Final = 1e-3
"""Ascents that end closer than this, in units of the narrowest component, have found one mode."""


class Pairs(NamedTuple):
    """Rows of a regression problem: inputs (n, num_inputs), targets (n, d)."""

    inputs: Tensor
    targets: Tensor


class Modes(NamedTuple):
    """Maxima of p(y | x): values (n, K, d), log densities (n, K), and which are not repetitions, (n, K).

    Each row is ordered from the highest density to the lowest.
    """

    values: Tensor
    log_density: Tensor
    is_distinct: Tensor


@dataclass(frozen=True, eq=False)
class ConditionalMixture:
    """One mixture of Gaussians with independent outputs for each row.

    Args:
        log_weights: log pi_k, normalised, shape (n, K).
        means: Shape (n, K, d).
        log_scales: Natural logarithms of the standard deviations, shape (n, K, d).
    """

    log_weights: Tensor
    means: Tensor
    log_scales: Tensor

    def log_joint(self, targets: Tensor) -> Tensor:
        """Return log p(y, z = k | x) for targets of shape (n, m, d), shape (n, m, K)."""
        scaled = (targets.unsqueeze(2) - self.means.unsqueeze(1)) * (-self.log_scales).exp().unsqueeze(1)
        log_densities = -(0.5 * (scaled.square() + _LOG_TWO_PI) + self.log_scales.unsqueeze(1)).sum(dim=3)
        return self.log_weights.unsqueeze(1) + log_densities

    def log_prob(self, targets: Tensor) -> Tensor:
        """Return log p(y | x) of one target per row, shape (n, d), by log-sum-exp; shape (n,).

        Example:
            >>> both = ConditionalMixture(torch.zeros(1, 1), torch.zeros(1, 1, 1), torch.zeros(1, 1, 1))
            >>> both.log_prob(torch.zeros(1, 1))
            tensor([-0.9189])
        """
        return self.log_joint(targets.unsqueeze(1)).squeeze(1).logsumexp(dim=1)

    def posterior(self, targets: Tensor) -> Tensor:
        """Return p(z = k | x, y) of one target per row, shape (n, K): the q with the largest bound."""
        return self.log_joint(targets.unsqueeze(1)).squeeze(1).softmax(dim=1)

    def elbo(self, targets: Tensor, responsibilities: Tensor) -> Tensor:
        r"""Return the bound of log p(y | x) of any q, exactly, shape (n,).

        .. math:: \sum_k r_k (\log p(y, z = k \mid x) - \log r_k), \quad 0 \log 0 = 0

        Args:
            targets: Shape (n, d).
            responsibilities: q(z = k) of each row, numbers >= 0 with sum one, shape (n, K).
        """
        log_joint = self.log_joint(targets.unsqueeze(1)).squeeze(1)
        return (responsibilities * log_joint - torch.xlogy(responsibilities, responsibilities)).sum(dim=1)

    @property
    def mean(self) -> Tensor:
        """The conditional mean E[y | x], shape (n, d): what least squares answers, maybe where no y is."""
        return (self.log_weights.exp().unsqueeze(2) * self.means).sum(dim=1)

    def sample(self, num: int, generator: torch.Generator) -> Tensor:
        """Return draws from p(y | x), shape (n, num, d).

        Args:
            num: Draws of each row, at least 1.
            generator: Source of component and noise, on the device of the parameters.
        """
        components = torch.multinomial(self.log_weights.exp(), num, replacement=True, generator=generator)
        chosen = components.unsqueeze(2).expand(-1, -1, self.means.shape[2])
        means, log_scales = self.means.gather(1, chosen), self.log_scales.gather(1, chosen)
        noise = torch.randn(means.shape, generator=generator, dtype=means.dtype, device=means.device)
        return means + log_scales.exp() * noise

    def modes(self, *, num_steps: int = 500) -> Modes:
        r"""Return the maxima that ascent finds from the mean of every component.

        Each step goes to the mean of the components, weighted by responsibility and precision; the density never
        falls, and at a mode the step is zero.

        .. math:: y \leftarrow \Big( \sum_k r_k(y) \sigma_k^{-2} \Big)^{-1} \sum_k r_k(y) \sigma_k^{-2} m_k

        Args:
            num_steps: Steps of each ascent.

        References:
            Carreira-Perpinan, Mode-Finding for Mixtures of Gaussian Distributions, 2000.
            https://doi.org/10.1109/34.888716
        """
        precisions = (-2 * self.log_scales).exp()
        values = self.means
        for _ in range(num_steps):
            shares = self.log_joint(values).softmax(dim=2)
            values = (shares @ (precisions * self.means)) / (shares @ precisions)
        log_density = self.log_joint(values).logsumexp(dim=2)
        log_density, order = log_density.sort(dim=1, descending=True)
        values = values.gather(1, order.unsqueeze(2).expand_as(values))
        tolerance = _SAME_MODE * self.log_scales.exp().amin(dim=(1, 2))
        distances = torch.cdist(values, values)
        is_repetition = (distances < tolerance.view(-1, 1, 1)).tril(-1).any(dim=2)
        return Modes(values, log_density, ~is_repetition)


class MixtureDensityNetwork(nn.Module):
    """A perceptron whose outputs are the parameters of a mixture.

    Inputs and targets are scaled to zero mean and unit variance inside, by the figures of the data that `fit` got;
    everything that goes in and out is in the user's units.

    Args:
        num_inputs: Width of an input row.
        num_outputs: d.
        num_components: K; 1 is Gaussian regression.
        hidden_dims: Widths of the hidden layers.
        generator: Source of the initial weights.
        min_log_scale: Smallest log standard deviation, relative to the targets'. Without one the likelihood has no
            maximum: a component on a single row gains for ever.
    """

    def __init__(
        self,
        num_inputs: int,
        num_outputs: int,
        num_components: int,
        hidden_dims: tuple[int, ...],
        generator: torch.Generator,
        *,
        min_log_scale: float = -7.0,
    ) -> None:
        super().__init__()
        if min(num_inputs, num_outputs, num_components) < 1:
            raise ValueError(
                f"network: {num_inputs} inputs, {num_outputs} outputs, {num_components} components; "
                "give at least 1 of each"
            )
        self.num_inputs, self.num_outputs, self.num_components = num_inputs, num_outputs, num_components
        self.min_log_scale = min_log_scale
        config = ModelConfig(latent_dim=num_inputs, hidden_dims=hidden_dims[::-1], activation="tanh")
        # The perceptron of the VAE's decoder is the one from vectors to vectors.
        self.network = Decoder(config, (num_components, 1 + 2 * num_outputs), generator)
        self.input_mean: Tensor
        self.input_scale: Tensor
        self.target_mean: Tensor
        self.target_scale: Tensor
        for name, width in (("input", num_inputs), ("target", num_outputs)):
            self.register_buffer(f"{name}_mean", torch.zeros(width))
            self.register_buffer(f"{name}_scale", torch.ones(width))

    def forward(self, inputs: Tensor) -> ConditionalMixture:
        """Return p(y | x) for inputs of shape (n, num_inputs).

        Raises:
            ValueError: If the inputs have another width or are not finite.
        """
        checked_rows(inputs, num_features=self.num_inputs, name="inputs")
        parameters = self.network((inputs - self.input_mean) / self.input_scale)
        logits, means, log_scales = parameters.split((1, self.num_outputs, self.num_outputs), dim=2)
        # A smooth floor: the gradient of a clamp would be zero for ever.
        log_scales = self.min_log_scale + functional.softplus(log_scales - self.min_log_scale)
        return ConditionalMixture(
            log_weights=logits.squeeze(2).log_softmax(dim=1),
            means=self.target_mean + self.target_scale * means,
            log_scales=log_scales + self.target_scale.log(),
        )

    def log_prob(self, targets: Tensor, inputs: Tensor) -> Tensor:
        """Return log p(y | x), shape (n,), for targets (n, d) and inputs (n, num_inputs).

        Raises:
            ValueError: If shapes do not fit or a value is not finite.
        """
        checked_rows(targets, num_features=self.num_outputs, name="targets")
        if len(targets) != len(inputs):
            raise ValueError(f"targets: {len(targets)} rows for {len(inputs)} inputs; give one target per input")
        mixture: ConditionalMixture = self(inputs)
        return mixture.log_prob(targets)

    @torch.no_grad()
    def sample(self, inputs: Tensor, num: int, generator: torch.Generator) -> Tensor:
        """Return draws from p(y | x), shape (n, num, d)."""
        mixture: ConditionalMixture = self(inputs)
        return mixture.sample(num, generator)

    def fit(
        self, data: Pairs, generator: torch.Generator, *, num_steps: int, learning_rate: float = 1e-2
    ) -> tuple[float, ...]:
        """Maximise the mean log p(y | x) by Adam on all rows.

        Args:
            data: The rows; dtype of the network.
            generator: Chooses the rows on which the components begin, so that they begin apart.
            num_steps: Steps; the step size falls to zero along half a cosine.
            learning_rate: Step size at the start.

        Returns:
            Mean negative log-likelihood before each step, nats per row.

        Raises:
            ValueError: If values are not finite, rows are fewer than components, or a column is constant (a
                constant target has unbounded density, a constant input says nothing).
        """
        self._start_at(data, generator)
        optimizer = torch.optim.Adam(self.parameters(), lr=learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
        losses = []
        for _ in range(num_steps):
            optimizer.zero_grad()
            loss = -self.log_prob(data.targets, data.inputs).mean()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        return tuple(losses)

    @torch.no_grad()
    def _start_at(self, data: Pairs, generator: torch.Generator) -> None:
        for name, rows, width in (
            ("inputs", data.inputs, self.num_inputs),
            ("targets", data.targets, self.num_outputs),
        ):
            checked_rows(rows, num_features=width, min_rows=max(2, self.num_components), name=name)
            is_constant = rows.amin(dim=0) == rows.amax(dim=0)
            if bool(is_constant.any()):
                raise ValueError(f"{name}: column {int(is_constant.nonzero()[0].item())} is constant; remove it")
        self.input_mean.copy_(data.inputs.mean(dim=0))
        self.input_scale.copy_(data.inputs.std(dim=0))
        self.target_mean.copy_(data.targets.mean(dim=0))
        self.target_scale.copy_(data.targets.std(dim=0))
        rows_of_start = torch.randperm(len(data.targets), generator=generator)[: self.num_components]
        bias = self.network.head.bias.view(self.num_components, 1 + 2 * self.num_outputs)
        bias[:, 1 : 1 + self.num_outputs] = (data.targets[rows_of_start] - self.target_mean) / self.target_scale


def inverse_problem(num: int, generator: torch.Generator, *, dtype: torch.dtype = torch.float32) -> Pairs:
    r"""Return rows of Bishop's inverse problem: predict t from x, where one x has up to three t.

    .. math:: t \sim U(0, 1), \quad x = t + 0.3 \sin 2 \pi t + U(-0.1, 0.1)

    The true conditional entropy H(t | x) is -1.282348 nats; no Gaussian regression has an expected negative
    log-likelihood below -0.655320.

    Args:
        num: Rows.
        generator: Source of t and of the noise.
        dtype: Type of the rows.

    Returns:
        Inputs x and targets t, both of shape (num, 1).

    References:
        Bishop, Mixture Density Networks, 1994.
    """
    targets, noise = torch.rand((2, num, 1), generator=generator, dtype=dtype)
    return Pairs(inputs=targets + 0.3 * (2 * math.pi * targets).sin() + 0.2 * noise - 0.1, targets=targets)
