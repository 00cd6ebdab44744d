"""Two load tests side by side: what became better, what became worse, and whether they may be compared at all."""

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Final, NamedTuple

from rich.console import Console
from rich.table import Table

from serving.loadtest.charts import Axis, Line, line_chart, number
from serving.loadtest.curves import stage_name
from serving.loadtest.distribution import Distribution, is_more_often
from serving.loadtest.page import Verdict, page, table, verdict_box
from serving.loadtest.report import statuses_of
from serving.loadtest.results import Counts, Latency, LoadReport, Stage

THRESHOLD: Final = 0.9
"""Least ratio after / before of a good thing, and of before / after of a bad one, that is no regression."""

_SAME_LOAD: Final = 0.02
"""Loads that differ by no more are the same stage."""

_ALL: Final = "all"


class Row(NamedTuple):
    """One kind of request at one load, before and after. Ratios are after / before."""

    load: str
    operation: str
    goodput: float | None
    p50: float | None
    p99: float | None
    problems: tuple[str, ...]
    """What became worse than the threshold allows; empty if nothing did."""


class Comparison(NamedTuple):
    """What two reports say together."""

    obstacles: tuple[str, ...]
    """Why the loads are not the same, so that ratios prove nothing; empty if they are."""

    remarks: tuple[str, ...]
    """Differences that a reader must know."""

    rows: tuple[Row, ...]
    threshold: float

    @property
    def problems(self) -> list[str]:
        """Every regression, with its place."""
        return [f"{row.operation} at {row.load}: {problem}" for row in self.rows for problem in row.problems]

    @property
    def is_good(self) -> bool:
        """Whether the loads were the same and nothing became worse."""
        return not self.obstacles and bool(self.rows) and not self.problems


class _Part(NamedTuple):
    """One kind of request in a stage."""

    counts: Counts
    seconds: float
    latency: Latency | None


def show(before: LoadReport, after: LoadReport, console: Console, *, threshold: float = THRESHOLD) -> bool:
    """Print a comparison; return whether the loads were the same and nothing became worse.

    Args:
        before: What is compared with.
        after: What is judged.
        console: Where to print.
        threshold: In (0, 1]: least ratio of goodputs after / before, and of response times before / after.

    Raises:
        ReportError: If a histogram of a report does not decode.
    """
    found = compare(before, after, threshold=threshold)
    shown = Table(title=f"{after.label} / {before.label}", title_justify="left")
    shown.add_column("load")
    shown.add_column("operation")
    for heading in ("goodput", "p50", "p99"):
        shown.add_column(heading, justify="right")
    shown.add_column("became worse")
    for row in found.rows:
        style = "red" if row.problems else None
        shown.add_row(row.load, row.operation, *map(_ratio, row[2:5]), "; ".join(row.problems) or "-", style=style)
    console.print(shown)
    said = _verdict(found)
    for line in (said.headline, *said.details):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    return found.is_good


def write_html_comparison(reports: Sequence[LoadReport], path: Path, *, threshold: float = THRESHOLD) -> None:
    """Write a page that compares each report with the first.

    Raises:
        ReportError: If a histogram of a report does not decode.
        OSError: If the file cannot be written.
    """
    first, *others = reports
    parts = []
    for other in others:
        found = compare(first, other, threshold=threshold)
        title = f"{other.label} / {first.label}"
        parts += [f"<section><h2>{escape(title)}</h2>", verdict_box(_verdict(found)), _table(found, title)]
        parts.append("</section>")
    parts += ['<section><h2>Curves</h2><div class="charts">', *_charts(reports), "</div></section>"]
    title = f"Load tests compared: {', '.join(report.label for report in reports)}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(title, "\n".join(parts)))


def compare(before: LoadReport, after: LoadReport, *, threshold: float = THRESHOLD) -> Comparison:
    """Return what two reports say together; stages are matched by their load.

    A response time is worse if it grew beyond the threshold and significantly more requests than before took
    longer than the threshold allows: neither a small difference counts nor one of few requests. Significance is
    that of these two runs, not of any two: repeat what matters.

    Raises:
        ReportError: If a histogram of a report does not decode.
    """
    matched = list(_matched(before.stages, after.stages))
    rows = [row for pair in matched for row in _rows(*pair, threshold)]
    return Comparison(
        _obstacles(before, after, len(matched)), _remarks(before, after, matched), tuple(rows), threshold
    )


def _obstacles(before: LoadReport, after: LoadReport, num_matched: int) -> tuple[str, ...]:
    facts = [
        ("protocols", before.protocol, after.protocol),
        ("mixes", _mix(before), _mix(after)),
        ("kinds of arrival", _arrival(before), _arrival(after)),
        ("deadlines", f"{before.deadline_s:g} s", f"{after.deadline_s:g} s"),
    ]
    found = [f"the {name} differ: {one}, then {other}" for name, one, other in facts if one != other]
    return (*found, *(["they have no load in common"] if not num_matched and not found else []))


def _remarks(before: LoadReport, after: LoadReport, matched: Sequence[tuple[Stage, Stage]]) -> tuple[str, ...]:
    facts = [
        ("models", before.model, after.model),
        ("targets", before.target, after.target),
        ("machines of the generator", _machine(before), _machine(after)),
        ("checks of contents", before.checks, after.checks),
    ]
    found = [f"The {name} differ: {one}, then {other}." for name, one, other in facts if one != other]
    if alone := len(before.stages) + len(after.stages) - 2 * len(matched):
        found.append(f"{alone} stages have no counterpart and are left out.")
    for report in (before, after):
        if report.limits is not None and report.limits.is_limiting:
            found.append(f"In {report.label} the generator may be the limit: {report.limits.reason}.")
        found += [f"{report.label}: {note}" for note in report.notes]
    return tuple(found)


