"""Answers as bytes: tensors go from the engine's memory into the reply in one copy.

A protobuf message would take three: into Python's bytes, into the message, into its serialised form.
"""

import functools
import math
from typing import Any, Final, Protocol

import numpy as np
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message
from numpy.typing import NDArray

from serving.tensors import little_endian, type_of

Array = NDArray[Any]

_LENGTH_DELIMITED: Final = 2
_DTYPE_TAG, _SHAPE_TAG, _DATA_TAG = b"\x08", b"\x12", b"\x1a"
"""Of the fields of `vae.v1.Tensor`: dtype = 1 (varint), shape = 2 (packed), data = 3 (bytes)."""


class Answer(Protocol):
    """What becomes the bytes of an answer: a message, or a reply."""

    def SerializeToString(self) -> bytes:  # noqa: N802 - the name that protobuf gave it
        """Return the bytes."""
        ...


class Reply:
    """A message and its tensors; parses as the message with its tensor fields set.

    Args:
        message: Everything but the tensors.
        tensors: Arrays of float32, float16 or uint8 by the name of their field; None for an absent one.

    Raises:
        UnsupportedType: If an array is of another type.
    """

    __slots__ = ("_message", "_parts")

    def __init__(self, message: Message, **tensors: Array | None) -> None:
        self._message, self._parts = message, list[Any]()
        for name, array in tensors.items():
            if array is not None:
                little = little_endian(array)
                self._parts += (_head(message.DESCRIPTOR, name, little.dtype, little.shape), little)

    def SerializeToString(self) -> bytes:  # noqa: N802 - as a message, which may stand in its place
        """Return the bytes. Fields may come in any order on the wire."""
        return b"".join((*self._parts, self._message.SerializeToString()))


@functools.lru_cache(maxsize=1024)
def _head(message: Descriptor, field: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """Return what precedes the data of a tensor in a field of a message."""
    number, num_bytes = message.fields_by_name[field].number, math.prod(shape) * dtype.itemsize
    packed = b"".join(map(_varint, shape))
    inside = _DTYPE_TAG + _varint(type_of(dtype)) + _SHAPE_TAG + _varint(len(packed)) + packed
    inside += _DATA_TAG + _varint(num_bytes)
    return _varint(number << 3 | _LENGTH_DELIMITED) + _varint(len(inside) + num_bytes) + inside


def _varint(number: int) -> bytes:
    """Return a non-negative number, seven bits to a byte, the least significant first."""
    groups = bytearray()
    while number > 0x7F:  # noqa: PLR2004 - seven bits
        groups.append(number & 0x7F | 0x80)
        number >>= 7
    groups.append(number)
    return bytes(groups)
