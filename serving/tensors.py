"""The message Tensor and the array it means, with every check made before memory is taken.

Both ends use it: the server to read what strangers send, the client to read what the server answers.
"""

import math
import sys
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from protos.vae.v1 import vae_pb2
from serving.errors import MissingField, OutOfRange, ShapeMismatch, SizeMismatch, UnsupportedType

Array = NDArray[Any]

MAX_RANK: Final = 8
_IS_LITTLE: Final = sys.byteorder == "little"

_DTYPES: Final[dict[vae_pb2.DataType.ValueType, np.dtype[Any]]] = {
    vae_pb2.DATA_TYPE_FLOAT32: np.dtype("<f4"),
    vae_pb2.DATA_TYPE_FLOAT16: np.dtype("<f2"),
    vae_pb2.DATA_TYPE_UINT8: np.dtype("u1"),
}
_TYPES: Final = {dtype: number for number, dtype in _DTYPES.items()}
_INPUTS: Final = frozenset({vae_pb2.DATA_TYPE_FLOAT32, vae_pb2.DATA_TYPE_UINT8})


def to_message(array: Array) -> vae_pb2.Tensor:
    r"""Return the message of an array of float32, float16 or uint8.

    Example:
        >>> to_message(np.array([[1, 2]], np.uint8)).data
        b'\x01\x02'
    """
    little = little_endian(array)
    return vae_pb2.Tensor(dtype=type_of(little.dtype), shape=little.shape, data=little.tobytes())


def little_endian(array: Array) -> Array:
    """Return an array as its bytes are on the wire: contiguous, least significant first; itself if it is so."""
    if _IS_LITTLE and array.dtype.isnative and array.flags.c_contiguous:
        return array
    return np.ascontiguousarray(array, array.dtype.newbyteorder("<"))


def type_of(dtype: np.dtype[Any]) -> vae_pb2.DataType.ValueType:
    """Return the number of a little-endian type on the wire.

    Raises:
        UnsupportedType: If it has none.
    """
    number = _TYPES.get(dtype)
    if number is None:
        raise UnsupportedType("tensor", expected="float32, float16 or uint8", actual=str(dtype))
    return number


def from_message(
    tensor: vae_pb2.Tensor, *, field: str, accept: frozenset[vae_pb2.DataType.ValueType] = _INPUTS
) -> Array:
    """Return the array of a message, read-only; protobuf copies the bytes once.

    Args:
        tensor: The message.
        field: Path of the field, for errors.
        accept: Types that are accepted there.

    Raises:
        MissingField: If it is empty.
        UnsupportedType: If its type is not one of `accept`.
        ShapeMismatch: If its rank is not in [1, 8].
        OutOfRange: If a dimension is below one.
        SizeMismatch: If its bytes are not product(shape) elements.

    Example:
        >>> from_message(to_message(np.ones((2, 3), np.float32)), field="data").shape
        (2, 3)
    """
    if not tensor.dtype and not tensor.data:
        raise MissingField(field, expected="a tensor")
    check_type(tensor.dtype, field=f"{field}.dtype", accept=accept)
    if not 1 <= len(tensor.shape) <= MAX_RANK:  # before they are copied: a stranger may send millions
        actual = tensor.shape[: MAX_RANK + 1]
        raise ShapeMismatch(f"{field}.shape", expected=f"of 1 to {MAX_RANK} dimensions", actual=actual)
    shape = tuple(tensor.shape)
    if min(shape) < 1:
        raise OutOfRange(f"{field}.shape", expected="each dimension at least 1", actual=str(min(shape)))
    dtype = _DTYPES[tensor.dtype]
    expected_bytes = math.prod(shape) * dtype.itemsize  # Python integers: no overflow, no memory
    data = tensor.data  # a copy each time that it is asked for: what is refused above costs none
    if len(data) != expected_bytes:
        raise SizeMismatch(f"{field}.data", expected_bytes=expected_bytes, actual_bytes=len(data))
    return np.frombuffer(data, dtype).reshape(shape)


def check_type(number: int, *, field: str, accept: frozenset[Any]) -> None:
    """Refuse a type that is not accepted there.

    Raises:
        UnsupportedType: If `number` is not one of `accept`.
    """
    if number not in accept:
        raise UnsupportedType(field, expected=_names(accept), actual=_name(number))


def to_output(unit: NDArray[np.float32], output_type: int) -> Array:
    """Return values in [0, 1] as the type that the caller asked for: float32 unless float16 or uint8."""
    if output_type == vae_pb2.DATA_TYPE_FLOAT16:
        return unit.astype(np.float16)
    if output_type == vae_pb2.DATA_TYPE_UINT8:
        rounded: Array = np.rint(unit * np.float32(255)).astype(np.uint8)
        return rounded
    return unit


def _name(number: int) -> str:
    known = vae_pb2.DataType.DESCRIPTOR.values_by_number.get(number)
    return known.name.removeprefix("DATA_TYPE_") if known else f"unknown type {number}"


def _names(numbers: frozenset[Any]) -> str:
    return " or ".join(_name(number) for number in sorted(numbers) if number)
