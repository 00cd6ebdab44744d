"""IDX, the file format of MNIST: a header of big-endian numbers, then one byte for every pixel or label."""

import math
import struct
from typing import Final

import numpy as np
from numpy.typing import NDArray

from training.errors import DataMissing

Pixels = NDArray[np.uint8]
Labels = NDArray[np.uint8]

_IDX_IMAGES_MAGIC: Final = 0x00000803
_IDX_LABELS_MAGIC: Final = 0x00000801
_IMAGE_DIMS: Final = 3
_LABEL_DIMS: Final = 1


def parse_images(content: bytes, *, file: str) -> Pixels:
    """Return the images of an IDX file, shape (n, 1, rows, columns).

    Raises:
        DataMissing: If the content is not an IDX file of images, or is cut short; names the problem.
    """
    images = _parse(content, _IDX_IMAGES_MAGIC, _IMAGE_DIMS, file=file, what="images")
    return images[:, None]


def parse_labels(content: bytes, *, file: str) -> Labels:
    """Return the labels of an IDX file, shape (n,).

    Raises:
        DataMissing: If the content is not an IDX file of labels, or is cut short; names the problem.
    """
    return _parse(content, _IDX_LABELS_MAGIC, _LABEL_DIMS, file=file, what="labels")


def _parse(content: bytes, expected_magic: int, num_dims: int, *, file: str, what: str) -> NDArray[np.uint8]:
    header = struct.Struct(f">{1 + num_dims}I")
    if len(content) < header.size:
        raise DataMissing(file=file, problem=f"{len(content)} bytes are too few for an IDX header")
    magic, *shape = header.unpack_from(content)
    if magic != expected_magic:
        raise DataMissing(file=file, problem=f"magic number {magic:#010x}, {what} have {expected_magic:#010x}")
    values = np.frombuffer(content, np.uint8, offset=header.size)
    # Python's own product: four bytes each may announce more than 2^64.
    announced = math.prod(shape)
    if len(values) != announced:
        problem = f"{len(content)} bytes, its header announces {header.size + announced}"
        raise DataMissing(file=file, problem=problem)
    return values.reshape(shape)
