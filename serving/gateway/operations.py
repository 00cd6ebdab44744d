"""Encode, decode, sample and what is built from them, on arrays: check, draw noise, batch, call the engine.

Knows no transport. Callers give intensities in [0, 1] as float32, or their 255ths as uint8; the graphs take
pixel units [0, 255].
"""

import asyncio
import functools
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any, Final, Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from serving import likelihoods, noise
from serving.batching import BatchReport, DropReport, RowBatcher
from serving.bundle import Graph, Manifest
from serving.config import ServingConfig
from serving.engine.protocol import GRAPHS, Engine, Posterior
from serving.errors import (
    Busy,
    NotFinite,
    OutOfRange,
    ShapeMismatch,
    TooManyRows,
    UnknownModelVersion,
    UnsupportedType,
)
from serving.likelihoods import Float32, Likelihood, RowNumbers
from serving.queueing import Outputs, Rows, Slice, Source, concatenate
from serving.spans import new_id
from serving.tickets import Ticket

Path = Literal["linear", "spherical"]
Bound = Literal["elbo", "importance-weighted"]
T = TypeVar("T")

MAX_TEMPERATURE: Final = 10.0
MAX_FIRST_ROW: Final = 2**63
_LARGE: Final = 2**16
"""Numbers from which on computing with them is left to a thread: about a millisecond."""

_PIXEL_MAX: Final = np.float32(255)
_PARALLEL: Final = 1e-4
"""Sine of the angle below which a great arc is computed as a line: the quotient loses its digits there."""


class PriorDraw:
    """Latents that a seed means; made when a run needs them, with those of other callers in one go.

    Args:
        seed: In [0, 2^64).
        rows: Numbers of the rows in the seed's sequence, uint64; or the first number and how many follow it.
        temperature: Standard deviation.
        latent_dim: Dimensions of a row.
    """

    __slots__ = ("_num_rows", "_rows", "latent_dim", "seed", "temperature")

    def __init__(self, seed: int, rows: RowNumbers, temperature: float, latent_dim: int) -> None:
        self.seed, self._rows = seed, rows
        self.temperature, self.latent_dim = temperature, latent_dim
        self._num_rows = rows[1] if isinstance(rows, tuple) else len(rows)

    def __len__(self) -> int:
        return self._num_rows

    @property
    def nbytes(self) -> int:
        """Bytes of the latents, float32."""
        return 4 * self._num_rows * self.latent_dim

    def rows(self, start: int = 0, stop: int | None = None) -> noise.Words:
        """Return the numbers of rows [start, stop) of the draw."""
        stop = self._num_rows if stop is None else stop
        if isinstance(self._rows, tuple):
            return np.arange(start, stop, dtype=np.uint64) + np.uint64(self._rows[0])
        return self._rows[start:stop]

    def __getitem__(self, part: slice) -> "PriorDraw":
        start, stop, _ = part.indices(self._num_rows)
        rows = self._rows[part] if not isinstance(self._rows, tuple) else (self._rows[0] + start, stop - start)
        return PriorDraw(self.seed, rows, self.temperature, self.latent_dim)

    def latents(self) -> Float32:
        """Return all rows, shape (rows, latent_dim)."""
        standard = noise.normal_at(np.full(1, self.seed, np.uint64), self.rows(), self.latent_dim)
        return standard * np.float32(self.temperature)


class ObservationDraw(NamedTuple):
    """Which observations are drawn from p(x | z): one for each row of latents."""

    seed: int
    """In [0, 2^64)."""

    rows: RowNumbers | None = None
    """Numbers of the rows in the seed's sequence, as for `PriorDraw`; from 0 on by default."""

    def part(self, start: int, stop: int) -> "ObservationDraw":
        """Return the draw of rows [start, stop)."""
        if isinstance(self.rows, tuple) or self.rows is None:
            first = self.rows[0] if self.rows else 0
            return self._replace(rows=(first + start, stop - start))
        return self._replace(rows=self.rows[start:stop])


class Samples(NamedTuple):
    """Draws from the prior: observations (n, *data_shape), and the draw that they come from."""

    observations: Float32
    draw: PriorDraw


class Chunk(NamedTuple):
    """Consecutive samples of a stream, and the number of the first in the seed's sequence."""

    first_row: int
    samples: Samples


