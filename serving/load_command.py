"""`vae-serve load`: tests a running service under load; `vae-serve load-compare`: compares two reports of it.

Exit codes: 0 every request was answered rightly or refused, 1 some were lost or wrong, or the service is not
there, 2 the command is wrong, 130 interrupted (the report is written).
"""

import importlib.util
import os
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final, Literal, NoReturn, Protocol

import typer
from rich.console import Console
from rich.table import Table

from serving.client import VaeClient
from serving.loadtest.arrivals import parse_counts, parse_rates, parse_steps, read_recording
from serving.loadtest.endpoint import Endpoint
from serving.loadtest.errors import BadWorkload, LoadTestError
from serving.loadtest.results import LoadReport, Stage
from serving.loadtest.workload import Mode, parse_mix
from serving.typed_config import ConfigError

EXIT_BAD_ANSWERS: Final = 1
EXIT_INTERRUPTED: Final = 130
_DEFAULT_RATE: Final = "100"
_DEFAULT_MIX: Final = "encode:1=0.4,decode:1=0.3,sample:1=0.3"
_UNITS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "": 1.0}
_COLUMNS: Final = (
    *("ended/s", "right/s", "rows/s"),
    *("p50", "p90", "p99", "p99.9"),
    *("refused", "lost", "wrong"),
)
_MAX_REASONS: Final = 3
"""Lines of a warning; the report has all."""

_LOAD: Final = "Load"
_CHECK: Final = "Checks"
_REPORT: Final = "Report"

out = Console()
err = Console(stderr=True)


class Connection(Protocol):
    """How the service is reached: what the options of all client commands give."""

    timeout: float

    def open(self) -> VaeClient:
        """Return a client; raise `ConfigError` if the options do not fit together."""

    def endpoint(self, *, retries: bool) -> Endpoint:
        """Return what processes need to open channels of their own."""


