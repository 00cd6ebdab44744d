"""IDX files become images or labels, or are refused with what is wrong with them."""

import struct

import pytest

from training.errors import DataMissing
from training.idx import parse_images, parse_labels


def _idx(num_rows: int, height: int = 2, width: int = 3) -> bytes:
    return struct.pack(">4I", 0x803, num_rows, height, width) + bytes(range(num_rows * height * width))


def test_idx_file_becomes_images() -> None:
    """The header's shape and the order of the bytes are kept."""
    images = parse_images(_idx(4), file="f")
    assert images.shape == (4, 1, 2, 3)
    assert images[1, 0, 0].tolist() == [6, 7, 8]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_idx(4)[:-1], "39 bytes, its header announces 40"),
        (_idx(4) + b"x", "41 bytes, its header announces 40"),
        (_idx(4)[:10], "10 bytes are too few for an IDX header"),
        (b"\0\0\x08\x01" + _idx(4)[4:], "magic number 0x00000801, images have 0x00000803"),
    ],
    ids=["cut short", "too long", "no header", "labels"],
)
def test_damaged_idx_file_is_refused(content: bytes, message: str) -> None:
    """The error names the file and what is wrong with it."""
    with pytest.raises(DataMissing, match=f"some/file: {message}"):
        parse_images(content, file="some/file")


def test_idx_file_becomes_labels() -> None:
    """One number for each row."""
    assert parse_labels(struct.pack(">2I", 0x801, 3) + bytes([7, 0, 9]), file="f").tolist() == [7, 0, 9]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (struct.pack(">2I", 0x801, 3) + bytes(2), "10 bytes, its header announces 11"),
        (struct.pack(">2I", 0x801, 2**32 - 1), "8 bytes, its header announces 4294967303"),
        (b"\0\0\x08", "3 bytes are too few for an IDX header"),
        (_idx(4), "magic number 0x00000803, labels have 0x00000801"),
    ],
    ids=["cut short", "absurd", "no header", "images"],
)
def test_damaged_labels_are_refused(content: bytes, message: str) -> None:
    """Images are no labels, and a label for every row or none."""
    with pytest.raises(DataMissing, match=f"some/file: {message}"):
        parse_labels(content, file="some/file")


def test_sizes_that_overflow_are_refused() -> None:
    """Three numbers of 32 bits may announce more than 2^64 bytes, which must not wrap around to what is there."""
    with pytest.raises(DataMissing, match="its header announces 73786976260478468116"):
        parse_images(struct.pack(">4I", 0x803, 2**32 - 1, 2**32 - 1, 4), file="f")
