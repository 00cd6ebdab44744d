r"""Variational inference without an encoder: one q_i(z) = N(mean_i, exp(log_var_i)) stored for every datapoint.

.. math:: L(\theta, q_i) = E_{q_i}[\log p_\theta(x_i \mid z)] - KL(q_i \,\|\, p(z))

Two steps alternate: ascent on L in the q_i with theta fixed tightens the bound; ascent in theta with the q_i fixed
improves the model. The same q step from the encoder's answer, theta frozen, refines an amortised posterior.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from training import objectives
from training.estimators import GaussianLatents
from training.objectives import AmortisedModel, Decoding, InferenceGap


class Ascent(NamedTuple):
    """How the q step is done: Adam for each row, maximising."""

    learning_rate: float = 2e-2
    """Size of the first step."""
    mean_decay: float = 0.9
    """Weight of the past in the average of gradients."""
    square_decay: float = 0.99
    """Weight of the past in the average of squared gradients.

    Adam's usual 0.999 would remember the first gradients of a far start, which are huge, through all of a short
    run, and the steps would stay too small.
    """
    epsilon: float = 1e-8
    """Added to the root of the squares."""


class PosteriorTable:
    r"""The variational parameters of N datapoints, and Adam's state of every row.

    It holds 2 N latent_dim numbers, where an encoder's number does not depend on N: for MNIST with 32 dimensions
    3,840,000, against 339,664 of an encoder 784-400-(32+32). A row moves, and its state ages, only when it is in
    the batch: a state shared by all rows would take too long a step where a row is rare.

    Args:
        mean: First means, shape (N, latent_dim); copied.
        log_var: First log variances, same shape; copied.

    References:
        Hoffman et al., Stochastic Variational Inference, 2013. https://arxiv.org/abs/1206.7051
        Kingma and Ba, Adam, 2015. https://arxiv.org/abs/1412.6980
    """

    def __init__(self, mean: Tensor, log_var: Tensor) -> None:
        # One tensor for both, so that one update serves both.
        self._parameters = torch.stack((mean, log_var), dim=1).detach().clone()
        self._average = torch.zeros_like(self._parameters)
        self._average_square = torch.zeros_like(self._parameters)
        self._steps = torch.zeros(len(mean), 1, 1, dtype=mean.dtype, device=mean.device)

    @classmethod
    def at_prior(cls, num_rows: int, latent_dim: int, dtype: torch.dtype = torch.float32) -> "PosteriorTable":
        """Return a table in which every q_i is the prior N(0, I)."""
        zeros = torch.zeros((num_rows, latent_dim), dtype=dtype)
        return cls(zeros, zeros)

    @property
    def num_parameters(self) -> int:
        """Return 2 N latent_dim."""
        return self._parameters.numel()

    @property
    def mean(self) -> Tensor:
        """Return the means, shape (N, latent_dim)."""
        return self._parameters[:, 0]

    @property
    def log_var(self) -> Tensor:
        """Return the log variances, shape (N, latent_dim)."""
        return self._parameters[:, 1]

    def rows(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log variance of some rows, as copies of shape (num_rows, latent_dim)."""
        mean, log_var = self._parameters[rows].unbind(dim=1)
        return mean, log_var

    def ascend(self, rows: Tensor, gradient_mean: Tensor, gradient_log_var: Tensor, ascent: Ascent) -> None:
        """Take one step of Adam uphill in some rows.

        Args:
            rows: Indices, shape (num_rows,), none twice.
            gradient_mean: Shape (num_rows, latent_dim).
            gradient_log_var: Same shape.
            ascent: How.
        """
        gradient = torch.stack((gradient_mean, gradient_log_var), dim=1)
        self._steps[rows] += 1
        self._average[rows] = self._average[rows].lerp(gradient, 1 - ascent.mean_decay)
        self._average_square[rows] = self._average_square[rows].lerp(gradient.square(), 1 - ascent.square_decay)
        steps = self._steps[rows]
        direction = self._average[rows] / (1 - ascent.mean_decay**steps)
        length = (self._average_square[rows] / (1 - ascent.square_decay**steps)).sqrt() + ascent.epsilon
        self._parameters[rows] += ascent.learning_rate * direction / length


def q_step(
    model: Decoding, data: Tensor, table: PosteriorTable, rows: Tensor, noise: Tensor, ascent: Ascent
) -> Tensor:
    """Move the q_i of a batch one step up their bounds, with the model fixed; return the bounds before the step.

    Args:
        model: Gets no gradient.
        data: The rows of data, shape (batch, *data_shape).
        table: The q_i of all data.
        rows: Indices of the batch in the table, shape (batch,).
        noise: Standard normal, shape (batch, M, latent_dim).
        ascent: Step size and averages.
    """
    mean, log_var = (parameter.requires_grad_() for parameter in table.rows(rows))
    bound = objectives.elbo_of_posterior(model, data, mean, log_var, noise).value
    # For these two alone, so that nothing is added to gradients that the p step collects.
    gradient_mean, gradient_log_var = torch.autograd.grad(bound.sum(), (mean, log_var))
    table.ascend(rows, gradient_mean, gradient_log_var, ascent)
    return bound.detach()


