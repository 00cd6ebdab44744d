"""Train briefly, export, serve with both engines, and hold the answers against torch and against each other."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from serving import noise
from serving.client import DeadlineExceeded, Unavailable, VaeClient
from tests.end_to_end.conftest import command
from tests.end_to_end.service import Service, running, wait_until
from training.checkpoint import RunFolder, averaged_model, load
from training.models.vae import VAE

pytestmark = [pytest.mark.ray, pytest.mark.slow]

PARITY = 1e-5
"""Largest difference between torch and the service, absolute and relative: the export's own gate on fp32."""

NUM_ROWS = 32
SEED = 7


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> NDArray[np.uint8]:
    """Return test digits, as `vae-train data` writes them."""
    file = tmp_path_factory.mktemp("data") / "test.npy"
    done = command("training", "data", "digits", "--split", "test", "--out", str(file))
    assert done.returncode == 0, done.stderr
    rows: NDArray[np.uint8] = np.load(file)[:NUM_ROWS]
    return rows


@pytest.fixture(scope="module")
def model(run_dir: Path, images: NDArray[np.uint8]) -> VAE:
    """Return the model in torch, as it was exported."""
    return averaged_model(load(RunFolder(run_dir).best), images.shape[1:], torch.device("cpu"))


@pytest.fixture(scope="module", params=["in-process", "ray"])
def service(request: pytest.FixtureRequest, trained_bundle: Path) -> Iterator[Service]:
    """Run the service with one engine; at the end it must stop cleanly."""
    with running(trained_bundle, "--engine", request.param) as service:
        yield service
        assert service.stop() == 0


@pytest.fixture
def client(service: Service) -> Iterator[VaeClient]:
    """Return a client of it."""
    with VaeClient(service.target, timeout_s=30) as client:
        yield client


def test_posteriors_and_reconstructions_equal_those_of_torch(
    client: VaeClient, model: VAE, images: NDArray[np.uint8]
) -> None:
    """What was trained is what is served."""
    with torch.no_grad():
        posterior = model.posterior(torch.from_numpy(images / np.float32(255)))
        expected = model.likelihood(posterior.mean).mean
    encoded = client.encode(images)
    np.testing.assert_allclose(encoded.mean, posterior.mean, rtol=PARITY, atol=PARITY)
    np.testing.assert_allclose(encoded.log_var, posterior.log_var, rtol=PARITY, atol=PARITY)
    reconstructed = client.reconstruct(images).reconstruction
    np.testing.assert_allclose(reconstructed, expected, rtol=PARITY, atol=PARITY)


def test_samples_equal_those_of_torch_for_the_same_seed(client: VaeClient, model: VAE) -> None:
    """Latents come from the shared noise, and torch decodes them to the same pixels."""
    sampled = client.sample(NUM_ROWS, seed=SEED, include_latents=True)
    latents = noise.normal(SEED, NUM_ROWS, model.latent_dim)
    np.testing.assert_array_equal(sampled.latents, latents)
    with torch.no_grad():
        expected = model.likelihood(torch.from_numpy(latents)).mean
    np.testing.assert_allclose(sampled.samples, expected, rtol=PARITY, atol=PARITY)


def test_batched_answers_are_bit_equal_to_single_ones(client: VaeClient, images: NDArray[np.uint8]) -> None:
    """A row's answer depends on the row alone, whatever shares its run."""
    together = client.encode(images)
    with ThreadPoolExecutor(NUM_ROWS) as pool:  # at once, so that the service batches them as it likes
        single = list(pool.map(lambda index: client.encode(images[index : index + 1]), range(NUM_ROWS)))
    np.testing.assert_array_equal(together.mean, np.concatenate([one.mean for one in single]))
    np.testing.assert_array_equal(together.log_var, np.concatenate([one.log_var for one in single]))


