"""Laws of `serving.gateway.operations`: exact arithmetic on arrays, without a transport."""

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import special, stats

from serving import errors, noise
from serving.bundle import Bundle, DecoderOutput
from serving.engine.in_process import InProcessEngine
from serving.engine.protocol import Posterior, Rows
from serving.gateway.operations import (
    Bound,
    Chunk,
    ObservationDraw,
    Operations,
    Scores,
    choose_seed,
    interpolate_latents,
)
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
    observed = await operations.observe((np.repeat(mean, 4000, axis=0),), ObservationDraw(seed))
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


BOUNDS: tuple[Bound, Bound] = ("elbo", "importance-weighted")


async def _collect(operations: Operations, num_samples: int, **options: Any) -> list[Chunk]:  # noqa: ANN401 - of the stream
    chunks = operations.sample_stream(num_samples, ticket=Ticket(FOREVER), **options)
    return [chunk async for chunk in chunks]


def _bytes(chunks: list[Chunk]) -> tuple[bytes, bytes]:
    """Return the observations and the latents of a stream."""
    return (
        b"".join(chunk.samples.observations.tobytes() for chunk in chunks),
        b"".join(chunk.samples.draw.latents().tobytes() for chunk in chunks),
    )


@pytest.mark.parametrize("observe", [False, True])
@pytest.mark.parametrize("first_row", [0, 2**32 - 7, 2**63])
async def test_a_stream_has_the_bytes_of_one_draw(
    operations: Operations, seed: int, first_row: int, *, observe: bool
) -> None:
    """In any chunking, resumed at any row, the samples and latents are those that Sample gives."""
    options: dict[str, Any] = {"seed": seed, "temperature": 0.7, "observe": observe}
    whole = await operations.sample(41, first_row=first_row, ticket=Ticket(FOREVER), **options)
    expected = whole.observations.tobytes(), whole.draw.latents().tobytes()
    for size in (0, 1, 2, 7, 40, 41, 64):
        chunks = await _collect(operations, 41, first_row=first_row, max_chunk_rows=size, **options)
        assert _bytes(chunks) == expected
        starts = list(range(first_row, first_row + 41, size or 41))
        assert [chunk.first_row for chunk in chunks] == starts
        assert all(chunk.samples.draw.seed == seed for chunk in chunks)
    if first_row + 3 > 2**63:
        return
    resumed = [
        await _collect(operations, 3, first_row=first_row, max_chunk_rows=2, **options),
        await _collect(operations, 38, first_row=first_row + 3, max_chunk_rows=9, **options),
    ]
    assert _bytes([chunk for part in resumed for chunk in part]) == expected


async def test_a_stream_may_be_longer_than_a_call(operations: Operations, small: Bundle, seed: int) -> None:
    """The limit of rows in a call is one of chunks here: a stream of many calls' rows is one sequence."""
    chunks = await _collect(operations, 1000, seed=seed)
    assert max(len(chunk.samples.observations) for chunk in chunks) == operations.max_rows == 64
    latents = noise.normal(seed, 1000, 2)
    assert _bytes(chunks) == (Oracle(small).decode(latents).tobytes(), latents.tobytes())


@pytest.fixture
def engine(small: Bundle) -> PuppetEngine:
    """Return an engine that obeys."""
    return PuppetEngine(small.manifest)


Held = Callable[..., Operations]


@pytest.fixture
async def make(bundle_dir: Path, small: Bundle, engine: PuppetEngine) -> AsyncIterator[Held]:
    """Return a maker of operations on the engine that obeys; they are closed at the end."""
    made: list[Operations] = []

    def maker(*overrides: str, **options: Any) -> Operations:  # noqa: ANN401 - of the operations
        made.append(Operations(engine, small.manifest, settings(bundle_dir, *overrides), **options))
        return made[-1]

    yield maker
    engine.is_open.set()
    for operations in made:
        await operations.close()


