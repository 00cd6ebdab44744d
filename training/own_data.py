"""The user's own images: a folder of them, a NumPy file or an IDX file, as pixels in [0, 255].

What a file does not say is inferred and told: size, channels, and the range of values. What cannot be inferred
without a guess is refused with what to do.
"""

import gzip
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from training.errors import DataMissing
from training.idx import parse_images

Pixels = NDArray[np.uint8]

MIN_ROWS: Final = 20
"""Fewer rows leave nothing to validate and to test on."""

_IMAGE_SUFFIXES: Final = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp"})
_ARRAY_NAMES: Final = ("images", "x_train", "data", "x")
_GREY, _COLOUR = 1, 3
_GREY_MODES: Final = frozenset({"1", "L", "LA"})
_MAX: Final = 255
_MAX_BYTES: Final = 8 * 2**30


class OwnImages(NamedTuple):
    """Rows that were read, and what was found out about them."""

    pixels: Pixels
    """Shape (n, channels, height, width), or (n, values) where rows are no images."""

    layout: str
    """How the rows were laid out."""

    values: str
    """Which values were found, and what was made of them."""


def read(path: Path, *, image_size: int | None = None) -> OwnImages:
    """Return the rows of a file or a folder.

    Args:
        path: Folder with image files, in sub-folders too; or a file: `.npy`, `.npz`, IDX, packed by gzip or not.
        image_size: Side of the square to which the images of a folder are scaled and cropped, pixels. Without it
            they must all have one size.

    Raises:
        DataMissing: If there is no such file, or it does not hold at least 20 rows of finite numbers that differ.
    """
    if path.is_dir():
        images = _read_folder(path, image_size)
    elif not path.is_file():
        raise DataMissing(file=str(path), problem="there is no such file or folder; give the path of your images")
    elif image_size is not None:
        raise DataMissing(
            file=str(path), problem="only the images of a folder are resized; leave out the image size"
        )
    else:
        images = _read_array(path)
    if len(images.pixels) < MIN_ROWS:
        problem = f"{len(images.pixels)} rows are too few: at least {MIN_ROWS} are divided into three splits"
        raise DataMissing(file=str(path), problem=problem)
    lowest, highest = int(images.pixels.min()), int(images.pixels.max())
    if lowest == highest:
        raise DataMissing(file=str(path), problem=f"every pixel is {lowest} of {_MAX}; there is nothing to learn")
    return images


def to_pixels(values: NDArray[Any], *, file: str) -> tuple[Pixels, str]:
    """Return values as pixels, and what was found and done.

    Booleans and zeros and ones become 0 and 255; integers in [0, 255] stay; floats in [0, 1] or [-1, 1] are scaled
    and rounded to 255ths, those in [0, 255] rounded.

    Raises:
        DataMissing: If the values are not numbers, not finite, or in another range.

    Example:
        >>> to_pixels(np.array([0.0, 0.5, 1.0]), file="x.npy")[0]
        array([  0, 128, 255], dtype=uint8)
    """
    if values.dtype.kind not in "biuf":
        raise DataMissing(file=file, problem=f"holds {values.dtype}, not numbers")
    if not values.size:
        raise DataMissing(file=file, problem="holds no values")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        row = int(np.argmax(~np.isfinite(values).reshape(len(values), -1).all(axis=1)))
        raise DataMissing(file=file, problem=f"row {row} holds NaN or an infinity; remove or fill it")
    low, high = float(values.min()), float(values.max())
    found = f"{values.dtype} in [{low:g}, {high:g}]"
    if values.dtype.kind == "f" and low >= 0 and high <= 1:
        return _rounded(values, 0.0, 1.0), f"{found}, times 255 and rounded"
    if values.dtype.kind == "f" and -1 <= low < 0 and high <= 1:
        return _rounded(values, -1.0, 1.0), f"{found}, taken as [-1, 1], scaled to [0, 255] and rounded"
    if low >= 0 and high <= 1:
        return values.astype(np.uint8) * np.uint8(_MAX), f"{found}, taken as black and white"
    if low >= 0 and high <= _MAX:
        rounded: Pixels = np.rint(values).astype(np.uint8)
        return rounded, found
    problem = f"values are {found}; scale them to [0, 1] or [0, 255] first"
    raise DataMissing(file=file, problem=problem)


