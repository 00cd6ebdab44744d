"""Charts as inline SVG: no script, no network, colours from the page's style sheet.

Our own, because what draws SVG in Python either needs NumPy and a font cache to start (Matplotlib, which serving
must not import) or has no logarithmic x axis and fixes its colours where they are drawn (pygal): a page that
follows its reader's dark mode needs classes, and latencies need an axis of nines.
"""

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import Final, Literal, NamedTuple

Scale = Literal["linear", "log", "nines"]
"""`nines` is for shares p in [0, 1): drawn at log 1 / (1 - p), so that each nine takes the same room."""

Point = tuple[float, float]

NUM_STYLES: Final = 7
"""Styles of lines, `.s0` to `.s6` in the style sheet: not only colours, dashes and points differ too."""

_WIDTH: Final = 440
_HEIGHT: Final = 270
_LEFT: Final = 56
_RIGHT: Final = 14
_TOP: Final = 24
_BOTTOM: Final = 44
_MAX_MARKED: Final = 40
_NUM_TICKS: Final = 5
_MANTISSAS: Final = ((1.0, 2.0, 5.0), (1.0, 3.0), (1.0,))
_NINES: Final = (0.0, 0.9, 0.99, 0.999, 0.9999, 0.99999)
_BAR_HEIGHT: Final = 20
_BAR_GAP: Final = 8
_BAR_LABEL: Final = 96


class Axis(NamedTuple):
    """One direction of a chart."""

    label: str
    scale: Scale = "linear"


class Line(NamedTuple):
    """Points in the order of x, joined; None breaks the line."""

    name: str
    points: Sequence[tuple[float, float | None]]


class Mark(NamedTuple):
    """A vertical line with a word, at a place of the x axis."""

    x: float
    text: str


class Bar(NamedTuple):
    """Shares of one whole, drawn end to end; each with the number of its style."""

    name: str
    parts: Sequence[tuple[str, float, int]]


class _Ruler(NamedTuple):
    """Maps values of one axis to places of the picture."""

    scale: Scale
    low: float
    high: float
    start: float
    stop: float

    def place(self, value: float) -> float:
        """Return where a value is drawn."""
        low, high = _stretched(self.low, self.scale), _stretched(self.high, self.scale)
        share = (_stretched(value, self.scale) - low) / (high - low)
        return self.start + (self.stop - self.start) * min(max(share, 0.0), 1.0)

    @property
    def ticks(self) -> list[float]:
        """Values with a label."""
        make: Callable[[float, float], list[float]] = {"linear": _even, "log": _decades, "nines": _nines}[
            self.scale
        ]
        return [tick for tick in make(self.low, self.high) if self.low <= tick <= self.high * (1 + 1e-9)]


def number(value: float) -> str:
    """Return a number as people write it: three significant digits, thousands apart."""
    if value == 0:
        return "0"
    if abs(value) >= 100:  # noqa: PLR2004 - all its digits are shown
        return f"{value:,.0f}"
    return f"{value:.3g}"


def line_chart(
    title: str, lines: Sequence[Line], *, x: Axis, y: Axis, marks: Sequence[Mark] = (), top: float | None = None
) -> str:
    """Return a figure with lines, axes, ticks and a legend; a sentence if there is nothing to draw.

    Args:
        title: What the chart shows.
        lines: At most NUM_STYLES of them get a style of their own.
        x: Horizontal axis.
        y: Vertical axis; a logarithmic one leaves out what is not above zero.
        marks: Places of x to point out.
        top: Least upper end of the vertical axis.
    """
    points = [
        (a, b) for line in lines for a, b in line.points if b is not None and _is_drawn(a, x) and _is_drawn(b, y)
    ]
    if not points:
        return f"<figure><figcaption>{escape(title)}</figcaption><p>Nothing to draw.</p></figure>"
    across = _ruler(x, [a for a, _ in points], _LEFT, _WIDTH - _RIGHT)
    up = _ruler(y, [b for _, b in points] + [top] * (top is not None), _HEIGHT - _BOTTOM, _TOP)  # type: ignore[list-item]  # repeated only if there
    drawn = [
        *_grid(across, up, x, y),
        *(_line(line, index % NUM_STYLES, across, up, x=x, y=y) for index, line in enumerate(lines)),
        *(_mark(mark, across) for mark in marks if across.low <= mark.x <= across.high),
    ]
    return _figure(title, drawn, _HEIGHT, [(line.name, index % NUM_STYLES) for index, line in enumerate(lines)])


