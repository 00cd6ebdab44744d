"""Charts draw every point where its axis puts it, and nothing that a browser cannot read."""

import math
import re
from itertools import pairwise
from xml.etree import ElementTree as ET

import pytest

from serving.loadtest.charts import Axis, Bar, Line, Mark, bar_chart, line_chart, number

NINES = Axis("share", "nines")
LINEAR = Axis("x")
LOG = Axis("y", "log")
ROUNDING = 0.11
"""Places are written with one digit after the point."""


def places(figure: str, line: int = 0) -> list[tuple[float, float]]:
    """Return where the points of a line are drawn."""
    (path,) = re.findall(rf'<path class="s{line}" d="(M[^"]*\.[^"]*)"', figure)
    return [(float(x), float(y)) for x, y in re.findall(r"[ML](\S+) ([\d.]+)", path)]


def test_each_nine_takes_the_same_room() -> None:
    """90 %, 99 %, 99.9 %: equal steps, because the axis is log 1 / (1 - p)."""
    points = [(0.0, 1.0), (0.9, 1.0), (0.99, 1.0), (0.999, 1.0)]
    xs = [x for x, _ in places(line_chart("t", [Line("a", points)], x=NINES, y=LOG))]
    steps = [b - a for a, b in pairwise(xs)]
    assert steps[0] == pytest.approx(steps[1], abs=2 * ROUNDING)
    assert steps[0] == pytest.approx(steps[2], abs=2 * ROUNDING)


def test_equal_ratios_take_the_same_room_on_a_logarithmic_axis() -> None:
    """1, 10, 100 upwards; a picture counts downwards."""
    ys = [y for _, y in places(line_chart("t", [Line("a", [(0, 1), (1, 10), (2, 100)])], x=LINEAR, y=LOG))]
    assert ys[0] - ys[1] == pytest.approx(ys[1] - ys[2], abs=2 * ROUNDING)
    assert ys[0] > ys[2]


def test_a_linear_axis_begins_at_zero() -> None:
    """A line of constants is not stretched into something that looks like a difference."""
    ys = [y for _, y in places(line_chart("t", [Line("a", [(0, 0), (1, 50), (2, 100)])], x=LINEAR, y=Axis("y")))]
    assert ys[0] - ys[1] == pytest.approx(ys[1] - ys[2], abs=2 * ROUNDING)


def test_a_gap_breaks_the_line() -> None:
    """A second without an answer has no latency, and none is made up between its neighbours."""
    figure = line_chart("t", [Line("a", [(0, 1), (1, None), (2, 3), (3, 4)])], x=LINEAR, y=LOG)
    (path,) = re.findall(r'<path class="s0" d="(M[^"]*\.[^"]*)"', figure)
    assert path.count("M") == 2
    assert path.count("L") == 1


def test_what_an_axis_cannot_show_is_left_out() -> None:
    """Zero has no logarithm, one has no nines, and infinity no place."""
    figure = line_chart("t", [Line("a", [(0.5, 0.0), (0.5, 2.0), (1.0, 3.0), (0.6, math.inf)])], x=NINES, y=LOG)
    assert len(places(figure)) == 1


@pytest.mark.parametrize("lines", [[], [Line("a", [])], [Line("a", [(1.0, None)])]])
def test_without_points_a_chart_says_so(lines: list[Line]) -> None:
    """An empty run has a page too."""
    assert "Nothing to draw" in line_chart("t", lines, x=LINEAR, y=LINEAR)


@pytest.mark.parametrize("value", [0.0, 1e-9, 7.0, 1e9])
def test_one_point_is_drawn_at_any_height(value: float) -> None:
    """The range of an axis is never empty."""
    assert len(places(line_chart("t", [Line("a", [(value, value)])], x=LINEAR, y=LINEAR))) == 1


def test_texts_are_escaped_and_the_picture_is_well_formed() -> None:
    """A label is text, whatever is in it; the figure parses as XML."""
    name = 'a <b> & "c"'
    marks = [Mark(1.0, name), Mark(99.0, "outside")]
    line = line_chart(name, [Line(name, [(0, 1), (2, 3)])], x=Axis(name), y=Axis(name, "log"), marks=marks)
    bar = bar_chart(name, [Bar(name, [(name, 2.0, 1), ("none", 0.0, 2)])])
    assert "outside" not in line
    for figure in (line, bar):
        texts = [element.text for element in ET.fromstring(figure).iter()]  # noqa: S314 - our own
        assert name in texts


def test_parts_of_a_bar_fill_it_in_proportion() -> None:
    """Widths are as the sizes; a part of nothing is not drawn and not in the legend."""
    figure = bar_chart("t", [Bar("a", [("right", 30.0, 2), ("lost", 10.0, 1), ("wrong", 0.0, 0)])])
    right, lost = (
        float(width) for width in re.findall(r'<rect class="f[12]" x="[\d.]+" y="0" width="([\d.]+)"', figure)
    )
    assert right == pytest.approx(3 * lost, rel=1e-3)
    assert "wrong" not in figure


def test_every_line_differs_from_the_others_without_its_colour() -> None:
    """Each style has a shape of its points of its own."""
    lines = [Line(str(index), [(0, index + 1)]) for index in range(7)]
    figure = line_chart("t", lines, x=LINEAR, y=LOG)
    shapes = {re.sub(r"^M\S+ [\d.]+", "", path) for path in re.findall(r'<path class="d\d" d="([^"]*)"', figure)}
    assert len(shapes) >= 6  # the ring differs from the disc in its filling


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.01234, "0.0123"), (12.34, "12.3"), (99.96, "100"), (1234567.8, "1,234,568")]
)
def test_numbers_are_short(value: float, text: str) -> None:
    """Three digits, thousands apart."""
    assert number(value) == text
