"""Laws of `serving.gateway.operations`: exact arithmetic on arrays, without a transport."""

import asyncio
import math
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from serving import errors, noise
from serving.bundle import Bundle
from serving.engine.in_process import InProcessEngine
from serving.engine.protocol import Posterior
from serving.gateway.operations import Operations, choose_seed, interpolate_latents
from serving.tickets import Ticket
from tests.serving.harness import Oracle, PuppetEngine, eventually, settings

FOREVER = math.inf
ROUNDING = 1e-6
"""A few units in the last place of float32 around one."""


@pytest.fixture
async def operations(bundle_dir: Path, small: Bundle) -> AsyncIterator[Operations]:
    """Return operations on the in-process engine: 64 rows in a call, 7 in a run, so that calls are split."""
    config = settings(
        bundle_dir, "limits.max_rows=64", "limits.max_latents_per_row=8", "batching.max_batch_rows=7"
    )
    engine = InProcessEngine(small, config)
    made = Operations(engine, small.manifest, config)
    yield made
    await made.close()
    await engine.close()


@pytest.fixture
def pixels(seed: int) -> NDArray[np.uint8]:
    """Return five rows of random pixels."""
    return np.random.default_rng(seed).integers(0, 256, (5, 1, 4, 4), dtype=np.uint8)


async def test_floats_and_bytes_of_the_same_pixels_give_the_same_bits(operations: Operations) -> None:
    """Intensity v / 255 as float32 means exactly what v means as uint8, for every v."""
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 1, 4, 4)
    by_bytes = await operations.encode(pixels, ticket=Ticket(FOREVER))
    for unit in (pixels.astype(np.float32) / np.float32(255), (pixels / 255).astype(np.float32)):
        by_floats = await operations.encode(unit, ticket=Ticket(FOREVER))
        assert by_bytes.mean.tobytes() == by_floats.mean.tobytes()
        assert by_bytes.log_var.tobytes() == by_floats.log_var.tobytes()


async def test_the_callers_array_is_not_changed(operations: Operations, pixels: NDArray[np.uint8]) -> None:
    """An operation reads its input and leaves it alone."""
    unit = pixels.astype(np.float32) / 255
    before = unit.copy()
    unit.flags.writeable = False
    await operations.reconstruct(unit, ticket=Ticket(FOREVER))
    np.testing.assert_array_equal(unit, before)


@pytest.mark.parametrize("observe", [False, True])
@pytest.mark.parametrize("first_row", [0, 5, 2**32 - 3, 2**63 - 10])
async def test_a_draw_may_be_split_and_resumed(
    operations: Operations, seed: int, first_row: int, *, observe: bool
) -> None:
    """Row i is a function of the seed and its number: parts equal the whole, bit for bit."""
    whole = await operations.sample(10, seed=seed, first_row=first_row, observe=observe, ticket=Ticket(FOREVER))
    parts = [
        await operations.sample(
            size, seed=seed, first_row=first_row + start, observe=observe, ticket=Ticket(FOREVER)
        )
        for start, size in ((0, 1), (1, 6), (7, 3))
    ]
    assert whole.observations.tobytes() == b"".join(part.observations.tobytes() for part in parts)
    assert whole.draw.latents().tobytes() == b"".join(part.draw.latents().tobytes() for part in parts)


async def test_samples_are_decoded_noise(operations: Operations, small: Bundle, seed: int) -> None:
    """The latents are the noise of the prior's stream, and the samples are their decodings."""
    drawn = await operations.sample(7, seed=seed, ticket=Ticket(FOREVER))
    latents = noise.normal(seed, 7, 2, stream=noise.Stream.PRIOR)
    assert drawn.draw.latents().tobytes() == latents.tobytes()
    assert drawn.observations.tobytes() == Oracle(small).decode(latents).tobytes()


async def test_draws_of_many_callers_share_a_run_and_mix_nothing(operations: Operations, seed: int) -> None:
    """Draws of other seeds, rows and temperatures beside given latents: each caller gets what it gets alone."""
    given = noise.normal(seed, 9, 2, stream=noise.Stream.GOLDEN)

    async def draw(index: int) -> bytes:
        drawn = await operations.sample(
            1 + index % 5,
            seed=seed + index,
            first_row=index * 2**33,
            temperature=index / 4,
            ticket=Ticket(FOREVER),
        )
        return drawn.observations.tobytes()

    alone = [await draw(index) for index in range(16)]
    decoded = (await operations.decode(given, ticket=Ticket(FOREVER))).tobytes()
    together = await asyncio.gather(
        *(draw(index) for index in range(16)), operations.decode(given, ticket=Ticket(FOREVER))
    )
    assert list(together[:16]) == alone
    assert np.asarray(together[16]).tobytes() == decoded


