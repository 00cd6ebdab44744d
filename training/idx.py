"""IDX, the file format of MNIST: a header of four numbers, then the pixels of all images."""

import struct
from typing import Final

import numpy as np
from numpy.typing import NDArray

from training.errors import DataMissing

Pixels = NDArray[np.uint8]

_IDX_IMAGES_MAGIC: Final = 0x00000803
_IDX_HEADER: Final = struct.Struct(">4I")


def parse_images(content: bytes, *, file: str) -> Pixels:
    """Return the images of an IDX file, shape (n, 1, rows, columns).

    Raises:
        DataMissing: If the content is not an IDX file of images, or is cut short; names the problem.
    """
    if len(content) < _IDX_HEADER.size:
        raise DataMissing(file=file, problem=f"{len(content)} bytes are too few for an IDX header")
    magic, num_rows, height, width = _IDX_HEADER.unpack_from(content)
    if magic != _IDX_IMAGES_MAGIC:
        raise DataMissing(file=file, problem=f"magic number {magic:#010x}, images have {_IDX_IMAGES_MAGIC:#010x}")
    expected = _IDX_HEADER.size + num_rows * height * width
    if len(content) != expected:
        raise DataMissing(file=file, problem=f"{len(content)} bytes, its header announces {expected}")
    pixels = np.frombuffer(content, np.uint8, offset=_IDX_HEADER.size)
    return pixels.reshape(num_rows, 1, height, width)
