"""Grids of images as PNG files, for people who would rather look than read."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

_MIN_CELL: Final = 56
"""Smallest side of one image on the picture, pixels: an 8 x 8 digit is enlarged seven times."""

_COLOUR: Final = 3
_GAP: Final = 4
_LABEL_HEIGHT: Final = 18
_BACKGROUND: Final = 255
_INK: Final = 40


def save_grid(path: Path, rows: Sequence[tuple[str, NDArray[Any]]]) -> None:
    """Write rows of images under their labels.

    Args:
        path: PNG file to write; its folder is made.
        rows: Label and images of each row. Images are (n, height, width), (n, 1, height, width) or, in colour,
            (n, 3, height, width); float in [0, 1] or uint8.
    """
    images = [(label, _pixels(values)) for label, values in rows]
    height, width = images[0][1].shape[1:3]
    zoom = max(1, -(-_MIN_CELL // max(height, width)))
    cell_height, cell_width = height * zoom + _GAP, width * zoom + _GAP
    num_columns = max(len(pixels) for _, pixels in images)
    size = (num_columns * cell_width + _GAP, sum(_label_height(label) + cell_height for label, _ in images) + _GAP)
    is_grey = all(pixels.ndim == 3 for _, pixels in images)  # noqa: PLR2004 - rows, height, width
    canvas = Image.new("L", size, _BACKGROUND) if is_grey else Image.new("RGB", size, (_BACKGROUND,) * 3)
    ink = _INK if is_grey else (_INK,) * 3
    draw, font, top = ImageDraw.Draw(canvas), ImageFont.load_default(), _GAP
    for label, pixels in images:
        draw.text((_GAP, top), label, fill=ink, font=font)
        top += _label_height(label)
        for column, pixel in enumerate(pixels):
            image = Image.fromarray(pixel).resize((width * zoom, height * zoom), Image.Resampling.NEAREST)
            canvas.paste(image, (_GAP + column * cell_width, top))
        top += cell_height
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path, optimize=True)


def are_images(data_shape: Sequence[int]) -> bool:
    """Return whether rows of this shape can be drawn: (height, width), or (1 or 3, height, width)."""
    return len(data_shape) == 2 or (len(data_shape) == 3 and data_shape[0] in {1, _COLOUR})  # noqa: PLR2004 - ranks


def _label_height(label: str) -> int:
    return _LABEL_HEIGHT if label else 0


def _pixels(values: NDArray[Any]) -> NDArray[np.uint8]:
    unit = values if values.dtype == np.uint8 else np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8)
    if unit.ndim == 4 and unit.shape[1] == _COLOUR:  # noqa: PLR2004 - rows, channels, height, width
        return np.ascontiguousarray(np.moveaxis(unit, 1, 3))
    return unit.reshape(len(unit), *unit.shape[-2:])