class Scores(NamedTuple):
    """Bounds on log p(x) and their parts, each (n,), float32, in nats."""

    score: Float32
    log_likelihood: Float32
    kl: Float32


class Operations:
    """What the service does, for one model on one engine.

    Args:
        engine: Who runs the graphs.
        manifest: Description of the model.
        config: Bounds.
        tell: Told about every run, and about rows that got no answer: name of the graph, report.
        charge: Told the client and the number of rows before they join a queue; may refuse them.
    """

    def __init__(
        self,
        engine: Engine,
        manifest: Manifest,
        config: ServingConfig,
        *,
        tell: Callable[[Graph, BatchReport | DropReport], None] = lambda _graph, _report: None,
        charge: Callable[[str, int], None] = lambda _client, _num_rows: None,
    ) -> None:
        self.manifest, self._engine, self._limits, self._charge = manifest, engine, config.limits, charge
        # The largest answers in float32: an observation with its latents; mean, log_var and one draw.
        self._row_bytes = 4 * max(manifest.data_size + manifest.latent_dim, 3 * manifest.latent_dim)
        self.max_rows = max(1, min(config.limits.max_rows, config.limits.max_response_bytes // self._row_bytes))
        """Most rows of one call: the limit, or as many as the largest answer can carry."""
        self._likelihood: Likelihood = likelihoods.of(manifest)
        # Parameters of a likelihood may be far larger than an answer: 256 levels of each pixel, of each row.
        self._rows_at_once = max(1, config.limits.max_response_bytes // (4 * likelihoods.num_parameters(manifest)))
        make = functools.partial(
            RowBatcher, config=config.batching, num_slots=config.batching.max_in_flight or engine.num_slots
        )
        encode, decode = (
            functools.partial(
                make,
                name=graph,
                tell=functools.partial(tell, graph),
                num_replicas=functools.partial(engine.num_replicas, graph),
            )
            for graph in GRAPHS
        )
        self.encoder = encode(self._run_encoder)
        # Drawn latents are made when a run needs them.
        decode = functools.partial(decode, assemble=self._assemble_latents)
        self.decoder = decode(self._run_decoder)
        # Rows of one run have the same outputs, so parameters have runs of their own on the same graph.
        self.scorer = decode(self._run_scorer)

    @property
    def num_rows(self) -> int:
        """Rows that wait or run."""
        return sum(batcher.num_rows for batcher in (self.encoder, self.decoder, self.scorer))

    def batchers(self, graph: Graph) -> Sequence[RowBatcher]:
        """Return who gathers rows for a graph."""
        return (self.encoder,) if graph == "encoder" else (self.decoder, self.scorer)

    def num_waiting(self, graph: Graph) -> int:
        """Return the rows that are in no run of a graph yet."""
        return sum(batcher.num_waiting for batcher in self.batchers(graph))

    @property
    def is_stalled(self) -> bool:
        """Whether rows wait and nothing moves."""
        return any(batcher.is_stalled for batcher in (self.encoder, self.decoder, self.scorer))

    def check_version(self, asked: str) -> None:
        """Refuse a version that is not loaded.

        Raises:
            UnknownModelVersion: If `asked` is neither empty nor the loaded version.
        """
        if asked and asked != self.manifest.version:
            raise UnknownModelVersion(asked=asked, loaded=self.manifest.version)

    def check_first_row(self, first_row: int) -> None:
        """Refuse a row number so large that the rows after it would have none.

        Raises:
            OutOfRange: If it is above 2^63.
        """
        if first_row > MAX_FIRST_ROW:
            raise OutOfRange("first_row", expected="a number in [0, 2^63]", actual=str(first_row))

    async def encode(self, data: Rows, *, ticket: Ticket, field: str = "data") -> Posterior:
        """Return the posteriors of data.

        Args:
            data: Shape (n, *data_shape), uint8 or float32 in [0, 1].
            ticket: Until when, for whom, how urgent.
            field: Path of the field that `data` came in, for errors.

        Raises:
            InvalidRequest: If the data do not fit the model.
        """
        rows = self._check_data(data, field)
        return Posterior(*await self._submit(self.encoder, rows, ticket))

    def check_num_latents(self, num_rows: int, num_latents: int) -> None:
        """Refuse more draws than the limits allow.

        Raises:
            OutOfRange: If `num_latents` is above the limit for one row.
            TooManyRows: If all draws together are above the limit of rows.
        """
        limit = self._limits.max_latents_per_row
        if num_latents > limit:
            raise OutOfRange("num_latents", expected=f"a number in [0, {limit}]", actual=str(num_latents))
        if num_latents:
            self._check_rows("num_latents", num_rows * num_latents)

    async def draw_latents(
        self, posterior: Posterior, num_latents: int, seed: int, *, first_row: int = 0
    ) -> Float32:
        """Return draws z = mean + exp(log_var / 2) * noise, shape (n, num_latents, latent_dim).

        Fewer draws with the same seed are the first of more draws.
        """
        latents, _ = await _off_loop(
            posterior.mean.size * num_latents, _draw_latents, posterior, num_latents, seed, first_row
        )
        return latents

    async def decode(
        self, latents: Rows, *, draw: ObservationDraw | None = None, ticket: Ticket, field: str = "latents"
    ) -> Float32:
        """Return means of p(x | z), in [0, 1]; or draws from it.

        Args:
            latents: Shape (n, latent_dim), float32.
            draw: Which observations to draw; means if None.
            ticket: Until when, for whom, how urgent.
            field: Path of the field that `latents` came in, for errors.

        Raises:
            InvalidRequest: If the latents do not fit the model.
        """
        self._check_latents(latents, field)
        return await self._decode(latents, draw, ticket)

    async def observe(self, parameters: Outputs, draw: ObservationDraw) -> Float32:
        """Return one draw from p(x | z) for each row of its parameters, float32 in [0, 1], shape (n, *data_shape).

        Args:
            parameters: The outputs of the decoder that the likelihood draws from, n rows each.
            draw: Which observations.
        """
        num_rows, size = len(parameters[0]), max(values.size for values in parameters)
        rows = draw.part(0, num_rows).rows
        return await _off_loop(size, self._likelihood.draw, parameters, draw.seed, rows)

    async def sample(
        self,
        num_samples: int,
        *,
        seed: int,
        first_row: int = 0,
        temperature: float = 1.0,
        observe: bool = False,
        ticket: Ticket,
    ) -> Samples:
        """Draw from the prior and decode.

        Row i is a function of (seed, first_row + i) and the model alone.

        Args:
            num_samples: Rows to draw.
            seed: In [0, 2^64).
            first_row: Number of the first row in the seed's sequence.
            temperature: Standard deviation of the latents.
            observe: Whether to draw from p(x | z) rather than return its mean.
            ticket: Until when, for whom, how urgent.

        Raises:
            InvalidRequest: If an argument is out of range.
        """
        self._check_rows("num_samples", num_samples)
        check_temperature(temperature)
        self.check_first_row(first_row)
        return await self._sample((first_row, num_samples), seed, temperature, observe=observe, ticket=ticket)

    async def sample_rows(
        self,
        rows: noise.Words,
        *,
        seed: int,
        temperature: float = 1.0,
        observe: bool = False,
        ticket: Ticket,
        field: str = "rows",
    ) -> Samples:
        """Draw rows with any numbers of a seed's sequence; the rest as for `sample`.

        Args:
            rows: Numbers of the rows, uint64, shape (n,).
            seed: In [0, 2^64).
            temperature: Standard deviation of the latents.
            observe: Whether to draw from p(x | z) rather than return its mean.
            ticket: Until when, for whom, how urgent.
            field: Path of the field that the rows came in, for errors.
        """
        self._check_rows(field, len(rows))
        check_temperature(temperature)
        return await self._sample(rows, seed, temperature, observe=observe, ticket=ticket)

    async def sample_stream(
        self,
        num_samples: int,
        *,
        seed: int,
        first_row: int = 0,
        temperature: float = 1.0,
        observe: bool = False,
        max_chunk_rows: int = 0,
        ticket: Ticket,
    ) -> AsyncGenerator[Chunk]:
        """Draw from the prior in chunks; one is made while the caller takes the one before it, never more.

        The arguments are those of `sample`, and:

        Args:
            num_samples: Rows to draw, in [1, max_stream_rows].
            seed: In [0, 2^64).
            first_row: Number of the first row in the seed's sequence.
            temperature: Standard deviation of the latents.
            observe: Whether to draw from p(x | z) rather than return its mean.
            max_chunk_rows: Most rows in a chunk; 0 for about `stream_chunk_bytes`.
            ticket: Until when, for whom, how urgent.

        Raises:
            InvalidRequest: If an argument is out of range.
            QueueFull: If there is no room for the first chunk; later ones wait for room.
        """
        limits = self._limits
        if not 1 <= num_samples <= limits.max_stream_rows:
            expected = f"a number in [1, {limits.max_stream_rows}]"
            raise OutOfRange("num_samples", expected=expected, actual=str(num_samples))
        check_temperature(temperature)
        self.check_first_row(first_row)
        if max_chunk_rows > self.max_rows:
            raise TooManyRows("max_chunk_rows", limit=self.max_rows, actual=max_chunk_rows)
        size = max_chunk_rows or max(1, min(self.max_rows, limits.stream_chunk_bytes // self._row_bytes))
        end = first_row + num_samples

        async def draw(start: int) -> Chunk:
            rows = (start, min(size, end - start))
            while True:
                part = ticket.part(time.monotonic() + limits.default_deadline_s)
                try:
                    samples = await self._sample(rows, seed, temperature, observe=observe, ticket=part)
                except Busy as busy:
                    if start == first_row or time.monotonic() + busy.retry_after_s > ticket.expires_at:
                        raise
                    await asyncio.sleep(busy.retry_after_s)
                else:
                    ticket.add(part)
                    return Chunk(start, samples)

        ahead = asyncio.create_task(draw(first_row))
        try:
            for start in range(first_row + size, end, size):
                chunk = await ahead
                ahead = asyncio.create_task(draw(start))
                yield chunk
            yield await ahead
        finally:
            ahead.cancel()
            await asyncio.gather(ahead, return_exceptions=True)

    async def score(
        self,
        data: Rows,
        *,
        bound: Bound = "elbo",
        num_latents: int = 1,
        seed: int,
        first_row: int = 0,
        ticket: Ticket,
    ) -> Scores:
        r"""Return lower bounds on log p(x), estimated with the latents that `draw_latents` draws.

        ELBO: mean_k log p(x | z_k) - KL(q || p) (Kingma and Welling, 2014, eq. 10, with the KL in closed form).
        Importance-weighted: log mean_k p(x, z_k) / q(z_k | x) (Burda et al., 2016, eq. 8).

        Args:
            data: Shape (n, *data_shape), uint8 or float32 in [0, 1].
            bound: Which of the two.
            num_latents: Latents that are drawn from each row's posterior.
            seed: In [0, 2^64).
            first_row: Number of the first row in the seed's sequence.
            ticket: Until when, for whom, how urgent.

        Raises:
            InvalidRequest: If an argument is out of range, or the data do not fit the model.
        """
        if num_latents < 1:
            raise OutOfRange("num_latents", expected="at least 1", actual=str(num_latents))
        pixels = self._check_data(data, "data")
        self.check_num_latents(len(pixels), num_latents)
        self.check_first_row(first_row)
        num_rows = len(pixels) * (1 + num_latents)
        posterior = Posterior(*await self._submit(self.encoder, pixels, ticket, charged=num_rows))
        size = posterior.mean.size * num_latents
        latents, standard = await _off_loop(size, _draw_latents, posterior, num_latents, seed, first_row)
        log_likelihood = await self._log_likelihood(pixels, latents, ticket)
        return await _off_loop(size, _score, posterior, standard, latents, log_likelihood, bound)

    async def reconstruct(self, data: Rows, *, draw: ObservationDraw | None = None, ticket: Ticket) -> Float32:
        """Return the decoded posterior means of data, or observations drawn there; arguments as for `decode`."""
        pixels = self._check_data(data, "data")
        latents, _ = await self._submit(self.encoder, pixels, ticket, charged=2 * len(pixels))
        return await self._decode(latents, draw, ticket, charged=0)

    async def interpolate(
        self,
        start: Rows,
        end: Rows,
        num_steps: int,
        *,
        kind: Literal["data", "latents"],
        path: Path,
        ticket: Ticket,
    ) -> tuple[Float32, Float32]:
        """Decode points on the path between two ends, for each pair of rows.

        Args:
            start: Rows of data or latents, shape (n, *row_shape).
            end: The same shape.
            num_steps: Points on each path, both ends included.
            kind: What the ends are. Data are encoded to their posterior means.
            path: Shape of the path.
            ticket: Until when, for whom, how urgent.

        Returns:
            Means (n, num_steps, *data_shape) and latents (n, num_steps, latent_dim).

        Raises:
            InvalidRequest: If the ends do not fit the model or each other, or there are too many points.
        """
        if start.shape != end.shape:
            expected = f"({', '.join(map(str, start.shape))}), as start has"
            raise ShapeMismatch(f"{kind}.end.shape", expected=expected, actual=end.shape)
        if num_steps < 2:  # noqa: PLR2004 - a path has two ends
            raise OutOfRange("num_steps", expected="at least 2", actual=str(num_steps))
        self._check_rows("num_steps", num_steps * len(start))
        if kind == "data":
            pixels = np.concatenate([self._check_data(start, "data.start"), self._check_data(end, "data.end")])
            num_rows = len(pixels) + num_steps * len(start)
            mean, _ = await self._submit(self.encoder, pixels, ticket, charged=num_rows)
            start, end = np.split(mean, 2)
        else:
            self._check_latents(start, "latents.start")
            self._check_latents(end, "latents.end")
        latents = interpolate_latents(start, end, num_steps, path)
        flat = latents.reshape(-1, self.manifest.latent_dim)
        charged = 0 if kind == "data" else len(flat)
        (mean,) = await self._submit(self.decoder, flat, ticket, charged=charged)
        return mean.reshape(len(start), num_steps, *self.manifest.data_shape), latents

    async def close(self) -> None:
        """Fail what waits, end what runs."""
        await asyncio.gather(self.encoder.close(), self.decoder.close(), self.scorer.close())

    async def _submit(
        self, batcher: RowBatcher, source: Source, ticket: Ticket, *, charged: int | None = None
    ) -> Outputs:
        """Charge and run rows.

        What a call runs in several graphs is charged with the first: refused later, it could never pass, because
        its own beginning would have spent what its end needs.
        """
        num_rows = len(source) if charged is None else charged
        if num_rows:
            self._charge(ticket.client, num_rows)
        return await batcher.submit(source, ticket)

    async def _sample(
        self, rows: RowNumbers, seed: int, temperature: float, *, observe: bool, ticket: Ticket
    ) -> Samples:
        latents = PriorDraw(seed, rows, temperature, self.manifest.latent_dim)
        draw = ObservationDraw(seed, rows) if observe else None
        return Samples(await self._decode(latents, draw, ticket), latents)

    async def _decode(
        self,
        latents: Rows | PriorDraw,
        draw: ObservationDraw | None,
        ticket: Ticket,
        *,
        charged: int | None = None,
    ) -> Float32:
        """Return means of p(x | z), or draws from it."""
        if draw is None or self._likelihood.draws_from == ("mean",):
            means = await self._submit(self.decoder, latents, ticket, charged=charged)
            return means[0] if draw is None else await self.observe(means, draw)
        pieces: list[Float32] = []
        charged = len(latents) if charged is None else charged
        for start in range(0, len(latents), self._rows_at_once):
            part = latents[start : start + self._rows_at_once]
            parameters = await self._submit(self.scorer, part, ticket, charged=0 if start else charged)
            pieces.append(await self.observe(parameters, draw.part(start, start + len(part))))
        return np.concatenate(pieces)

    async def _log_likelihood(self, pixels: Rows, latents: Float32, ticket: Ticket) -> NDArray[np.float64]:
        """Return log p(x | z) of each row at each of its latents, (n, k), for latents (n, k, latent_dim)."""
        num_rows, num_latents, dim = latents.shape
        unit = pixels.reshape(num_rows, 1, -1).astype(np.float32) / _PIXEL_MAX
        at_once = max(1, self._rows_at_once // num_latents)
        pieces: list[NDArray[np.float64]] = []
        for start in range(0, num_rows, at_once):
            part = slice(start, start + at_once)
            parameters = await self._submit(self.scorer, latents[part].reshape(-1, dim), ticket, charged=0)
            size = max(values.size for values in parameters)
            pieces.append(await _off_loop(size, self._likelihood.log_prob, unit[part], parameters))
        return np.concatenate(pieces)

    async def _run_encoder(self, rows: Rows, timeout_s: float) -> Outputs:
        return await self._engine.encode(rows, timeout_s)

    async def _run_decoder(self, rows: Rows, timeout_s: float) -> Outputs:
        return await self._engine.decode(rows, timeout_s)

    async def _run_scorer(self, rows: Rows, timeout_s: float) -> Outputs:
        return await self._engine.decode(rows, timeout_s, self._likelihood.parameters)

    def _assemble_latents(self, batch: Sequence[Slice]) -> Rows:
        """Return the latents of slices: given ones, and draws from the prior, all made at once."""
        draws = [part for part in batch if isinstance(part.request.source, PriorDraw)]
        if not draws:
            return concatenate(batch)
        drawn = dict(zip(draws, _draw(draws, self.manifest.latent_dim), strict=True))
        rows = [drawn[part] if part in drawn else part.rows for part in batch]  # noqa: SIM401 - a draw has no rows
        return np.concatenate(rows)

    def _check_data(self, data: Rows, field: str) -> Rows:
        """Return data in pixel units, checked."""
        self._check_shape(data, self.manifest.data_shape, field)
        if data.dtype == np.uint8:
            return data
        if data.dtype != np.float32:
            raise UnsupportedType(f"{field}.dtype", expected="FLOAT32 or UINT8", actual=str(data.dtype))
        _check_values(data, field, low=0.0, high=1.0)
        pixels: Rows = data * _PIXEL_MAX  # exact for v / 255: the same bytes as uint8 v
        return pixels

    def _check_latents(self, latents: Rows, field: str) -> None:
        self._check_shape(latents, (self.manifest.latent_dim,), field)
        if latents.dtype != np.float32:
            raise UnsupportedType(f"{field}.dtype", expected="FLOAT32", actual=str(latents.dtype))
        _check_values(latents, field)

    def _check_shape(self, rows: Rows, row_shape: tuple[int, ...], field: str) -> None:
        if rows.shape[1:] != row_shape or rows.ndim == 0:
            expected = f"(rows, {', '.join(map(str, row_shape))})"
            raise ShapeMismatch(f"{field}.shape", expected=expected, actual=rows.shape)
        self._check_rows(f"{field}.shape", len(rows))

    def _check_rows(self, field: str, num_rows: int) -> None:
        if num_rows < 1:
            raise OutOfRange(field, expected="at least 1", actual=str(num_rows))
        if num_rows > self.max_rows:
            raise TooManyRows(field, limit=self.max_rows, actual=num_rows)


def _draw(parts: Sequence[Slice], latent_dim: int) -> list[Float32]:
    """Return the latents of slices of draws, one array each, from one pass of the generator."""
    draws: list[Any] = [part.request.source for part in parts]
    counts = [part.stop - part.start for part in parts]
    ends = np.cumsum(counts)
    seeds = np.repeat(np.array([draw.seed for draw in draws], np.uint64), counts)
    rows = np.concatenate([draw.rows(part.start, part.stop) for draw, part in zip(draws, parts, strict=True)])
    scale = np.repeat(np.array([draw.temperature for draw in draws], np.float32), counts)
    return np.split(noise.normal_at(seeds, rows, latent_dim) * scale[:, None], ends[:-1])


def _draw_latents(posterior: Posterior, num_latents: int, seed: int, first_row: int) -> tuple[Float32, Float32]:
    """Return latents and the standard noise in them, each (n, num_latents, latent_dim)."""
    num_rows, dim = posterior.mean.shape
    flat = noise.normal(seed, num_rows, num_latents * dim, first_row=first_row, stream=noise.Stream.POSTERIOR)
    standard = flat.reshape(num_rows, num_latents, dim)
    scale = np.exp(np.float32(0.5) * posterior.log_var)[:, None]
    return posterior.mean[:, None] + scale * standard, standard


def _score(
    posterior: Posterior,
    standard: Float32,
    latents: Float32,
    log_likelihood: NDArray[np.float64],
    bound: Bound,
) -> Scores:
    """Return scores, given noise and latents (n, k, dim) and log p(x | z) (n, k); sums are taken in float64."""
    mean, log_var = posterior.mean.astype(np.float64), posterior.log_var.astype(np.float64)
    kl = 0.5 * (mean**2 + np.exp(log_var) - 1.0 - log_var).sum(axis=1)
    if bound == "elbo":
        score = log_likelihood.mean(axis=1) - kl
    else:
        squares = standard.astype(np.float64) ** 2 - latents.astype(np.float64) ** 2
        weight = log_likelihood + 0.5 * (squares.sum(axis=2) + log_var.sum(axis=1)[:, None])
        largest = weight.max(axis=1)
        score = largest + np.log(np.exp(weight - largest[:, None]).mean(axis=1))
    return Scores(*(part.astype(np.float32) for part in (score, log_likelihood.mean(axis=1), kl)))


async def _off_loop(size: int, compute: Callable[..., T], *arguments: Any) -> T:  # noqa: ANN401 - those of `compute`
    """Compute on so many numbers: in a thread if they are many, so that the event loop serves others meanwhile."""
    return compute(*arguments) if size < _LARGE else await asyncio.to_thread(compute, *arguments)


def check_temperature(temperature: float, *, field: str = "temperature") -> None:
    """Refuse a standard deviation of the latents outside [0, 10].

    Raises:
        OutOfRange: If it is outside, or NaN.
    """
    if not 0 <= temperature <= MAX_TEMPERATURE:  # also refuses NaN
        expected = f"a number in [0, {MAX_TEMPERATURE:g}]"
        raise OutOfRange(field, expected=expected, actual=f"{temperature:g}")


def choose_seed() -> int:
    """Return 64 random bits, not 0. They are no secret: the caller is told."""
    return new_id(64)


def interpolate_latents(start: Rows, end: Rows, num_steps: int, path: Path) -> Float32:
    r"""Return points between latents, shape (n, num_steps, latent_dim); the ends are exact.

    Linear: (1 - t) a + t b. Spherical: sin((1 - t) w) / sin(w) a + sin(t w) / sin(w) b with w the angle
    between a and b (Shoemake, Animating Rotation with Quaternion Curves, 1985).

    Example:
        >>> start, end = np.zeros((1, 1), np.float32), np.ones((1, 1), np.float32)
        >>> interpolate_latents(start, end, 3, "linear").ravel()
        array([0. , 0.5, 1. ], dtype=float32)
    """
    a, b = (ends.astype(np.float64)[:, None] for ends in (start, end))
    t = np.linspace(0.0, 1.0, num_steps)[None, :, None]
    weight_a, weight_b = 1.0 - t, t
    if path == "spherical":
        norms = np.linalg.norm(a, axis=-1, keepdims=True) * np.linalg.norm(b, axis=-1, keepdims=True)
        cosine = np.clip((a * b).sum(axis=-1, keepdims=True) / np.maximum(norms, np.finfo(np.float64).tiny), -1, 1)
        angle, sine = np.arccos(cosine), np.sqrt(1.0 - cosine**2)
        is_arc = sine > _PARALLEL
        divisor = np.where(is_arc, sine, 1.0)
        weight_a = np.where(is_arc, np.sin(weight_a * angle) / divisor, weight_a)
        weight_b = np.where(is_arc, np.sin(weight_b * angle) / divisor, weight_b)
    points: Float32 = (weight_a * a + weight_b * b).astype(np.float32)
    points[:, 0], points[:, -1] = start, end
    return points


def _check_values(rows: NDArray[Any], field: str, *, low: float = -np.inf, high: float = np.inf) -> None:
    """Refuse NaN, infinities and values outside [low, high]."""
    # The extremes see NaN (it spreads through min and max) and cost no array of booleans.
    smallest, largest = float(rows.min()), float(rows.max())
    if not (np.isfinite(smallest) and np.isfinite(largest)):
        bad = ~np.isfinite(rows).reshape(len(rows), -1).all(axis=1)
        raise NotFinite(f"{field}.data", row=int(np.argmax(bad)))
    if smallest < low or largest > high:
        actual = f"values from {smallest:g} to {largest:g}"
        raise OutOfRange(f"{field}.data", expected=f"values in [{low:g}, {high:g}]", actual=actual)
