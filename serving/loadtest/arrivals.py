"""When requests are due and which they are: laws and recordings, the same for any number of processes.

Time is in seconds since the start. Everything is drawn from a seed, so that the parts which several processes send
are together exactly what one process would send.
"""

import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from serving.loadtest.errors import BadArrivals, BadWorkload

Law = Literal["poisson", "constant"]

MAX_RATE: Final = 1e6
_CHUNK: Final = 4096
"""Arrivals that are drawn at once: a long test needs no more memory than a short one."""

_CALLER_CHUNK: Final = 64
"""The same for one caller of a closed loop, of whom there may be thousands."""

_TIMES, _KINDS, _REPLAY = range(3)
"""Streams of random numbers, one for each use."""


class Arrivals(NamedTuple):
    """Some requests in the order in which they are due: arrays of equal length."""

    due_s: NDArray[np.float64]

    operation: NDArray[np.int64]
    """Index of the operation."""

    request: NDArray[np.float64]
    """Which of the operation's prepared requests: a number in [0, 1), uniform."""


class Schedule(Protocol):
    """What is due until when."""

    @property
    def seconds(self) -> float:
        """Length."""

    def part(self, index: int, count: int) -> Iterator[Arrivals]:
        """Return the arrivals of one of `count` processes, in order."""


class Segment(NamedTuple):
    """A time of constant load."""

    rate_per_s: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Paced:
    """Arrivals at given rates, one segment after the other.

    Poisson: independent callers, whose times between arrivals are exponential; the law keeps no memory, so
    segments join without a seam. Constant: arrival i of a segment is due i / rate after its begin.
    """

    law: Law
    segments: tuple[Segment, ...]
    shares: tuple[float, ...]
    """Share of each operation; their sum is one."""

    seed: int

    stage: int = 0
    """Number of the stage: each has draws of its own, or all would have the same arrivals in another tempo."""

    @property
    def seconds(self) -> float:
        """Length of all segments."""
        return sum(segment.seconds for segment in self.segments)

    def part(self, index: int, count: int) -> Iterator[Arrivals]:
        """Return the arrivals of one of `count` processes, in order."""
        offset, begin_s = index, 0.0
        for number, segment in enumerate(self.segments):
            kinds = np.random.default_rng([self.seed, self.stage, _KINDS, number])
            for times in self._times(segment, number):
                operation = _choose(self.shares, kinds.random(len(times)))
                due_s, request = begin_s + times, kinds.random(len(times))
                yield Arrivals(due_s[offset::count], operation[offset::count], request[offset::count])
                offset = (offset - len(times)) % count
            begin_s += segment.seconds

    def _times(self, segment: Segment, number: int) -> Iterator[NDArray[np.float64]]:
        """Return the times of a segment since its begin, some at a time."""
        if self.law == "constant":
            total = math.ceil(segment.rate_per_s * segment.seconds - 1e-9)
            for first in range(0, total, _CHUNK):
                yield np.arange(first, min(first + _CHUNK, total)) / segment.rate_per_s
            return
        random, last_s = np.random.default_rng([self.seed, self.stage, _TIMES, number]), 0.0
        while last_s < segment.seconds:
            times = last_s + random.exponential(1 / segment.rate_per_s, _CHUNK).cumsum()
            last_s = times[-1]
            yield times[times < segment.seconds]


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """Arrivals of a file."""

    due_s: NDArray[np.float64]
    operation: NDArray[np.int64]
    seed: int

    @property
    def seconds(self) -> float:
        """Whole seconds that hold all arrivals."""
        return math.floor(float(self.due_s[-1])) + 1.0

    def part(self, index: int, count: int) -> Iterator[Arrivals]:
        """Return the arrivals of one of `count` processes, in order."""
        request = np.random.default_rng([self.seed, _REPLAY]).random(len(self.due_s))
        yield Arrivals(self.due_s[index::count], self.operation[index::count], request[index::count])


class Recording(NamedTuple):
    """What a file of arrivals holds."""

    due_s: list[float]
    operations: list[str | None]
    """Name of each, where the file gives one."""


def read_recording(path: Path) -> Recording:
    """Read arrivals: CSV with the columns seconds and, optionally, operation, or JSON lines with these keys.

    Raises:
        BadArrivals: If it is empty, or a line is not an arrival, or comes before the one above it.
        OSError: If the file cannot be read.
    """
    recording = Recording([], [])
    with path.open(encoding="utf-8", newline="") as file:
        first = file.readline()
        file.seek(0)
        entries = _json_lines(file, path) if first.lstrip().startswith("{") else _csv_lines(file)
        for line, seconds, operation in entries:
            _add(recording, path, line, seconds, operation)
    if not recording.due_s:
        raise BadArrivals(path=str(path), line=1, problem="there are no arrivals; each line is one: 0.25,encode:1")
    return recording


