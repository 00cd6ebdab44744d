"""How the pictures of the study look: one palette, one size, PNG bytes that repeat.

Matplotlib's object interface throughout: `pyplot` holds figures in global state, which a library must not touch.
"""

import io
from collections.abc import Sequence
from typing import Any, Final

import matplotlib as mpl
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

INK: Final = "#1f2933"
MUTED: Final = "#7b8794"
PALETTE: Final = ("#2f6fb0", "#d1495b", "#3a8f5c", "#8a63b4", "#c77d1a", "#3fa7a3")
"""Blue first: it is the model. Red is what it is compared with, green the exact value."""

DOTS_PER_INCH: Final = 110

_STYLE: Final[dict[Any, Any]] = {  # matplotlib types the keys as 300 literals
    "font.size": 9.5,
    "font.family": "DejaVu Sans",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e7eb",
    "grid.linewidth": 0.7,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "axes.prop_cycle": cycler(color=PALETTE),
}


def figure(*, width: float = 7.6, height: float = 3.0) -> Figure:
    """Return an empty figure in the study's style; sizes in inches. Add axes with `subplots`."""
    with mpl.rc_context(_STYLE):
        made = Figure(figsize=(width, height), dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(made)
    return made


def axes(made: Figure, rows: int = 1, columns: int = 1, **options: Any) -> NDArray[Any]:  # noqa: ANN401
    """Return the axes of a grid in the study's style: an array of shape (rows, columns)."""
    with mpl.rc_context(_STYLE):
        grid: NDArray[Any] = made.subplots(rows, columns, squeeze=False, **options)
    return grid


def legend_below(made: Figure, of: Axes, *, columns: int = 4) -> None:
    """Put the legend of some axes below the figure, where it hides nothing and takes no width."""
    handles, labels = of.get_legend_handles_labels()
    made.legend(handles, labels, loc="outside lower center", ncols=min(columns, len(labels)), frameon=False)


def plain_ticks(of: Axes, places: Sequence[float]) -> None:
    """Label a logarithmic x axis with numbers as they are, not as powers of ten."""
    of.set_xticks(list(places), [f"{place:g}" for place in places])
    of.set_xticks([], minor=True)


def png(made: Figure) -> bytes:
    """Return the figure as a PNG file, without the date and the version that would make two runs differ."""
    buffer = io.BytesIO()
    with mpl.rc_context(_STYLE):
        made.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
