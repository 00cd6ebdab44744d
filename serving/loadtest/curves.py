"""What a load test found, as curves."""

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Final, TypeVar

from serving.loadtest.charts import NUM_STYLES, Axis, Bar, Line, Mark, bar_chart, line_chart, number
from serving.loadtest.distribution import Distribution
from serving.loadtest.results import LoadReport, Stage, Window

T = TypeVar("T")

OUTCOMES: Final = (("right", 2), ("refused", 3), ("lost", 1), ("wrong", 0))
"""What became of a request, and the style of its colour."""

_WIDE: Final = 8
"""Ratio of the highest to the lowest load above which the axis of loads is logarithmic."""


def stage_name(stage: Stage) -> str:
    """Return the load of a stage in a word."""
    return f"c{stage.concurrency}" if stage.offered_per_s is None else f"{number(stage.offered_per_s)}/s"


def charts(report: LoadReport) -> list[str]:
    """Return the figures of a report: percentiles, latency and goodput against load, time, what became of it."""
    charts = [_percentiles(report.stages)]
    if len(report.stages) > 1:
        charts += _against_load(report)
    return [*charts, *_timeline(report.stages), _outcomes(report.stages)]


def _percentiles(stages: Sequence[Stage]) -> str:
    answered = [(stage, stage.response_time) for stage in stages if stage.response_time is not None]
    shown = _spread(answered, NUM_STYLES)
    lines = [Line(stage_name(stage), Distribution.of(latency).curve()) for stage, latency in shown]
    some = f" ({len(shown)} of {len(answered)} stages)" if len(shown) < len(answered) else ""
    title = f"Response time by share of right answers{some}"
    return line_chart(title, lines, x=Axis("share of right answers", "nines"), y=Axis("milliseconds", "log"))


def _against_load(report: LoadReport) -> list[str]:
    is_open = all(stage.offered_per_s is not None for stage in report.stages)
    stages = sorted(report.stages, key=_load)
    name = "offered requests/s" if is_open else "callers"
    x = Axis(name, "log" if _load(stages[0]) > 0 and _load(stages[-1]) > _WIDE * _load(stages[0]) else "linear")
    knee = report.knee
    marks: list[Mark] = []
    if is_open and knee is not None:
        marks = [Mark(knee.good_per_s, f"knee {number(knee.good_per_s)}/s")] if knee.good_per_s else []
    answered = [(_load(stage), stage.response_time) for stage in stages if stage.response_time is not None]
    latency = [
        Line("p50", [(load, times.p50) for load, times in answered]),
        Line("p99", [(load, times.p99) for load, times in answered]),
    ]
    goodput = [Line("right", [(_load(stage), stage.goodput_per_s) for stage in stages])]
    if is_open:
        goodput.append(Line("offered", [(_load(stage), _load(stage)) for stage in stages]))
    y = Axis("requests/s", "log" if x.scale == "log" else "linear")
    return [
        line_chart(f"Response time against {name}", latency, x=x, y=Axis("milliseconds", "log"), marks=marks),
        line_chart(f"Goodput against {name}", goodput, x=x, y=y, marks=marks),
    ]


def _load(stage: Stage) -> float:
    return float(stage.concurrency or 0) if stage.offered_per_s is None else stage.offered_per_s


def _timeline(stages: Sequence[Stage]) -> list[str]:
    starts = list(accumulate((stage.seconds for stage in stages), initial=0.0))
    marks = [Mark(start, stage_name(stage)) for start, stage in zip(starts, stages, strict=False)]
    marks = marks if 1 < len(marks) <= NUM_STYLES else []

    def line(name: str, value: Callable[[Window], float | None]) -> Line:
        points: list[tuple[float, float | None]] = []
        for start, stage in zip(starts, stages, strict=False):
            points += [(start + window.start_s, value(window)) for window in stage.windows]
            points.append((start + stage.seconds, None))  # stages are apart: no line from one to the next
        return Line(name, points)

    rates = [
        line("due", lambda window: window.counts.sent),
        line("lost or wrong", lambda window: window.counts.lost + window.counts.wrong),
        line("right", lambda window: window.counts.right),
        line("refused", lambda window: window.counts.refused),
    ]
    times = [line("p50", lambda window: window.p50_ms), line("p99", lambda window: window.p99_ms)]
    x = Axis("seconds, warm-ups left out")
    return [
        line_chart("Requests per second over time", rates, x=x, y=Axis("requests/s"), marks=marks),
        line_chart("Response time over time", times, x=x, y=Axis("milliseconds", "log"), marks=marks),
    ]


def _outcomes(stages: Sequence[Stage]) -> str:
    bars = [
        Bar(stage_name(stage), [(name, getattr(stage.counts, name), style) for name, style in OUTCOMES])
        for stage in stages
    ]
    return bar_chart("What became of the requests", bars)


def _spread(items: Sequence[T], limit: int) -> list[T]:
    """Return at most so many items, the first and the last among them, evenly apart."""
    if len(items) <= limit:
        return list(items)
    return [items[math.floor(index * (len(items) - 1) / (limit - 1))] for index in range(limit)]