def to_rows(values: NDArray[Any], *, file: str) -> tuple[NDArray[Any], str]:
    """Return values with channels before height and width, and the layout that was found.

    Raises:
        DataMissing: If the shape is none of rows of numbers or of grey or colour images.

    Example:
        >>> to_rows(np.zeros((30, 8, 9, 3)), file="x.npy")[0].shape
        (30, 3, 8, 9)
    """
    shape = values.shape
    if values.ndim == 2:  # noqa: PLR2004 - rows and values
        return values, f"{shape[0]} rows of {shape[1]} values"
    if values.ndim == 3:  # noqa: PLR2004 - rows, height, width
        return values[:, None], f"{shape[0]} grey images of {shape[1]} x {shape[2]}"
    channels = {_GREY, _COLOUR}
    if values.ndim == 4 and shape[1] in channels and not (shape[3] in channels and shape[1] != shape[3]):  # noqa: PLR2004 - rows, channels, height, width
        return values, f"{shape[0]} images of {shape[2]} x {shape[3]}, {shape[1]} channel(s) first"
    if values.ndim == 4 and shape[3] in channels:  # noqa: PLR2004 - rows, height, width, channels
        layout = f"{shape[0]} images of {shape[1]} x {shape[2]}, {shape[3]} channel(s) last"
        return np.moveaxis(values, 3, 1), layout
    problem = (
        f"shape {shape} is none of (rows, values), (rows, height, width), (rows, height, width, channels) and "
        "(rows, channels, height, width) with 1 or 3 channels"
    )
    raise DataMissing(file=file, problem=problem)


def _rounded(values: NDArray[Any], low: float, high: float) -> Pixels:
    scaled: Pixels = np.rint((values.astype(np.float64) - low) / (high - low) * _MAX).astype(np.uint8)
    return scaled


def _read_array(path: Path) -> OwnImages:
    rows, layout = to_rows(_load(path), file=str(path))
    pixels, found = to_pixels(rows, file=str(path))
    return OwnImages(np.ascontiguousarray(pixels), layout, found)


def _load(path: Path) -> NDArray[Any]:
    try:
        if path.suffix == ".npz":
            return _load_npz(path)
        if path.suffix == ".npy":
            with path.open("rb") as file:
                array: NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
            return array
        return parse_images(_unpacked(path), file=f"{path}: neither .npy nor .npz, and as IDX")
    except (OSError, ValueError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        problem = f"not a readable file of numbers ({str(error)[:200]})"
        raise DataMissing(file=str(path), problem=problem) from None


def _load_npz(path: Path) -> NDArray[Any]:
    with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
        names: Sequence[str] = archive.files
        chosen = names[0] if len(names) == 1 else next((name for name in _ARRAY_NAMES if name in names), None)
        if chosen is None:
            problem = f"holds {', '.join(names)}; name the array of images one of {', '.join(_ARRAY_NAMES)}"
            raise DataMissing(file=str(path), problem=problem)
        array: NDArray[Any] = archive[chosen]
    return array


def _unpacked(path: Path) -> bytes:
    if path.suffix != ".gz":
        return path.read_bytes()
    with gzip.open(path) as file:
        content = file.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise DataMissing(file=str(path), problem=f"unpacks to more than {_MAX_BYTES} bytes")
    return content


def _read_folder(folder: Path, image_size: int | None) -> OwnImages:
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in _IMAGE_SUFFIXES and file.is_file())
    if not files:
        known = ", ".join(sorted(_IMAGE_SUFFIXES))
        raise DataMissing(file=str(folder), problem=f"holds no images ({known})")
    images = [_open(file) for file in files]
    are_grey = all(image.mode in _GREY_MODES for image in images)
    mode = "L" if are_grey else "RGB"
    arrays = []
    for file, image in zip(files, images, strict=True):
        if image_size is not None:
            image = ImageOps.fit(image, (image_size, image_size))  # noqa: PLW2901 - the same picture
        elif image.size != images[0].size:
            problem = (
                f"{image.width} x {image.height} pixels, and {files[0].name} has {images[0].width} x "
                f"{images[0].height}; give --image-size to bring all to one"
            )
            raise DataMissing(file=str(file), problem=problem)
        arrays.append(np.asarray(image.convert(mode)))
    rows, layout = to_rows(np.stack(arrays), file=str(folder))
    return OwnImages(np.ascontiguousarray(rows), layout, f"{'grey' if are_grey else 'colour'} in [0, {_MAX}]")


def _open(file: Path) -> Image.Image:
    try:
        with Image.open(file) as image:
            image.load()
            return image.copy()
    except (OSError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise DataMissing(file=str(file), problem=f"not a readable image ({str(error)[:200]})") from None
