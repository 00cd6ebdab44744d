"""Gaussian and categorical models: every method over the wire, and what one call may take of memory."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import special, stats

from protos.inference import inference_pb2 as oip
from serving import bundle, noise
from serving.bundle import Bundle, DecoderOutput
from serving.client import AsyncVaeClient
from serving.config import ServingConfig
from serving.engine.in_process import InProcessEngine
from serving.engine.protocol import Rows
from serving.gateway.operations import Bound, ObservationDraw, Operations
from serving.standalone import in_process
from serving.tickets import Ticket
from tests.bundles import LikelihoodName, small_bundle
from tests.serving.harness import Oracle, settings, wire
from tests.serving.inference_harness import DATATYPES, ask, infer
from tests.serving.inference_harness import request as infer_request

NUM_LEVELS = 5
NEVER = float("inf")
FLOAT32 = 2e-5
"""float32 keeps seven digits of a mean; divided by a small variance it loses up to two of them."""

MAX_RESPONSE_BYTES = 64 * 1024
"""The smallest that may be configured: 204 rows of parameters of five levels of 16 pixels."""


class Served(NamedTuple):
    """A small model of one likelihood, and a client of its service."""

    bundle: Bundle
    config: ServingConfig
    client: AsyncVaeClient
    port: int


@pytest.fixture(params=["gaussian", "categorical"])
async def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Served]:
    """Serve a small model in this process."""
    likelihood: LikelihoodName = request.param
    num_levels = NUM_LEVELS if likelihood == "categorical" else None
    folder = small_bundle(tmp_path_factory.mktemp("b") / "b", likelihood=likelihood, num_levels=num_levels)
    config = settings(folder)
    async with in_process(config) as server, AsyncVaeClient(f"127.0.0.1:{server.port}") as client:
        yield Served(bundle.read(str(folder)), config, client, server.port)


@pytest.fixture
def pixels(seed: int) -> NDArray[np.uint8]:
    """Return six rows of random pixels."""
    return np.random.default_rng(seed).integers(0, 256, (6, 1, 4, 4), dtype=np.uint8)


@pytest.fixture
def latents(seed: int) -> NDArray[np.float32]:
    """Return seven rows of latents."""
    return np.random.default_rng(seed).standard_normal((7, 2)).astype(np.float32)


def _expected_draws(model: Bundle, latents: Rows, unit: NDArray[np.float32], standard: Rows) -> Rows:
    """Return observations in float64, from the definition and the noise."""
    oracle = Oracle(model)
    if model.manifest.likelihood == "gaussian":
        mean, log_var = oracle.decode(latents), oracle.decode(latents, "log_var").astype(np.float64)
        return np.asarray(np.clip(mean + np.exp(0.5 * log_var) * standard.reshape(mean.shape), 0, 1))
    edges = special.softmax(oracle.decode(latents, "logits").astype(np.float64), axis=1).cumsum(axis=1)
    levels = (edges[:, :-1] <= unit.reshape(len(latents), 1, 1, 4, 4)).sum(axis=1)
    return np.asarray(levels / (NUM_LEVELS - 1))


def _expected_log_likelihood(model: Bundle, unit: Rows, flat: Rows, num_latents: int) -> Rows:
    """Return log p(x | z) in float64, shape (n, num_latents), from the densities themselves."""
    oracle, num_rows = Oracle(model), len(unit)
    shape = num_rows, num_latents, 16
    data = unit.reshape(num_rows, 1, 16).astype(np.float64)
    if model.manifest.likelihood == "gaussian":
        scale = np.exp(0.5 * oracle.decode(flat, "log_var").astype(np.float64)).reshape(num_rows, num_latents, 1)
        mean = oracle.decode(flat).reshape(shape)
        return np.asarray(np.sum(stats.norm.logpdf(data, mean, scale), axis=2))
    table = special.log_softmax(oracle.decode(flat, "logits").astype(np.float64), axis=1)
    table = table.reshape(num_rows, num_latents, NUM_LEVELS, 16)
    nearest = np.abs(data[..., None] - np.linspace(0, 1, NUM_LEVELS)).argmin(axis=3)[:, :, None]
    chosen = np.take_along_axis(table, np.broadcast_to(nearest, (num_rows, num_latents, 1, 16)), axis=2)
    return np.asarray(chosen[:, :, 0].sum(axis=2))


async def test_the_model_says_what_it_is(served: Served) -> None:
    """GetModel names the likelihood and its levels."""
    model, manifest = await served.client.get_model(), served.bundle.manifest
    assert (model.likelihood, model.num_levels) == (manifest.likelihood, manifest.num_levels or 0)


async def test_means_are_those_of_the_graph(
    served: Served, latents: NDArray[np.float32], pixels: NDArray[np.uint8], seed: int
) -> None:
    """Decode, Sample, Reconstruct and Interpolate return the mean's own bytes, whatever the parameters are."""
    client, oracle = served.client, Oracle(served.bundle)
    assert (await client.decode(latents)).reconstruction.tobytes() == oracle.decode(latents).tobytes()
    sampled = await client.sample(7, seed=seed)
    assert sampled.samples.tobytes() == oracle.decode(noise.normal(seed, 7, 2)).tobytes()
    reconstructed = (await client.reconstruct(pixels)).reconstruction
    assert reconstructed.tobytes() == oracle.decode(oracle.encode(pixels)[0]).tobytes()
    path = await client.interpolate(latents[:3], latents[3:6], 2, kind="latents")
    assert path.observations[:, 0].tobytes() == oracle.decode(latents[:3]).tobytes()


