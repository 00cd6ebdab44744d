"""Frames: whatever array goes in comes out, and nothing else is taken for one."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from serving.direct.frames import LENGTH, FrameError, pack, unpack

TYPES = st.sampled_from([np.dtype(name) for name in ("<f4", "u1", "<f2", "<f8")])
ARRAYS = st.lists(
    TYPES.flatmap(lambda dtype: arrays.arrays(dtype, arrays.array_shapes(min_dims=0, max_dims=4, max_side=6))),
    max_size=3,
)


def joined(text: str, *values: np.ndarray) -> bytes:
    """Return a frame without its length."""
    return b"".join(pack(text, values))[LENGTH.size :]


@given(st.text("abc ,.é\n", max_size=40), ARRAYS)
def test_what_goes_in_comes_out(text: str, values: list[np.ndarray]) -> None:
    """Text, types, shapes and bits survive; NaN too."""
    again, found = unpack(joined(text, *values))
    assert again == text
    assert [(value.dtype, value.shape, value.tobytes()) for value in found] == [
        (value.dtype, value.shape, value.tobytes()) for value in values
    ]


def test_the_length_comes_first() -> None:
    """The first part begins with the number of bytes that follow, for small and for large frames."""
    for num_rows in (1, 1000):
        frame = b"".join(pack("mean", [np.ones((num_rows, 100), np.float32)]))
        assert LENGTH.unpack_from(frame) == (len(frame) - LENGTH.size,)


def test_large_arrays_are_not_copied() -> None:
    """A part is the memory of the array; on the way back, the array is the memory of the frame."""
    rows = np.ones((1000, 100), np.float32)
    assert any(np.shares_memory(np.frombuffer(part, np.uint8), rows) for part in pack("", [rows])[1:])
    frame = joined("", rows)
    assert np.shares_memory(unpack(frame)[1][0], np.frombuffer(frame, np.uint8))


def test_arrays_are_aligned_in_the_frame() -> None:
    """Each begins at a multiple of 64 bytes of its frame."""
    frame = joined("abc", np.ones(3, np.uint8), np.ones(5, np.float32))
    start = np.frombuffer(frame, np.uint8).ctypes.data
    assert all((value.ctypes.data - start) % 64 == 0 for value in unpack(frame)[1])


def test_rows_that_are_not_contiguous_travel() -> None:
    """A view with strides arrives as what it shows."""
    rows = np.arange(24, dtype=np.float32).reshape(4, 6)[:, ::2]
    assert np.array_equal(unpack(joined("", rows))[1][0], rows)


@pytest.mark.parametrize("values", [np.ones(2, np.int64), np.ones(2, "<U3"), np.ones((1,) * 9, np.float32)])
def test_other_arrays_do_not_travel(values: np.ndarray) -> None:
    """Other types and more than eight dimensions are refused, not converted."""
    with pytest.raises(FrameError, match="do not travel"):
        pack("", [values])


@given(st.binary(max_size=80))
def test_noise_is_no_frame(noise: bytes) -> None:
    """Bytes of anybody raise the one error, whatever they are."""
    with pytest.raises(FrameError):
        unpack(noise)


@given(st.data())
def test_a_damaged_frame_is_refused_or_has_its_size(data: st.DataObject) -> None:
    """A frame that is cut, or has another byte, is refused; or its arrays still fit into it."""
    frame = bytearray(joined("mean", np.ones((3, 5), np.float32)))
    index = data.draw(st.integers(0, len(frame) - 1))
    frame[index] = data.draw(st.integers(0, 255))
    cut = bytes(frame[: data.draw(st.integers(0, len(frame)))])
    try:
        _, values = unpack(cut)
    except FrameError:
        return
    assert sum(value.nbytes for value in values) <= len(cut)


def test_a_shape_larger_than_memory_takes_none() -> None:
    """Dimensions whose product overflows 64 bits are refused before anything is made."""
    frame = bytearray(joined("", np.ones((1, 1), np.float32)))
    where = frame.index((1).to_bytes(8, "little"))
    frame[where : where + 16] = (2**40).to_bytes(8, "little") * 2
    with pytest.raises(FrameError, match="shorter than its arrays"):
        unpack(bytes(frame))