async def test_temperature_scales_the_latents(operations: Operations, seed: int) -> None:
    """Zero gives the decoding of zeros in every row, two gives twice the noise."""
    cold = await operations.sample(3, seed=seed, temperature=0.0, ticket=Ticket(FOREVER))
    zeros = await operations.decode(np.zeros((1, 2), np.float32), ticket=Ticket(FOREVER))
    assert all(row.tobytes() == zeros[0].tobytes() for row in cold.observations)
    warm, hot = [
        await operations.sample(3, seed=seed, temperature=temperature, ticket=Ticket(FOREVER))
        for temperature in (1, 2)
    ]
    np.testing.assert_array_equal(hot.draw.latents(), 2 * warm.draw.latents())


async def test_observations_are_drawn_from_the_means(operations: Operations, seed: int) -> None:
    """Observations are zeros and ones whose frequency is the mean, pixel by pixel."""
    mean = np.linspace(0, 1, 16, dtype=np.float32).reshape(1, 1, 4, 4)
    observed = await operations.observe(np.repeat(mean, 4000, axis=0), seed)
    assert set(np.unique(observed)) == {0.0, 1.0}
    five_sigma = 5 * 0.5 / math.sqrt(4000)
    np.testing.assert_allclose(observed.mean(axis=0), mean[0], atol=five_sigma)
    assert not observed[:, 0, 0, 0].any()
    assert observed[:, 0, 3, 3].all()


async def test_draws_from_a_posterior_have_its_moments(operations: Operations, seed: int) -> None:
    """Latents have the mean and the scale exp(log_var / 2) of their row, and rows differ."""
    mean = np.array([[1.0, -2.0], [0.0, 5.0]], np.float32)
    log_var = np.array([[0.0, 2.0], [-4.0, 1.0]], np.float32)
    latents = await operations.draw_latents(Posterior(mean, log_var), 20_000, seed)
    assert latents.shape == (2, 20_000, 2)
    scale = np.exp(log_var / 2)
    five_sigma = 5 / math.sqrt(20_000)
    np.testing.assert_array_less(np.abs(latents.mean(axis=1) - mean) / scale, five_sigma)
    np.testing.assert_array_less(np.abs(latents.std(axis=1) / scale - 1), five_sigma)
    standard = (latents - mean[:, None]) / scale[:, None]
    assert abs(np.corrcoef(standard[0].ravel(), standard[1].ravel())[0, 1]) < five_sigma


async def test_fewer_draws_are_the_first_of_more(operations: Operations, seed: int) -> None:
    """Asking for more latents keeps those that were drawn."""
    posterior = Posterior(np.ones((3, 2), np.float32), np.zeros((3, 2), np.float32))
    few = await operations.draw_latents(posterior, 2, seed)
    many = await operations.draw_latents(posterior, 7, seed)
    assert np.ascontiguousarray(many[:, :2]).tobytes() == few.tobytes()


@pytest.mark.parametrize("path", ["linear", "spherical"])
async def test_a_path_ends_in_the_reconstructions(
    operations: Operations, pixels: NDArray[np.uint8], path: str
) -> None:
    """The first and the last point of a path are the reconstructions of its ends, bit for bit."""
    start, end = pixels[:2], pixels[2:4]
    means, latents = await operations.interpolate(
        start, end, 5, kind="data", path="spherical" if path == "spherical" else "linear", ticket=Ticket(FOREVER)
    )
    assert means.shape == (2, 5, 1, 4, 4)
    assert latents.shape == (2, 5, 2)
    for index, rows in ((0, start), (-1, end)):
        expected = await operations.reconstruct(rows, ticket=Ticket(FOREVER))
        assert np.ascontiguousarray(means[:, index]).tobytes() == expected.tobytes()
        posterior = await operations.encode(rows, ticket=Ticket(FOREVER))
        assert np.ascontiguousarray(latents[:, index]).tobytes() == posterior.mean.tobytes()