def _mix(report: LoadReport) -> str:
    return ", ".join(f"{name} {share:.3g}" for name, share in sorted(report.mix.items()))


def _arrival(report: LoadReport) -> str:
    """Return how requests came: searching for the knee is an open loop too."""
    return {"knee": "open"}.get(report.mode, report.mode)


def _machine(report: LoadReport) -> str:
    return ", ".join(f"{name} {value}" for name, value in sorted(report.machine.items()))


def _matched(before: Sequence[Stage], after: Sequence[Stage]) -> Iterator[tuple[Stage, Stage]]:
    """Pair stages of the same load, each once, in the order of the first."""
    left = list(after)
    for stage in before:
        match = next((other for other in left if _is_same_load(stage, other)), None)
        if match is not None:
            left.remove(match)
            yield stage, match


def _is_same_load(one: Stage, other: Stage) -> bool:
    if one.offered_per_s is None or other.offered_per_s is None:
        return one.concurrency == other.concurrency
    return abs(one.offered_per_s - other.offered_per_s) <= _SAME_LOAD * one.offered_per_s


def _rows(before: Stage, after: Stage, threshold: float) -> Iterator[Row]:
    ends = statuses_of(before), statuses_of(after)
    whole = _row(_whole(before), _whole(after), threshold)
    appeared = tuple(f"{name} appeared {ends[1][name]:,} times" for name in sorted(set(ends[1]) - set(ends[0])))
    yield Row(stage_name(before), _ALL, *whole[:3], (*whole[3], *appeared))
    others = {result.name: result for result in after.operations}
    for one in before.operations:
        if (other := others.get(one.name)) is not None:
            parts = (
                _Part(one.counts, before.seconds, one.response_time),
                _Part(other.counts, after.seconds, other.response_time),
            )
            yield Row(stage_name(before), one.name, *_row(*parts, threshold))


def _whole(stage: Stage) -> _Part:
    return _Part(stage.counts, stage.seconds, stage.response_time)


def _row(
    before: _Part, after: _Part, threshold: float
) -> tuple[float | None, float | None, float | None, tuple[str, ...]]:
    problems = []
    rates = before.counts.right / before.seconds, after.counts.right / after.seconds
    goodput = rates[1] / rates[0] if rates[0] else None
    if goodput is not None and goodput < threshold:
        problems.append(f"goodput {number(rates[0])} to {number(rates[1])}/s")
    for name in ("lost", "wrong"):
        was, now = (getattr(part.counts, name) for part in (before, after))
        if now / max(after.counts.sent, 1) > was / max(before.counts.sent, 1):
            problems.append(f"{name} {was:,} to {now:,}")
    p50, slower = _slower(before, after, 0.5, threshold)
    p99, late = _slower(before, after, 0.99, threshold)
    return goodput, p50, p99, (*problems, *slower, *late)


def _slower(before: _Part, after: _Part, share: float, threshold: float) -> tuple[float | None, tuple[str, ...]]:
    """Return the ratio of a quantile, and what is wrong with it."""
    if before.latency is None or after.latency is None:
        return None, ()
    one, other = Distribution.of(before.latency), Distribution.of(after.latency)
    was, now = one.quantile_ms(share), other.quantile_ms(share)
    if not was:
        return None, ()
    limit = was / threshold
    is_worse = now > limit and is_more_often(
        other.num_above(limit), other.num_values, one.num_above(limit), one.num_values
    )
    return now / was, (f"p{share * 100:g} {number(was)} to {number(now)} ms",) if is_worse else ()


def _verdict(found: Comparison) -> Verdict:
    details = list(found.remarks)
    if found.obstacles:
        return Verdict("warn", f"No verdict, these are not the same load: {'; '.join(found.obstacles)}", details)
    if found.problems:
        worse, all_loads = (
            list(dict.fromkeys(row.load for row in found.rows if row.problems or is_all))
            for is_all in (False, True)
        )
        where = f"at {len(worse)} of {len(all_loads)} loads: {', '.join(worse)}"
        return Verdict("bad", f"Worse beyond a ratio of {found.threshold:g} {where}", details)
    return Verdict("good", f"No regression beyond a ratio of {found.threshold:g}", details)


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _table(found: Comparison, title: str) -> str:
    headings = ["load", "operation", "goodput", "p50", "p99", "became worse"]
    rows = [
        [
            escape(row.load),
            f'<td class="text">{escape(row.operation)}</td>',
            *map(_ratio, row[2:5]),
            f'<td class="text{" bad-cell" if row.problems else ""}">{escape("; ".join(row.problems)) or "-"}</td>',
        ]
        for row in found.rows
    ]
    return table(f"Ratios {title}: above one is better for goodput, worse for times", headings, rows)


def _charts(reports: Sequence[LoadReport]) -> Iterator[str]:
    is_open = all(stage.offered_per_s is not None for report in reports for stage in report.stages)
    x = Axis("offered requests/s" if is_open else "callers", "log")

    def load(stage: Stage) -> float:
        return stage.offered_per_s or float(stage.concurrency or 0)

    def lines(value: str) -> list[Line]:
        return [
            Line(
                report.label,
                [
                    (load(stage), getattr(stage.response_time, value, None))
                    for stage in sorted(report.stages, key=load)
                ],
            )
            for report in reports
        ]

    for name in ("p50", "p99"):
        yield line_chart(f"Response time, {name}", lines(name), x=x, y=Axis("milliseconds", "log"))
    goodput = [
        Line(report.label, [(load(stage), stage.goodput_per_s) for stage in sorted(report.stages, key=load)])
        for report in reports
    ]
    yield line_chart("Goodput", goodput, x=x, y=Axis("right answers/s", "log"))
