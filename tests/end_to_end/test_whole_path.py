"""Train briefly, export, serve with both engines, and hold the answers against torch and against each other."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import grpc
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from protos.inference import inference_pb2 as oip
from serving import noise
from serving.client import DeadlineExceeded, Unavailable, VaeClient
from tests.end_to_end.conftest import command
from tests.end_to_end.service import Service, running, wait_until
from training import gaussians
from training.checkpoint import RunFolder, averaged_model, load
from training.models.vae import VAE
from training.objectives import elbo, importance_weighted_bound

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


def test_the_same_rows_have_the_same_bytes_in_every_method_and_protocol(
    client: VaeClient, service: Service
) -> None:
    """Sample, SampleStream in any chunking and resumed, and ModelInfer in any order give one sequence of rows."""
    rows, first = 200, 11
    whole = client.sample(rows, seed=SEED, first_row=first).samples
    for chunk in (1, 7, 64, 200):
        chunks = client.sample_stream(rows, seed=SEED, first_row=first, max_chunk_rows=chunk)
        parts = [part.samples for part in chunks]
        assert [len(part) for part in parts[:-1]] == [chunk] * (len(parts) - 1)
        assert np.concatenate(parts).tobytes() == whole.tobytes()
    begun = next(client.sample_stream(rows, seed=SEED, first_row=first, max_chunk_rows=30))
    missing = rows - len(begun.samples)
    rest = client.sample_stream(missing, seed=SEED, first_row=begun.first_row + len(begun.samples))
    resumed = [begun.samples, *(part.samples for part in rest)]
    assert np.concatenate(resumed).tobytes() == whole.tobytes()
    numbers = np.random.default_rng(SEED).permutation(np.arange(first, first + rows, dtype=np.uint64))
    request = oip.ModelInferRequest(
        model_name="prior",
        inputs=[oip.ModelInferRequest.InferInputTensor(name="row", datatype="UINT64", shape=[rows, 1])],
        raw_input_contents=[numbers.tobytes()],
        parameters={"seed": oip.InferParameter(int64_param=SEED)},
    )
    with grpc.insecure_channel(service.target) as channel:
        infer: Any = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer", response_deserializer=oip.ModelInferResponse.FromString
        )
        answer = infer(request.SerializeToString(), timeout=30)
    shuffled = np.frombuffer(answer.raw_output_contents[0], np.float32).reshape(whole.shape)
    assert shuffled.tobytes() == whole[(numbers - first).astype(np.int64)].tobytes()


@pytest.mark.parametrize("bound", ["elbo", "importance-weighted"])
def test_scores_equal_those_of_torch(
    client: VaeClient, model: VAE, images: NDArray[np.uint8], bound: Literal["elbo", "importance-weighted"]
) -> None:
    """The bounds that the service computes are those of the training package, with the same noise."""
    num_latents, dim = 5, client.get_model().latent_dim
    standard = noise.normal(SEED, len(images), num_latents * dim, stream=noise.Stream.POSTERIOR)
    draws = torch.from_numpy(standard.reshape(len(images), num_latents, dim))
    data = torch.from_numpy(images / np.float32(255))
    with torch.no_grad():
        bounds = [elbo(model, data, draws[:, k]) for k in range(num_latents)]
        mean, log_var = model.posterior(data)
        latents = [gaussians.rsample(mean, log_var, draws[:, k]) for k in range(num_latents)]
        weights = [
            one.log_likelihood
            + gaussians.standard_normal_log_prob(z).double()
            - gaussians.log_prob(z, mean, log_var).double()
            for one, z in zip(bounds, latents, strict=True)
        ]
        log_likelihood = torch.stack([one.log_likelihood for one in bounds]).mean(0)
        expected = (
            log_likelihood - bounds[0].kl
            if bound == "elbo"
            else importance_weighted_bound(torch.stack(weights, dim=-1))
        )
    scored = client.score(images, bound=bound, num_latents=num_latents, seed=SEED)
    # Sums over 64 pixels of terms that agree within PARITY each.
    tolerance = images[0].size * PARITY
    np.testing.assert_allclose(scored.score, expected, rtol=PARITY, atol=tolerance)
    np.testing.assert_allclose(scored.log_likelihood, log_likelihood, rtol=PARITY, atol=tolerance)
    np.testing.assert_allclose(scored.kl, bounds[0].kl, rtol=PARITY, atol=tolerance)


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
