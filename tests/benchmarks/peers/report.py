"""What was measured, as JSON, as tables and as a plot."""

import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from tests.benchmarks.peers.calls import WORKLOADS, Workload
from tests.benchmarks.peers.load import RIGHT, Window

Loop = Literal["closed", "open"]
Report = dict[str, Any]

_MANY: Final = 128


class Target(NamedTuple):
    """What issue 5 asks for against one peer."""

    throughput: float | None = None
    """Least ratio of throughputs, ours by the peer's; none was asked for by default."""

    latency: float | None = None
    """Largest ratio of median latencies with one call in flight."""


TARGETS: Final = {
    "PyTriton": Target(1.2, 0.8),
    "MLServer": Target(2),
    "Ray Serve": Target(6),
    "Ray Serve, tuned": Target(),
}
VARIANTS: Final = {"MLServer": ("MLServer", "MLServer, batches")}
"""Peers with more than one setting: each figure is compared with the better of theirs."""


class Key(NamedTuple):
    """One cell of the tables."""

    workload: str
    series: str
    loop: Loop
    concurrency: int
    """Calls in flight, closed loop; 0 in the open loop."""


class Cells:
    """Windows by cell, in the order in which they were measured."""

    def __init__(self) -> None:
        self._windows: dict[Key, list[Window]] = {}

    def add(self, key: Key, window: Window) -> None:
        """Add one window."""
        self._windows.setdefault(key, []).append(window)

    def slowest(self, workload: Workload, series: Iterable[str]) -> float:
        """Return the least calls per second of several series with 128 calls in flight."""
        keys = [Key(workload.name, name, "closed", _MANY) for name in series]
        return min(statistics.median(window.calls_per_s for window in self._windows[key]) for key in keys)

    def as_json(self) -> list[dict[str, Any]]:
        """Return a record per cell: medians first, then what they are medians of."""
        return [
            {
                **key._asdict(),
                "median": {name: _median(getattr(each, name) for each in windows) for name in _NUMBERS},
                "calls_per_s": [_rounded(each.calls_per_s) for each in windows],
                "p50_ms": [_rounded(each.p50_ms) for each in windows],
                "statuses": dict(sum((Counter(each.statuses) for each in windows), Counter())),
            }
            for key, windows in self._windows.items()
        ]


_NUMBERS: Final = ("calls_per_s", "p50_ms", "p99_ms", "late_ms")


def dumps(report: Report) -> str:
    """Return the report as JSON with a line per cell."""
    head = json.dumps({key: value for key, value in report.items() if key != "cells"}, indent=2, allow_nan=False)
    lines = ",\n".join("    " + json.dumps(cell, allow_nan=False) for cell in report["cells"])
    return f'{head[:-2]},\n  "cells": [\n{lines}\n  ]\n}}\n'


def as_markdown(report: Report) -> str:
    """Return the report as tables."""
    tables = [
        *_table(
            report, "Right answers per second, 128 calls in flight", ("closed", _MANY), "calls_per_s", "{:,.0f}"
        ),
        *_table(report, "Right answers per second, one call in flight", ("closed", 1), "calls_per_s", "{:,.0f}"),
        *_table(report, "Median latency, ms, one call in flight", ("closed", 1), "p50_ms", "{:.2f}"),
    ]
    lines = [
        "# Comparable servers, side by side: a recorded run",
        "",
        *_how(report),
        "",
        f"**Statuses**: {_statuses(report)}",
        "",
        *_absent(report),
        "![latency against throughput](peers.svg)",
        "",
        *tables,
        *_ratios(report),
        *_open_tables(report),
        "## Settings",
        "",
        *(f"- **{name}**: {settings}." for name, settings in report["settings"].items()),
        "",
        "Ours gets intensities in [0, 1] and scales them itself; the others get the graph's pixel units and are",
        "spared that. `vae.v1` is our typed API, OIP the Open Inference Protocol with raw contents, which the",
        "others speak (Ray Serve: the same messages).",
    ]
    return "\n".join(lines) + "\n"


