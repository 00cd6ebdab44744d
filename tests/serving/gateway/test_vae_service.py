"""Each method of the typed API over the wire: right answers against an oracle, and each way to be wrong."""

import asyncio
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.message import Message
from numpy.typing import NDArray

from protos.vae.v1 import vae_pb2 as pb
from serving import noise
from serving.bundle import Bundle
from serving.client import AsyncVaeClient
from serving.gateway.server import GatewayServer
from serving.standalone import in_process
from serving.tensors import from_message, to_message
from tests.bundles import small_bundle
from tests.serving.harness import (
    Oracle,
    PuppetEngine,
    call,
    eventually,
    failure,
    sample_stream,
    serving_with,
    settings,
    trailers,
    wire,
)

ANY = frozenset({pb.DATA_TYPE_FLOAT32, pb.DATA_TYPE_FLOAT16, pb.DATA_TYPE_UINT8})
FLOAT16_ROUNDING = 2.0**-11
"""Half a unit in the last place of float16 at one."""

UINT8_ROUNDING = 0.5 / 255 + 1e-6
"""Half a 255th, and the rounding of float32."""


@pytest.fixture(scope="module")
def oracle(small: Bundle) -> Oracle:
    """Return the bundle's graphs, run directly and one row at a time."""
    return Oracle(small)


@pytest.fixture
def pixels(seed: int) -> NDArray[np.uint8]:
    """Return six rows of random pixels."""
    return np.random.default_rng(seed).integers(0, 256, (6, 1, 4, 4), dtype=np.uint8)


@pytest.fixture
def latents(seed: int) -> NDArray[np.float32]:
    """Return six rows of latents."""
    return np.random.default_rng(seed).standard_normal((6, 2)).astype(np.float32)


def _array(tensor: pb.Tensor) -> NDArray[Any]:
    return from_message(tensor, field="response", accept=ANY)


async def test_encode_gives_posteriors(
    client: AsyncVaeClient, oracle: Oracle, small: Bundle, pixels: NDArray[np.uint8]
) -> None:
    """Means and log-variances are the graph's, bit for bit, whatever rows share a run."""
    encoded = await client.encode(pixels)
    mean, log_var = oracle.encode(pixels)
    assert encoded.mean.tobytes() == mean.tobytes()
    assert encoded.log_var.tobytes() == log_var.tobytes()
    assert (encoded.latents, encoded.seed, encoded.model_version) == (None, None, small.manifest.version)


async def test_encode_draws_latents_on_request(
    client: AsyncVaeClient, pixels: NDArray[np.uint8], seed: int
) -> None:
    """Latents are mean + exp(log_var / 2) * noise of the posterior's stream; the seed comes back."""
    encoded = await client.encode(pixels, num_latents=3, seed=seed)
    standard = noise.normal(seed, 6, 6, stream=noise.Stream.POSTERIOR).reshape(6, 3, 2)
    expected = encoded.mean[:, None] + np.exp(np.float32(0.5) * encoded.log_var)[:, None] * standard
    np.testing.assert_array_equal(encoded.latents, expected)
    assert encoded.seed == seed


async def test_decode_gives_means(
    client: AsyncVaeClient, oracle: Oracle, small: Bundle, latents: NDArray[np.float32]
) -> None:
    """Means of p(x | z) are the graph's, bit for bit."""
    decoded = await client.decode(latents)
    assert decoded.reconstruction.tobytes() == oracle.decode(latents).tobytes()
    assert (decoded.seed, decoded.model_version) == (None, small.manifest.version)


async def test_sample_gives_decoded_noise(
    client: AsyncVaeClient, oracle: Oracle, small: Bundle, seed: int
) -> None:
    """Samples are decodings of the prior's noise; latents come on request, the seed and the version always."""
    sampled = await client.sample(5, seed=seed, first_row=3, temperature=0.5, include_latents=True)
    latents = noise.normal(seed, 5, 2, first_row=3) * np.float32(0.5)
    np.testing.assert_array_equal(sampled.latents, latents)
    assert sampled.samples.tobytes() == oracle.decode(latents).tobytes()
    assert (sampled.seed, sampled.model_version) == (seed, small.manifest.version)
    assert (await client.sample(5, seed=seed)).latents is None