def load(  # noqa: PLR0913 - a command has options
    connection: Connection,
    *,
    mix: Annotated[
        str,
        typer.Option(
            help="method:rows=share, ...: encode, decode, sample, reconstruct, score, interpolate.",
            rich_help_panel=_LOAD,
        ),
    ] = _DEFAULT_MIX,
    protocol: Annotated[
        Literal["vae", "oip"], typer.Option(help="vae.v1, or Open Inference Protocol.", rich_help_panel=_LOAD)
    ] = "vae",
    rate: Annotated[
        str | None,
        typer.Option(help="Open loop: requests per second; several are stages: 100,200.", rich_help_panel=_LOAD),
    ] = None,
    steps: Annotated[
        str | None,
        typer.Option(help="Open loop without pauses, rate x seconds: 50x10,200x10.", rich_help_panel=_LOAD),
    ] = None,
    replay: Annotated[
        Path | None,
        typer.Option(help="Open loop: file of arrivals, CSV or JSON lines.", rich_help_panel=_LOAD),
    ] = None,
    concurrency: Annotated[
        str | None,
        typer.Option(help="Closed loop: callers that wait; several are stages: 1,8,64.", rich_help_panel=_LOAD),
    ] = None,
    find_knee: Annotated[
        bool,
        typer.Option("--find-knee", help="Search the highest good rate, from --rate on.", rich_help_panel=_LOAD),
    ] = False,
    p99_limit: Annotated[
        str, typer.Option(help="What a good rate keeps, with 99 % right answers.", rich_help_panel=_LOAD)
    ] = "100ms",
    arrivals: Annotated[
        Literal["poisson", "constant"], typer.Option(help="Law of the arrivals.", rich_help_panel=_LOAD)
    ] = "poisson",
    duration: Annotated[str, typer.Option(help="Length of a stage: 10s, 2m.", rich_help_panel=_LOAD)] = "10s",
    warm_up: Annotated[
        str, typer.Option(help="Load before each stage that is not counted.", rich_help_panel=_LOAD)
    ] = "2s",
    processes: Annotated[
        int | None, typer.Option(min=1, max=64, help="Of the generator; half the cores.", rich_help_panel=_LOAD)
    ] = None,
    channels: Annotated[
        int, typer.Option(min=1, max=64, help="Connections of each process.", rich_help_panel=_LOAD)
    ] = 4,
    retries: Annotated[
        bool,
        typer.Option(
            "--retries", help="Repeat calls as the published client does; else one attempt.", rich_help_panel=_LOAD
        ),
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of arrivals and contents.", rich_help_panel=_LOAD)] = 1,
    bundle: Annotated[
        str | None,
        typer.Option(help="Check answers against this bundle's own graphs.", rich_help_panel=_CHECK),
    ] = None,
    tolerance: Annotated[
        float,
        typer.Option(min=0, max=1, help="Largest difference, absolute and relative.", rich_help_panel=_CHECK),
    ] = 0.0,
    no_check: Annotated[
        bool, typer.Option("--no-check", help="Count statuses only.", rich_help_panel=_CHECK)
    ] = False,
    no_limits: Annotated[
        bool,
        typer.Option("--no-limits", help="Do not measure the generator itself first.", rich_help_panel=_CHECK),
    ] = False,
    html: Annotated[Path | None, typer.Option(help="Page to write.", rich_help_panel=_REPORT)] = None,
    json: Annotated[Path | None, typer.Option(help="File for load-compare.", rich_help_panel=_REPORT)] = None,
    label: Annotated[str, typer.Option(help="Name of the run.", rich_help_panel=_REPORT)] = "",
) -> None:
    """Test the service under load: what was offered, what came back, whether it was right.

    Without --rate, --steps, --replay or --concurrency: 100 requests/s. --timeout is the deadline of each call.
    """
    _require_histograms()
    from serving.loadtest.tester import Plan, run  # noqa: PLC0415 - other commands do without its packages

    try:
        given = {"--rate": rate, "--steps": steps, "--replay": replay, "--concurrency": concurrency}
        mode = _mode(given, find_knee=find_knee)
        recording = read_recording(replay) if replay else None
        plan = Plan(
            mode=mode,
            protocol=protocol,
            mix=parse_mix(mix),
            rates=parse_rates("--rate", rate or _DEFAULT_RATE),
            steps=parse_steps(steps) if steps else (),
            law=arrivals,
            recording=recording,
            concurrency=parse_counts("--concurrency", concurrency) if concurrency else (),
            p99_limit_ms=parse_duration("--p99-limit", p99_limit) * 1000,
            seconds=parse_duration("--duration", duration),
            warm_up_s=parse_duration("--warm-up", warm_up, least=0.0),
            deadline_s=connection.timeout,
            num_processes=processes or default_processes(),
            num_channels=channels,
            seed=seed,
            bundle=bundle,
            tolerance=tolerance,
            is_checked=not no_check,
            measures_limits=not no_limits,
            label=label,
            command=shlex.join(["vae-serve", *sys.argv[1:]]),
        )
        for path in (html, json):
            _check_writable(path)
        connection.open().close()  # says what is wrong with the options
        report = run(plan, connection.endpoint(retries=retries), err)
    except LoadTestError as error:
        _fail(error)
    _deliver(report, html, json)
    if any("interrupted" in note for note in report.notes):
        raise typer.Exit(EXIT_INTERRUPTED)
    if report.counts.lost or report.counts.wrong or any("during warm-up" in note for note in report.notes):
        raise typer.Exit(EXIT_BAD_ANSWERS)


def load_compare(
    before: Annotated[Path, typer.Argument(help="Report, JSON.")],
    after: Annotated[Path, typer.Argument(help="Report, JSON.")],
    threshold: Annotated[
        float,
        typer.Option(
            min=0.01, max=1.0, help="Least ratio of goodputs, after / before, and of times, before / after."
        ),
    ] = 0.9,
    html: Annotated[Path | None, typer.Option(help="Page to write the comparison to, with plots.")] = None,
) -> None:
    """Compare two reports of load tests; exit code 1 if the second is worse."""
    _require_histograms()
    from serving.loadtest import compare  # noqa: PLC0415 - as above

    try:
        _check_writable(html)
        earlier, later = LoadReport.read(before), LoadReport.read(after)
        is_good = compare.show(earlier, later, out, threshold=threshold)
        if html is not None:
            compare.write_html_comparison([earlier, later], html, threshold=threshold)
    except LoadTestError as error:
        _fail(error)
    if not is_good:
        raise typer.Exit(EXIT_BAD_ANSWERS)


def parse_duration(option: str, text: str, *, least: float | None = None) -> float:
    """Return the seconds of "50ms", "2s", "1m" or "0.5".

    Raises:
        BadWorkload: If it does not read so, or is not above zero (or, with `least`, below that).
    """
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*(ms|s|m|h|)", text.strip())
    if match is None:
        raise BadWorkload(option, given=text, expected="a time such as 50ms, 10s or 2m")
    seconds = float(match[1]) * _UNITS[match[2]]
    if seconds <= 0 if least is None else seconds < least:
        raise BadWorkload(option, given=text, expected="more than zero")
    return seconds


def default_processes() -> int:
    """Return how many processes make the load unless told: half the cores, at most four."""
    return max(1, min(4, (os.cpu_count() or 1) // 2))


def show(report: LoadReport, console: Console) -> None:
    """Print what a load test found. Times are response times of right answers: from when they were due."""
    title = f"{report.label}: {report.model} at {report.target}; times in milliseconds"
    console.print(title, highlight=False, markup=False, soft_wrap=True)
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("load", no_wrap=True)
    for column in _COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    for stage in report.stages:
        table.add_row(*_cells(stage))
    console.print(table)
    for line in _lines(report):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _mode(given: Mapping[str, object], *, find_knee: bool) -> Mode:
    """Return what kind of test the options mean."""
    chosen = [option for option, value in given.items() if value is not None]
    if len(chosen) > 1:
        raise BadWorkload(" ".join(chosen), given="together", expected="one of them")
    if find_knee and chosen not in ([], ["--rate"]):
        raise BadWorkload(
            "--find-knee", given=f"with {chosen[0]}", expected="--rate at most, where the search begins"
        )
    if find_knee:
        return "knee"
    modes: dict[str, Mode] = {"--replay": "replay", "--concurrency": "closed"}
    return modes.get(chosen[0], "open") if chosen else "open"


def _check_writable(path: Path | None) -> None:
    if path is not None and not path.absolute().parent.is_dir():
        raise ConfigError(f"{path}: there is no folder {path.parent}")


def _deliver(report: LoadReport, html: Path | None, json: Path | None) -> None:
    if json is not None:
        report.write(json)
    if html is not None:
        from serving.loadtest.report import write_html  # noqa: PLC0415 - only who wants a page needs it

        write_html(report, html)
    show(report, out)
    for path in (html, json):
        if path is not None:
            out.print(f"wrote {path}", highlight=False, markup=False, soft_wrap=True)


def _cells(stage: Stage) -> list[str]:
    time, counts = stage.response_time, stage.counts
    percentiles = [time.p50, time.p90, time.p99, time.p999] if time else [None] * 4
    is_open = stage.offered_per_s is not None
    return [
        f"{stage.offered_per_s:g}/s" if is_open else f"{stage.concurrency} callers",
        *(_short(rate) for rate in (stage.rate_per_s, stage.goodput_per_s, stage.rows_per_s)),
        *(_short(value) for value in percentiles),
        *(f"{number:,}" for number in (counts.refused, counts.lost, counts.wrong)),
    ]


def _short(value: float | None) -> str:
    """Return a number with three digits or more."""
    if value is None:
        return "-"
    decimals = max(0, 2 - len(f"{value:.0f}") + 1) if value else 0
    return f"{value:,.{decimals}f}"


def _lines(report: LoadReport) -> list[str]:
    """Return what stands below the table."""
    counts = report.counts
    ends = f"{counts.right:,} right + {counts.refused:,} refused + {counts.lost:,} lost + {counts.wrong:,} wrong"
    lines = [
        f"ledger: {counts.sent:,} sent = {ends}",
        f"statuses: {_statuses(report)}",
        f"checks: {report.checks}",
    ]
    if counts.sent and not (counts.lost or counts.wrong):
        lines.append(
            f"  none lost or wrong of {counts.sent:,}: at most {3 / counts.sent:.2g} of requests, at 95 %"
        )
    if report.knee is not None:
        good, bad = report.knee.good_per_s, report.knee.bad_per_s
        lines.append(f"knee: good at {_per_s(good)}, not at {_per_s(bad)}; good is {report.knee.criterion}")
    if report.limits is not None:
        lines.append(
            f"generator: {report.limits.num_processes} process{'es' * (report.limits.num_processes > 1)}, "
            f"{report.limits.calls_per_s:,.0f} calls/s and p50 {report.limits.echo_p50_ms:.2f} ms against an echo"
        )
        if report.limits.is_limiting:
            lines += ["WARNING: the generator may be the limit, not the service:"]
            reasons = report.limits.reason.split("; ")
            lines += [f"  {reason}" for reason in reasons[:_MAX_REASONS]]
            if len(reasons) > _MAX_REASONS:
                lines.append(f"  and {len(reasons) - _MAX_REASONS} more of the kind")
    return [*lines, *(f"note: {note}" for note in report.notes)]


def _statuses(report: LoadReport) -> str:
    total: dict[str, int] = {}
    for stage in report.stages:
        for operation in stage.operations:
            for name, number in operation.statuses.items():
                total[name] = total.get(name, 0) + number
    return (
        ", ".join(f"{name} {number:,}" for name, number in sorted(total.items(), key=lambda item: -item[1]))
        or "none"
    )


def _per_s(rate: float | None) -> str:
    return "no rate" if rate is None else f"{rate:,.1f}/s"


def _require_histograms() -> None:
    if importlib.util.find_spec("hdrh") is None:
        raise ConfigError("a load test needs the package hdrhistogram: pip install 'vae-serving[load]'")


def _fail(error: LoadTestError) -> NoReturn:
    """End the command with one line."""
    if error.is_callers_fault:
        raise ConfigError(str(error)) from None
    err.print(f"vae-serve: {error}", highlight=False, markup=False, soft_wrap=True)
    raise typer.Exit(EXIT_BAD_ANSWERS) from None