def fingerprint(client: VaeClient, images: NDArray[np.uint8]) -> list[bytes]:
    """Return the bytes of every seeded answer: whole, in parts, and among other calls."""

    def part(first_row: int) -> NDArray[np.float32]:
        return client.sample(4, seed=SEED, first_row=first_row, observation="sample").samples

    with ThreadPoolExecutor(8) as pool:
        parts = np.concatenate(list(pool.map(part, range(0, NUM_ROWS, 4))))
    whole = client.sample(NUM_ROWS, seed=SEED, observation="sample").samples
    np.testing.assert_array_equal(parts, whole)
    answers = [
        whole,
        client.sample(NUM_ROWS, seed=SEED, temperature=0.5).samples,
        client.encode(images, num_latents=3, seed=SEED).latents,
        client.decode(client.encode(images).mean, observation="sample", seed=SEED).reconstruction,
        client.reconstruct(images, observation="sample", seed=SEED).reconstruction,
        client.interpolate(images[:4], images[4:8], 5, interpolation="spherical").observations,
    ]
    return [np.asarray(answer).tobytes() for answer in answers]


def test_the_same_seed_gives_the_same_bytes_from_any_engine_and_after_a_restart(
    client: VaeClient, trained_bundle: Path, images: NDArray[np.uint8]
) -> None:
    """Answers are functions of request and model: a new process of the other kind gives the same bytes."""
    before = fingerprint(client, images)
    with running(trained_bundle, "--engine", "in-process") as other, VaeClient(other.target) as second:
        assert fingerprint(second, images) == before
        assert other.stop() == 0


def test_an_answer_names_the_version_that_the_bundle_has(client: VaeClient, trained_bundle: Path) -> None:
    """The version travels from the manifest to every answer."""
    model = client.get_model()
    assert model.model_version in (trained_bundle / "manifest.json").read_text()
    assert client.sample(1).model_version == model.model_version
    assert model.encoder_provider == model.decoder_provider == "CPUExecutionProvider"
    assert model.metrics["elbo"] < 0


def test_calls_in_flight_end_right_while_the_service_stops(trained_bundle: Path) -> None:
    """A stop drains: health says so first, and no call ends in a way outside the contract."""
    with running(trained_bundle, "--engine", "ray") as service, ThreadPoolExecutor(8) as pool:
        with VaeClient(service.target) as client:
            expected = client.sample(16, seed=SEED).samples
        outcomes: list[str] = []

        def call_until_gone() -> None:
            # No retries: this is the raw view, in which a lost call would show.
            with VaeClient(service.target, timeout_s=20, options=[("grpc.enable_retries", 0)]) as client:
                while True:
                    try:
                        samples = client.sample(16, seed=SEED).samples
                    except (Unavailable, DeadlineExceeded) as error:
                        outcomes.append(error.code.name)
                        return
                    outcomes.append("right" if np.array_equal(samples, expected) else "wrong")

        callers = [pool.submit(call_until_gone) for _ in range(8)]
        wait_until(lambda: len(outcomes) > 200, "load runs", timeout_s=30)
        assert service.stop() == 0
        for caller in callers:
            caller.result(timeout=60)  # raises what a call ended with, if it is outside the contract
        assert "wrong" not in outcomes
        assert outcomes.count("right") > 200


def test_a_killed_decoder_comes_back_and_no_answer_is_wrong(trained_bundle: Path) -> None:
    """A lost replica costs clear errors at most; Serve replaces it and health recovers."""
    with running(trained_bundle, "--engine", "ray") as service, VaeClient(service.target, timeout_s=20) as client:
        expected = client.sample(4, seed=SEED).samples
        victim = service.replica("Decoder")
        victim.kill()
        right = 0
        for _ in range(40):
            try:
                np.testing.assert_array_equal(client.sample(4, seed=SEED).samples, expected)
                right += 1
            except (Unavailable, DeadlineExceeded):
                continue
        assert right > 0
        wait_until(service.is_serving, "health recovers", timeout_s=30)
        np.testing.assert_array_equal(client.sample(4, seed=SEED).samples, expected)
        assert service.replica("Decoder").pid != victim.pid
        assert service.stop() == 0
