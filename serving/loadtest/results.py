"""What a load test found, as a file: JSON that a later run is compared with."""

from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from serving.loadtest.errors import ReportError

VERSION: Final = 1


class Outcome(StrEnum):
    """What became of one request. Each has exactly one."""

    RIGHT = "right"
    """OK, in time, and equal to the known answer of this very request."""

    REFUSED = "refused"
    """A status of the contract, in time: refused with a reason, and safe to repeat."""

    LOST = "lost"
    """No end a second after the deadline, or an end outside the contract: UNKNOWN, INTERNAL, a CANCELLED that
    nobody asked for, a broken connection."""

    WRONG = "wrong"
    """OK, with another content than the known answer."""


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Counts(_Model):
    """The ledger: `sent` is always the sum of the others."""

    sent: int = Field(ge=0)
    right: int = Field(ge=0)
    refused: int = Field(ge=0)
    lost: int = Field(ge=0)
    wrong: int = Field(ge=0)

    @model_validator(mode="after")
    def _check_balance(self) -> Self:
        if self.sent != self.right + self.refused + self.lost + self.wrong:
            raise ValueError(f"{self.sent} sent, but {self.right + self.refused + self.lost + self.wrong} ended")
        return self

    @classmethod
    def total(cls, parts: Iterable["Counts"]) -> "Counts":
        """Return the sum of ledgers."""
        sums = dict.fromkeys(cls.model_fields, 0)
        for part in parts:
            for name in sums:
                sums[name] += getattr(part, name)
        return cls(**sums)


class Latency(_Model):
    """A distribution of times, milliseconds."""

    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    p999: float
    max: float
    histogram: str
    """The whole distribution as an HdrHistogram of microseconds: its compressed, base64 form (V2)."""


class OperationResult(_Model):
    """What became of the requests of one kind, such as `encode:64`, in one stage."""

    name: str
    counts: Counts
    statuses: dict[str, int]
    """Requests by the name of their gRPC status; LOST_AFTER_DEADLINE for those without an end."""

    rows: int
    """Rows in right answers."""

    request_bytes: int
    response_bytes: int
    response_time: Latency | None
    """From when the request was due to its right answer: free of coordinated omission. None without one."""

    service_time: Latency | None
    """From when it was sent to its right answer."""


class Window(_Model):
    """One second of a stage, by when requests were due."""

    start_s: float
    """Since the stage began."""

    counts: Counts
    p50_ms: float | None
    """Response time of right answers."""

    p99_ms: float | None


class Stage(_Model):
    """One level of load, measured after its warm-up."""

    offered_per_s: float | None
    """Requests due per second; None in a closed loop."""

    concurrency: int | None
    """Callers that each wait for their answer; None in an open loop."""

    seconds: float
    operations: list[OperationResult]
    windows: list[Window]
    counts: Counts
    rate_per_s: float
    """Requests that ended, per second."""

    goodput_per_s: float
    """Right answers per second."""

    rows_per_s: float
    """Rows in right answers, per second."""

    response_time: Latency | None
    service_time: Latency | None
    send_lag_p99_ms: float
    """How much later than due the generator sent; what it adds to the response time by itself."""

    generator_cpu: float
    """Processor time of the generator per second of the clock and process, in [0, 1] or little above."""


class GeneratorLimits(_Model):
    """What the generator can do by itself, so that nobody takes its limit for the server's."""

    num_processes: int
    calls_per_s: float
    """Calls of the smallest operation that these processes complete against a server that only echoes."""

    echo_p50_ms: float
    is_limiting: bool
    """Whether a stage came so near to that limit, or was sent so late, that it measures the generator."""

    reason: str
    """Which stage and why; empty if none."""


class Knee(_Model):
    """Where more load stops to give more right answers in time."""

    criterion: str
    """What a good stage is, in words: the share of right answers and the bound of p99."""

    good_per_s: float | None
    """Highest offered load that was good; None if none was."""

    bad_per_s: float | None
    """Lowest offered load that was not; None if all were good."""


class LoadReport(_Model):
    """One load test."""

    version: Literal[1] = VERSION
    label: str
    """Name of the run in comparisons."""

    command: str
    target: str
    protocol: Literal["vae", "oip"]
    mode: Literal["open", "closed", "replay", "knee"]
    model: str
    """Name and digest of the served model."""

    mix: dict[str, float]
    """Share of each operation."""

    deadline_s: float
    seed: int
    started_at: str
    """ISO 8601, UTC."""

    machine: dict[str, str]
    """Processors, architecture, system, versions of Python and grpcio: of the generator."""

    checks: str
    """How contents were checked, in words."""

    stages: list[Stage]
    counts: Counts
    limits: GeneratorLimits | None
    knee: Knee | None
    notes: list[str]
    """What a reader must know: interrupted, content not checked, and the like."""

    def write(self, path: Path) -> None:
        """Write the report as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.model_dump_json(indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> "LoadReport":
        """Return the report of a file.

        Raises:
            ReportError: If it cannot be read, or is not a report of this version.
        """
        try:
            return cls.model_validate_json(path.read_text())
        except OSError as error:
            raise ReportError(path=str(path), problem=error.strerror or str(error)) from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ReportError(path=str(path), problem=f"{where}: {first['msg']}".removeprefix(": ")) from None