async def test_observations_are_drawn_from_the_likelihood(
    served: Served, latents: NDArray[np.float32], pixels: NDArray[np.uint8], seed: int
) -> None:
    """Each value follows from the decoder's parameters and the noise of (seed, row, pixel), in every method."""
    client, model = served.client, served.bundle
    options: Any = {"observation": "sample", "seed": seed, "first_row": 11}

    def expected(rows: Rows) -> Rows:
        unit = noise.uniform(seed, len(rows), 16, first_row=11)
        standard = noise.normal(seed, len(rows), 16, first_row=11, stream=noise.Stream.OBSERVATION)
        return _expected_draws(model, rows, unit, standard)

    drawn = (await client.decode(latents, **options)).reconstruction
    np.testing.assert_allclose(drawn, expected(latents), rtol=0, atol=1e-6)
    reconstructed = (await client.reconstruct(pixels, **options)).reconstruction
    np.testing.assert_allclose(reconstructed, expected(Oracle(model).encode(pixels)[0]), rtol=0, atol=1e-6)
    sampled = (await client.sample(7, **options)).samples
    np.testing.assert_allclose(sampled, expected(noise.normal(seed, 7, 2, first_row=11)), rtol=0, atol=1e-6)
    for values in (drawn, reconstructed, sampled):
        assert values.dtype == np.float32
        assert ((values >= 0) & (values <= 1)).all()


@pytest.mark.parametrize(("output_type", "tolerance"), [("float16", 2.0**-11), ("uint8", 0.5 / 255 + 1e-6)])
async def test_smaller_types_differ_by_rounding_alone(
    served: Served,
    latents: NDArray[np.float32],
    seed: int,
    output_type: Any,  # noqa: ANN401 - a literal
    tolerance: float,
) -> None:
    """Means and draws are in [0, 1], so that they fit into every type that is offered."""
    for observation in ("mean", "sample"):
        options: Any = {"observation": observation, "seed": seed}
        whole = (await served.client.decode(latents, **options)).reconstruction
        small = (await served.client.decode(latents, output_type=output_type, **options)).reconstruction
        assert small.dtype == output_type
        values = small.astype(np.float32) / (np.float32(255) if output_type == "uint8" else np.float32(1))
        assert np.abs(values - whole).max() <= tolerance


async def test_draws_may_be_split_resumed_and_streamed(served: Served, seed: int) -> None:
    """One sequence of rows: in parts, among other callers, and in chunks it has the bytes of one draw."""
    client, options = served.client, {"seed": seed, "observation": "sample"}
    whole = (await client.sample(40, first_row=5, **options)).samples  # type: ignore[arg-type]  # of two types
    starts = range(0, 40, 8)
    parts = await asyncio.gather(*(client.sample(8, first_row=5 + start, **options) for start in starts))  # type: ignore[arg-type]
    assert b"".join(part.samples.tobytes() for part in parts) == whole.tobytes()
    chunks = client.sample_stream(40, first_row=5, max_chunk_rows=7, **options)  # type: ignore[arg-type]
    assert b"".join([chunk.samples.tobytes() async for chunk in chunks]) == whole.tobytes()