async def test_reconstruct_decodes_the_mean(
    client: AsyncVaeClient, oracle: Oracle, pixels: NDArray[np.uint8]
) -> None:
    """A reconstruction is the decoding of the posterior mean, not of a draw."""
    reconstructed = await client.reconstruct(pixels)
    assert reconstructed.reconstruction.tobytes() == oracle.decode(oracle.encode(pixels)[0]).tobytes()


async def test_interpolate_walks_between_latents(
    client: AsyncVaeClient, oracle: Oracle, small: Bundle, latents: NDArray[np.float32]
) -> None:
    """Three steps are the start, the middle and the end, one path per row."""
    result = await client.interpolate(latents[:3], latents[3:], 3, kind="latents", include_latents=True)
    path = np.stack([latents[:3], (latents[:3].astype(np.float64) + latents[3:]) / 2, latents[3:]], axis=1)
    np.testing.assert_array_equal(result.latents, path.astype(np.float32))
    expected = oracle.decode(path.astype(np.float32).reshape(-1, 2)).reshape(3, 3, 1, 4, 4)
    assert result.observations.tobytes() == expected.tobytes()
    assert result.model_version == small.manifest.version


async def test_get_model_says_what_is_loaded(client: AsyncVaeClient, small: Bundle) -> None:
    """Name, version, shapes, limits and providers are the manifest's and the configuration's."""
    model = await client.get_model()
    manifest = small.manifest
    assert (model.name, model.model_version, model.dataset) == (manifest.name, manifest.version, "none")
    assert (model.data_shape, model.latent_dim) == (manifest.data_shape, manifest.latent_dim)
    assert (model.likelihood, model.prior, model.noise_algorithm) == (
        "bernoulli",
        "standard_normal",
        noise.ALGORITHM,
    )
    assert model.metrics == manifest.metrics
    assert model.limits == {
        "max_rows": 4096,
        "max_latents_per_row": 64,
        "max_request_bytes": 16 * 2**20,
        "max_deadline_s": 60.0,
        "max_stream_rows": 10_000_000,
        "max_stream_s": 600.0,
    }
    assert (model.encoder_provider, model.decoder_provider) == ("CPUExecutionProvider", "CPUExecutionProvider")


@pytest.mark.parametrize(
    ("output_type", "dtype", "tolerance"),
    [("float32", np.float32, 0.0), ("float16", np.float16, FLOAT16_ROUNDING), ("uint8", np.uint8, UINT8_ROUNDING)],
)
async def test_output_types_differ_by_rounding_alone(
    client: AsyncVaeClient,
    latents: NDArray[np.float32],
    output_type: Any,  # noqa: ANN401 - a literal
    dtype: type[np.generic],
    tolerance: float,
) -> None:
    """Smaller types are the nearest values of the float32 answer."""
    whole = (await client.decode(latents)).reconstruction
    small = (await client.decode(latents, output_type=output_type)).reconstruction
    assert small.dtype == dtype
    values = small / np.float32(255) if dtype is np.uint8 else small.astype(np.float32)
    assert np.abs(values - whole).max() <= tolerance


@pytest.mark.parametrize("output_type", ["float32", "float16", "uint8"])
async def test_observations_are_zeros_and_ones(
    client: AsyncVaeClient,
    latents: NDArray[np.float32],
    seed: int,
    output_type: Any,  # noqa: ANN401 - a literal
) -> None:
    """A draw from p(x | z) is binary in every type (0 and 255 as uint8), and repeats with its seed."""
    first, again, other = [
        await client.decode(latents, observation="sample", seed=own, output_type=output_type)
        for own in (seed, seed, seed + 1)
    ]
    one = 255 if output_type == "uint8" else 1
    assert set(np.unique(first.reconstruction)) <= {0, one}
    np.testing.assert_array_equal(first.reconstruction, again.reconstruction)
    assert (first.reconstruction != other.reconstruction).any()
    assert first.seed == seed


