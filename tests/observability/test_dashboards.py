"""The dashboards are what the generator writes, and every line of them has data."""

import json
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
from prometheus_client import REGISTRY

from deploy.observability import grafana, panels
from serving import metrics
from tests.observability.conftest import Watched
from tests.observability.expressions import metric_names
from tests.observability.prometheus import OBSERVABILITY
from tests.observability.test_rules import RULES, RUNBOOK

FOLDER = OBSERVABILITY / "dashboards"
PROCESS = {
    "process_cpu_seconds_total",
    "process_open_fds",
    "process_resident_memory_bytes",
    "process_start_time_seconds",
    "up",
}
"""Metrics of every process, from prometheus_client, and of every target, from Prometheus."""


class Line(NamedTuple):
    """A line of a panel."""

    board: str
    panel: str
    query: panels.Query


def lines(board: panels.Board) -> Iterator[Line]:
    """Return the lines of a dashboard."""
    for section in board.sections:
        for panel in section.panels:
            for query in panel.queries:
                yield Line(board.uid, panel.title, query)


ALL = [line for board in panels.BOARDS for line in lines(board)]
OURS = [line for line in ALL if line.board == panels.SERVICE.uid]


def runnable(expr: str, *, over: str = "15s") -> str:
    """Return an expression of a dashboard as Grafana would send it, for all services."""
    return expr.replace("$job", ".+").replace(panels.RATE, over)


def exposed() -> set[str]:
    """Return the names of all series that the service can have; they are declared when it is imported."""
    metrics.register_gateway()
    suffixes = {
        "counter": ("_total",),
        "gauge": ("",),
        "info": ("_info",),
        "histogram": ("_bucket", "_sum", "_count"),
    }
    families = [family for family in REGISTRY.collect() if family.name.startswith("vae_")]
    return {family.name + suffix for family in families for suffix in suffixes[family.type]}


@pytest.mark.parametrize("board", panels.BOARDS, ids=lambda board: board.uid)
def test_the_generator_reproduces_what_is_checked_in(board: panels.Board) -> None:
    """Nobody edits the JSON: after a change run `python -m deploy.observability`."""
    assert (FOLDER / f"{board.uid}.json").read_text() == grafana.text_of(board)


def test_every_file_is_of_a_dashboard() -> None:
    """A dashboard that is no longer made goes."""
    assert {path.stem for path in FOLDER.iterdir()} == {board.uid for board in panels.BOARDS}


@pytest.mark.parametrize("board", panels.BOARDS, ids=lambda board: board.uid)
def test_a_dashboard_is_well_formed(board: panels.Board) -> None:
    """Panels have numbers of their own, do not overlap, and their lines have names of their own."""
    built: dict[str, Any] = json.loads(grafana.text_of(board))
    numbers = [panel["id"] for panel in built["panels"]]
    assert len(set(numbers)) == len(numbers)
    taken: set[tuple[int, int]] = set()
    for panel in built["panels"]:
        place = panel["gridPos"]
        cells = {
            (place["x"] + i, place["y"] + j) for i in range(place.get("w", 24)) for j in range(place.get("h", 1))
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
        names = [target["refId"] for target in panel.get("targets", ())]
        assert len(set(names)) == len(names)


def test_every_metric_that_is_named_exists() -> None:
    """Rules and dashboards ask for what the service, its processes or Ray export."""
    known = exposed() | PROCESS
    asked = [line.query.expr for line in OURS] + [rule["expr"] for rule in RULES]
    for expr in asked:
        names = metric_names(expr)
        assert names or ":" in expr, expr
        assert names <= known, f"{names - known} in {expr}"


def test_every_recorded_series_that_is_named_is_recorded() -> None:
    """A name with a colon is one of a recording rule."""
    recorded = {rule["record"] for rule in RULES if "record" in rule}
    asked = [line.query.expr for line in ALL] + [rule["expr"] for rule in RULES]
    named = {name for expr in asked for name in re.findall(r"\bjob\w*:\w+:\w+", expr)}
    assert named <= recorded


def test_the_runbook_names_panels_that_exist() -> None:
    """What stands in italics is the title of a panel or a section, or a page of Prometheus."""
    titles = {panel.title for section in panels.SERVICE.sections for panel in section.panels}
    titles |= {section.title for section in panels.SERVICE.sections} | {panels.SERVICE.title, "Targets"}
    named = {" ".join(name.split()) for name in re.findall(r"(?<![*\w])\*([^*]+)\*(?!\*)", RUNBOOK)}
    assert len(named) > 10
    assert named <= titles


@pytest.mark.slow
@pytest.mark.parametrize("line", OURS, ids=lambda line: f"{line.panel}: {line.query.legend}")
def test_every_line_has_data(watched: Watched, line: Line) -> None:
    """On a service that was called a moment ago, each expression has values; or it says why it need not."""
    found = watched.prometheus.series(runnable(line.query.expr))
    assert found or line.query.may_be_empty, line.query.expr
    assert line.query.may_be_empty or any(math.isfinite(value) for _, value in found), line.query.expr


@pytest.mark.slow
def test_lines_that_may_be_empty_have_data_after_errors(watched: Watched) -> None:
    """The load has errors of every kind: only rows without an answer are missing."""
    empty = {line.panel for line in OURS if not watched.prometheus.series(runnable(line.query.expr))}
    assert empty <= {"Rows without an answer"}


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.get("record") or rule["alert"])
def test_every_rule_is_evaluated(watched: Watched, rule: dict[str, Any]) -> None:
    """A recording rule has data; the rule of an alert is valid, and empty: nothing is wrong."""
    found = watched.prometheus.series(rule["expr"])
    assert bool(found) == ("record" in rule), found


@pytest.mark.slow
def test_no_rule_fails_and_no_alert_is_on(watched: Watched) -> None:
    """Prometheus evaluates all of them in good health, on a service that is well."""
    groups = watched.prometheus.ask("rules")["groups"]
    states = [(rule["name"], rule["health"], rule.get("state", "inactive")) for g in groups for rule in g["rules"]]
    assert len(states) == len(RULES)
    assert {(health, state) for _, health, state in states} <= {("ok", "inactive")}, states
