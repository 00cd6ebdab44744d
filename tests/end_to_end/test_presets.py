"""Every preset makes a bundle that both engines serve: its architecture, its likelihood, its image size."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from serving import noise
from serving.client import VaeClient
from tests.end_to_end.service import running
from training import checkpoint, data, presets
from training.checkpoint import RunFolder, averaged_model
from training.data import Dataset
from training.evaluate import evaluate_run
from training.export import export
from training.models.vae import VAE
from training.trainer import fit

pytestmark = [pytest.mark.slow]

CPU = torch.device("cpu")
PARITY = 1e-5
"""Largest difference between torch and the service, absolute and relative: the export's own gate on fp32."""

NUM_ROWS = 9
SEED = 11


class Exported(NamedTuple):
    """A preset, trained for a few steps and exported."""

    bundle: Path
    vae: VAE
    images: NDArray[np.uint8]


def strokes(shape: tuple[int, ...]) -> Dataset:
    """Return images of the preset's size that have something to learn, so that no file is needed: blurred bars."""
    _, height, width = shape
    unit = noise.uniform(SEED, 640, 4)
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32)
    angle = (np.pi * unit[:, 0])[:, None, None]
    offset = (unit[:, 1] - 0.5)[:, None, None] * height / 2
    distance = np.cos(angle) * (rows - height / 2) + np.sin(angle) * (columns - width / 2) - offset
    pixels = (255 * np.exp(-(distance**2) / (height / 4))).astype(np.uint8).reshape(-1, *shape)
    return Dataset("strokes", pixels[:512], pixels[512:576], pixels[576:], sha256="0" * 64, split="in order")


@pytest.fixture(scope="module", params=[name for name in presets.PRESETS if name != "smoke"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Return a preset's bundle: its own networks and likelihood, two epochs on few images."""
    config = presets.shortened(presets.named(request.param))
    folder = tmp_path_factory.mktemp(request.param)
    run = RunFolder(folder)
    dataset = strokes(data.described(config.data).data_shape)
    fit(config, dataset, run, device=CPU)
    evaluation = evaluate_run(run, dataset, config.evaluation, device=CPU)
    export(run, dataset, evaluation, folder / "bundle")
    vae = averaged_model(checkpoint.load(run.best), dataset.data_shape, CPU)
    return Exported(folder / "bundle", vae, dataset.test[:NUM_ROWS])


@pytest.fixture(scope="module", params=["in-process", pytest.param("ray", marks=pytest.mark.ray)])
def client(request: pytest.FixtureRequest, exported: Exported) -> Iterator[VaeClient]:
    """Serve the bundle with one engine and return a client of it."""
    with running(exported.bundle, "--engine", request.param) as service:
        with VaeClient(service.target, timeout_s=30) as client:
            yield client
        assert service.stop() == 0


@torch.no_grad()
def test_every_preset_is_served_by_both_engines(client: VaeClient, exported: Exported) -> None:
    """Posteriors, reconstructions, samples and scores are those of torch, whatever the preset."""
    posterior = exported.vae.posterior(torch.from_numpy(exported.images / np.float32(255)))
    encoded = client.encode(exported.images)
    np.testing.assert_allclose(encoded.mean, posterior.mean, rtol=PARITY, atol=PARITY)
    np.testing.assert_allclose(encoded.log_var, posterior.log_var, rtol=PARITY, atol=PARITY)

    expected = exported.vae.likelihood(posterior.mean).mean
    reconstructed = client.reconstruct(exported.images).reconstruction
    np.testing.assert_allclose(reconstructed, expected, rtol=PARITY, atol=PARITY)

    latents = torch.from_numpy(noise.normal(SEED, NUM_ROWS, exported.vae.latent_dim))
    sampled = client.sample(NUM_ROWS, seed=SEED)
    np.testing.assert_allclose(sampled.samples, exported.vae.likelihood(latents).mean, rtol=PARITY, atol=PARITY)
    scores = client.score(exported.images, num_latents=4, seed=SEED)
    np.testing.assert_allclose(scores.score, scores.log_likelihood - scores.kl, rtol=1e-5)
    assert np.isfinite(scores.score).all()
