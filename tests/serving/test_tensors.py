"""Laws of `serving.tensors`: what goes in comes out, and nothing wrong comes in."""

import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from protos.vae.v1 import vae_pb2 as pb
from serving.errors import (
    InvalidRequest,
    MissingField,
    OutOfRange,
    ShapeMismatch,
    SizeMismatch,
    UnsupportedType,
)
from serving.tensors import from_message, to_message, to_output

ALL = frozenset({pb.DATA_TYPE_FLOAT32, pb.DATA_TYPE_FLOAT16, pb.DATA_TYPE_UINT8})
SHAPES = arrays.array_shapes(min_dims=1, max_dims=8, max_side=4)
F32, F16, U8, NONE = (
    pb.DATA_TYPE_FLOAT32,
    pb.DATA_TYPE_FLOAT16,
    pb.DATA_TYPE_UINT8,
    pb.DATA_TYPE_UNSPECIFIED,
)


@given(
    array=st.one_of(
        arrays.arrays(np.float32, SHAPES), arrays.arrays(np.float16, SHAPES), arrays.arrays(np.uint8, SHAPES)
    )
)
@settings(max_examples=150, deadline=None)
def test_an_array_comes_back_as_it_went(array: NDArray[Any]) -> None:
    """Type, shape and every bit survive, NaN payloads included, through the wire as well."""
    message = pb.Tensor.FromString(to_message(array).SerializeToString())
    back = from_message(message, field="data", accept=ALL)
    assert back.dtype == array.dtype
    assert back.shape == array.shape
    assert back.tobytes() == array.tobytes()


@given(array=arrays.arrays(np.float32, arrays.array_shapes(min_dims=2, max_dims=3, min_side=2, max_side=5)))
@settings(max_examples=50, deadline=None)
def test_layout_and_byte_order_of_the_sender_do_not_matter(array: NDArray[np.float32]) -> None:
    """Big-endian, transposed, strided and reversed arrays arrive with the values that their owner sees."""
    for other in (array.astype(">f4"), array.T, array[::-1], array[..., ::2], np.asfortranarray(array)):
        back = from_message(to_message(other), field="data")
        np.testing.assert_array_equal(back, other)
        assert back.dtype == np.dtype("<f4")


def test_bytes_are_little_endian_and_row_major() -> None:
    """The wire format is what the proto promises, spelled out."""
    message = to_message(np.array([[1.0, 2.0], [3.0, 4.0]], ">f4"))
    assert message.data.hex() == "0000803f00000040" + "0000404000008040"
    assert list(message.shape) == [2, 2]
    assert message.dtype == F32


@pytest.mark.parametrize(
    "dtype", [np.float64, np.int8, np.int64, np.bool_, np.complex64, np.object_, "U3", "M8[s]"]
)
def test_other_types_are_not_sent(dtype: Any) -> None:  # noqa: ANN401 - numpy's own argument
    """An array of another type is refused by name."""
    with pytest.raises(UnsupportedType, match="expected float32, float16 or uint8, got "):
        to_message(np.zeros((1, 1), dtype))


def test_reading_copies_nothing() -> None:
    """The array looks at the bytes of the message, and cannot be written."""
    message = to_message(np.zeros((256, 1024), np.float32))
    tracemalloc.start()
    array = from_message(message, field="data")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert not array.flags.writeable
    # Reading `message.data` makes one bytes object of 1 MiB; a copy would make two.
    assert peak < 1.5 * array.nbytes


