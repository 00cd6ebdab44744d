"""Encode, decode, sample and what is built from them, on arrays: check, draw noise, batch, call the engine.

Knows no transport. Callers give intensities in [0, 1] as float32, or their 255ths as uint8; the graphs take
pixel units [0, 255].
"""

import asyncio
import secrets
from collections.abc import Callable, Sequence
from typing import Any, Final, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from serving import noise
from serving.batching import BatchReport, Outputs, RowBatcher, Rows, Slice, concatenate
from serving.bundle import Manifest
from serving.config import ServingConfig
from serving.engine.protocol import Engine, Posterior
from serving.errors import (
    NotFinite,
    OutOfRange,
    ShapeMismatch,
    TooManyRows,
    UnknownModelVersion,
    UnsupportedType,
)

Float32 = NDArray[np.float32]
Path = Literal["linear", "spherical"]

MAX_TEMPERATURE: Final = 10.0
MAX_FIRST_ROW: Final = 2**63
_PIXEL_MAX: Final = np.float32(255)
_PARALLEL: Final = 1e-4
"""Sine of the angle below which a great arc is computed as a line: the quotient loses its digits there."""


class PriorDraw:
    """Latents that a seed means; made when a run needs them, with those of other callers in one go.

    Args:
        seed: In [0, 2^64).
        first_row: Number of the first row in the seed's sequence.
        num_rows: Rows to draw.
        temperature: Standard deviation.
        latent_dim: Dimensions of a row.
    """

    __slots__ = ("first_row", "latent_dim", "num_rows", "seed", "temperature")

    def __init__(self, seed: int, first_row: int, num_rows: int, temperature: float, latent_dim: int) -> None:
        self.seed, self.first_row, self.num_rows = seed, first_row, num_rows
        self.temperature, self.latent_dim = temperature, latent_dim

    def __len__(self) -> int:
        return self.num_rows

    @property
    def nbytes(self) -> int:
        """Bytes of the latents, float32."""
        return 4 * self.num_rows * self.latent_dim

    def latents(self) -> Float32:
        """Return all rows, shape (num_rows, latent_dim)."""
        standard = noise.normal(self.seed, self.num_rows, self.latent_dim, first_row=self.first_row)
        return standard * np.float32(self.temperature)


class Samples(NamedTuple):
    """Draws from the prior: observations (n, *data_shape), and the draw that they come from."""

    observations: Float32
    draw: PriorDraw