async def test_chunks_are_made_as_they_are_read(make: Held, engine: PuppetEngine) -> None:
    """One chunk is made while the reader has the one before it: whoever reads nothing more costs nothing more."""
    chunks = make().sample_stream(1000, seed=1, max_chunk_rows=10, ticket=Ticket(FOREVER))
    assert engine.num_decoded == 0
    for number in range(1, 6):
        chunk = await anext(chunks)
        assert chunk.first_row == 10 * (number - 1)
        for _ in range(200):
            await asyncio.sleep(0)
        assert engine.num_decoded == 10 * (number + 1)
    await chunks.aclose()


async def test_the_last_chunk_has_no_successor(make: Held, engine: PuppetEngine) -> None:
    """A stream runs exactly the rows that were asked for."""
    chunks = [chunk async for chunk in make().sample_stream(25, seed=1, max_chunk_rows=10, ticket=Ticket(FOREVER))]
    assert [len(chunk.samples.observations) for chunk in chunks] == [10, 10, 5]
    assert engine.num_decoded == 25


@pytest.mark.parametrize("num_read", [0, 1, 3])
async def test_a_stream_that_is_left_stops_the_work(make: Held, engine: PuppetEngine, num_read: int) -> None:
    """When the reader goes, in whatever moment, nothing waits, nothing runs and nothing comes after."""
    operations = make()
    chunks = operations.sample_stream(1000, seed=1, max_chunk_rows=10, ticket=Ticket(FOREVER))
    for _ in range(num_read):
        await anext(chunks)
    await eventually(lambda: operations.decoder.num_in_flight == 0)
    engine.is_open.clear()
    reading = asyncio.ensure_future(anext(chunks))
    await eventually(lambda: engine.num_running == 1)
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    await chunks.aclose()
    assert operations.decoder.num_rows == 0
    engine.is_open.set()
    await eventually(lambda: operations.decoder.num_in_flight == 0)
    num_decoded = engine.num_decoded
    for _ in range(200):
        await asyncio.sleep(0)
    assert (engine.num_decoded, engine.num_running) == (num_decoded, 0)
    assert num_decoded <= 10 * (num_read + 2)


async def test_a_full_queue_in_the_middle_of_a_stream_is_waited_for(make: Held, engine: PuppetEngine) -> None:
    """Once begun, a stream outlasts a full queue; its rows are the same."""
    operations = make("batching.max_queue_rows=10", "batching.shed_at=[1.0, 1.0, 1.0]")
    ticket = Ticket(FOREVER, client="stream")
    chunks = operations.sample_stream(15, seed=1, max_chunk_rows=5, ticket=ticket)
    read = [await anext(chunks)]
    await eventually(lambda: engine.num_decoded == 10)
    engine.is_open.clear()
    other = asyncio.ensure_future(operations.sample(10, seed=2, ticket=Ticket(FOREVER, client="other")))
    await eventually(lambda: operations.decoder.num_rows == 10)
    read.append(await anext(chunks))  # it was made before
    reading = asyncio.ensure_future(anext(chunks))
    await asyncio.sleep(0.1)  # two times the shortest delay: refused, and not ended
    assert not reading.done()
    assert operations.decoder.num_rows == 10
    engine.is_open.set()
    await other
    read.append(await asyncio.wait_for(reading, 5))
    assert [chunk.first_row for chunk in read] == [0, 5, 10]
    with pytest.raises(StopAsyncIteration):
        await anext(chunks)
    assert ticket.num_rows == 15


async def test_a_full_queue_at_the_begin_of_a_stream_refuses_it(make: Held, engine: PuppetEngine) -> None:
    """A stream that has sent nothing is shed like a call, with the time after which to come back."""
    operations = make("batching.max_queue_rows=10")
    engine.is_open.clear()
    other = asyncio.ensure_future(operations.sample(10, seed=2, ticket=Ticket(FOREVER)))
    await eventually(lambda: operations.decoder.num_rows == 10)
    with pytest.raises(errors.QueueFull, match="the service is busy"):
        await anext(operations.sample_stream(15, seed=1, max_chunk_rows=5, ticket=Ticket(FOREVER)))
    assert operations.decoder.num_rows == 10
    engine.is_open.set()
    await other


