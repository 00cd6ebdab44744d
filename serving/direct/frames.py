"""Arrays as bytes, and back without a copy: what travels between a gateway and a replica.

A frame is a head, a text and arrays; each array begins at a multiple of 64 bytes, so that a view of it is aligned.
Numbers are little-endian. Both ends are of one release: a frame names its format, and another one is refused.
"""

import math
import struct
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Buffer = bytes | bytearray | memoryview

LENGTH: Final = struct.Struct("<Q")
"""What precedes a frame: its bytes."""

_MAGIC: Final = b"VAE1"
_ALIGNMENT: Final = 64
_HEAD: Final = struct.Struct("<4sHH")  # format, number of arrays, bytes of the text
_ARRAY: Final = struct.Struct("<BB")  # type, number of dimensions
_MAX_RANK: Final = 8
_TYPES: Final[tuple[np.dtype[Any], ...]] = tuple(np.dtype(name) for name in ("<f4", "u1", "<f2", "<f8"))
_CODES: Final = {dtype: code for code, dtype in enumerate(_TYPES)}
_JOINED: Final = 64 * 1024
"""Bytes up to which a frame is joined: one write, which costs less than a copy of so few saves."""


class FrameError(ValueError):
    """Bytes that are no frame of this release, or arrays that no frame can hold."""


def pack(text: str, arrays: Sequence[Array]) -> list[Buffer]:
    r"""Return the parts of a frame in the order in which they are to be sent, its length first.

    Large arrays are not copied: they must not change until the parts are sent.

    Args:
        text: What goes with the arrays, at most 64 KiB.
        arrays: Of float32, float64, float16 or uint8, at most eight dimensions.

    Raises:
        FrameError: If an array is of another type or rank.

    Example:
        >>> frame = b"".join(pack("mean", [np.arange(3, dtype=np.float32)]))
        >>> unpack(frame[LENGTH.size:])
        ('mean', [array([0., 1., 2.], dtype=float32)])
    """
    encoded = text.encode()
    head = bytearray(_HEAD.pack(_MAGIC, len(arrays), len(encoded)))
    head += encoded
    for array in arrays:
        code = _CODES.get(array.dtype)
        if code is None or array.ndim > _MAX_RANK:
            raise FrameError(f"arrays of {array.dtype} with {array.ndim} dimensions do not travel")
        head += _ARRAY.pack(code, array.ndim)
        head += struct.pack(f"<{array.ndim}Q", *array.shape)
    parts: list[Buffer] = [b"", head]
    size = len(head)
    for array in arrays:
        padding = bytes(-size % _ALIGNMENT)
        parts.append(padding)
        parts.append(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        size += len(padding) + array.nbytes
    parts[0] = LENGTH.pack(size)
    return [b"".join(parts)] if size <= _JOINED else [b"".join(parts[:3]), *parts[3:]]


def unpack(frame: Buffer) -> tuple[str, list[Array]]:
    """Return the text and the arrays of a frame, which are views of it.

    Raises:
        FrameError: If it is not a frame of this format, or is cut.
    """
    try:
        magic, num_arrays, num_text = _HEAD.unpack_from(frame)
        if magic != _MAGIC:
            raise FrameError("not a frame of this release")
        offset = _HEAD.size + num_text
        text = bytes(frame[_HEAD.size : offset]).decode()
        kinds: list[tuple[np.dtype[Any], tuple[int, ...]]] = []
        for _ in range(num_arrays):
            code, rank = _ARRAY.unpack_from(frame, offset)
            if code >= len(_TYPES) or rank > _MAX_RANK:
                raise FrameError(f"array of type {code} with {rank} dimensions")
            kinds.append((_TYPES[code], struct.unpack_from(f"<{rank}Q", frame, offset + _ARRAY.size)))
            offset += _ARRAY.size + 8 * rank
    except (struct.error, UnicodeDecodeError) as error:
        raise FrameError(f"a frame is cut or damaged: {error}") from None
    arrays = []
    for dtype, shape in kinds:
        offset += -offset % _ALIGNMENT
        count = math.prod(shape)  # of Python integers: what would overflow is larger than any frame
        if count * dtype.itemsize > len(frame) - offset:
            raise FrameError("a frame is shorter than its arrays")
        arrays.append(np.frombuffer(frame, dtype, count, offset).reshape(shape))
        offset += count * dtype.itemsize
    return text, arrays