def _how(report: Report) -> list[str]:
    machine = report["machine"]
    return [
        f"`{report['command']}`, {report['date']}, {machine['processors']} processors ({machine['model']}),",
        f"Python {machine['python']}, load average {machine['load_average']:.1f} at the start.",
        "",
        f"Every server has the same ONNX graphs ({report['model']}) and gets the same float32 rows over one",
        "connection from one process, which shares the machine with it: read the ratios. One server is alive at a",
        f"time, started anew in each of {report['rounds']} rounds, every round in another order; medians. Every",
        f"answer is compared with ONNX Runtime's own, within {report['tolerance']:g}.",
    ]


def plot(report: Report, path: Path) -> None:
    """Draw median latency against throughput, a panel per workload, a line per series."""
    import matplotlib as mpl  # noqa: PLC0415 - slow to import

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415 - as above
    from matplotlib.ticker import LogLocator  # noqa: PLC0415 - as above

    mpl.rcParams["svg.hashsalt"] = "peers"  # the same file from the same figures
    mpl.rcParams["svg.fonttype"] = "none"
    figure, panels = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    for panel, workload in zip(panels.flat, WORKLOADS, strict=True):
        for number, series in enumerate(report["series"]):
            points = [
                cell["median"]
                for cell in report["cells"]
                if (cell["workload"], cell["series"], cell["loop"]) == (workload.name, series, "closed")
                and cell["median"]["p50_ms"] is not None
            ]
            panel.plot(
                [point["calls_per_s"] for point in points],
                [point["p50_ms"] for point in points],
                marker="osD^vPXh"[number % 8],
                linestyle="-" if series.startswith("ours") else "--",
                label=series,
            )
        panel.set(title=workload.name, xlabel="right answers per second", ylabel="median latency, ms")
        panel.set(xscale="log", yscale="log")
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_formatter("{x:g}")
            axis.set_minor_locator(LogLocator(subs=(2, 5)))
            axis.set_minor_formatter("{x:g}")
        panel.grid(visible=True, which="both", alpha=0.2)
    levels = ", ".join(map(str, report["concurrencies"]))
    figure.suptitle(f"Latency against throughput, {levels} calls in flight (lower and further right is better)")
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")


def _median(values: Iterable[float]) -> float | None:
    known = [value for value in values if not math.isnan(value)]
    return _rounded(statistics.median(known)) if known else None


def _rounded(value: float) -> float | None:
    """Return four significant digits: more than the machine repeats."""
    return None if math.isnan(value) else float(f"{value:.4g}")


def _value(report: Report, key: Key, number: str) -> float | None:
    for cell in report["cells"]:
        if all(cell[name] == wanted for name, wanted in key._asdict().items()):
            value: float | None = cell["median"][number]
            return value
    return None


def _table(report: Report, title: str, load: tuple[Loop, int], number: str, form: str) -> list[str]:
    def shown(workload: Workload, series: str) -> str:
        value = _value(report, Key(workload.name, series, *load), number)
        return "-" if value is None else form.format(value)

    measured = {cell["series"] for cell in report["cells"] if (cell["loop"], cell["concurrency"]) == load}
    names = [name for name in report["series"] if name in measured]
    return [
        f"## {title}",
        "",
        f"| | {' | '.join(names)} |",
        f"|---|{'---:|' * len(names)}",
        *(f"| {each.name} | {' | '.join(shown(each, name) for name in names)} |" for each in WORKLOADS),
        "",
    ]


def _ratios(report: Report) -> list[str]:
    ours = [name for name in report["series"] if name.startswith("ours")]
    peers = [name for name in TARGETS if name in report["series"]]
    if not ours or not peers:
        return []
    return [
        "## Ratios to reach",
        "",
        "Ours divided by the peer: throughput with 128 calls in flight, median latency with one. Bold: reached.",
        "MLServer's figure is the better one of its two settings.",
        "",
        f"| peer | what | asked | call | {' | '.join(ours)} |",
        f"|---|---|---|---|{'---:|' * len(ours)}",
        *(line for peer in peers for line in _ratios_to(report, peer, ours)),
        "",
    ]