def bar_chart(title: str, bars: Sequence[Bar]) -> str:
    """Return a figure with one horizontal bar per whole, divided into its parts, with a legend."""
    room = _WIDTH - _BAR_LABEL - _RIGHT
    drawn: list[str] = []
    for index, bar in enumerate(bars):
        top, left = index * (_BAR_HEIGHT + _BAR_GAP), float(_BAR_LABEL)
        drawn.append(f'<text x="{_BAR_LABEL - 6}" y="{top + 14}" class="end">{escape(bar.name)}</text>')
        whole = sum(size for _, size, _ in bar.parts) or 1.0
        for name, size, style in bar.parts:
            width = room * size / whole
            text = escape(f"{bar.name}, {name}: {number(size)} ({size / whole:.2%})")
            box = f'x="{left:.1f}" y="{top}" width="{width:.2f}" height="{_BAR_HEIGHT}"'
            if size:
                drawn.append(f'<rect class="f{style}" {box}><title>{text}</title></rect>')
            left += width
    legend = {name: style for bar in bars for name, size, style in bar.parts if size}
    return _figure(title, drawn, len(bars) * (_BAR_HEIGHT + _BAR_GAP), list(legend.items()), shape="square")


def _figure(
    title: str, drawn: Sequence[str], height: int, legend: Sequence[tuple[str, int]], *, shape: str = ""
) -> str:
    name = escape(title)
    picture = (
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(title, quote=True)}">'
        f"{''.join(drawn)}</svg>"
    )
    entries = "".join(f"<li>{_swatch(style, shape)}{escape(text)}</li>" for text, style in legend)
    return f'<figure><figcaption>{name}</figcaption>{picture}<ul class="legend">{entries}</ul></figure>'


def _swatch(style: int, shape: str) -> str:
    inside = (
        f'<rect class="f{style}" x="5" y="1" width="12" height="10"/>'
        if shape
        else f'<path class="s{style}" d="M0 6H22"/>{_dot(11, 6, style)}'
    )
    return f'<svg class="swatch" viewBox="0 0 22 12" aria-hidden="true">{inside}</svg>'


