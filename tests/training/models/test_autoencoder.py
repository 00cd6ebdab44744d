"""The deterministic autoencoder: what it does better than the VAE of the same networks, and what it cannot do."""

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from training import objectives
from training.config import ModelConfig
from training.data import MAX_PIXEL, Dataset
from training.models.autoencoder import Autoencoder, ReconstructionLoss
from training.models.gaussian_mixture import GaussianMixture
from training.models.ppca import ProbabilisticPCA
from training.models.vae import VAE

CONFIG = ModelConfig(latent_dim=8, hidden_dims=(128,))
NUM_STEPS = 1500
BATCH_SIZE = 128
NUM_SAMPLES = 2000


class Trained(NamedTuple):
    """Two models with the same networks, the same start, the same data and the same number of steps."""

    autoencoder: Autoencoder
    vae: VAE


def _grey(pixels: Tensor) -> Tensor:
    return pixels.float() / MAX_PIXEL


@pytest.fixture(scope="module")
def train(digits: Dataset) -> Tensor:
    """Return the training split in [0, 1]."""
    return _grey(torch.from_numpy(digits.train.copy()))


@pytest.fixture(scope="module")
def trained(train: Tensor) -> Trained:
    """Return an autoencoder and a VAE of the digits."""
    autoencoder = Autoencoder(CONFIG, (1, 8, 8), torch.Generator().manual_seed(0))
    autoencoder.fit(train, torch.Generator().manual_seed(1), num_steps=NUM_STEPS, batch_size=BATCH_SIZE)
    vae, source = VAE(CONFIG, (1, 8, 8), torch.Generator().manual_seed(0)), torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-3)
    for _ in range(NUM_STEPS):
        data = train[torch.randint(len(train), (BATCH_SIZE,), generator=source)]
        noise = torch.randn((BATCH_SIZE, CONFIG.latent_dim), generator=source)
        optimizer.zero_grad()
        torch.autograd.backward(-objectives.elbo(vae, data, noise).value.mean())
        optimizer.step()
    return Trained(autoencoder, vae)


def test_a_categorical_likelihood_is_refused(source: torch.Generator) -> None:
    """Logits of levels are no pixels: the error names what to set. A Gaussian's networks are as good as any."""
    config = ModelConfig(latent_dim=2, hidden_dims=(5,), likelihood="categorical")
    with pytest.raises(ValueError, match="set bernoulli or gaussian"):
        Autoencoder(config, (1, 2, 2), source)
    gaussian = Autoencoder(CONFIG.model_copy(update={"likelihood": "gaussian"}), (1, 2, 2), source)
    assert gaussian.reconstruct(torch.rand((3, 1, 2, 2), generator=source)).shape == (3, 1, 2, 2)


@pytest.fixture
def small(source: torch.Generator) -> Autoencoder:
    """Return an untrained autoencoder of 2x2 pixels."""
    return Autoencoder(ModelConfig(latent_dim=2, hidden_dims=(5,)), (1, 2, 2), source)


def _frechet(samples: Tensor, data: Tensor, axes: Tensor) -> float:
    """Return the squared Frechet distance of two Gaussians fitted to the rows' coordinates on orthonormal axes."""
    first, second = ((rows.flatten(start_dim=1).double() @ axes) for rows in (samples, data))
    covariances = first.T.cov(), second.T.cov()
    values, vectors = torch.linalg.eigh(covariances[0])
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ covariances[1] @ root).clamp_min(0).sqrt().sum()
    shift = (first.mean(dim=0) - second.mean(dim=0)).square().sum()
    return float(shift + covariances[0].trace() + covariances[1].trace() - 2 * cross)


@torch.no_grad()
def test_draws_from_the_prior_decode_to_garbage(trained: Trained, train: Tensor, source: torch.Generator) -> None:
    """Decoded draws of N(0, I) lie far from the digits for the autoencoder, near for the VAE.

    Squared Frechet distances on 20 principal axes; two halves of the training rows are 0.05 apart, which bounds
    what 2000 draws leave to chance. Seen: 4.1 against 0.84, and 0.23 with a Gaussian fitted to the codes: what
    the autoencoder lacks is p(z), not a decoder.
    """
    axes = torch.linalg.qr(ProbabilisticPCA.fit(train.flatten(start_dim=1).double(), 20).weight).Q
    half = len(train) // 2
    assert _frechet(train[:half], train[half:], axes) < 0.1
    latents = torch.randn((NUM_SAMPLES, CONFIG.latent_dim), generator=source)
    codes = trained.autoencoder.encode(train).double()
    fitted_prior = GaussianMixture.fit(codes, 1, source).model
    of_autoencoder = _frechet(trained.autoencoder.decode(latents), train, axes)
    of_vae = _frechet(trained.vae.likelihood(latents).mean, train, axes)
    with_prior = trained.autoencoder.decode(fitted_prior.sample(NUM_SAMPLES, source).data.float())
    assert of_autoencoder > 3 * of_vae
    assert _frechet(with_prior, train, axes) < of_autoencoder / 3


