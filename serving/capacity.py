"""What calls and runs cost: measured once, recorded as JSON, taken by `vae-serve plan`."""

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Final, Literal, Self

import numpy as np
from pydantic import Field, ValidationError

from serving.typed_config import Config, ConfigError

Graph = Literal["encoder", "decoder"]

RECORDED: Final = "recorded/capacity.json"
"""File of the package with one record for each engine."""


class MeasurementError(ConfigError):
    """A file of measurements cannot be read, or does not hold what is needed."""

    def __init__(self, *, source: str, problem: str) -> None:
        super().__init__(
            f"{source}: {problem}; expected a file of `vae-serve plan --save` or `vae-serve load --json`"
        )
        self.source, self.problem = source, problem


class Cost(Config):
    """Time that grows with the rows: t(n) = a + b n."""

    per_call_s: float = Field(ge=0)
    """a: what a call, or a run, takes whatever its rows, seconds."""

    per_row_s: float = Field(ge=0)
    """b: what each row adds, seconds."""

    def seconds(self, num_rows: float) -> float:
        """Return t(n)."""
        return self.per_call_s + self.per_row_s * num_rows

    @classmethod
    def fit(cls, num_rows: Sequence[float], seconds: Sequence[float]) -> Self:
        """Return the line through measurements with the least relative squares, neither part below zero.

        Relative, because a run of 512 rows takes a hundred times as long as one of a row, and both must fit.
        """
        rows, times = np.asarray(num_rows, float), np.asarray(seconds, float)
        design = np.stack([np.ones_like(rows), rows], axis=1) / times[:, None]
        a, b = np.linalg.lstsq(design, np.ones_like(times), rcond=None)[0]
        if a < 0:
            a, b = 0.0, _through_origin(design[:, 1])
        if b < 0:
            a, b = _through_origin(design[:, 0]), 0.0
        return cls(per_call_s=float(a), per_row_s=float(b))

    def scaled(self, factor: float) -> "Cost":
        """Return the cost with rows that are so many times as large."""
        return Cost(per_call_s=self.per_call_s, per_row_s=self.per_row_s * factor)


class Run(Config):
    """What a run of a graph keeps its replica from others."""

    graph: Cost
    """Time of the graph alone."""

    overhead_s: float = Field(default=0.0, ge=0)
    """What the replica's process adds to each run: taking the call, sending the answer; seconds."""

    points: dict[int, float] = Field(default={})
    """What the graph's line was fitted to: seconds by rows."""

    threads: int = Field(default=1, ge=1)
    """Threads, and so processors, of the replica."""

    memory_mib: float = Field(default=0.0, ge=0)
    """Resident memory of the replica's process, MiB."""

    @property
    def cost(self) -> Cost:
        """Time of a run, all in all."""
        return Cost(per_call_s=self.graph.per_call_s + self.overhead_s, per_row_s=self.graph.per_row_s)

    def with_graph(self, points: dict[int, float], threads: int) -> "Run":
        """Return the same replica with another graph, of which times by rows were measured."""
        graph = Cost.fit(list(points), list(points.values()))
        return self.model_copy(update={"graph": graph, "points": points, "threads": threads})


class Gateway(Config):
    """What calls cost the process that speaks gRPC."""

    costs: dict[str, Cost]
    """Processor time by method: encode, decode, sample, reconstruct, score. On one processor."""

    row_values: int = Field(ge=1)
    """Values in a row of data, to which the costs per row belong."""

    memory_mib: float = Field(default=0.0, ge=0)
    """Resident memory of the process, MiB."""


class Capacity(Config):
    """Everything that a plan needs to know of a service."""

    format_version: Literal[1] = 1
    """Version of this record."""

    engine: Literal["ray", "in-process"]
    """Who ran the graphs."""

    device: Literal["cpu", "cuda"]
    """Where they ran."""

    model: str
    """What was measured, in words."""

    measured_at: str
    """ISO 8601, UTC."""

    machine: dict[str, str]
    """Processor, system and versions."""

    method: str
    """How it was measured, in words."""

    encoder: Run
    decoder: Run
    gateway: Gateway
    floor_s: float = Field(ge=0)
    """What a call alone takes beyond these times: hops between processes, wake-ups; seconds."""

    max_batch_rows: int = Field(default=512, ge=1)
    """Most rows of a run."""

    shared_memory_mib: float = Field(default=0.0, ge=0)
    """What the service takes once, whatever its replicas: the cluster's own processes, MiB."""

    def with_graphs(self, *, encoder: Run, decoder: Run, row_values: int, **facts: object) -> "Capacity":
        """Return the same service with other graphs; the gateway's cost of a row grows with its values."""
        factor = row_values / self.gateway.row_values
        costs = {method: cost.scaled(factor) for method, cost in self.gateway.costs.items()}
        gateway = self.gateway.model_copy(update={"costs": costs, "row_values": row_values})
        return self.model_copy(update={"encoder": encoder, "decoder": decoder, "gateway": gateway, **facts})

    def write(self, path: Path) -> None:
        """Write the record as JSON."""
        path.write_text(self.model_dump_json(indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Self:
        """Return the record of a file.

        Raises:
            MeasurementError: If it cannot be read or is no record.
        """
        try:
            return cls._parsed(path.read_text(), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise MeasurementError(source=str(path), problem=f"cannot be read ({error})") from None

    @classmethod
    def recorded(cls, engine: Literal["ray", "in-process"] = "ray") -> Self:
        """Return the record that comes with the package: see its `model` and `machine`."""
        records = json.loads(resources.files("serving").joinpath(RECORDED).read_text())
        return cls._parsed(json.dumps(records[engine]), RECORDED)

    @classmethod
    def _parsed(cls, text: str, source: str) -> Self:
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise MeasurementError(source=source, problem=f"{where}: {first['msg']}".removeprefix(": ")) from None


def _through_origin(slopes: "np.ndarray[tuple[int, ...], np.dtype[np.float64]]") -> float:
    """Return the factor f with the least squares of f * slope - 1."""
    return float(slopes.sum() / np.square(slopes).sum())