async def test_without_a_seed_two_calls_differ(
    client: AsyncVaeClient, pixels: NDArray[np.uint8], latents: NDArray[np.float32]
) -> None:
    """The service chooses a new seed each time, and the answer names it, so that it can be repeated."""
    sampled = [await client.sample(4) for _ in range(2)]
    assert sampled[0].seed != sampled[1].seed
    assert sampled[0].samples.tobytes() != sampled[1].samples.tobytes()
    repeated = await client.sample(4, seed=sampled[0].seed)
    assert repeated.samples.tobytes() == sampled[0].samples.tobytes()
    encoded = [await client.encode(pixels, num_latents=2) for _ in range(2)]
    assert encoded[0].seed is not None
    assert encoded[0].seed != encoded[1].seed
    for method, rows in ((client.decode, latents), (client.reconstruct, pixels)):
        drawn = await method(rows, observation="sample")
        assert drawn.seed is not None
        same = await method(rows, observation="sample", seed=drawn.seed)
        assert same.reconstruction.tobytes() == drawn.reconstruction.tobytes()


async def test_seed_zero_is_a_seed(client: AsyncVaeClient) -> None:
    """Zero is not the same as absent."""
    drawn = await client.sample(4, seed=0)
    assert drawn.seed == 0
    assert drawn.samples.tobytes() == (await client.sample(4, seed=0)).samples.tobytes()


async def test_the_loaded_version_may_be_asked_for(client: AsyncVaeClient, small: Bundle) -> None:
    """A caller who names the loaded version is served."""
    assert (await client.sample(1, model_version=small.manifest.version)).model_version == small.manifest.version


GOOD = to_message(np.zeros((2, 1, 4, 4), np.uint8))
FLOATS = to_message(np.zeros((2, 1, 4, 4), np.float32))
CODES = to_message(np.zeros((2, 2), np.float32))


def _with(base: pb.Tensor, **changes: Any) -> pb.Tensor:  # noqa: ANN401 - fields of a message
    tensor = pb.Tensor(dtype=changes.get("dtype", base.dtype), data=changes.get("data", base.data))
    tensor.shape.extend(changes.get("shape", base.shape))
    return tensor


def _filled(shape: tuple[int, ...], value: float) -> pb.Tensor:
    return to_message(np.full(shape, value, np.float32))


def _bad_tensors(field: str, good: pb.Tensor, shape: tuple[int, ...]) -> list[tuple[pb.Tensor, str, str]]:
    floats = _filled(shape, 0.5)
    return [
        (pb.Tensor(), "MISSING_FIELD", field),
        (_with(floats, dtype=pb.DATA_TYPE_UNSPECIFIED), "UNSUPPORTED_TYPE", f"{field}.dtype"),
        (_with(floats, dtype=pb.DATA_TYPE_FLOAT16), "UNSUPPORTED_TYPE", f"{field}.dtype"),
        (_with(floats, dtype=77), "UNSUPPORTED_TYPE", f"{field}.dtype"),
        (_with(floats, shape=[]), "SHAPE_MISMATCH", f"{field}.shape"),
        (_with(floats, shape=[1] * 9), "SHAPE_MISMATCH", f"{field}.shape"),
        (_with(floats, shape=[*shape, 1]), "SHAPE_MISMATCH", f"{field}.shape"),
        (to_message(np.zeros((2, 7), np.float32)), "SHAPE_MISMATCH", f"{field}.shape"),
        (to_message(np.zeros(2, np.float32)), "SHAPE_MISMATCH", f"{field}.shape"),
        (_with(good, shape=[0, *shape[1:]], data=b""), "OUT_OF_RANGE", f"{field}.shape"),
        (_with(good, shape=[-2, *shape[1:]]), "OUT_OF_RANGE", f"{field}.shape"),
        (_with(good, shape=[2**62, *shape[1:]]), "SIZE_MISMATCH", f"{field}.data"),
        (_with(good, data=good.data[:-1]), "SIZE_MISMATCH", f"{field}.data"),
        (_with(good, data=good.data + b"x"), "SIZE_MISMATCH", f"{field}.data"),
        (_filled(shape, np.nan), "NOT_FINITE", f"{field}.data"),
        (_filled(shape, np.inf), "NOT_FINITE", f"{field}.data"),
        (_filled(shape, -np.inf), "NOT_FINITE", f"{field}.data"),
    ]