@torch.no_grad()
def test_codes_do_not_lie_where_the_prior_does(trained: Trained, train: Tensor, source: torch.Generator) -> None:
    """The mean log density of N(0, I) at the codes is far below that at draws of the VAE's posterior."""
    codes = trained.autoencoder.encode(train)
    posterior = trained.vae.posterior(train)
    latents = posterior.mean + (0.5 * posterior.log_var).exp() * torch.randn(codes.shape, generator=source)
    squares = [rows.square().sum(dim=1).mean().item() for rows in (codes, latents)]
    # The prior's own is 8, with a deviation of 4 over rows; the KL term holds the VAE near it.
    assert squares[1] == pytest.approx(CONFIG.latent_dim, abs=4)
    assert squares[0] > 5 * CONFIG.latent_dim


@torch.no_grad()
def test_autoencoder_reconstructs_better(trained: Trained, digits: Dataset) -> None:
    """On unseen digits its squared error is below the VAE's, by a third at least: it pays for no KL."""
    test = _grey(torch.from_numpy(digits.test.copy()))
    ours = trained.autoencoder.reconstruction_error(test, "squared_error").mean().item()
    theirs = (test - trained.vae.likelihood(trained.vae.posterior(test).mean).mean).square().sum().item() / len(
        test
    )
    assert ours < theirs * 2 / 3


def test_networks_and_start_are_those_of_the_vae(seed: int) -> None:
    """The same configuration and seed give the same weights under the same names."""
    models = [kind(CONFIG, (1, 8, 8), torch.Generator().manual_seed(seed)) for kind in (Autoencoder, VAE)]
    first, second = (model.state_dict() for model in models)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_cross_entropy_is_the_vaes_likelihood_at_the_code(small: Autoencoder, source: torch.Generator) -> None:
    """It is -log p(x | z) at z = the posterior mean, and squared error that of the pixels."""
    vae = VAE(ModelConfig(latent_dim=2, hidden_dims=(5,)), (1, 2, 2), torch.Generator())
    vae.load_state_dict(small.state_dict())
    data = (torch.rand((6, 1, 2, 2), generator=source) < 0.5).float()
    expected = -vae.likelihood(vae.posterior(data).mean).log_prob(data)
    torch.testing.assert_close(small.reconstruction_error(data), expected)
    squares = (data - small.reconstruct(data)).square().sum(dim=(1, 2, 3))
    torch.testing.assert_close(small.reconstruction_error(data, "squared_error"), squares)


def test_reconstruction_is_deterministic(small: Autoencoder, source: torch.Generator) -> None:
    """Nothing is drawn: two calls agree, in shape and range of the data."""
    data = torch.rand((3, 1, 2, 2), generator=source)
    first, second = small.reconstruct(data), small.reconstruct(data)
    assert torch.equal(first, second)
    assert first.shape == data.shape
    assert 0 < first.min().item() < first.max().item() < 1


@pytest.mark.parametrize("loss", ["cross_entropy", "squared_error"])
def test_fit_learns_and_repeats(loss: ReconstructionLoss, train: Tensor, seed: int) -> None:
    """Either error falls by a quarter in 100 steps, and the same seed takes the same steps."""
    runs = []
    for _ in range(2):
        own = torch.Generator().manual_seed(seed)
        model = Autoencoder(ModelConfig(latent_dim=4, hidden_dims=(32,)), (1, 8, 8), own)
        runs.append(model.fit(train, own, num_steps=100, batch_size=64, loss=loss))
    assert runs[0] == runs[1]
    assert len(runs[0]) == 100
    assert sum(runs[0][-10:]) < 0.75 * sum(runs[0][:10])


def _with(value: float) -> Tensor:
    data = torch.rand((4, 1, 2, 2), generator=torch.Generator().manual_seed(0))
    data[1, 0, 1, 1] = value
    return data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (_with(math.nan), r"a value is NaN or outside \[0, 1\]; divide pixels by 255"),
        (_with(17), r"a value is NaN or outside \[0, 1\]; divide pixels by 255"),
        (_with(-1e-3), r"a value is NaN or outside \[0, 1\]"),
        (torch.zeros(4, 4), r"shape \(4, 4\), expected \(rows, 1, 2, 2\)"),
        (torch.zeros(0, 1, 2, 2), r"shape \(0, 1, 2, 2\), expected \(rows, 1, 2, 2\)"),
        (torch.full((4, 1, 2, 2), 0.5), "all rows are equal, there is nothing to encode; give data that vary"),
    ],
)
def test_data_that_cannot_be_learned_are_refused(
    data: Tensor, message: str, small: Autoencoder, source: torch.Generator
) -> None:
    """What cannot be fitted is an error that says what is wrong and what to do."""
    with pytest.raises(ValueError, match=message):
        small.fit(data, source, num_steps=1)