def _ratios_to(report: Report, peer: str, ours: list[str]) -> list[str]:
    least, most = TARGETS[peer]

    def row(what: str, workload: Workload, asked: str, shown: Iterable[str]) -> str:
        return f"| {peer} | {what} | {asked} | {workload.name} | {' | '.join(shown)} |"

    def throughput(name: str, workload: Workload) -> str:
        ratio = _ratio(report, workload, (name, peer), "calls_per_s", _MANY)
        return _marked(ratio, is_reached=ratio is not None and least is not None and ratio >= least)

    def latency(name: str, workload: Workload, most: float) -> str:
        ratio = _ratio(report, workload, (name, peer), "p50_ms", 1)
        return _marked(ratio, is_reached=ratio is not None and ratio <= most)

    asked = "-" if least is None else f"≥ {least:g}"
    rows = [row("throughput", each, asked, (throughput(name, each) for name in ours)) for each in WORKLOADS]
    if most is not None:
        rows += [
            row("latency", each, f"≤ {most:g}", (latency(name, each, most) for name in ours)) for each in WORKLOADS
        ]
    return rows


def _marked(ratio: float | None, *, is_reached: bool) -> str:
    if ratio is None:
        return "-"
    return f"**{ratio:.2f}**" if is_reached else f"{ratio:.2f}"


def _ratio(
    report: Report, workload: Workload, pair: tuple[str, str], number: str, concurrency: int
) -> float | None:
    ours, peer = pair
    mine = _value(report, Key(workload.name, ours, "closed", concurrency), number)
    values = [
        _value(report, Key(workload.name, name, "closed", concurrency), number)
        for name in VARIANTS.get(peer, (peer,))
    ]
    theirs = [value for value in values if value]
    if mine is None or not theirs:
        return None
    return mine / (max(theirs) if number == "calls_per_s" else min(theirs))


def _open_tables(report: Report) -> list[str]:
    if not report["rates"]:
        return []
    rates = ", ".join(f"{name}: {rate:,.0f}/s" for name, rate in report["rates"].items())
    late = max(cell["median"]["late_ms"] for cell in report["cells"] if cell["loop"] == "open")
    return [
        "## Open loop",
        "",
        f"Poisson arrivals at {report['open_share']:.0%} of what the slowest peer answered with 128 calls in",
        f"flight in the first round ({rates});",
        f"latency from the moment a call was due. The generator itself was at most {late:.2f} ms late (99th",
        "percentile, worst cell), which is part of every latency.",
        "",
        *_table(report, "Open loop: median latency, ms", ("open", 0), "p50_ms", "{:.2f}"),
        *_table(report, "Open loop: 99th percentile of latency, ms", ("open", 0), "p99_ms", "{:.2f}"),
    ]


def _statuses(report: Report) -> str:
    totals: dict[str, Counter[str]] = {}
    for cell in report["cells"]:
        totals.setdefault(cell["series"], Counter()).update(cell["statuses"])
    num_right = sum(counts[RIGHT] for counts in totals.values())
    others = [
        f"{name}: {', '.join(f'{status} {count:,}' for status, count in sorted(counts.items()))}"
        for name, counts in totals.items()
        if set(counts) - {RIGHT}
    ]
    if not others:
        return f"all {num_right:,} calls were answered OK, each rightly."
    return f"{num_right:,} calls were answered OK and rightly. Not all were: {'; '.join(others)}."


def _absent(report: Report) -> list[str]:
    missing = [f"- {name} is not here and was left out: {how}." for name, how in report["absent"].items()]
    return [*missing, ""] if missing else []
