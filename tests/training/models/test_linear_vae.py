"""The linear VAE against its oracle, probabilistic PCA."""

import math
from typing import NamedTuple

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from training.models.linear_vae import LinearVAE
from training.models.ppca import ProbabilisticPCA, elbo_maximum

LATENT_DIM = 8

MAXIMUM = 14.209788
"""Largest mean log p of the digits / 16 with eight latent dimensions, nats per row."""

GATE = 14.2093
"""Half a thousandth of a nat below: what an optimiser with exact expectations must reach."""

SAMPLED_GATE = 14.15
"""With one sample per row the gradient noise leaves some hundredths of a nat."""


class Fitted(NamedTuple):
    """A linear VAE at the end of its fit."""

    vae: LinearVAE
    elbo: float


@pytest.fixture(scope="module")
def grey_digits() -> Tensor:
    """Return all digits, float64 in [0, 1], shape (1797, 64)."""
    return torch.from_numpy(load_digits().data) / 16


@pytest.fixture(scope="module")
def fitted(grey_digits: Tensor) -> Fitted:
    """Return the model at the maximum of its exact ELBO."""
    vae = LinearVAE(64, LATENT_DIM, torch.Generator().manual_seed(0))
    vae.start_at(grey_digits)
    return Fitted(vae, vae.fit(grey_digits, max_gradients=1600).elbo)


def _small(source: torch.Generator) -> tuple[LinearVAE, Tensor]:
    vae = LinearVAE(5, 2, source)
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=source, dtype=torch.float64))
    return vae, torch.randn((6, 5), generator=source, dtype=torch.float64)


def test_fit_reaches_the_maximum_of_ppca(fitted: Fitted, grey_digits: Tensor) -> None:
    """ELBO <= exact log p <= maximum, and the first is at the gate: amortised inference costs nothing here."""
    log_prob = fitted.vae.as_ppca().log_prob(grey_digits).mean().item()
    rounding = 1e-9
    assert GATE <= fitted.elbo <= log_prob + rounding
    assert log_prob <= elbo_maximum(grey_digits, LATENT_DIM) + rounding
    assert elbo_maximum(grey_digits, LATENT_DIM) == pytest.approx(MAXIMUM, abs=5.1e-7)


def test_decoder_spans_the_principal_subspace(fitted: Fitted, grey_digits: Tensor) -> None:
    r"""The sine of the largest angle to the principal subspace is small.

    Turning one axis by a from eigenvalue l_q to l_{q+1} loses a^2 (l_q - l_{q+1}) (1/s^2 - 1/l_q) / 2 nats per
    row; with the digits' 0.1718 and 0.1574 that is 0.2225 a^2, so that the gate's 4.9e-4 allows a = 0.047.
    """
    principal = torch.linalg.qr(ProbabilisticPCA.fit(grey_digits, LATENT_DIM).weight).Q
    ours = torch.linalg.qr(fitted.vae.as_ppca().weight).Q
    sine = torch.linalg.matrix_norm(ours - principal @ (principal.T @ ours), 2).item()
    assert sine < 0.047


def test_columns_are_the_principal_axes(fitted: Fitted) -> None:
    """The diagonal posterior breaks the rotation: W^T W is diagonal, to a hundredth of its largest entry."""
    weight = fitted.vae.as_ppca().weight
    gram = weight.T @ weight
    lengths = gram.diagonal()
    assert ((gram - torch.diag(lengths)).abs().max() / lengths.max()).item() < 1e-2


def test_amortised_posterior_is_nearly_exact(fitted: Fitted, grey_digits: Tensor) -> None:
    """At the maximum the gap of the mean row is what the ELBO lacks of log p, below the gate's half thousandth."""
    model, q = fitted.vae.as_ppca(), fitted.vae.as_gaussian_posterior(grey_digits)
    gap = model.kl_to_posterior(grey_digits, q).mean().item()
    assert 0 <= gap <= MAXIMUM + 1e-6 - GATE
    assert gap == pytest.approx(model.log_prob(grey_digits).mean().item() - fitted.elbo, abs=1e-9)


def test_one_sample_per_row_is_enough(grey_digits: Tensor) -> None:
    """Trained as a VAE is, by reparametrised samples and Adam, it comes within 0.06 nats of the maximum."""
    source = torch.Generator().manual_seed(0)
    vae = LinearVAE(64, LATENT_DIM, source)
    vae.start_at(grey_digits)
    fit = vae.fit_sampled(grey_digits, source, num_steps=1500, learning_rate=2e-2)
    log_prob = vae.as_ppca().log_prob(grey_digits).mean().item()
    assert SAMPLED_GATE <= fit.elbo <= log_prob <= MAXIMUM + 1e-6


def test_exact_bound_is_that_of_ppca_with_the_same_q(source: torch.Generator) -> None:
    """Two formulas of one bound: likelihood less KL here, log joint plus entropy there."""
    vae, data = _small(source)
    with torch.no_grad():
        expected = vae.as_ppca().elbo(data, vae.as_gaussian_posterior(data))
        torch.testing.assert_close(vae.elbo(data), expected, rtol=0, atol=1e-9)


def test_sampled_bound_has_the_exact_one_as_mean(source: torch.Generator) -> None:
    """The reparametrised bound is unbiased, within five standard errors."""
    vae, data = _small(source)
    num = 100_000
    with torch.no_grad():
        noise = torch.randn((num, 2), generator=source, dtype=torch.float64)
        draws = vae.elbo(data[:1].expand(num, -1), noise)
        exact = vae.elbo(data[:1]).item()
    assert draws.mean().item() == pytest.approx(exact, abs=5 * draws.std().item() / math.sqrt(num))


def test_start_is_the_mean_with_the_variance_of_the_data(grey_digits: Tensor, source: torch.Generator) -> None:
    """Before the first step the model without its weights is the best isotropic Gaussian."""
    vae = LinearVAE(64, 3, source)
    vae.start_at(grey_digits)
    torch.testing.assert_close(vae.decoder_bias.detach(), grey_digits.mean(dim=0))
    assert vae.noise_log_var.exp().item() == pytest.approx(grey_digits.var(dim=0, correction=0).mean().item())
    assert vae.posterior(grey_digits).mean.mean(dim=0).abs().max().item() < 1e-12


@pytest.mark.parametrize("latent_dim", [0, 5, 6])
def test_latents_are_fewer_than_features(latent_dim: int, source: torch.Generator) -> None:
    """As many latents as features would leave no noise to learn."""
    with pytest.raises(ValueError, match=rf"latent_dim: {latent_dim} is not in \[1, 5\); choose a smaller one"):
        LinearVAE(5, latent_dim, source)


def test_bad_rows_are_refused(source: torch.Generator) -> None:
    """Neither fit begins on rows that are not finite or not of the model's width."""
    vae, data = _small(source)
    with pytest.raises(ValueError, match="4 features, the model has 5"):
        vae.fit(data[:, :4])
    data[2, 0] = math.inf
    with pytest.raises(ValueError, match="the first is row 2"):
        vae.fit_sampled(data, source, num_steps=1)
