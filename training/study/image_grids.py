"""Images in the study's figures: grids of them, drawn into axes."""

from typing import Final

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray
from torch import Tensor

_GAP: Final = 1
_PAPER: Final = 0.62
"""Grey between the images, so that the edges of black ones are seen."""


def draw_images(where: Axes, images: Tensor, *, num_columns: int, title: str = "") -> None:
    """Draw a grid of images, row by row, black for 0 and white for 1.

    Args:
        where: Axes, whose frame and ticks are taken away.
        images: In [0, 1], shape (n, 1, height, width).
        num_columns: Images in a row.
        title: Above the grid.
    """
    where.imshow(tiled(images, num_columns=num_columns), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    where.set_axis_off()
    if title:
        where.set_title(title)


def label_lines(where: Axes, labels: tuple[str, ...], image_height: int) -> None:
    """Write a label to the left of each line of a grid that `draw_images` drew."""
    for line, label in enumerate(labels):
        middle = _GAP + line * (image_height + _GAP) + image_height / 2
        where.text(-2 * _GAP, middle, label, ha="right", va="center", fontsize=9)


def tiled(images: Tensor, *, num_columns: int) -> NDArray[np.float32]:
    """Return a grid of images as one, with a grey line around each, shape (height, width).

    Args:
        images: In [0, 1], shape (n, 1, height, width).
        num_columns: Images in a row; the last row may stay short.
    """
    _, _, height, width = images.shape
    num_lines = -(-len(images) // num_columns)
    size = num_lines * (height + _GAP) + _GAP, num_columns * (width + _GAP) + _GAP
    paper = np.full(size, _PAPER, np.float32)
    for number, image in enumerate(images.detach().cpu().numpy()):
        line, column = divmod(number, num_columns)
        top, left = _GAP + line * (height + _GAP), _GAP + column * (width + _GAP)
        paper[top : top + height, left : left + width] = image[0]
    return paper