BAD: list[tuple[pb.Tensor, type[InvalidRequest], str]] = [
    (pb.Tensor(), MissingField, "data"),
    (pb.Tensor(shape=[1]), MissingField, "data"),
    (pb.Tensor(data=b"1234", shape=[1]), UnsupportedType, "data.dtype"),
    (pb.Tensor(dtype=F16, data=b"12", shape=[1]), UnsupportedType, "data.dtype"),
    *[
        (pb.Tensor(dtype=number, data=b"1234", shape=[1]), UnsupportedType, "data.dtype")  # type: ignore[arg-type]
        for number in (4, 99, -1, 2**31 - 1, -(2**31))
    ],
    (pb.Tensor(dtype=F32), ShapeMismatch, "data.shape"),
    (pb.Tensor(dtype=F32, data=b"1234"), ShapeMismatch, "data.shape"),
    (pb.Tensor(dtype=U8, data=b"1", shape=[1] * 9), ShapeMismatch, "data.shape"),
    (pb.Tensor(dtype=U8, data=b"1", shape=[1] * 100_000), ShapeMismatch, "data.shape"),
    (pb.Tensor(dtype=U8, data=b"", shape=[0] * 9), ShapeMismatch, "data.shape"),
    *[
        (pb.Tensor(dtype=number, data=data, shape=shape), OutOfRange, "data.shape")
        for number in (F32, U8)
        for data in (b"", b"1234")
        for shape in ([0], [1, 0], [0, 1], [-1], [-4], [2, -2], [-2, -2], [2**40, 0], [-(2**63)], [3, -1])
    ],
    *[
        (pb.Tensor(dtype=number, data=b"1234", shape=shape), SizeMismatch, "data.data")
        for number in (F32, U8)
        for shape in (
            [2],
            [3],
            [5],
            [2, 3],
            [2**31],
            [2**40],
            [2**63 - 1],
            [2**32, 2**32],
            [2**62, 4],
            [2**63 - 1] * 8,
            [2**31, 2**31, 4],
        )
    ],
    (pb.Tensor(dtype=F32, shape=[1]), SizeMismatch, "data.data"),
    (pb.Tensor(dtype=F32, data=b"123", shape=[1]), SizeMismatch, "data.data"),
    (pb.Tensor(dtype=F32, data=b"12345", shape=[1]), SizeMismatch, "data.data"),
    (pb.Tensor(dtype=U8, data=b"", shape=[1]), SizeMismatch, "data.data"),
]


@pytest.mark.parametrize(("tensor", "kind", "field"), BAD)
def test_a_wrong_tensor_is_refused_with_its_field(
    tensor: pb.Tensor, kind: type[InvalidRequest], field: str
) -> None:
    """Each way to be wrong has its class and the path of the field; no memory is taken for what is claimed."""
    tracemalloc.start()
    with pytest.raises(InvalidRequest, match="expected") as caught:
        from_message(tensor, field="data")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert type(caught.value) is kind
    assert caught.value.field == field
    assert len(str(caught.value)) < 400
    assert (
        peak < 16 * 2**20
    )  # a shape of 100,000 dimensions is a tuple of 0.8 MB; the claims are up to 2^504 bytes


def test_a_size_mismatch_says_both_sizes() -> None:
    """The caller reads how many bytes were needed and how many came."""
    with pytest.raises(SizeMismatch, match=r"^data\.data: expected 8 bytes for its type and shape, got 4$"):
        from_message(pb.Tensor(dtype=F32, data=b"1234", shape=[2]), field="data")


@pytest.mark.parametrize(
    ("number", "text"),
    [(F16, "got FLOAT16"), (NONE, "got UNSPECIFIED"), (99, "got unknown type 99")],
)
def test_a_wrong_type_is_named_beside_the_right_ones(number: int, text: str) -> None:
    """The error lists what is accepted."""
    tensor = pb.Tensor(dtype=number, data=b"1234", shape=[1])  # type: ignore[arg-type]
    with pytest.raises(UnsupportedType, match=f"expected FLOAT32 or UINT8, {text}$"):
        from_message(tensor, field="data")


@given(
    dtype=st.sampled_from([0, 1, 2, 3, 4, 99]),
    shape=st.lists(st.one_of(st.integers(-3, 5), st.integers(-(2**63), 2**63 - 1)), max_size=10),
    data=st.binary(max_size=64),
)
@settings(max_examples=300, deadline=None)
def test_any_message_is_an_array_or_a_clear_error(dtype: int, shape: list[int], data: bytes) -> None:
    """Nothing but an array whose bytes are the message's, or an InvalidRequest, comes out."""
    tensor = pb.Tensor(dtype=dtype, shape=shape, data=data)  # type: ignore[arg-type]
    try:
        array = from_message(tensor, field="data")
    except InvalidRequest as error:
        assert error.field.startswith("data")  # noqa: PT017 - either outcome is right
    else:
        assert array.tobytes() == data
        assert list(array.shape) == shape


def test_uint8_output_is_the_nearest_of_255ths() -> None:
    """Every pixel value survives float32 in [0, 1] and back; the error of any other value is half a 255th."""
    pixels = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(to_output(pixels.astype(np.float32) / np.float32(255), U8), pixels)
    unit = np.linspace(0, 1, 10_001, dtype=np.float32)
    rounding = 1e-6
    assert np.abs(to_output(unit, U8) / 255 - unit).max() <= 0.5 / 255 + rounding


@pytest.mark.parametrize(
    ("output_type", "dtype"), [(NONE, np.float32), (F32, np.float32), (F16, np.float16), (U8, np.uint8)]
)
def test_output_has_the_type_asked_for(output_type: int, dtype: type[np.generic]) -> None:
    """Float32 unless float16 or uint8 is asked for."""
    assert to_output(np.zeros(3, np.float32), output_type).dtype == dtype
