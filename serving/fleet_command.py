"""`vae-serve top`: the whole service as a table that is always of now; and the same once, for `status`."""

import dataclasses
import json
import math
import time
from collections.abc import Callable
from typing import Annotated, Any, Final

import grpc
import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from serving.client import Unavailable
from serving.fleet import Look, Summary, Unreachable, look, summarise

DEFAULT_METRICS: Final = "http://127.0.0.1:9090"
_SETTLE_S: Final = 1.0
"""Time between the two looks of a single table, seconds."""

Metrics = Annotated[str, typer.Option("--metrics", help="Address of a gateway's metrics; it knows all others.")]


def top(
    metrics: Metrics = DEFAULT_METRICS,
    interval: Annotated[float, typer.Option(min=0.2, help="Time between two looks, seconds.")] = 2.0,
    *,
    once: Annotated[bool, typer.Option("--once", help="Show one table and end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and end.")] = False,
) -> None:
    """Show methods, graphs and processes with their rates, again and again until interrupted."""
    console = Console()
    try:
        if as_json:
            print(as_text(summary_of_now(metrics)))  # noqa: T201 - the product of the command
        elif once or not console.is_terminal:
            console.print(as_tables(summary_of_now(metrics)))
        else:
            _watch(metrics, interval, console)
    except Unreachable as error:
        raise Unavailable(grpc.StatusCode.UNAVAILABLE, str(error)) from None


def summary_of_now(url: str, *, sleep: Callable[[float], None] = time.sleep) -> Summary:
    """Look twice, a second apart, so that rates are of now.

    Raises:
        Unreachable: If the gateway's metrics cannot be read.
    """
    before = look(url)
    sleep(_SETTLE_S)
    return summarise(look(url), before)


def _watch(url: str, interval_s: float, console: Console) -> None:
    before: Look | None = None
    with Live(Text("looking"), console=console, screen=True, auto_refresh=False) as live:
        while True:
            try:
                now = look(url)
                live.update(as_tables(summarise(now, before)), refresh=True)
                before = now
            except Unreachable as error:  # it may come back: a restart is when people look
                live.update(Text(str(error), style="red"), refresh=True)
                before = None
            time.sleep(interval_s)


def as_text(summary: Summary) -> str:
    """Return a summary as one line of JSON; what is not known is null."""

    def plain(value: Any) -> Any:  # noqa: ANN401 - any part of a summary
        if isinstance(value, float):
            return None if math.isnan(value) else round(value, 3)
        if isinstance(value, tuple) and hasattr(value, "_asdict"):
            return {key: plain(item) for key, item in value._asdict().items()}
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    return json.dumps(plain(summary))


@dataclasses.dataclass(frozen=True)
class _Column:
    """A column of numbers or words."""

    title: str
    digits: int | None = None


def as_tables(summary: Summary) -> RenderableType:
    """Return a summary as tables: calls, graphs, processes."""
    state = Text("READY", style="bold green") if summary.is_ready else Text("NOT READY", style="bold red")
    state.append(f"  {summary.num_calls:.0f} calls in flight", style="not bold default")
    methods = _table(
        "calls",
        [
            _Column("method"),
            _Column("calls/s", 1),
            _Column("errors/s", 1),
            _Column("p50 ms", 2),
            _Column("p99 ms", 2),
        ],
        [tuple(row) for row in summary.methods],
    )
    graphs = _table(
        "graphs",
        [
            _Column("graph"), _Column("replicas", 0), _Column("version"), _Column("rows/s", 0),
            _Column("rows/run", 1), _Column("waiting", 0), _Column("oldest s", 3), _Column("running", 0),
        ],
        [(*row[:2], " ".join(row.versions) + _skew(row.versions), *row[3:]) for row in summary.graphs],
    )  # fmt: skip
    processes = _table(
        "processes",
        [
            _Column("role"), _Column("replica"), _Column("metrics at"), _Column("serves"), _Column("rows/s", 0),
            _Column("run ms", 2), _Column("cpu", 2), _Column("MiB", 0),
        ],
        [tuple(row) for row in summary.processes],
    )  # fmt: skip
    lost = [Text(f"not read: {address}: {reason}", style="red") for address, reason in summary.unreachable.items()]
    return Group(state, methods, graphs, processes, *lost)


def _skew(versions: tuple[str, ...]) -> str:
    return "  versions differ" if len(versions) > 1 else ""


def _table(title: str, columns: list[_Column], rows: list[tuple[Any, ...]]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column.title, justify="left" if column.digits is None else "right")
    for row in rows:
        table.add_row(*(_shown(value, column.digits) for value, column in zip(row, columns, strict=True)))
    return table


def _shown(value: object, digits: int | None) -> str:
    if digits is None:
        return str(value)
    number = float(str(value))
    return "-" if math.isnan(number) else f"{number:,.{digits}f}"