class Operations:
    """What the service does, for one model on one engine.

    Args:
        engine: Who runs the graphs.
        manifest: Description of the model.
        config: Bounds.
        on_batch: Told about every run: name of the graph, report.
    """

    def __init__(
        self,
        engine: Engine,
        manifest: Manifest,
        config: ServingConfig,
        *,
        on_batch: Callable[[str, BatchReport], None] = lambda _graph, _report: None,
    ) -> None:
        self.manifest, self._engine, self._limits = manifest, engine, config.limits
        # The largest answers in float32: an observation with its latents; mean, log_var and one draw.
        row_bytes = 4 * max(manifest.data_size + manifest.latent_dim, 3 * manifest.latent_dim)
        self.max_rows = max(1, min(config.limits.max_rows, config.limits.max_response_bytes // row_bytes))
        """Most rows of one call: the limit, or as many as the largest answer can carry."""
        num_slots = config.batching.max_in_flight or engine.num_slots
        self.encoder = RowBatcher(
            self._run_encoder,
            config.batching,
            name="encoder",
            num_slots=num_slots,
            on_batch=lambda report: on_batch("encoder", report),
        )
        self.decoder = RowBatcher(
            self._run_decoder,
            config.batching,
            name="decoder",
            num_slots=num_slots,
            assemble=self._assemble_latents,
            on_batch=lambda report: on_batch("decoder", report),
        )

    @property
    def is_stalled(self) -> bool:
        """Whether rows wait and nothing moves."""
        return self.encoder.is_stalled or self.decoder.is_stalled

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

    async def encode(self, data: Rows, *, expires_at: float, field: str = "data") -> Posterior:
        """Return the posteriors of data.

        Args:
            data: Shape (n, *data_shape), uint8 or float32 in [0, 1].
            expires_at: Monotonic time after which nobody waits.
            field: Path of the field that `data` came in, for errors.

        Raises:
            InvalidRequest: If the data do not fit the model.
        """
        rows = self._check_data(data, field)
        return Posterior(*await self.encoder.submit(rows, expires_at=expires_at))

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

    def draw_latents(self, posterior: Posterior, num_latents: int, seed: int, *, first_row: int = 0) -> Float32:
        """Return draws z = mean + exp(log_var / 2) * noise, shape (n, num_latents, latent_dim).

        Fewer draws with the same seed are the first of more draws.
        """
        num_rows, dim = posterior.mean.shape
        standard = noise.normal(
            seed, num_rows, num_latents * dim, first_row=first_row, stream=noise.Stream.POSTERIOR
        )
        scale = np.exp(np.float32(0.5) * posterior.log_var)[:, None]
        latents: Float32 = posterior.mean[:, None] + scale * standard.reshape(num_rows, num_latents, dim)
        return latents

    async def decode(self, latents: Rows, *, expires_at: float, field: str = "latents") -> Float32:
        """Return means of p(x | z), in [0, 1].

        Args:
            latents: Shape (n, latent_dim), float32.
            expires_at: Monotonic time after which nobody waits.
            field: Path of the field that `latents` came in, for errors.

        Raises:
            InvalidRequest: If the latents do not fit the model.
        """
        self._check_latents(latents, field)
        (mean,) = await self.decoder.submit(latents, expires_at=expires_at)
        return mean

    def observe(self, mean: Float32, seed: int, *, first_row: int = 0) -> Float32:
        """Return one draw from the Bernoulli likelihood for each row of means: zeros and ones, float32."""
        unit = noise.uniform(
            seed, len(mean), self.manifest.data_size, first_row=first_row, stream=noise.Stream.OBSERVATION
        )
        return (unit.reshape(mean.shape) < mean).astype(np.float32)

    async def sample(
        self,
        num_samples: int,
        *,
        seed: int,
        first_row: int = 0,
        temperature: float = 1.0,
        observe: bool = False,
        expires_at: float,
    ) -> Samples:
        """Draw from the prior and decode.

        Row i is a function of (seed, first_row + i) and the model alone.

        Args:
            num_samples: Rows to draw.
            seed: In [0, 2^64).
            first_row: Number of the first row in the seed's sequence.
            temperature: Standard deviation of the latents.
            observe: Whether to draw from p(x | z) rather than return its mean.
            expires_at: Monotonic time after which nobody waits.

        Raises:
            InvalidRequest: If an argument is out of range.
        """
        self._check_rows("num_samples", num_samples)
        if not 0 <= temperature <= MAX_TEMPERATURE:  # also refuses NaN
            expected = f"a number in [0, {MAX_TEMPERATURE:g}]"
            raise OutOfRange("temperature", expected=expected, actual=f"{temperature:g}")
        self.check_first_row(first_row)
        draw = PriorDraw(seed, first_row, num_samples, temperature, self.manifest.latent_dim)
        (mean,) = await self.decoder.submit(draw, expires_at=expires_at)
        observations = self.observe(mean, seed, first_row=first_row) if observe else mean
        return Samples(observations, draw)

    async def reconstruct(self, data: Rows, *, expires_at: float) -> Float32:
        """Return the decoded posterior means of data."""
        posterior = await self.encode(data, expires_at=expires_at)
        return await self.decode(posterior.mean, expires_at=expires_at)

    async def interpolate(
        self,
        start: Rows,
        end: Rows,
        num_steps: int,
        *,
        kind: Literal["data", "latents"],
        path: Path,
        expires_at: float,
    ) -> tuple[Float32, Float32]:
        """Decode points on the path between two ends, for each pair of rows.

        Args:
            start: Rows of data or latents, shape (n, *row_shape).
            end: The same shape.
            num_steps: Points on each path, both ends included.
            kind: What the ends are. Data are encoded to their posterior means.
            path: Shape of the path.
            expires_at: Monotonic time after which nobody waits.

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
            mean, _ = await self.encoder.submit(pixels, expires_at=expires_at)
            start, end = np.split(mean, 2)
        else:
            self._check_latents(start, "latents.start")
            self._check_latents(end, "latents.end")
        latents = interpolate_latents(start, end, num_steps, path)
        flat = latents.reshape(-1, self.manifest.latent_dim)
        mean = await self.decode(flat, expires_at=expires_at)
        return mean.reshape(len(start), num_steps, *self.manifest.data_shape), latents

    async def close(self) -> None:
        """Fail what waits, end what runs."""
        await asyncio.gather(self.encoder.close(), self.decoder.close())

    async def _run_encoder(self, rows: Rows) -> Outputs:
        return await self._engine.encode(rows)

    async def _run_decoder(self, rows: Rows) -> Outputs:
        return (await self._engine.decode(rows),)

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
    rows = np.concatenate(
        [
            np.arange(part.start, part.stop, dtype=np.uint64) + np.uint64(draw.first_row)
            for draw, part in zip(draws, parts, strict=True)
        ]
    )
    scale = np.repeat(np.array([draw.temperature for draw in draws], np.float32), counts)
    return np.split(noise.normal_at(seeds, rows, latent_dim) * scale[:, None], ends[:-1])


def choose_seed() -> int:
    """Return 64 random bits from the operating system."""
    return secrets.randbits(64)


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