def complete(recording: Recording, shares: Mapping[str, float], *, seed: int) -> Recording:
    """Return the recording with an operation for each arrival: drawn by shares where the file names none."""
    names = list(shares)
    random = np.random.default_rng([seed, _REPLAY, 1])
    drawn = _choose(list(shares.values()), random.random(len(recording.due_s))).tolist()
    operations = [
        names[number] if given is None else given
        for given, number in zip(recording.operations, drawn, strict=True)
    ]
    return Recording(recording.due_s, list[str | None](operations))


def recorded(recording: Recording, names: Sequence[str], *, seed: int) -> Recorded:
    """Return a complete recording as a schedule.

    Args:
        recording: What the file holds, with an operation for each arrival.
        names: Operations, in the order of their indices.
        seed: Of the choice of requests.
    """
    index: dict[str | None, int] = {name: number for number, name in enumerate(names)}
    operation = np.array([index[name] for name in recording.operations], np.int64)
    return Recorded(due_s=np.array(recording.due_s, np.float64), operation=operation, seed=seed)


def parse_rates(option: str, text: str) -> list[float]:
    """Return the rates of "100" or "50,100,200", per second.

    Raises:
        BadWorkload: If one is not a number in (0, 10^6].
    """
    return [_rate(option, text, part) for part in text.split(",")]


def parse_steps(text: str) -> tuple[Segment, ...]:
    """Return the segments of "50x10,100x10": rate x seconds.

    Raises:
        BadWorkload: If it does not read so.
    """
    segments = []
    for part in text.split(","):
        rate, _, seconds = part.partition("x")
        try:
            segment = Segment(_rate("--steps", text, rate), float(seconds))
        except ValueError:
            raise _bad_steps(text) from None
        if not 0 < segment.seconds < math.inf:
            raise _bad_steps(text)
        segments.append(segment)
    return tuple(segments)


def parse_counts(option: str, text: str) -> list[int]:
    """Return the counts of "1,8,64".

    Raises:
        BadWorkload: If one is not a whole number above zero.
    """
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise BadWorkload(option, given=text, expected="whole numbers above zero, such as 1,8,64")
    return [int(part) for part in parts]


def choose(shares: Sequence[float], seed: int, *, caller: int) -> Iterator[tuple[int, float]]:
    """Return what one caller of a closed loop asks for, without end: operation, and request as in `Arrivals`."""
    random = np.random.default_rng([seed, _KINDS, caller])
    while True:
        operations = _choose(shares, random.random(_CALLER_CHUNK)).tolist()
        yield from zip(operations, random.random(_CALLER_CHUNK).tolist(), strict=True)


def _choose(shares: Sequence[float], uniform: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return an index for each uniform number, by shares."""
    edges = np.cumsum(shares)
    found: NDArray[np.int64] = np.searchsorted(edges, uniform * edges[-1], side="right")
    return np.minimum(found, len(edges) - 1)


def _rate(option: str, text: str, part: str) -> float:
    try:
        rate = float(part)
    except ValueError:
        rate = math.nan
    if not 0 < rate <= MAX_RATE:
        raise BadWorkload(option, given=text, expected=f"requests per second, above 0 and at most {MAX_RATE:,.0f}")
    return rate


def _bad_steps(text: str) -> BadWorkload:
    return BadWorkload("--steps", given=text, expected="rate x seconds, such as 50x10,100x10,200x10")


def _csv_lines(file: Any) -> Iterator[tuple[int, object, object]]:  # noqa: ANN401 - a text file
    reader = csv.reader(file)
    for row in reader:
        cells = [cell.strip() for cell in row]
        is_header = reader.line_num == 1 and cells[:1] == ["seconds"]
        if not any(cells) or is_header:
            continue
        too_many = len(cells) > 2  # noqa: PLR2004 - seconds and operation
        yield reader.line_num, "too many columns" if too_many else cells[0], "".join(cells[1:2]) or None


def _json_lines(file: Any, path: Path) -> Iterator[tuple[int, object, object]]:  # noqa: ANN401 - a text file
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if not isinstance(entry, dict) or not entry.keys() <= {"seconds", "operation"}:
            problem = 'expected an object such as {"seconds": 0.25, "operation": "encode:1"}'
            raise BadArrivals(path=str(path), line=number, problem=problem)
        yield number, entry.get("seconds"), entry.get("operation")


def _add(recording: Recording, path: Path, line: int, seconds: object, operation: object) -> None:
    try:
        due_s = float(seconds)  # type: ignore[arg-type]  # whatever stands there
    except (TypeError, ValueError):
        due_s = math.nan
    if not 0 <= due_s < math.inf:
        problem = f"expected seconds since the start, then perhaps an operation, got {str(seconds)[:40]!r}"
        raise BadArrivals(path=str(path), line=line, problem=problem)
    if recording.due_s and due_s < recording.due_s[-1]:
        problem = f"{due_s:g} s comes before {recording.due_s[-1]:g} s of the arrival above it; sort the file"
        raise BadArrivals(path=str(path), line=line, problem=problem)
    if operation is not None and not isinstance(operation, str):
        raise BadArrivals(path=str(path), line=line, problem="an operation is a name such as encode:1")
    recording.due_s.append(due_s)
    recording.operations.append(operation)