def _cases() -> list[tuple[str, Message, str, str]]:
    images, codes = (2, 1, 4, 4), (2, 2)
    data = [
        *_bad_tensors("data", GOOD, images),
        (_filled(images, 1.5), "OUT_OF_RANGE", "data.data"),
        (_filled(images, -0.1), "OUT_OF_RANGE", "data.data"),
        (to_message(np.zeros((4097, 1, 4, 4), np.uint8)), "TOO_MANY_ROWS", "data.shape"),
    ]
    latents = [
        *_bad_tensors("latents", CODES, codes),
        (to_message(np.zeros((2, 2), np.uint8)), "UNSUPPORTED_TYPE", "latents.dtype"),
        (to_message(np.zeros((4097, 2), np.float32)), "TOO_MANY_ROWS", "latents.shape"),
    ]
    cases: list[tuple[str, Message, str, str]] = []
    # Every place that holds data first counts the rows of the call: more draws than rows are its own case below.
    cases += [
        ("Encode", pb.EncodeRequest(data=tensor), reason, field)
        for tensor, reason, field in data
        if reason != "TOO_MANY_ROWS"
    ]
    cases += [("Reconstruct", pb.ReconstructRequest(data=tensor), reason, field) for tensor, reason, field in data]
    cases += [("Decode", pb.DecodeRequest(latents=tensor), reason, field) for tensor, reason, field in latents]
    cases += [("Score", pb.ScoreRequest(data=tensor), reason, field) for tensor, reason, field in data]
    ends = pb.Endpoints
    cases += [
        (
            "Interpolate",
            pb.InterpolateRequest(data=ends(start=GOOD, end=tensor), num_steps=3),
            reason,
            field.replace("data", "data.end", 1),
        )
        for tensor, reason, field in data
        if list(tensor.shape) == [2, 1, 4, 4] or not tensor.dtype
    ]
    stream = pb.SampleStreamRequest
    for number in (4, 99, -1):
        unknown: Any = number
        cases += [
            ("Encode", pb.EncodeRequest(data=GOOD, output_type=unknown), "UNSUPPORTED_TYPE", "output_type"),
            ("Decode", pb.DecodeRequest(latents=CODES, output_type=unknown), "UNSUPPORTED_TYPE", "output_type"),
            ("Sample", pb.SampleRequest(num_samples=1, output_type=unknown), "UNSUPPORTED_TYPE", "output_type"),
            (
                "Reconstruct",
                pb.ReconstructRequest(data=GOOD, output_type=unknown),
                "UNSUPPORTED_TYPE",
                "output_type",
            ),
            ("Interpolate", pb.InterpolateRequest(output_type=unknown), "UNSUPPORTED_TYPE", "output_type"),
            ("Decode", pb.DecodeRequest(latents=CODES, observation=unknown), "OUT_OF_RANGE", "observation"),
            ("Sample", pb.SampleRequest(num_samples=1, observation=unknown), "OUT_OF_RANGE", "observation"),
            ("Reconstruct", pb.ReconstructRequest(data=GOOD, observation=unknown), "OUT_OF_RANGE", "observation"),
            ("Interpolate", pb.InterpolateRequest(interpolation=unknown), "OUT_OF_RANGE", "interpolation"),
            ("Score", pb.ScoreRequest(data=GOOD, bound=unknown), "OUT_OF_RANGE", "bound"),
            ("SampleStream", stream(num_samples=1, output_type=unknown), "UNSUPPORTED_TYPE", "output_type"),
            ("SampleStream", stream(num_samples=1, observation=unknown), "OUT_OF_RANGE", "observation"),
        ]
    uint8 = pb.DATA_TYPE_UINT8
    both = ends(start=CODES, end=CODES)
    cases += [
        ("Encode", pb.EncodeRequest(), "MISSING_FIELD", "data"),
        ("Encode", pb.EncodeRequest(data=GOOD, output_type=uint8), "UNSUPPORTED_TYPE", "output_type"),
        ("Encode", pb.EncodeRequest(data=GOOD, num_latents=65), "OUT_OF_RANGE", "num_latents"),
        (
            "Encode",
            pb.EncodeRequest(data=to_message(np.zeros((65, 1, 4, 4), np.uint8)), num_latents=64),
            "TOO_MANY_ROWS",
            "num_latents",
        ),
        ("Decode", pb.DecodeRequest(), "MISSING_FIELD", "latents"),
        ("Sample", pb.SampleRequest(), "OUT_OF_RANGE", "num_samples"),
        ("Sample", pb.SampleRequest(num_samples=4097), "TOO_MANY_ROWS", "num_samples"),
        ("Sample", pb.SampleRequest(num_samples=2**32 - 1), "TOO_MANY_ROWS", "num_samples"),
        ("Sample", pb.SampleRequest(num_samples=1, temperature=-1), "OUT_OF_RANGE", "temperature"),
        ("Sample", pb.SampleRequest(num_samples=1, temperature=10.01), "OUT_OF_RANGE", "temperature"),
        ("Sample", pb.SampleRequest(num_samples=1, temperature=float("nan")), "OUT_OF_RANGE", "temperature"),
        ("Sample", pb.SampleRequest(num_samples=1, temperature=float("inf")), "OUT_OF_RANGE", "temperature"),
        ("Sample", pb.SampleRequest(num_samples=1, first_row=2**63 + 1), "OUT_OF_RANGE", "first_row"),
        ("Sample", pb.SampleRequest(num_samples=1, first_row=2**64 - 1), "OUT_OF_RANGE", "first_row"),
        ("Encode", pb.EncodeRequest(data=GOOD, first_row=2**63 + 1), "OUT_OF_RANGE", "first_row"),
        ("Decode", pb.DecodeRequest(latents=CODES, first_row=2**63 + 1), "OUT_OF_RANGE", "first_row"),
        ("Reconstruct", pb.ReconstructRequest(data=GOOD, first_row=2**64 - 1), "OUT_OF_RANGE", "first_row"),
        ("Score", pb.ScoreRequest(), "MISSING_FIELD", "data"),
        ("Score", pb.ScoreRequest(data=GOOD, num_latents=65), "OUT_OF_RANGE", "num_latents"),
        ("Score", pb.ScoreRequest(data=GOOD, num_latents=2**32 - 1), "OUT_OF_RANGE", "num_latents"),
        ("Score", pb.ScoreRequest(data=GOOD, first_row=2**63 + 1), "OUT_OF_RANGE", "first_row"),
        (
            "Score",
            pb.ScoreRequest(data=to_message(np.zeros((65, 1, 4, 4), np.uint8)), num_latents=64),
            "TOO_MANY_ROWS",
            "num_latents",
        ),
        ("SampleStream", stream(), "OUT_OF_RANGE", "num_samples"),
        ("SampleStream", stream(num_samples=10_000_001), "OUT_OF_RANGE", "num_samples"),
        ("SampleStream", stream(num_samples=2**64 - 1), "OUT_OF_RANGE", "num_samples"),
        ("SampleStream", stream(num_samples=1, first_row=2**63 + 1), "OUT_OF_RANGE", "first_row"),
        ("SampleStream", stream(num_samples=1, temperature=float("nan")), "OUT_OF_RANGE", "temperature"),
        ("SampleStream", stream(num_samples=1, max_chunk_rows=4097), "TOO_MANY_ROWS", "max_chunk_rows"),
        ("SampleStream", stream(num_samples=1, max_chunk_rows=2**32 - 1), "TOO_MANY_ROWS", "max_chunk_rows"),
        ("Interpolate", pb.InterpolateRequest(num_steps=3), "MISSING_FIELD", "endpoints"),
        ("Interpolate", pb.InterpolateRequest(data=ends(end=GOOD), num_steps=3), "MISSING_FIELD", "data.start"),
        ("Interpolate", pb.InterpolateRequest(data=ends(start=GOOD), num_steps=3), "MISSING_FIELD", "data.end"),
        (
            "Interpolate",
            pb.InterpolateRequest(latents=ends(end=CODES), num_steps=3),
            "MISSING_FIELD",
            "latents.start",
        ),
        ("Interpolate", pb.InterpolateRequest(latents=both), "OUT_OF_RANGE", "num_steps"),
        ("Interpolate", pb.InterpolateRequest(latents=both, num_steps=1), "OUT_OF_RANGE", "num_steps"),
        ("Interpolate", pb.InterpolateRequest(latents=both, num_steps=2049), "TOO_MANY_ROWS", "num_steps"),
        ("Interpolate", pb.InterpolateRequest(latents=both, num_steps=2**32 - 1), "TOO_MANY_ROWS", "num_steps"),
        (
            "Interpolate",
            pb.InterpolateRequest(latents=ends(start=CODES, end=_filled((3, 2), 0.0)), num_steps=3),
            "SHAPE_MISMATCH",
            "latents.end.shape",
        ),
        (
            "Interpolate",
            pb.InterpolateRequest(latents=ends(start=CODES, end=_filled((2, 2), np.nan)), num_steps=3),
            "NOT_FINITE",
            "latents.end.data",
        ),
        (
            "Interpolate",
            pb.InterpolateRequest(latents=ends(start=GOOD, end=GOOD), num_steps=3),
            "SHAPE_MISMATCH",
            "latents.start.shape",
        ),
    ]
    return cases


