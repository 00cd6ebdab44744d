"""The dashboards as Grafana imports them, from `panels`."""

import json
import string
from typing import Final

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import (
    BigValueGraphMode,
    LegendDisplayMode,
    LegendPlacement,
    StackingMode,
    TooltipDisplayMode,
)
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DataSourceRef,
    VariableOption,
    VariableRefresh,
)

from deploy.observability.panels import BOARDS, Board, Panel

_SOURCE: Final = DataSourceRef("prometheus", "${datasource}")
_WIDTH: Final = 24


def files() -> dict[str, str]:
    """Return the text of each dashboard by the name of its file."""
    return {f"{board.uid}.json": text_of(board) for board in BOARDS}


def text_of(board: Board) -> str:
    """Return a dashboard as Grafana imports it."""
    return json.dumps(_built(board), cls=JSONEncoder, indent=1, sort_keys=True) + "\n"


def _built(board: Board) -> object:
    built = (
        dashboard.Dashboard(board.title)
        .uid(board.uid)
        .description(board.description)
        .tags(["vae"])
        .readonly()
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .time("now-1h", "now")
        .refresh("30s")
        .timezone("browser")
        .with_variable(dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
        .with_variable(_job())
    )
    number = 0
    for section in board.sections:
        number += 1
        built = built.with_row(dashboard.Row(section.title).id(number))
        for panel in section.panels:
            number += 1
            built = built.with_panel(_panel(panel, number, len(section.panels)))
    return built.build()


def _job() -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable("job")
        .label("Service")
        .query("label_values(vae_ready, job)")
        .datasource(_SOURCE)
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .multi(multi=True)
        .include_all(include_all=True)
        .current(VariableOption(selected=True, text="All", value="$__all"))
    )


def _panel(panel: Panel, number: int, num_beside: int) -> stat.Panel | timeseries.Panel:
    built: stat.Panel | timeseries.Panel
    if panel.kind == "number":
        last = common.ReduceDataOptions().calcs(["lastNotNull"])
        built = stat.Panel().graph_mode(BigValueGraphMode.AREA).reduce_options(last)
        built.height(4).span(_WIDTH // num_beside)
    else:
        built = _curves(panel).height(8).span(_WIDTH // 4 if num_beside % 4 == 0 else _WIDTH // 3)
    built.id(number).title(panel.title).description(panel.help).unit(panel.unit).datasource(_SOURCE)
    for name, query in zip(string.ascii_uppercase, panel.queries, strict=False):
        target = prometheus.Dataquery().ref_id(name).expr(query.expr).legend_format(query.legend or "__auto")
        built.with_target(target)
    return built


def _curves(panel: Panel) -> timeseries.Panel:
    legend = common.VizLegendOptions().show_legend(show_legend=True)
    built = (
        timeseries.Panel()
        .legend(legend.display_mode(LegendDisplayMode.LIST).placement(LegendPlacement.BOTTOM))
        .tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI))
        .axis_soft_min(0)
    )
    if panel.kind == "stacked":
        built = built.stacking(common.StackingConfig().mode(StackingMode.NORMAL)).fill_opacity(25)
    return built
