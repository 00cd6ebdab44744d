"""How pictures of the study look: one style, the same bytes, no global state."""

import io

import matplotlib as mpl
import numpy as np
import pytest
from PIL import Image

from training.study import figures


def drawn(*, width: float = 4.0) -> bytes:
    """Return two panels with a line each."""
    made = figures.figure(width=width, height=2.0)
    grid = figures.axes(made, 1, 2, sharey=True)
    for panel in grid[0]:
        panel.plot([0, 1, 2], [0, 1, 4])
    return figures.png(made)


def test_a_figure_is_a_png_of_the_size_that_was_asked_for() -> None:
    """Inches times dots per inch."""
    image = Image.open(io.BytesIO(drawn(width=4.0)))
    assert image.format == "PNG"
    assert image.size == (round(4.0 * figures.DOTS_PER_INCH), round(2.0 * figures.DOTS_PER_INCH))


def test_the_same_figure_has_the_same_bytes() -> None:
    """No date, no version: a recorded report changes where its numbers change."""
    assert drawn() == drawn()


def test_the_first_line_has_the_first_colour_of_the_palette() -> None:
    """The palette is in force although the style is set only while drawing."""
    pixels = np.asarray(Image.open(io.BytesIO(drawn())).convert("RGB")).reshape(-1, 3)
    blue = np.array([int(figures.PALETTE[0][index : index + 2], 16) for index in (1, 3, 5)])
    assert (pixels == blue).all(axis=1).any()


def test_the_style_stays_inside() -> None:
    """Whoever imports us and draws pictures of their own finds matplotlib as it was."""
    before = dict(mpl.rcParams)
    drawn()
    assert dict(mpl.rcParams) == before


def test_a_legend_below_takes_height_not_width() -> None:
    """Every label once; the axes become lower, not narrower."""
    sizes = []
    for with_legend in (False, True):
        made = figures.figure(width=4.0, height=3.0)
        (axes,) = figures.axes(made)[0]
        for name in ("first", "second"):
            axes.plot([0, 1], [0, 1], label=name)
        if with_legend:
            figures.legend_below(made, axes)
        figures.png(made)  # the layout is made when the figure is drawn
        sizes.append(axes.get_position().size)
    (legend,) = made.legends
    assert [text.get_text() for text in legend.get_texts()] == ["first", "second"]
    assert sizes[1][0] == pytest.approx(sizes[0][0], rel=0.01)
    assert sizes[1][1] < 0.95 * sizes[0][1]


def test_plain_ticks_are_numbers_as_they_are() -> None:
    """On a logarithmic axis, where matplotlib would write powers of ten."""
    (axes,) = figures.axes(figures.figure())[0]
    axes.set_xscale("log")
    figures.plain_ticks(axes, (0.25, 1, 500))
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.25", "1", "500"]
    assert not axes.get_xticklabels(minor=True)