def _grid(across: _Ruler, up: _Ruler, x: Axis, y: Axis) -> list[str]:
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    drawn = []
    for tick in up.ticks:
        at = up.place(tick)
        drawn.append(f'<path class="grid" d="M{_LEFT} {at:.1f}H{right}"/>')
        drawn.append(f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" class="end">{_tick(tick, y)}</text>')
    for tick in across.ticks:
        at = across.place(tick)
        drawn.append(f'<path class="grid" d="M{at:.1f} {_TOP}V{bottom}"/>')
        drawn.append(f'<text x="{at:.1f}" y="{bottom + 16}" class="middle">{_tick(tick, x)}</text>')
    middle = (_TOP + bottom) / 2
    return [
        *drawn,
        f'<path class="axis" d="M{_LEFT} {_TOP}V{bottom}H{right}"/>',
        f'<text x="{(_LEFT + right) / 2}" y="{_HEIGHT - 8}" class="middle label">{escape(x.label)}</text>',
        f'<text transform="translate(12 {middle}) rotate(-90)" class="middle label">{escape(y.label)}</text>',
    ]


def _line(line: Line, style: int, across: _Ruler, up: _Ruler, *, x: Axis, y: Axis) -> str:
    path, dots, is_open = [], [], False
    is_marked = len(line.points) <= _MAX_MARKED
    for a, b in line.points:
        if b is None or not (_is_drawn(a, x) and _is_drawn(b, y)):
            is_open = False
            continue
        left, top = across.place(a), up.place(b)
        path.append(f"{'L' if is_open else 'M'}{left:.1f} {top:.1f}")
        if is_marked:
            what = escape(f"{line.name}: {_tick(a, x)}, {number(b)}")
            dots.append(_dot(left, top, style, title=what))
        is_open = True
    return f'<path class="s{style}" d="{"".join(path)}"/>{"".join(dots)}'


def _dot(x: float, y: float, style: int, *, title: str = "") -> str:
    """Draw a point in the shape of its style: disc, square, triangle, diamond, ring, cross, bar."""
    shapes = (
        "m-3 0a3 3 0 1 0 6 0a3 3 0 1 0 -6 0",
        "m-3 -3h6v6h-6z",
        "m0 -4l4 7h-8z",
        "m0 -4l4 4l-4 4l-4 -4z",
        "m-3 0a3 3 0 1 0 6 0a3 3 0 1 0 -6 0",
        "m-3 -3l6 6m0 -6l-6 6",
        "m0 -4v8",
    )
    content = f"<title>{title}</title>" if title else ""
    return f'<path class="d{style}" d="M{x:.1f} {y:.1f}{shapes[style]}">{content}</path>'


def _mark(mark: Mark, across: _Ruler) -> str:
    at = across.place(mark.x)
    side, shift = ("end", 4) if at > _WIDTH - _LEFT - _RIGHT else ("start", -4)
    return (
        f'<path class="mark" d="M{at:.1f} {_TOP}V{_HEIGHT - _BOTTOM}"/>'
        f'<text x="{at + shift:.1f}" y="{_TOP - 8}" class="{side} mark">{escape(mark.text)}</text>'
    )


def _ruler(axis: Axis, values: Sequence[float], start: float, stop: float) -> _Ruler:
    low, high = min(values), max(values)
    if axis.scale == "linear":
        low, high = min(low, 0.0), max(high, 1e-9)
        step = _step(high - low)
        is_upright = start > stop  # room above the highest point; to the right none is needed
        return _Ruler("linear", low, math.ceil(high / step - 1e-9) * step if is_upright else high, start, stop)
    if axis.scale == "nines":
        return _Ruler("nines", 0.0, max(high, 0.99), start, stop)
    return _Ruler("log", low / 1.15, high * 1.15, start, stop)


def _is_drawn(value: float, axis: Axis) -> bool:
    in_range = {"linear": True, "log": value > 0, "nines": value < 1}[axis.scale]
    return math.isfinite(value) and in_range


def _stretched(value: float, scale: Scale) -> float:
    if scale == "linear":
        return value
    return math.log10(max(value, 1e-12)) if scale == "log" else -math.log10(1 - value)


def _step(span: float) -> float:
    """Return 1, 2 or 5 times a power of ten that divides a span into about five."""
    power = 10.0 ** math.floor(math.log10(span / _NUM_TICKS))
    return next(power * size for size in (1, 2, 5, 10) if span / (power * size) <= _NUM_TICKS)


def _even(low: float, high: float) -> list[float]:
    step = _step(high - low)
    return [index * step for index in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1)]


def _decades(low: float, high: float) -> list[float]:
    """Return round values of a logarithmic axis, as many as have room."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for mantissas in _MANTISSAS:
        ticks = [size * 10.0**power for power in powers for size in mantissas]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= _NUM_TICKS + 2:
            break
    return ticks


def _nines(_low: float, high: float) -> list[float]:
    return [tick for tick in _NINES if tick <= high]


def _tick(value: float, axis: Axis) -> str:
    return f"{value * 100:.6g} %" if axis.scale == "nines" else number(value)
