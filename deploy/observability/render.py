"""Draw the dashboards from what a Prometheus has, where there is no Grafana.

`python -m deploy.observability.render http://127.0.0.1:9091 --last-s 300 --out FOLDER`
"""

import argparse
import io
import json
import re
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from PIL import Image

from deploy.observability.panels import BOARDS, RATE, Board, Panel, Query, Section

_COLUMNS: Final = 4
_NUMBER_COLUMNS: Final = 6
_DPI: Final = 80
_ROWS_OF_A_PICTURE: Final = 6
"""Rows of panels above which a dashboard becomes two pictures."""

_MAX_LEGEND: Final = 8
_MAX_NAME: Final = 38
_NUM_POINTS: Final = 240
_STYLE: Final[dict[Any, Any]] = {
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.fontsize": 6.5,
    "legend.frameon": False,
    "lines.linewidth": 1.3,
}


class Span(NamedTuple):
    """A stretch of time, seconds since 1970, and the window of rates, seconds."""

    start: float
    end: float
    rate_s: int

    @property
    def step_s(self) -> float:
        """Time between two points, seconds."""
        return max(1.0, (self.end - self.start) / _NUM_POINTS)


class Curve(NamedTuple):
    """A line of a panel."""

    name: str
    times: Sequence[float]
    values: Sequence[float]


Fetch = Callable[[Query, Span], list[Curve]]


