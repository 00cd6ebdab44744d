"""The table of metrics in the README, from their declarations."""

from collections.abc import Iterator
from typing import Final, NamedTuple

from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.registry import Collector

from serving import exporter, metrics
from serving.loop_metrics import LoopCounter, LoopHistogram

BEGIN: Final = "<!-- made by python -m deploy.observability -->"
END: Final = "<!-- end -->"
_SUFFIXES: Final = {"counter": "_total", "gauge": "", "histogram": "", "info": "_info"}
_EVERYWHERE: Final = frozenset({"vae_build", "vae_event_loop_lag_seconds"})


class Entry(NamedTuple):
    """A row of the table."""

    name: str
    kind: str
    labels: tuple[str, ...]
    whose: str
    help: str


def entries() -> Iterator[Entry]:
    """Return every metric that is declared, in the order of the declarations."""
    for metric in [*vars(metrics).values(), exporter.LOOP_LAG]:
        if isinstance(metric, LoopCounter | LoopHistogram | MetricWrapperBase):
            yield _entry(metric)


def table() -> str:
    """Return the table as Markdown."""
    lines = ["| metric | kind | labels | of | what |", "|---|---|---|---|---|"]
    for entry in entries():
        labels = ", ".join(f"`{label}`" for label in entry.labels)
        lines.append(f"| `{entry.name}` | {entry.kind} | {labels} | {entry.whose} | {entry.help} |")
    return "\n".join(lines)


def replaced_in(text: str) -> str:
    """Return a text with the table between the two marks.

    Raises:
        ValueError: If the text does not have them.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"expected the marks {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


def _entry(metric: Collector) -> Entry:
    (family, *_) = metric.describe()  # type: ignore[attr-defined]  # of all that is declared
    labels = metric.labelnames if isinstance(metric, LoopCounter | LoopHistogram) else _labels_of(metric)
    return Entry(
        family.name + _SUFFIXES[family.type], family.type, labels, _whose(family.name), family.documentation
    )


def _labels_of(metric: Collector) -> tuple[str, ...]:
    assert isinstance(metric, MetricWrapperBase)  # noqa: S101 - for the type checker
    return tuple(metric._labelnames)  # noqa: SLF001 - there is no public way


def _whose(name: str) -> str:
    if name in _EVERYWHERE:
        return "every process"
    return "replica" if name.startswith("vae_replica_") else "gateway"