def test_a_line_is_straight(seed: int) -> None:
    """Points of a linear path lie at (1 - t) a + t b."""
    random = np.random.default_rng(seed)
    a, b = random.standard_normal((2, 4, 3)).astype(np.float32)
    points = interpolate_latents(a, b, 9, "linear")
    t = np.linspace(0, 1, 9)[None, :, None]
    np.testing.assert_allclose(points, (1 - t) * a[:, None] + t * b[:, None], atol=ROUNDING)


def test_a_great_arc_stays_on_the_sphere_and_turns_evenly(seed: int) -> None:
    """Between unit vectors, each point has norm one and each step the same angle."""
    random = np.random.default_rng(seed)
    ends = random.standard_normal((2, 20, 8))
    a, b = (ends / np.linalg.norm(ends, axis=-1, keepdims=True)).astype(np.float32)
    points = interpolate_latents(a, b, 7, "spherical").astype(np.float64)
    np.testing.assert_allclose(np.linalg.norm(points, axis=-1), 1, atol=ROUNDING)
    cosines = (points[:, 1:] * points[:, :-1]).sum(axis=-1)
    np.testing.assert_allclose(cosines, np.repeat(cosines[:, :1], 6, axis=1), atol=ROUNDING)


@pytest.mark.parametrize("factor", [1.0, 2.0, -1.0, 1 + 1e-7])
def test_parallel_ends_fall_back_to_a_line(factor: float) -> None:
    """Where a great arc is not defined, the path is the line: finite, with exact ends."""
    a = np.array([[3.0, 4.0]], np.float32)
    b = (a * factor).astype(np.float32)
    np.testing.assert_array_equal(
        interpolate_latents(a, b, 5, "spherical"), interpolate_latents(a, b, 5, "linear")
    )


def test_the_ends_of_a_path_are_exact(seed: int) -> None:
    """Whatever the magnitudes, the first and the last point are the ends, bit for bit."""
    random = np.random.default_rng(seed)
    a, b = (random.standard_normal((2, 50, 3)) * 10.0 ** random.integers(-20, 20, (2, 50, 1))).astype(np.float32)
    near = (a * (1 + 3e-4 * random.standard_normal(a.shape))).astype(np.float32)  # where sines lose their digits
    a, b = np.concatenate([a] * 2), np.concatenate([b, near])
    a[0, 0], b[1, 1] = -0.0, -0.0  # a sum would lose the sign
    for path in ("linear", "spherical"):
        points = interpolate_latents(a, b, 3, "spherical" if path == "spherical" else "linear")
        assert points[:, 0].tobytes() == a.tobytes()
        assert points[:, -1].tobytes() == b.tobytes()
        assert np.isfinite(points).all()


@pytest.mark.parametrize("num_rows", [65, 1000])
async def test_too_many_rows_are_refused_before_they_run(operations: Operations, num_rows: int) -> None:
    """The limit counts rows after expansion, in every operation."""
    data = np.zeros((num_rows, 1, 4, 4), np.float32)
    latents = np.zeros((num_rows, 2), np.float32)
    match = rf"expected at most 64 rows in one call, got {num_rows}; split it"
    with pytest.raises(errors.TooManyRows, match=match):
        await operations.encode(data, ticket=Ticket(FOREVER))
    with pytest.raises(errors.TooManyRows, match=match):
        await operations.decode(latents, ticket=Ticket(FOREVER))
    with pytest.raises(errors.TooManyRows, match=match):
        await operations.sample(num_rows, seed=0, ticket=Ticket(FOREVER))
    with pytest.raises(errors.TooManyRows, match=match):
        await operations.interpolate(
            latents[:1], latents[:1], num_rows, kind="latents", path="linear", ticket=Ticket(FOREVER)
        )


async def test_the_limit_itself_is_served(operations: Operations) -> None:
    """As many rows as the limit says are answered."""
    assert len((await operations.sample(64, seed=0, ticket=Ticket(FOREVER))).observations) == 64


@pytest.mark.parametrize(
    ("num_rows", "num_latents", "kind"),
    [
        (1, 9, errors.OutOfRange),
        (9, 8, errors.TooManyRows),
        (65, 1, errors.TooManyRows),
        (8, 8, None),
        (64, 1, None),
    ],
)
def test_draws_count_as_rows(
    operations: Operations, num_rows: int, num_latents: int, kind: type[errors.InvalidRequest] | None
) -> None:
    """Draws of one row have a limit, and all draws together count as rows."""
    if kind is None:
        operations.check_num_latents(num_rows, num_latents)
    else:
        with pytest.raises(kind, match=r"^num_latents: expected"):
            operations.check_num_latents(num_rows, num_latents)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("row", [0, 3, 4])
