r"""The linear VAE: linear encoder and decoder, Gaussian likelihood; its ELBO has a maximum that is known.

.. math:: x \mid z \sim N(W z + b, s^2 I), \quad q(z \mid x) = N(V x + c, diag(\sigma^2))

The largest mean ELBO is the largest mean log-likelihood of probabilistic PCA, `ppca.elbo_maximum`: amortised
inference costs nothing here. The diagonal posterior picks the principal axes, not only their subspace.

References:
    Lucas, Tucker, Grosse and Norouzi, Don't Blame the ELBO! A Linear VAE Perspective on Posterior Collapse, 2019.
    https://arxiv.org/abs/1911.02469
"""

import math
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn

from training import gaussians
from training.models.ppca import GaussianPosterior, ProbabilisticPCA, checked_rows
from training.models.vae import Posterior

_HISTORY: Final = 50
"""Pairs of steps and gradients that L-BFGS keeps."""


class LinearFit(NamedTuple):
    """How a fit ended: the mean ELBO of the last step, nats per row, and the number of gradients taken."""

    elbo: float
    num_gradients: int


class LinearVAE(nn.Module):
    """A VAE without hidden layers and with one learned noise variance.

    Args:
        num_features: Width of a row of data, d.
        latent_dim: q, in [1, d).
        generator: Source of the initial weights.
        dtype: Type of the weights; float64 where values are compared with exact ones.

    Raises:
        ValueError: If latent_dim is out of range.
    """

    def __init__(
        self, num_features: int, latent_dim: int, generator: torch.Generator, *, dtype: torch.dtype = torch.float64
    ) -> None:
        super().__init__()
        if not 1 <= latent_dim < num_features:
            raise ValueError(f"latent_dim: {latent_dim} is not in [1, {num_features}); choose a smaller one")
        self.latent_dim = latent_dim

        def drawn(*shape: int) -> nn.Parameter:
            scale = 1 / math.sqrt(num_features)
            return nn.Parameter(scale * torch.randn(shape, generator=generator, dtype=dtype))

        self.encoder_weight = drawn(latent_dim, num_features)
        self.encoder_bias = nn.Parameter(torch.zeros(latent_dim, dtype=dtype))
        self.posterior_log_var = nn.Parameter(torch.zeros(latent_dim, dtype=dtype))
        self.decoder_weight = drawn(num_features, latent_dim)
        self.decoder_bias = nn.Parameter(torch.zeros(num_features, dtype=dtype))
        self.noise_log_var = nn.Parameter(torch.zeros((), dtype=dtype))
        self.centre: Tensor
        self.register_buffer("centre", torch.zeros(num_features, dtype=dtype))

    @torch.no_grad()
    def start_at(self, data: Tensor) -> None:
        """Let the encoder measure data from their mean, and every latent decode to it.

        The model is the same family; without it a weight and its bias pull at each other, and optimisers crawl.

        Args:
            data: Shape (n, d).
        """
        self.centre.copy_(data.mean(dim=0))
        self.decoder_bias.copy_(self.centre)
        self.noise_log_var.copy_((data - self.centre).square().mean().log())

    def posterior(self, data: Tensor) -> Posterior:
        """Return q(z | x) for data of shape (n, d); the variance is the same for all rows."""
        mean = (data - self.centre) @ self.encoder_weight.T + self.encoder_bias
        return Posterior(mean, self.posterior_log_var.expand_as(mean))

    def elbo(self, data: Tensor, noise: Tensor | None = None) -> Tensor:
        r"""Return the bound of each row, nats, shape (n,).

        .. math:: E_q[\log p(x \mid z)] = -\tfrac12 \left( d \log 2\pi s^2 + \|x - b - W \mu\|^2 / s^2
            + \sum_j \sigma_j^2 \|w_j\|^2 / s^2 \right)

        Args:
            data: Shape (n, d).
            noise: Standard normal, shape (n, q): one reparametrised sample per row. None: the exact expectation.
        """
        mean, log_var = self.posterior(data)
        latents = mean if noise is None else gaussians.rsample(mean, log_var, noise)
        reconstruction = latents @ self.decoder_weight.T + self.decoder_bias
        log_likelihood = gaussians.log_prob(data, reconstruction, self.noise_log_var)
        if noise is None:
            spread = log_var.exp() @ self.decoder_weight.square().sum(dim=0)
            log_likelihood = log_likelihood - 0.5 * spread * (-self.noise_log_var).exp()
        return log_likelihood - gaussians.kl_to_standard_normal(mean, log_var)

    def fit(self, data: Tensor, *, max_gradients: int = 2000, tolerance: float = 1e-9) -> LinearFit:
        """Maximise the exact mean ELBO by L-BFGS on all rows.

        Args:
            data: Shape (n, d), dtype of the model.
            max_gradients: Largest number of passes over the data.
            tolerance: Stop when no entry of the gradient is larger, nats per unit of the parameter.

        Raises:
            ValueError: If the data are not finite rows of the model's width.
        """
        checked_rows(data, num_features=len(self.decoder_bias), min_rows=2)
        optimizer = torch.optim.LBFGS(
            self.parameters(),
            max_iter=max_gradients,
            max_eval=max_gradients,
            tolerance_grad=tolerance,
            tolerance_change=0,
            history_size=_HISTORY,
            line_search_fn="strong_wolfe",
        )
        num_gradients = 0

        def closure() -> float:
            nonlocal num_gradients
            num_gradients += 1
            optimizer.zero_grad()
            loss = -self.elbo(data).mean()
            torch.autograd.backward(loss)
            return loss.item()

        optimizer.step(closure)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            return LinearFit(self.elbo(data).mean().item(), num_gradients)

    def fit_sampled(
        self, data: Tensor, generator: torch.Generator, *, num_steps: int, learning_rate: float = 1e-2
    ) -> LinearFit:
        """Maximise the mean ELBO by Adam with one reparametrised sample per row and step, as a VAE is trained.

        Args:
            data: Shape (n, d), dtype of the model.
            generator: Source of the posterior noise.
            num_steps: Steps on all rows; the step size falls to zero along half a cosine.
            learning_rate: Step size at the start.

        Returns:
            The exact mean ELBO at the end.
        """
        checked_rows(data, num_features=len(self.decoder_bias), min_rows=2)
        optimizer = torch.optim.Adam(self.parameters(), lr=learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
        for _ in range(num_steps):
            noise = torch.randn((len(data), self.latent_dim), generator=generator, dtype=data.dtype)
            optimizer.zero_grad()
            torch.autograd.backward(-self.elbo(data, noise).mean())
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            return LinearFit(self.elbo(data).mean().item(), num_steps)

    @torch.no_grad()
    def as_ppca(self) -> ProbabilisticPCA:
        """Return the decoder as a model whose log p(x) is exact; ELBO <= its log p(x) <= the maximum."""
        return ProbabilisticPCA(
            self.decoder_weight.clone(), self.decoder_bias.clone(), self.noise_log_var.exp().clone()
        )

    @torch.no_grad()
    def as_gaussian_posterior(self, data: Tensor) -> GaussianPosterior:
        """Return q(z | x) in the form that `ProbabilisticPCA.elbo` takes."""
        mean, _ = self.posterior(data)
        return GaussianPosterior(mean, torch.diag(self.posterior_log_var.exp()))