def main() -> None:
    """Draw every dashboard."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("url", help="address of a Prometheus")
    parser.add_argument("--last-s", type=float, default=3600.0, help="how far back, seconds")
    parser.add_argument("--rate-s", type=int, default=60, help="window of rates: at least four scrapes, seconds")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "pictures", help="folder")
    given = parser.parse_args()
    now = time.time()
    given.out.mkdir(parents=True, exist_ok=True)
    for name, picture in render(fetcher(given.url), Span(now - given.last_s, now, given.rate_s)).items():
        (given.out / name).write_bytes(picture)


def fetcher(url: str) -> Fetch:
    """Return what asks a Prometheus for the curves of a query.

    Raises:
        ValueError: If the address is not one of HTTP.
    """
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"{url}: expected the http address of a Prometheus")

    def fetch(query: Query, span: Span) -> list[Curve]:
        asked = {
            "query": query.expr.replace("$job", ".+").replace(RATE, f"{span.rate_s}s"),
            "start": str(span.start),
            "end": str(span.end),
            "step": str(span.step_s),
        }
        address = f"{url.rstrip('/')}/api/v1/query_range?{urllib.parse.urlencode(asked)}"
        with urllib.request.urlopen(address, timeout=30) as response:  # noqa: S310 - checked above
            answer = json.load(response)
        return [_curve(query, series) for series in answer["data"]["result"]]

    return fetch


def render(fetch: Fetch, span: Span, boards: Sequence[Board] = BOARDS) -> dict[str, bytes]:
    """Return the pictures of dashboards by file name, as PNG."""
    pictures = {}
    with mpl.rc_context(_STYLE):
        for board in boards:
            parts = _parts(board)
            for number, sections in enumerate(parts, start=1):
                name = f"{board.uid}-{number}.png" if len(parts) > 1 else f"{board.uid}.png"
                pictures[name] = _picture(board, sections, fetch, span)
    return pictures


def _curve(query: Query, series: dict[str, Any]) -> Curve:
    labels: dict[str, str] = series["metric"]
    legend = query.legend or ", ".join(labels.values())
    name = re.sub(r"\{\{(\w+)\}\}", lambda label: labels.get(label[1], "").rpartition("/")[2], legend)
    times, values = zip(*((float(t), float(value)) for t, value in series["values"]), strict=True)
    return Curve(name.strip(), times, values)


def _num_rows(section: Section) -> int:
    columns = _NUMBER_COLUMNS if section.panels[0].kind == "number" else _COLUMNS
    return -(-len(section.panels) // columns)


def _parts(board: Board) -> list[list[Section]]:
    """Return the sections of each picture."""
    parts: list[list[Section]] = [[]]
    for section in board.sections:
        if parts[-1] and sum(map(_num_rows, parts[-1])) + _num_rows(section) > _ROWS_OF_A_PICTURE:
            parts.append([])
        parts[-1].append(section)
    return parts


def _picture(board: Board, sections: list[Section], fetch: Fetch, span: Span) -> bytes:
    rows = [(section, i) for section in sections for i in range(_num_rows(section))]
    heights = [0.6 if section.panels[0].kind == "number" else 2.5 for section, _ in rows]
    figure = Figure(figsize=(16, sum(heights) + 0.55 * len(rows) + 0.4), dpi=_DPI, layout="constrained")
    when = time.strftime("%Y-%m-%d %H:%M", time.gmtime(span.end))
    figure.suptitle(f"{board.title}, {when} UTC, the last {span.end - span.start:.0f} s", x=0.01, ha="left")
    bands = figure.subfigures(len(rows), 1, height_ratios=[height + 0.55 for height in heights], squeeze=False)
    for (section, number), band in zip(rows, bands[:, 0], strict=True):
        if number == 0:
            band.suptitle(section.title, x=0.005, ha="left", fontsize=10, fontweight="bold")
        columns = _NUMBER_COLUMNS if section.panels[0].kind == "number" else _COLUMNS
        shown = section.panels[number * columns : (number + 1) * columns]
        for axes, panel in zip(band.subplots(1, columns, squeeze=False)[0], shown, strict=False):
            _draw(axes, panel, [curve for query in panel.queries for curve in fetch(query, span)], span)
        for axes in band.axes[len(shown) :]:
            axes.set_axis_off()
    file = io.BytesIO()
    figure.savefig(file, format="png")
    small = io.BytesIO()
    Image.open(file).convert("RGB").quantize(64).save(small, format="png", optimize=True)
    return small.getvalue()


def _draw(axes: Axes, panel: Panel, curves: list[Curve], span: Span) -> None:
    axes.set_title(panel.title, loc="left")
    if panel.kind == "number":
        axes.set_axis_off()
        values = [value for curve in curves for value in curve.values[-1:]]
        text = text_of(values[0], panel.unit) if values else "no data"
        axes.text(0.0, 0.4, text, fontsize=17, transform=axes.transAxes, va="center")
        return
    if panel.kind == "stacked":
        _stack(axes, curves, span)
    else:
        for curve in curves:
            axes.plot([t - span.end for t in curve.times], curve.values, label=curve.name)
    if not curves:
        axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center", color="0.5")
    axes.set_xlim(span.start - span.end, 0)
    axes.set_ylim(0, 1.03 * axes.get_ylim()[1] if any(any(curve.values) for curve in curves) else 1)
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: text_of(value, panel.unit)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f} s"))
    handles, labels = axes.get_legend_handles_labels()
    if any(labels):
        names = [label[:_MAX_NAME] for label in labels[:_MAX_LEGEND]]
        place = (-0.05, -0.12)
        axes.legend(handles[:_MAX_LEGEND], names, ncols=2, loc="upper left", bbox_to_anchor=place, borderaxespad=0)


def _stack(axes: Axes, curves: list[Curve], span: Span) -> None:
    """Stack curves, whose points may be missing here and there, on common times."""
    if not curves:
        return
    times = np.arange(span.start, span.end - span.step_s / 2, span.step_s)  # the last point may be missing
    tops = np.zeros((len(curves), len(times)))
    for row, curve in zip(tops, curves, strict=True):
        at = np.round((np.array(curve.times) - span.start) / span.step_s).astype(int)
        is_shown = at < len(times)
        row[at[is_shown]] = np.nan_to_num(curve.values)[is_shown]
    axes.stackplot(times - span.end, tops, labels=[curve.name for curve in curves], alpha=0.75)


def text_of(value: float, unit: str) -> str:
    """Return a value with its unit, short."""
    if not np.isfinite(value):
        return "no data"
    if unit == "percentunit":
        return f"{100 * value:.3g} %"
    if unit == "ms":
        value, unit = value / 1000, "s"
    if unit == "s":
        return _scaled(value, ((1, "s"), (1e-3, "ms"), (1e-6, "µs")))
    if unit in {"bytes", "Bps"}:
        ending = "/s" if unit == "Bps" else ""
        return _scaled(value, ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B"))) + ending
    ending = {"reqps": "/s", "ops": "/s"}.get(unit, "/s" if unit.startswith("suffix: rows") else "")
    return _scaled(value, ((1e6, "M"), (1e3, "k"), (1, ""))) + ending


def _scaled(value: float, scales: Sequence[tuple[float, str]]) -> str:
    if value == 0:
        return "0"
    size, name = next(((size, name) for size, name in scales if abs(value) >= size), scales[-1])
    return f"{value / size:.3g} {name}".strip()


if __name__ == "__main__":
    main()