def p_step(
    model: Decoding,
    data: Tensor,
    table: PosteriorTable,
    rows: Tensor,
    noise: Tensor,
    optimizer: torch.optim.Optimizer,
) -> Tensor:
    """Move the model one step up the mean bound of a batch, with all q_i fixed; return the bounds before the step.

    The KL does not depend on the model, so this is ascent on the mean of log p(x_i | z), z ~ q_i.

    Args:
        model: Its parameters are those of the optimiser.
        data: The rows of data, shape (batch, *data_shape).
        table: The q_i of all data.
        rows: Indices of the batch in the table, shape (batch,).
        noise: Standard normal, fresh, shape (batch, M, latent_dim).
        optimizer: Descends, on the negative bound.
    """
    bound = objectives.elbo_of_posterior(model, data, *table.rows(rows), noise).value
    optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(-bound.mean())
    optimizer.step()
    return bound.detach()


class Alternation(NamedTuple):
    """The article's algorithm: how many steps of which kind."""

    num_epochs: int
    """Passes over the data."""
    batch_size: int
    """Rows at once; all rows make it the algorithm as it stands in the article."""
    num_q_steps: int = 5
    """q steps of a batch before its p step."""
    num_samples: int = 1
    """M: samples of a bound."""


def alternate(
    model: Decoding,
    data: Tensor,
    table: PosteriorTable,
    optimizer: torch.optim.Optimizer,
    alternation: Alternation,
    source: torch.Generator,
    *,
    ascent: Ascent | None = None,
) -> list[float]:
    """Fit model and q_i in turns; return the mean ELBO of every epoch, nats per row, as measured by its p steps.

    Args:
        model: p(x | z), with prior N(0, I).
        data: All rows, shape (N, *data_shape).
        table: The q_i, changed in place.
        optimizer: Of the model's parameters.
        alternation: Numbers of steps.
        source: Draws the order of the rows and the noise.
        ascent: Of the q steps.
    """
    ascent = ascent or Ascent()
    trace = []
    for _ in range(alternation.num_epochs):
        total = 0.0
        for rows in torch.split(torch.randperm(len(data), generator=source), alternation.batch_size):
            shape = (len(rows), alternation.num_samples, table.mean.shape[1])
            batch = data[rows]
            for _ in range(alternation.num_q_steps):
                q_step(model, batch, table, rows, _normal(shape, table, source), ascent)
            total += float(p_step(model, batch, table, rows, _normal(shape, table, source), optimizer).sum())
        trace.append(total / len(data))
    return trace


def refine(
    model: Decoding,
    data: Tensor,
    start: tuple[Tensor, Tensor],
    source: torch.Generator,
    *,
    num_steps: int = 400,
    num_samples: int = 4,
    ascent: Ascent | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the best Gaussians found from a start, mean and log variance, with the model frozen.

    From the encoder's answer this is local refinement; from the prior it is inference from scratch. The step size
    falls to zero along half a cosine, so that the noise of the gradients dies away.

    Args:
        model: p(x | z); gets no gradient.
        data: Shape (batch, *data_shape).
        start: Mean and log variance, both of shape (batch, latent_dim).
        source: Draws the noise.
        num_steps: q steps.
        num_samples: M: samples of a bound.
        ascent: Of the q steps; the learning rate is the first one.

    References:
        Cremer, Li and Duvenaud, Inference Suboptimality in Variational Autoencoders, 2018.
        https://arxiv.org/abs/1801.03558
    """
    ascent = ascent or Ascent()
    table = PosteriorTable(*start)
    rows = torch.arange(len(data), device=table.mean.device)
    shape = (len(data), num_samples, table.mean.shape[1])
    for step in range(num_steps):
        rate = 0.5 * ascent.learning_rate * (1 + math.cos(math.pi * step / num_steps))
        noise = _normal(shape, table, source)
        q_step(model, data, table, rows, noise, ascent._replace(learning_rate=rate))
    return table.mean, table.log_var


class Gaps(NamedTuple):
    """The bounds of the same rows, each of shape (batch,), nats."""

    amortised_elbo: Tensor
    """With the encoder's q."""
    refined_elbo: Tensor
    """With the best q found from there."""
    log_evidence: Tensor
    """Importance-weighted bound with the refined q, a lower bound of log p(x)."""

    @property
    def gap(self) -> InferenceGap:
        """Return approximation and amortisation gap of each row."""
        return objectives.inference_gap(self.log_evidence, self.refined_elbo, self.amortised_elbo)


def measure_gaps(
    model: AmortisedModel, data: Tensor, noise: Tensor, source: torch.Generator, *, num_steps: int = 400
) -> Gaps:
    """Return what amortisation and the Gaussian family cost, row by row.

    Args:
        model: The trained model; not changed.
        data: Shape (batch, *data_shape).
        noise: Standard normal, shape (batch, k, latent_dim): common to all three bounds, independent of `source`.
        source: Draws the noise of the refinement.
        num_steps: Of the refinement.
    """
    with torch.no_grad():
        start = model.posterior(data)
    refined = refine(model, data, start, source, num_steps=num_steps)
    with torch.no_grad():
        # Both terms from the samples of the weighted bound too, so that this cannot lie below (Jensen).
        amortised, best = (_log_weights(model, data, q, noise) for q in (start, refined))
        return Gaps(
            amortised_elbo=amortised.mean(dim=1),
            refined_elbo=best.mean(dim=1),
            log_evidence=objectives.importance_weighted_bound(best),
        )


def _log_weights(model: Decoding, data: Tensor, parameters: tuple[Tensor, Tensor], noise: Tensor) -> Tensor:
    latents = GaussianLatents(*parameters)
    samples = latents.rsample(noise)
    return objectives.log_joint(model, data)(samples) - latents.log_prob(samples)


def _normal(shape: tuple[int, ...], table: PosteriorTable, source: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=source, dtype=table.mean.dtype, device=table.mean.device)
