"""Each likelihood from configuration to the wire: train on digits, measure, export, serve, hold against torch."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from serving import noise
from serving.client import AsyncVaeClient
from serving.gateway.operations import Bound
from serving.standalone import in_process
from tests.serving.harness import settings
from training import checkpoint, data, gaussians, objectives, presets
from training.checkpoint import RunFolder, averaged_model
from training.config import DataConfig
from training.evaluate import Evaluation, evaluate_run
from training.export import export
from training.likelihoods import Gaussian, Likelihood
from training.models.vae import VAE
from training.observations import observed_rows
from training.trainer import fit

pytestmark = [pytest.mark.slow]

CPU = torch.device("cpu")
PARITY = 1e-5
"""Largest difference between torch and the service, absolute and relative: the export's own gate on fp32."""

NUM_ROWS, NUM_LATENTS, SEED = 32, 5, 7

CHANGES = {
    "bernoulli": [],
    "gaussian": ["model.likelihood=gaussian"],
    "categorical": ["model.likelihood=categorical", "model.num_levels=17"],
    "categorical convolutions": ["model.likelihood=categorical", "model.channels=[4]"],
    "gaussian convolutions": ["model.likelihood=gaussian", "model.channels=[4]"],
}


class Trained(NamedTuple):
    """A bundle, what it was exported from, and images that it has not seen."""

    bundle: Path
    vae: VAE
    evaluation: Evaluation
    images: NDArray[np.uint8]


@pytest.fixture(scope="module", params=CHANGES)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Fit for two epochs, evaluate and export."""
    config = presets.smoke().override(["optimizer.learning_rate=5e-3", *CHANGES[request.param]])
    digits, folder = data.load(DataConfig(name="digits")), tmp_path_factory.mktemp("run")
    run = RunFolder(folder / "run")
    run.path.mkdir()
    fit(config, digits, run, device=CPU)
    evaluation = evaluate_run(run, digits, config.evaluation, device=CPU)
    export(run, digits, evaluation, folder / "bundle")
    vae = averaged_model(checkpoint.load(run.best), digits.data_shape, CPU)
    return Trained(folder / "bundle", vae, evaluation, digits.test[:NUM_ROWS])


@pytest.fixture
async def client(trained: Trained) -> AsyncIterator[AsyncVaeClient]:
    """Serve the bundle in this process."""
    async with (
        in_process(settings(trained.bundle)) as server,
        AsyncVaeClient(f"127.0.0.1:{server.port}") as client,
    ):
        yield client


def _tolerance(likelihood: Likelihood, rows: Tensor) -> float:
    """Return how much log p(x | z) may differ where every output of the decoder differs as the gate permits.

    A logit off by d moves the logarithm of a pixel's probability by d, and a level's by 2 d. A mean off by d moves
    the logarithm of a density by d |x - mean| / variance, to first order.
    """
    num_pixels = rows[0].numel()
    if isinstance(likelihood, Gaussian):
        slope = (rows.unsqueeze(1) - likelihood.mean).abs() * (-likelihood.log_var).exp()
        return PARITY * (2 * float(slope.flatten(2).sum(dim=2).max()) + num_pixels)
    return 2 * PARITY * num_pixels * (1 + float(likelihood.logits.abs().max()))


@pytest.mark.parametrize("bound", ["elbo", "importance-weighted"])
async def test_scores_equal_those_of_torch(client: AsyncVaeClient, trained: Trained, bound: Bound) -> None:
    """The bounds that the service computes are those of the training package, with the same noise and data."""
    vae, dim = trained.vae, trained.vae.latent_dim
    standard = noise.normal(SEED, NUM_ROWS, NUM_LATENTS * dim, stream=noise.Stream.POSTERIOR)
    draws = torch.from_numpy(standard.reshape(NUM_ROWS, NUM_LATENTS, dim))
    rows = torch.from_numpy(trained.images / np.float32(255))
    with torch.no_grad():
        mean, log_var = vae.posterior(rows)
        terms = objectives.elbo_of_posterior(vae, rows, mean, log_var, draws)
        expected = terms.value if bound == "elbo" else objectives.importance_weighted_elbo(vae, rows, draws)
        latents = gaussians.rsample(mean.unsqueeze(1), log_var.unsqueeze(1), draws)
        tolerance = _tolerance(vae.likelihood(latents), rows)
    scored = await client.score(trained.images, bound=bound, num_latents=NUM_LATENTS, seed=SEED)
    assert tolerance < 0.1
    np.testing.assert_allclose(scored.score, expected, rtol=PARITY, atol=tolerance)
    np.testing.assert_allclose(scored.log_likelihood, terms.log_likelihood, rtol=PARITY, atol=tolerance)
    np.testing.assert_allclose(scored.kl, terms.kl, rtol=PARITY, atol=dim * PARITY)


async def test_observations_equal_those_of_torch(client: AsyncVaeClient, trained: Trained) -> None:
    """With the service's noise torch draws the same values, clipped where the density leaves [0, 1]."""
    vae = trained.vae
    latents = noise.normal(SEED, NUM_ROWS, vae.latent_dim)
    with torch.no_grad():
        likelihood = vae.likelihood(torch.from_numpy(latents))
        if likelihood.noise == "normal":
            drawn = noise.normal(SEED, NUM_ROWS, 64, stream=noise.Stream.OBSERVATION)
        else:
            drawn = noise.uniform(SEED, NUM_ROWS, 64)
        expected = likelihood.sample(torch.from_numpy(drawn).view(NUM_ROWS, 1, 8, 8)).clamp(0, 1).numpy()
    served = (await client.sample(NUM_ROWS, seed=SEED, observation="sample")).samples
    is_equal = np.isclose(served, expected, rtol=PARITY, atol=PARITY)
    # A discrete value changes where the noise falls between two versions of an edge: of 2048 pixels hardly one.
    assert (~is_equal).sum() <= (0 if isinstance(likelihood, Gaussian) else 2)
    again = (await client.sample(NUM_ROWS, seed=SEED, observation="sample")).samples
    assert served.tobytes() == again.tobytes()


async def test_the_figures_of_the_bundle_are_those_of_the_service(
    client: AsyncVaeClient, trained: Trained
) -> None:
    """The ELBO that the manifest states is what Score gives for the same data, apart from the draws of latents."""
    evaluation, model = trained.evaluation, await client.get_model()
    assert model.metrics["elbo"] == evaluation.elbo.value
    assert evaluation.num_images == NUM_ROWS
    rows = observed_rows(trained.vae.config, trained.images, seed=evaluation.seed).numpy()
    scores = (await client.score(rows, num_latents=64, seed=SEED)).score
    # Two estimates of one expectation for each image, of 20 and of 64 latents; the spread of single ones is known.
    single = np.stack([(await client.score(rows, seed=seed)).score for seed in range(20)])
    variance = single.var(axis=0, ddof=1).sum() * (1 / evaluation.num_importance_samples + 1 / 64)
    assert abs(float(scores.mean()) - evaluation.elbo.value) < 5 * np.sqrt(variance) / NUM_ROWS