async def test_a_number_that_is_not_finite_is_found_in_its_row(
    operations: Operations, row: int, bad: float
) -> None:
    """NaN and infinities are refused; the error names the first row that holds one."""
    data, latents = np.zeros((5, 1, 4, 4), np.float32), np.zeros((5, 2), np.float32)
    data[row:, 0, 1, 2], latents[row:, 1] = bad, bad
    with pytest.raises(errors.NotFinite, match=rf"^data\.data: .*in row {row}$"):
        await operations.encode(data, ticket=Ticket(FOREVER))
    with pytest.raises(errors.NotFinite, match=rf"^latents\.data: .*in row {row}$"):
        await operations.decode(latents, ticket=Ticket(FOREVER))


async def test_a_signalling_nan_is_found(operations: Operations) -> None:
    """A NaN that traps on some processors is refused like any other, without a warning."""
    latents = np.frombuffer(bytes.fromhex("0100807f00000000"), np.float32).reshape(1, 2)
    with pytest.raises(errors.NotFinite, match="row 0"):
        await operations.decode(latents, ticket=Ticket(FOREVER))


@pytest.mark.parametrize("bad", [-1e-6, 1.0001, 255.0, -1.0, 1e38])
async def test_an_intensity_outside_the_unit_interval_is_refused(operations: Operations, bad: float) -> None:
    """Pixels in [0, 255] sent as floats are a mistake that is named, not a wrong answer."""
    data = np.full((2, 1, 4, 4), 0.5, np.float32)
    data[1, 0, 0, 0] = bad
    with pytest.raises(errors.OutOfRange, match=r"^data\.data: expected values in \[0, 1\], got values from "):
        await operations.encode(data, ticket=Ticket(FOREVER))


@pytest.mark.parametrize("temperature", [-0.1, 10.1, math.nan, math.inf, -math.inf])
async def test_a_temperature_outside_its_range_is_refused(operations: Operations, temperature: float) -> None:
    """Temperatures are in [0, 10]; NaN is not."""
    with pytest.raises(errors.OutOfRange, match=r"^temperature: expected a number in \[0, 10\], got "):
        await operations.sample(1, seed=0, temperature=temperature, ticket=Ticket(FOREVER))


async def test_a_first_row_beyond_its_range_is_refused(operations: Operations) -> None:
    """The last first row is 2^63."""
    await operations.sample(1, seed=0, first_row=2**63, ticket=Ticket(FOREVER))
    with pytest.raises(errors.OutOfRange, match=r"^first_row: expected a number in \[0, 2\^63\], got "):
        await operations.sample(1, seed=0, first_row=2**63 + 1, ticket=Ticket(FOREVER))


async def test_an_end_that_is_refused_runs_nothing(bundle_dir: Path, small: Bundle) -> None:
    """When one end of a path is wrong, the other costs no run and leaves no rows behind."""
    engine = PuppetEngine(small.manifest)
    engine.is_open.clear()
    operations = Operations(engine, small.manifest, settings(bundle_dir))
    good, bad = np.zeros((3, 1, 4, 4), np.float32), np.full((3, 1, 4, 4), np.nan, np.float32)
    with pytest.raises(errors.NotFinite, match=r"data\.end"):
        await operations.interpolate(good, bad, 3, kind="data", path="linear", ticket=Ticket(FOREVER))
    try:
        await eventually(lambda: operations.encoder.num_rows == 0, timeout_s=0.5)
        assert engine.num_running == 0
    finally:
        engine.is_open.set()
        await operations.close()


def test_chosen_seeds_are_64_bits_and_never_repeat() -> None:
    """Seeds of ours come from the operating system: no two calls share one."""
    seeds = {choose_seed() for _ in range(20_000)}
    assert len(seeds) == 20_000
    assert max(seeds) > 2**63
    assert max(seeds) <= noise.MAX_SEED


def test_rows_of_an_answer_fit_into_a_message(bundle_dir: Path, small: Bundle) -> None:
    """The limit of rows is lowered to what the largest answer in float32 can carry."""
    config = settings(bundle_dir, "limits.max_response_bytes=65536")
    operations = Operations(PuppetEngine(small.manifest), small.manifest, config)
    assert operations.max_rows == 65_536 // (4 * (16 + 2))  # an observation and its latents