async def test_each_way_to_be_wrong_has_its_reason_and_field(service: GatewayServer) -> None:
    """Bad input of every kind, in every method, is INVALID_ARGUMENT with the right reason and field."""
    wrong = []
    cases = _cases()
    async with wire(service.port) as channel:
        for method, request, reason, field in cases:
            error = await failure(channel, method, request)
            found = trailers(error)
            actual = (error.code(), found.get("vae-error-reason"), found.get("vae-error-field"))
            if actual != (grpc.StatusCode.INVALID_ARGUMENT, reason, field):
                wrong.append((method, str(request)[:80], (reason, field), actual))
        assert len((await call(channel, "Sample", pb.SampleRequest(num_samples=1))).samples.data) == 64
    assert not wrong
    assert len(cases) > 150


async def test_more_rows_than_one_call_may_have_are_refused(service: GatewayServer) -> None:
    """Encode counts its rows too, and says under which field."""
    async with wire(service.port) as channel:
        rows = to_message(np.zeros((4097, 1, 4, 4), np.uint8))
        error = await failure(channel, "Encode", pb.EncodeRequest(data=rows))
    assert (error.code(), trailers(error)["vae-error-reason"]) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "TOO_MANY_ROWS",
    )
    assert trailers(error)["vae-error-field"] == "data.shape"


