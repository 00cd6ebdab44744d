"""A load test as one page: what was found first, then how; no script, no network, nothing to install."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Final

from serving.loadtest.charts import number
from serving.loadtest.curves import OUTCOMES, charts, stage_name
from serving.loadtest.page import Verdict, page, table, verdict_box
from serving.loadtest.results import Counts, Latency, LoadReport, OperationResult, Stage

_BYTES_PER_MIB: Final = 2**20
_RULE_OF_THREE: Final = 3
"""Of n trials without a failure: the 95 % upper bound of the share of failures is 3 / n (Hanley and Lippman-Hand,
1983)."""


def write_html(report: LoadReport, path: Path) -> None:
    """Write a load test as a page that needs no other file.

    Raises:
        ReportError: If a histogram of the report does not decode.
        OSError: If the file cannot be written.
    """
    title = f"Load test: {report.label}"
    parts = [
        f'<p class="muted">{escape(report.target)} · {escape(report.model)} · {escape(report.started_at)}</p>',
        verdict_box(verdict(report)),
        _facts(report),
        '<section><h2>Curves</h2><div class="charts">',
        *charts(report),
        "</div></section>",
        "<section><h2>Stages</h2>",
        _stages(report.stages),
        *(_operations(stage) for stage in report.stages),
        "</section>",
        "<section><h2>Statuses</h2>",
        _statuses(report.stages),
        "</section>",
        "<section><h2>What was run</h2>",
        _run(report),
        "</section>",
        _MEANING,
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(title, "\n".join(parts)))


def verdict(report: LoadReport) -> Verdict:
    """Return what a report says: whether every request ended as it may, where the knee is, whose limit was met."""
    counts, details = report.counts, []
    num_bad = counts.lost + counts.wrong
    if not counts.sent:
        return Verdict("bad", "Nothing was sent", list(report.notes))
    if num_bad:
        headline = f"{counts.lost:,} of {counts.sent:,} requests lost, {counts.wrong:,} wrong"
    else:
        headline = f"None of {counts.sent:,} requests lost or wrong"
        bound = f"fewer than one in {max(1, counts.sent // _RULE_OF_THREE):,} is"
        details.append(f"With 95 % confidence {bound} (the rule of three: at most 3 of {counts.sent:,}).")
    details.append(
        f"{counts.right / counts.sent:.2%} were right, {counts.refused / counts.sent:.2%} refused in time."
    )
    details += _knee(report)
    is_limited = report.limits is not None and report.limits.is_limiting
    if report.limits is None:
        details.append("The generator's own limits were not measured: these may be its numbers, not the server's.")
    elif is_limited:
        headline += "; the generator may be the limit"
        details.append(f"The generator may be the limit: {report.limits.reason}.")
    else:
        reached = f"{number(report.limits.calls_per_s)} calls/s against an echo"
        details.append(f"The generator was not the limit: it reaches {reached}.")
    details += report.notes
    return Verdict("bad" if num_bad else "warn" if is_limited else "good", headline, details)


def _knee(report: LoadReport) -> list[str]:
    if report.knee is None:
        return []
    good, bad = report.knee.good_per_s, report.knee.bad_per_s
    if good is None:
        where = f"No load was good, the lowest was {number(bad or 0)} requests/s"
    elif bad is None:
        where = f"Every load was good, up to {number(good)} requests/s: the knee is above"
    else:
        where = f"The knee is between {number(good)} and {number(bad)} requests/s"
    return [f"{where}; good is: {report.knee.criterion}."]


def _facts(report: LoadReport) -> str:
    counts = report.counts
    facts = [("sent", f"{counts.sent:,}", f"{len(report.stages)} stages")]
    facts += [(name, f"{getattr(counts, name):,}", _share(getattr(counts, name), counts)) for name, _ in OUTCOMES]
    if (stage := _told(report)) is not None:
        where = f"at {stage_name(stage)}"
        facts.append(("goodput", f"{number(stage.goodput_per_s)}/s", where))
        facts.append(("rows", f"{number(stage.rows_per_s)}/s", where))
        facts.append(("p50, p99 in ms", _two(stage.response_time), where))
    items = (
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(note)}</small></dd></div>"
        for name, value, note in facts
    )
    return f'<dl class="facts">{"".join(items)}</dl>'


def _told(report: LoadReport) -> Stage | None:
    """Return the stage whose numbers stand for the run: that of the knee, else the one with most right answers."""
    knee = report.knee.good_per_s if report.knee else None
    at_knee = [stage for stage in report.stages if knee is not None and stage.offered_per_s == knee]
    return max(at_knee or report.stages, key=lambda stage: stage.goodput_per_s, default=None)


def _share(part: int, counts: Counts) -> str:
    return f"{part / counts.sent:.2%}" if counts.sent else ""


def _two(latency: Latency | None) -> str:
    return f"{number(latency.p50)}, {number(latency.p99)}" if latency else "none right"


def _stages(stages: Sequence[Stage]) -> str:
    headings = ["load", "seconds", "sent", "right", "refused", "lost", "wrong", "ended/s", "goodput/s", "rows/s"]
    headings += ["p50 ms", "p90", "p99", "p99.9", "max", "service p99", "send lag p99 ms", "generator CPU"]
    rows = [
        [
            stage_name(stage),
            number(stage.seconds),
            *_ledger(stage.counts),
            *(number(value) for value in (stage.rate_per_s, stage.goodput_per_s, stage.rows_per_s)),
            *_quantiles(stage.response_time),
            number(stage.service_time.p99) if stage.service_time else "-",
            number(stage.send_lag_p99_ms),
            f"{stage.generator_cpu:.0%}",
        ]
        for stage in stages
    ]
    return table("Response times of right answers, from when a request was due", headings, rows)


def _ledger(counts: Counts) -> list[str]:
    bad = [f'<td class="bad-cell">{value:,}</td>' if value else "0" for value in (counts.lost, counts.wrong)]
    return [f"{counts.sent:,}", f"{counts.right:,}", f"{counts.refused:,}", *bad]


def _quantiles(latency: Latency | None) -> list[str]:
    if latency is None:
        return ["-"] * 5
    return [number(value) for value in (latency.p50, latency.p90, latency.p99, latency.p999, latency.max)]


def _operations(stage: Stage) -> str:
    headings = ["operation", "sent", "right", "refused", "lost", "wrong", "rows/s", "MiB/s out", "MiB/s in"]
    headings += ["p50 ms", "p90", "p99", "p99.9", "max", "service p50", "service p99", "statuses"]
    rows = [_operation(result, stage.seconds) for result in stage.operations]
    shown = table(f"Operations at {stage_name(stage)}", headings, rows)
    return f"<details><summary>Operations at {escape(stage_name(stage))}</summary>{shown}</details>"


def _operation(result: OperationResult, seconds: float) -> list[str]:
    service = result.service_time
    statuses = ", ".join(f"{name} {count:,}" for name, count in sorted(result.statuses.items()))
    return [
        escape(result.name),
        *_ledger(result.counts),
        number(result.rows / seconds),
        *(number(size / seconds / _BYTES_PER_MIB) for size in (result.request_bytes, result.response_bytes)),
        *_quantiles(result.response_time),
        *([number(service.p50), number(service.p99)] if service else ["-", "-"]),
        f'<td class="text">{escape(statuses)}</td>',
    ]


def _statuses(stages: Sequence[Stage]) -> str:
    counted = [statuses_of(stage) for stage in stages]
    names = sorted({name for statuses in counted for name in statuses}, key=lambda name: (name != "OK", name))
    rows = [
        [stage_name(stage), *(f"{statuses.get(name, 0):,}" for name in names)]
        for stage, statuses in zip(stages, counted, strict=True)
    ]
    return table("Requests by the gRPC status they ended with", ["load", *names], rows)


def statuses_of(stage: Stage) -> dict[str, int]:
    """Return how many requests of a stage ended with each status."""
    names = sorted({name for result in stage.operations for name in result.statuses})
    return {name: sum(result.statuses.get(name, 0) for result in stage.operations) for name in names}


def _run(report: LoadReport) -> str:
    mix = ", ".join(f"{name} {share:.1%}" for name, share in report.mix.items())
    facts = [
        ("command", f"<code>{escape(report.command)}</code>"),
        ("target", escape(report.target)),
        ("protocol", {"vae": "vae.v1", "oip": "Open Inference Protocol v2"}[report.protocol]),
        ("mode", f"{report.mode} loop" if report.mode in {"open", "closed"} else report.mode),
        ("model", escape(report.model)),
        ("mix", escape(mix)),
        ("deadline", f"{report.deadline_s:g} s"),
        ("seed", str(report.seed)),
        ("contents", escape(report.checks)),
        ("started", escape(report.started_at)),
        ("generator on", escape(", ".join(f"{name} {value}" for name, value in report.machine.items()))),
    ]
    if report.limits is not None:
        own = report.limits
        speed = f"{number(own.calls_per_s)} calls/s, p50 {number(own.echo_p50_ms)} ms, against an echo"
        facts.append(("generator alone", f"{own.num_processes} processes, {speed}"))
    return f'<dl class="run">{"".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in facts)}</dl>'


_MEANING: Final = """<section><h2>How to read it</h2><dl class="run">
<dt>right</dt><dd>OK, within the deadline, and equal to the known answer of this very request</dd>
<dt>refused</dt><dd>a status of the service's contract, in time; safe to repeat</dd>
<dt>lost</dt><dd>no end a second after the deadline, or a status that nobody may get</dd>
<dt>wrong</dt><dd>OK with another content than the known answer</dd>
<dt>goodput</dt><dd>right answers per second</dd>
<dt>response time</dt><dd>from when a request was due, whenever it was sent: a server that stalls cannot hide it by
holding back the generator (no coordinated omission)</dd>
<dt>service time</dt><dd>from when it was sent</dd>
<dt>send lag</dt><dd>how much later than due the generator sent; response times contain it</dd>
<dt>knee</dt><dd>the load above which more load gives no more right answers in time</dd></dl></section>"""
