"""The dashboards can be drawn without Grafana."""

import io
import math

import pytest
from PIL import Image

from deploy.observability import panels, render

SPAN = render.Span(start=1000.0, end=1120.0, rate_s=10)


def curves(query: panels.Query, span: render.Span) -> list[render.Curve]:
    """Return two curves with a gap, or none for what may be empty."""
    if query.may_be_empty:
        return []
    times = [span.start + i for i in range(60)]
    return [render.Curve(name, times, [math.nan, *range(59)]) for name in ("one", "another")]


def test_a_dashboard_is_drawn() -> None:
    """Numbers, curves and stacks, with and without data."""
    board = panels.SERVICE._replace(uid="drawn", sections=panels.SERVICE.sections[:2])
    pictures = render.render(curves, SPAN, [board])
    assert list(pictures) == ["drawn.png"]
    assert Image.open(io.BytesIO(pictures["drawn.png"])).width == 1280


def test_no_number_is_no_data() -> None:
    """A quantile of nothing is NaN, and drawn as missing, not as zero."""
    assert render.text_of(math.nan, "s") == "no data"


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.0123, "s", "12.3 ms"),
        (1500.0, "ms", "1.5 s"),
        (0.5, "percentunit", "50 %"),
        (3 * 2**20, "bytes", "3 MiB"),
        (2048.0, "Bps", "2 KiB/s"),
        (12_345.0, panels.ROWS, "12.3 k/s"),
        (7.0, "short", "7"),
        (0.0, "s", "0"),
    ],
)
def test_values_have_their_unit(value: float, unit: str, text: str) -> None:
    """Three digits and a unit that people read."""
    assert render.text_of(value, unit) == text


def test_only_an_http_address_is_asked() -> None:
    """A file or another scheme is refused."""
    with pytest.raises(ValueError, match="http address"):
        render.fetcher("file:///somewhere")