@pytest.mark.parametrize(
    ("method", "request_"),
    [
        ("Encode", pb.EncodeRequest(data=GOOD)),
        ("Decode", pb.DecodeRequest(latents=CODES)),
        ("Sample", pb.SampleRequest(num_samples=1)),
        ("Reconstruct", pb.ReconstructRequest(data=GOOD)),
        ("Interpolate", pb.InterpolateRequest(latents=pb.Endpoints(start=CODES, end=CODES), num_steps=2)),
        ("Score", pb.ScoreRequest(data=GOOD)),
        ("SampleStream", pb.SampleStreamRequest(num_samples=1)),
    ],
)
@pytest.mark.parametrize("version", ["latest", "0" * 12, "x" * 10_000, "\N{SNOWMAN}" * 1000])
async def test_a_version_that_is_not_loaded_is_not_found(
    service: GatewayServer,
    method: str,
    request_: Any,  # noqa: ANN401 - seven kinds of requests
    version: str,
) -> None:
    """A caller who needs another model is told which one is loaded."""
    asked = type(request_)()
    asked.CopyFrom(request_)
    asked.model_version = version
    async with wire(service.port) as channel:
        error = await failure(channel, method, asked)
        loaded = (await call(channel, "GetModel", pb.GetModelRequest())).model_version
    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert trailers(error)["vae-error-reason"] == "UNKNOWN_MODEL_VERSION"
    assert loaded in str(error.details())
    assert len(str(error.details())) < 200