async def test_a_stream_does_not_wait_beyond_its_deadline(make: Held, engine: PuppetEngine) -> None:
    """When there is no room before the end of the stream's time, the caller hears so at once, and can resume."""
    num_charged = 0

    def charge(_client: str, num_rows: int) -> None:
        nonlocal num_charged
        num_charged += num_rows
        if num_charged > 10:
            raise errors.RateLimited(retry_after_s=60.0, limit="10 rows per second")

    operations = make(charge=charge)
    ticket = Ticket(time.monotonic() + 30)
    chunks = operations.sample_stream(15, seed=1, max_chunk_rows=5, ticket=ticket)
    assert [(await anext(chunks)).first_row for _ in range(2)] == [0, 5]
    started = time.monotonic()
    with pytest.raises(errors.RateLimited, match="10 rows per second"):
        await anext(chunks)
    assert time.monotonic() - started < 5
    assert (ticket.num_rows, engine.num_decoded) == (10, 10)


@pytest.mark.parametrize(
    ("options", "field", "kind"),
    [
        ({"num_samples": 0}, "num_samples", errors.OutOfRange),
        ({"num_samples": 1001}, "num_samples", errors.OutOfRange),
        ({"num_samples": 2**64 - 1}, "num_samples", errors.OutOfRange),
        ({"max_chunk_rows": 4097}, "max_chunk_rows", errors.TooManyRows),
        ({"temperature": math.nan}, "temperature", errors.OutOfRange),
        ({"temperature": -1.0}, "temperature", errors.OutOfRange),
        ({"first_row": 2**63 + 1}, "first_row", errors.OutOfRange),
    ],
)
async def test_a_stream_out_of_range_runs_nothing(
    make: Held, engine: PuppetEngine, options: dict[str, Any], field: str, kind: type[errors.InvalidRequest]
) -> None:
    """Limits of a stream are checked before its first row."""
    operations = make("limits.max_stream_rows=1000")
    given: dict[str, Any] = {"num_samples": 10, "seed": 1, "ticket": Ticket(FOREVER)} | options
    chunks = operations.sample_stream(**given)
    with pytest.raises(kind) as caught:
        await anext(chunks)
    assert caught.value.field == field
    assert engine.num_decoded == 0