@pytest.mark.parametrize("bound", ["elbo", "importance-weighted"])
@pytest.mark.parametrize("num_latents", [1, 4])
async def test_scores_are_those_of_the_densities(
    served: Served, pixels: NDArray[np.uint8], seed: int, bound: Bound, num_latents: int
) -> None:
    """In float64, from the densities themselves and the latents that Encode draws: the same bounds."""
    client, oracle = served.client, Oracle(served.bundle)
    drawn = (await client.encode(pixels, num_latents=num_latents, seed=seed)).latents
    assert drawn is not None
    likelihood = _expected_log_likelihood(served.bundle, pixels / 255, drawn.reshape(-1, 2), num_latents)
    mean, log_var = (part.astype(np.float64) for part in oracle.encode(pixels))
    kl = 0.5 * (mean**2 + np.exp(log_var) - 1 - log_var).sum(axis=1)
    weights = likelihood + np.sum(stats.norm.logpdf(drawn), axis=2)
    weights -= np.sum(stats.norm.logpdf(drawn, mean[:, None], np.exp(log_var / 2)[:, None]), axis=2)
    expected = (
        likelihood.mean(axis=1) - kl
        if bound == "elbo"
        else special.logsumexp(weights, axis=1) - np.log(num_latents)
    )
    scored = await client.score(pixels, bound=bound, num_latents=num_latents, seed=seed)
    np.testing.assert_allclose(scored.score, expected, rtol=FLOAT32, atol=FLOAT32)
    np.testing.assert_allclose(scored.log_likelihood, likelihood.mean(axis=1), rtol=FLOAT32, atol=FLOAT32)
    floats = await client.score(pixels / np.float32(255), bound=bound, num_latents=num_latents, seed=seed)
    assert floats.score.tobytes() == scored.score.tobytes()


async def test_the_other_protocol_gives_the_same(served: Served, latents: NDArray[np.float32], seed: int) -> None:
    """The model `decoder` returns the bytes of Decode, and says what an observation is."""
    async with wire(served.port) as channel:
        for output_type in ("float32", "uint8"):
            for observation in ("mean", "sample"):
                options: Any = {"observation": observation, "output_type": output_type, "seed": seed}
                expected = (await served.client.decode(latents, **options)).reconstruction
                asked: Any = {"observation": observation, "output_datatype": DATATYPES[output_type], "seed": seed}
                answer = await infer(channel, infer_request("decoder", latents, **asked))
                assert answer.raw_output_contents[0] == expected.tobytes()
                assert list(answer.outputs[0].shape) == [7, 1, 4, 4]
        for name in ("decoder", "prior"):
            found = await ask(channel, "ModelMetadata", oip.ModelMetadataRequest(name=name))
            assert found.properties["likelihood"] == served.bundle.manifest.likelihood
            drawn = {"gaussian": "clipped to [0, 1]", "categorical": "levels of intensity"}
            assert drawn[served.bundle.manifest.likelihood] in found.properties["parameter.observation"]
            assert [(output.name, list(output.shape)) for output in found.outputs] == [
                ("samples" if name == "prior" else "reconstruction", [-1, 1, 4, 4])
            ]


class CountingEngine(InProcessEngine):
    """Remembers how many rows of parameters were asked for in each run."""

    num_rows: list[int]

    async def decode(
        self, latents: Rows, timeout_s: float, outputs: Sequence[DecoderOutput] = ("mean",)
    ) -> tuple[Rows, ...]:
        """Count rows whose parameters are asked for."""
        if outputs != ("mean",):
            self.num_rows.append(len(latents))
        return await super().decode(latents, timeout_s, outputs)


async def test_parameters_of_many_rows_are_taken_in_parts(served: Served, seed: int) -> None:
    """A call whose parameters are larger than an answer may be holds a part of them at a time; no bit differs."""
    model = served.bundle
    rows = np.random.default_rng(seed).integers(0, 256, (110, 1, 4, 4), dtype=np.uint8)
    answers, counted = [], []
    for limit in ("", f"limits.max_response_bytes={MAX_RESPONSE_BYTES}"):
        config = served.config.override(["batching.max_batch_rows=4096", *filter(None, [limit])])
        engine = CountingEngine(model, config)
        engine.num_rows = []
        charged: list[int] = []

        def charge(_client: str, num_rows: int, *, charged: list[int] = charged) -> None:
            charged.append(num_rows)

        operations = Operations(engine, model.manifest, config, charge=charge)
        ticket = Ticket(NEVER)
        scores = await operations.score(rows, num_latents=4, seed=seed, ticket=ticket)
        samples = await operations.sample(440, seed=seed, observe=True, ticket=Ticket(NEVER))
        picked = await operations.sample_rows(
            np.arange(440, dtype=np.uint64)[::-1], seed=seed, observe=True, ticket=Ticket(NEVER)
        )
        decoded = await operations.decode(
            noise.normal(seed, 440, 2), draw=ObservationDraw(seed), ticket=Ticket(NEVER)
        )
        assert ticket.num_rows == 550
        assert charged == [550, 440, 440, 440]
        assert picked.observations[::-1].tobytes() == samples.observations.tobytes() == decoded.tobytes()
        answers.append((scores.score.tobytes(), scores.log_likelihood.tobytes(), decoded.tobytes()))
        counted.append(max(engine.num_rows))
        await operations.close()
        await engine.close()
    assert answers[0] == answers[1]
    assert counted[0] == 440
    most = MAX_RESPONSE_BYTES // (4 * 16 * NUM_LEVELS) if model.manifest.num_levels else 440
    assert counted[1] <= most