async def test_splitting_a_call_changes_no_draw(
    service: GatewayServer, pixels: NDArray[np.uint8], seed: int
) -> None:
    """With the number of its first row, a part of a call draws what the whole call draws for it."""
    async with wire(service.port) as channel:

        async def answers(start: int, stop: int) -> list[bytes]:
            part = to_message(pixels[start:stop])
            common: dict[str, Any] = {"seed": seed, "first_row": 100 + start}
            encoded = await call(channel, "Encode", pb.EncodeRequest(data=part, num_latents=3, **common))
            observed = [
                await call(
                    channel,
                    "Reconstruct",
                    pb.ReconstructRequest(data=part, observation=pb.OBSERVATION_SAMPLE, **common),
                ),
                await call(
                    channel,
                    "Decode",
                    pb.DecodeRequest(latents=encoded.mean, observation=pb.OBSERVATION_SAMPLE, **common),
                ),
            ]
            scored = await call(channel, "Score", pb.ScoreRequest(data=part, num_latents=3, **common))
            return [
                encoded.latents.data,
                *(answer.reconstruction.data for answer in observed),
                scored.score.data,
            ]

        whole = await answers(0, 6)
        parts = [await answers(start, stop) for start, stop in ((0, 1), (1, 4), (4, 6))]
    assert whole == [b"".join(pieces) for pieces in zip(*parts, strict=True)]


async def test_scores_belong_to_the_latents_that_encode_draws(
    service: GatewayServer, oracle: Oracle, pixels: NDArray[np.uint8], seed: int
) -> None:
    """A caller can recompute the likelihood from Encode's own draws with the same seed."""
    data = to_message(pixels)
    async with wire(service.port) as channel:
        encoded = await call(channel, "Encode", pb.EncodeRequest(data=data, num_latents=4, seed=seed, first_row=9))
        scored = await call(channel, "Score", pb.ScoreRequest(data=data, num_latents=4, seed=seed, first_row=9))
    logits = oracle.decode(_array(encoded.latents).reshape(-1, 2), "logits").reshape(6, 4, -1).astype(np.float64)
    unit = pixels.reshape(6, 1, -1) / 255.0
    expected = (unit * logits - np.logaddexp(0, logits)).sum(axis=2).mean(axis=1)
    np.testing.assert_allclose(_array(scored.log_likelihood), expected, rtol=1e-5)
    np.testing.assert_allclose(
        _array(scored.score), _array(scored.log_likelihood) - _array(scored.kl), rtol=1e-6, atol=1e-5
    )
    assert scored.seed == seed


async def test_a_score_has_defaults(service: GatewayServer, small: Bundle, pixels: NDArray[np.uint8]) -> None:
    """Without more, one latent and the ELBO; the seed is chosen and named, so that it can be repeated."""
    data = to_message(pixels)
    async with wire(service.port) as channel:
        chosen = [await call(channel, "Score", pb.ScoreRequest(data=data)) for _ in range(2)]
        again = await call(
            channel, "Score", pb.ScoreRequest(data=data, seed=chosen[0].seed, num_latents=1, bound=pb.BOUND_ELBO)
        )
        zero = await call(channel, "Score", pb.ScoreRequest(data=data, seed=0))
    assert chosen[0].seed != chosen[1].seed
    assert chosen[0].score.data != chosen[1].score.data
    assert chosen[0].score.data == again.score.data
    assert zero.seed == 0
    for tensor in (zero.score, zero.log_likelihood, zero.kl):
        assert (list(tensor.shape), tensor.dtype) == ([6], pb.DATA_TYPE_FLOAT32)
    assert zero.model_version == small.manifest.version