async def test_chunks_are_as_large_as_configured(make: Held) -> None:
    """A chunk holds as many rows as fit the configured bytes in float32, and at least one."""
    for num_bytes, expected in ((1024, 1024 // 72), (7200, 100)):
        chunks = make(f"limits.stream_chunk_bytes={num_bytes}").sample_stream(1000, seed=1, ticket=Ticket(FOREVER))
        assert len((await anext(chunks)).samples.observations) == expected  # rows of 16 pixels and 2 latents
        await chunks.aclose()


@contextlib.asynccontextmanager
async def _roomy(bundle_dir: Path, small: Bundle) -> AsyncIterator[Operations]:
    """Run operations on the in-process engine with the usual limits."""
    config = settings(bundle_dir)
    engine = InProcessEngine(small, config)
    operations = Operations(engine, small.manifest, config)
    try:
        yield operations
    finally:
        await operations.close()
        await engine.close()


async def _score(
    operations: Operations, data: Rows, bound: Bound, num_latents: int, seed: int, first_row: int = 0
) -> Scores:
    return await operations.score(
        data, bound=bound, num_latents=num_latents, seed=seed, first_row=first_row, ticket=Ticket(FOREVER)
    )


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("num_latents", [1, 2, 8])
@pytest.mark.parametrize("binary", [False, True])
async def test_scores_are_those_of_the_densities(
    operations: Operations,
    small: Bundle,
    pixels: NDArray[np.uint8],
    seed: int,
    bound: Bound,
    num_latents: int,
    *,
    binary: bool,
) -> None:
    """In float64, from the densities themselves and the latents that Encode draws: the same scores."""
    pixels = np.where(pixels > 127, 255, 0).astype(np.uint8) if binary else pixels
    oracle, data = Oracle(small), pixels.reshape(5, 1, -1) / 255.0
    mean, log_var = (part.astype(np.float64) for part in oracle.encode(pixels))
    posterior = await operations.encode(pixels, ticket=Ticket(FOREVER))
    latents = await operations.draw_latents(posterior, num_latents, seed)
    flat = latents.reshape(-1, 2)
    chance = oracle.decode(flat).reshape(5, num_latents, -1).astype(np.float64)
    logits = oracle.decode(flat, "logits").reshape(chance.shape).astype(np.float64)
    direct = data * np.log(chance) + (1 - data) * np.log1p(-chance)
    is_safe = np.abs(logits) < 6  # beyond, the mean in float32 is too near to zero or one
    assert is_safe.mean() > 0.7
    likelihood = np.where(is_safe, direct, data * logits - np.logaddexp(0, logits)).sum(axis=2)
    scale = np.exp(log_var / 2)
    kl = (np.log(1 / scale) + (scale**2 + mean**2 - 1) / 2).sum(axis=1)
    prior = np.sum(stats.norm.logpdf(latents), axis=2)
    proposal = np.sum(stats.norm.logpdf(latents, mean[:, None], scale[:, None]), axis=2)
    expected = (
        likelihood.mean(axis=1) - kl
        if bound == "elbo"
        else special.logsumexp(likelihood + prior - proposal, axis=1) - np.log(num_latents)
    )
    scores = await _score(operations, pixels, bound, num_latents, seed)
    assert {part.dtype for part in scores} == {np.dtype(np.float32)}
    # float32 keeps seven digits of a mean; near one, log(1 - mean) loses up to three of them.
    np.testing.assert_allclose(scores.score, expected, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(scores.log_likelihood, likelihood.mean(axis=1), rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(scores.kl, kl, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("bound", BOUNDS)
async def test_scores_may_be_split_and_repeated(
    operations: Operations, pixels: NDArray[np.uint8], seed: int, bound: Bound
) -> None:
    """A row's score depends on seed and row number alone: parts equal the whole, floats bytes, bit for bit."""
    whole = await _score(operations, pixels, bound, 3, seed, first_row=7)
    floats = await _score(operations, (pixels / 255).astype(np.float32), bound, 3, seed, first_row=7)
    parts = [
        await _score(operations, pixels[start:stop], bound, 3, seed, 7 + start) for start, stop in ((0, 2), (2, 5))
    ]
    for index in range(3):
        expected = whole[index].tobytes()
        assert floats[index].tobytes() == expected
        assert b"".join(part[index].tobytes() for part in parts) == expected
    other = await _score(operations, pixels, bound, 3, seed + 1, first_row=7)
    assert other.score.tobytes() != whole.score.tobytes()
    assert other.kl.tobytes() == whole.kl.tobytes()


async def test_bounds_of_one_latent_differ_by_the_estimate_of_the_kl(
    bundle_dir: Path, small: Bundle, pixels: NDArray[np.uint8], seed: int
) -> None:
    """With one latent both have the same likelihood; the weighted one estimates the KL, right on average."""
    async with _roomy(bundle_dir, small) as operations:
        row = np.repeat(pixels[:1], 4000, axis=0)
        elbo, weighted = [await _score(operations, row, bound, 1, seed) for bound in BOUNDS]
    assert elbo.log_likelihood.tobytes() == weighted.log_likelihood.tobytes()
    estimates = weighted.log_likelihood.astype(np.float64) - weighted.score
    five_sigma = 5 * estimates.std() / math.sqrt(4000)
    assert five_sigma < 0.3
    assert abs(estimates.mean() - float(elbo.kl[0])) < five_sigma


async def test_more_latents_tighten_the_bound(
    bundle_dir: Path, small: Bundle, pixels: NDArray[np.uint8], seed: int
) -> None:
    """On average the weighted bound is above the ELBO and grows with the latents (Burda et al., theorem 1)."""
    async with _roomy(bundle_dir, small) as operations:
        rows = np.repeat(pixels, 100, axis=0)
        elbo = await _score(operations, rows, "elbo", 8, seed)
        weighted = [await _score(operations, rows, "importance-weighted", k, seed) for k in (1, 2, 4, 8)]
    rising = [elbo.score.astype(np.float64), *(part.score.astype(np.float64) for part in weighted)]
    for lower, higher in pairwise(rising):
        gain = higher - lower
        assert gain.mean() > -5 * gain.std() / math.sqrt(len(gain))
    gain = rising[-1] - rising[0]
    assert gain.mean() > 5 * gain.std() / math.sqrt(len(gain))  # and not only by chance


class SaturatedEngine(PuppetEngine):
    """A decoder that is as sure as it can be: logits of +-200, whose means round to zero and one."""

    async def decode(
        self, latents: Rows, timeout_s: float, outputs: Sequence[DecoderOutput] = ("mean",)
    ) -> tuple[Rows, ...]:
        """Return the same for every row: half of the pixels on, half off."""
        shape = (await super().decode(latents, timeout_s, outputs))[0].shape
        logits = np.where(np.arange(math.prod(shape[1:])) % 2, 200.0, -200.0).reshape(shape[1:])
        values = {"logits": logits, "mean": special.expit(logits)}
        return tuple(np.broadcast_to(values[output], shape).astype(np.float32) for output in outputs)


@pytest.mark.parametrize("bound", BOUNDS)
async def test_a_sure_decoder_gives_finite_scores(
    bundle_dir: Path, small: Bundle, bound: Bound, seed: int
) -> None:
    """Where the mean rounds to 0 or 1 and its logarithm is infinite, the score is finite and right."""
    operations = Operations(SaturatedEngine(small.manifest), small.manifest, settings(bundle_dir))
    on = (np.arange(16) % 2).reshape(1, 1, 4, 4)
    data = np.concatenate([on * 255, 255 - on * 255, np.full((1, 1, 4, 4), 51)]).astype(np.uint8)
    scores = await _score(operations, data, bound, 4, seed)
    assert all(np.isfinite(part).all() for part in scores)
    # Right everywhere, wrong everywhere by 200 nats a pixel, and a fifth of each.
    np.testing.assert_allclose(scores.log_likelihood, [0.0, -3200.0, -8 * 200 * (0.8 + 0.2)], rtol=1e-6)
    await operations.close()


@pytest.mark.parametrize(
    ("num_rows", "num_latents", "kind"),
    [(1, 0, errors.OutOfRange), (1, 65, errors.OutOfRange), (65, 64, errors.TooManyRows)],
)
async def test_a_score_out_of_range_runs_nothing(
    make: Held, engine: PuppetEngine, num_rows: int, num_latents: int, kind: type[errors.InvalidRequest]
) -> None:
    """Draws have a limit for each row, and count as rows all together, before anything is encoded."""
    with pytest.raises(kind, match=r"^num_latents: expected"):
        await _score(make(), np.zeros((num_rows, 1, 4, 4), np.uint8), "elbo", num_latents, 1)
    assert (engine.num_encoded, engine.num_decoded) == (0, 0)


async def test_a_ticket_counts_the_rows_of_both_graphs(make: Held) -> None:
    """A score of 5 rows with 3 latents each runs 5 rows of the encoder and 15 of the decoder."""
    ticket = Ticket(FOREVER)
    charged: list[tuple[str, int]] = []
    operations = make(charge=lambda client, num_rows: charged.append((client, num_rows)))
    await operations.score(np.zeros((5, 1, 4, 4), np.uint8), num_latents=3, seed=1, ticket=ticket)
    assert (ticket.num_rows, ticket.run_share) == (20, 2.0)
    assert charged == [("", 20)]


async def test_a_call_is_charged_once_for_all_of_its_rows(make: Held, engine: PuppetEngine) -> None:
    """At any rate each call passes with a full bucket: what its end needs is not spent by its beginning."""
    data, latents = np.zeros((6, 1, 4, 4), np.uint8), np.zeros((6, 2), np.float32)
    charged: list[int] = []

    def charge(_client: str, num_rows: int) -> None:
        charged.append(num_rows)
        if len(charged) > 1:
            raise errors.RateLimited(retry_after_s=1.0, limit="10 rows per second")

    calls: list[tuple[Callable[[Operations, Ticket], Awaitable[object]], int]] = [
        (lambda made, ticket: made.encode(data, ticket=ticket), 6),
        (lambda made, ticket: made.decode(latents, ticket=ticket), 6),
        (lambda made, ticket: made.sample(6, seed=1, ticket=ticket), 6),
        (lambda made, ticket: made.sample_rows(np.arange(6, dtype=np.uint64), seed=1, ticket=ticket), 6),
        (lambda made, ticket: made.reconstruct(data, ticket=ticket), 12),
        (lambda made, ticket: made.score(data, num_latents=3, seed=1, ticket=ticket), 24),
        (
            lambda made, ticket: made.interpolate(
                latents, latents, 5, kind="latents", path="linear", ticket=ticket
            ),
            30,
        ),
        (lambda made, ticket: made.interpolate(data, data, 5, kind="data", path="linear", ticket=ticket), 42),
    ]
    for run, expected in calls:
        charged.clear()
        before, ticket = engine.num_encoded + engine.num_decoded, Ticket(FOREVER)
        await run(make(charge=charge), ticket)
        assert charged == [expected]
        assert ticket.num_rows == engine.num_encoded + engine.num_decoded - before == expected


async def test_a_call_that_is_refused_by_its_rate_runs_nothing(make: Held, engine: PuppetEngine) -> None:
    """Who calls too fast hears so before any row of the call is run."""

    def charge(_client: str, _num_rows: int) -> None:
        raise errors.RateLimited(retry_after_s=1.0, limit="10 rows per second")

    with pytest.raises(errors.RateLimited, match="10 rows per second"):
        await make(charge=charge).score(np.zeros((5, 1, 4, 4), np.uint8), seed=1, ticket=Ticket(FOREVER))
    assert (engine.num_encoded, engine.num_decoded) == (0, 0)


async def test_rows_of_any_numbers_are_those_of_the_sequence(operations: Operations, seed: int) -> None:
    """Rows picked out of a seed's sequence, in any order, also twice, have the bytes that they have in it."""
    whole = await operations.sample(20, seed=seed, observe=True, ticket=Ticket(FOREVER))
    numbers = np.array([19, 0, 7, 7, 3], np.uint64)
    picked = await operations.sample_rows(numbers, seed=seed, observe=True, ticket=Ticket(FOREVER))
    np.testing.assert_array_equal(picked.observations, whole.observations[numbers.astype(np.int64)])
    far = np.array([2**64 - 1, 2**63 + 1], np.uint64)
    drawn = await operations.sample_rows(far, seed=seed, ticket=Ticket(FOREVER))
    assert np.isfinite(drawn.observations).all()


async def test_the_event_loop_turns_while_much_is_computed(operations: Operations, seed: int) -> None:
    """Noise and scores of many numbers are made in threads: other calls are answered meanwhile."""
    mean = np.full((500, 28, 28), 0.5, np.float32)
    posterior = Posterior(np.zeros((2000, 32), np.float32), np.zeros((2000, 32), np.float32))
    for slow in (
        operations.observe((mean,), ObservationDraw(seed)),
        operations.draw_latents(posterior, 8, seed),
    ):
        task, num_turns = asyncio.ensure_future(slow), 0
        while not task.done():
            await asyncio.sleep(0)
            num_turns += 1
        await task
        assert num_turns > 10


async def test_threads_and_the_loop_compute_the_same(operations: Operations, seed: int) -> None:
    """Where it is computed does not show: the first rows of a large draw are those of a small one."""
    large = np.linspace(0, 1, 300 * 784, dtype=np.float32).reshape(300, 784)
    draw = ObservationDraw(seed)
    many, few = await operations.observe((large,), draw), await operations.observe((large[:3],), draw)
    assert many[:3].tobytes() == few.tobytes()