@pytest.mark.parametrize("first_row", [0, 2**32 - 5, 2**63])
@pytest.mark.parametrize("output_type", [pb.DATA_TYPE_FLOAT32, pb.DATA_TYPE_UINT8])
async def test_a_stream_has_the_bytes_of_sample(
    service: GatewayServer,
    small: Bundle,
    seed: int,
    first_row: int,
    output_type: Any,  # noqa: ANN401 - an enum
) -> None:
    """In any chunking, SampleStream sends the samples, latents, seed and version of Sample."""
    asked: dict[str, Any] = {
        "num_samples": 50,
        "seed": seed,
        "first_row": first_row,
        "temperature": 0.5,
        "observation": pb.OBSERVATION_SAMPLE,
        "output_type": output_type,
        "include_latents": True,
    }
    async with wire(service.port) as channel:
        whole = await call(channel, "Sample", pb.SampleRequest(**asked))
        for size in (0, 1, 7, 50, 4096):
            stream = sample_stream(channel, pb.SampleStreamRequest(**asked, max_chunk_rows=size))
            chunks = [chunk async for chunk in stream]
            assert b"".join(chunk.samples.data for chunk in chunks) == whole.samples.data
            assert b"".join(chunk.latents.data for chunk in chunks) == whole.latents.data
            starts = [chunk.first_row for chunk in chunks]
            assert starts == list(range(first_row, first_row + 50, size or 4096))
            assert {(chunk.seed, chunk.model_version) for chunk in chunks} == {(seed, small.manifest.version)}


async def test_a_stream_without_a_seed_names_its_own(service: GatewayServer) -> None:
    """All chunks of a stream come from one seed, another one in each stream; with it the stream is repeated."""
    async with wire(service.port) as channel:

        async def read(**asked: Any) -> list[Any]:  # noqa: ANN401 - fields of a request
            request = pb.SampleStreamRequest(num_samples=20, max_chunk_rows=5, **asked)
            return [chunk async for chunk in sample_stream(channel, request)]

        first, second = await read(), await read()
        seeds = {chunk.seed for chunk in first}
        assert len(seeds) == 1
        assert seeds != {chunk.seed for chunk in second}
        again = await read(seed=seeds.pop())
    assert [chunk.samples.data for chunk in again] == [chunk.samples.data for chunk in first]
    assert not first[0].HasField("latents")


async def test_a_stream_that_finds_the_queue_full_is_shed(bundle_dir: Path, small: Bundle) -> None:
    """Before its first chunk a stream is refused like a call: RESOURCE_EXHAUSTED, with a delay."""
    engine = PuppetEngine(small.manifest)
    engine.is_open.clear()
    config = settings(bundle_dir, "batching.max_queue_rows=10")
    async with serving_with(engine, small.manifest, config) as server, wire(server.port) as channel:
        held = asyncio.ensure_future(call(channel, "Sample", pb.SampleRequest(num_samples=10)))
        await eventually(lambda: server.operations.decoder.num_rows == 10)
        error = await failure(channel, "SampleStream", pb.SampleStreamRequest(num_samples=1))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert trailers(error)["vae-error-reason"] == "QUEUE_FULL"
        assert int(trailers(error)["grpc-retry-pushback-ms"]) >= 50
        engine.is_open.set()
        await held


async def test_others_are_answered_while_the_largest_calls_are_computed(tmp_path: Path) -> None:
    """Scores and observations of as many rows as allowed leave the event loop to others."""
    folder = small_bundle(tmp_path / "wide", data_shape=(1, 28, 28))
    data = to_message(np.zeros((64, 1, 28, 28), np.uint8))
    heavy = [
        ("Score", pb.ScoreRequest(data=data, num_latents=64, seed=1)),
        ("Sample", pb.SampleRequest(num_samples=4096, observation=pb.OBSERVATION_SAMPLE, seed=1)),
    ]
    async with in_process(settings(folder)) as server, wire(server.port) as channel:
        await call(channel, "GetModel", pb.GetModelRequest())
        for method, request in heavy:
            pending = asyncio.ensure_future(call(channel, method, request))
            num_answers = 0
            while not pending.done():
                await call(channel, "GetModel", pb.GetModelRequest())
                num_answers += 1
            await pending
            assert num_answers > 2
