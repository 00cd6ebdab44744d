"""The user's own images: what is inferred is told, and what cannot be is refused with what to do."""

import gzip
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from training import data
from training.config import DataConfig
from training.errors import DataMissing
from training.own_data import MIN_ROWS, OwnImages, read, to_pixels

NUM = 30


@pytest.fixture
def grey(seed: int) -> NDArray[np.uint8]:
    """Return grey images that are higher than wide."""
    return np.random.default_rng(seed).integers(0, 256, (NUM, 6, 5), dtype=np.uint8)


@pytest.fixture
def colour(seed: int) -> NDArray[np.uint8]:
    """Return colour images, channels last as files have them."""
    return np.random.default_rng(seed).integers(0, 256, (NUM, 6, 5, 3), dtype=np.uint8)


def save_images(folder: Path, images: NDArray[np.uint8], suffix: str = ".png") -> Path:
    """Write images as files, half of them in a sub-folder."""
    (folder / "more").mkdir(parents=True)
    for index, image in enumerate(images):
        parent = folder / "more" if index >= len(images) // 2 else folder
        Image.fromarray(image).save(parent / f"{index:03}{suffix}")
    return folder


def save(path: Path, array: NDArray[Any]) -> Path:
    """Write an array as .npy."""
    np.save(path, array)
    return path


@pytest.mark.parametrize("kind", ["npy", "npz", "named npz", "idx", "idx.gz", "folder"])
def test_grey_images_are_the_same_from_any_file(tmp_path: Path, grey: NDArray[np.uint8], kind: str) -> None:
    """Whatever carries them, the pixels are the pixels."""
    path = tmp_path / "images"
    if kind == "npy":
        path = save(tmp_path / "images.npy", grey)
    elif kind == "npz":
        path = tmp_path / "images.npz"
        np.savez(path, anything=grey)
    elif kind == "named npz":
        path = tmp_path / "images.npz"
        np.savez(path, labels=np.arange(NUM), x_train=grey)
    elif kind == "folder":
        save_images(path, grey)
    else:
        content = struct.pack(">4I", 0x803, *grey.shape) + grey.tobytes()
        path = tmp_path / f"images-{kind}"
        path.write_bytes(gzip.compress(content) if kind == "idx.gz" else content)
    images = read(path)
    np.testing.assert_array_equal(images.pixels, grey[:, None])
    assert images.pixels.dtype == np.uint8
    assert "6 x 5" in images.layout


@pytest.mark.parametrize("layout", ["last", "first", "folder"])
def test_colour_images_have_their_channels_first(tmp_path: Path, colour: NDArray[np.uint8], layout: str) -> None:
    """Channels last or first are told apart by their number."""
    first = np.moveaxis(colour, 3, 1)
    if layout == "folder":
        path = save_images(tmp_path / "images", colour)
    else:
        path = save(tmp_path / "images.npy", colour if layout == "last" else first)
    images = read(path)
    np.testing.assert_array_equal(images.pixels, first)
    assert images.pixels.flags.c_contiguous


def test_rows_that_are_no_images_stay_rows(tmp_path: Path, grey: NDArray[np.uint8]) -> None:
    """Two dimensions are rows and values."""
    images = read(save(tmp_path / "rows.npy", grey.reshape(NUM, -1)))
    assert images.pixels.shape == (NUM, 30)


def test_a_folder_is_brought_to_one_size_on_request(tmp_path: Path, grey: NDArray[np.uint8]) -> None:
    """Images of several sizes are scaled and cropped to squares; without a size they are refused by name."""
    folder = save_images(tmp_path / "images", grey)
    Image.fromarray(np.zeros((9, 7), np.uint8)).save(folder / "zz.png")
    assert read(folder, image_size=8).pixels.shape == (NUM + 1, 1, 8, 8)
    with pytest.raises(DataMissing, match=r"zz\.png: 7 x 9 pixels, and 000\.png has 5 x 6; give --image-size"):
        read(folder)


def test_a_folder_with_one_colour_image_is_a_folder_of_colour_images(
    tmp_path: Path, grey: NDArray[np.uint8], colour: NDArray[np.uint8]
) -> None:
    """Grey images among colour ones get three equal channels."""
    folder = save_images(tmp_path / "images", grey)
    Image.fromarray(colour[0]).save(folder / "000.png")
    images = read(folder)
    assert images.pixels.shape == (NUM, 3, 6, 5)
    assert (images.pixels[1, 0] == images.pixels[1, 2]).all()
    assert "colour" in images.values


@pytest.mark.parametrize(
    ("values", "pixels", "told"),
    [
        (np.array([0.0, 0.25, 1.0], np.float32), [0, 64, 255], "times 255"),
        (np.array([-1.0, 0.0, 1.0], np.float64), [0, 128, 255], r"\[-1, 1\]"),
        (np.array([0.0, 12.4, 255.0], np.float64), [0, 12, 255], r"\[0, 255\]"),
        (np.array([0, 7, 255], np.int64), [0, 7, 255], r"int64 in \[0, 255\]"),
        (np.array([False, True]), [0, 255], "black and white"),
        (np.array([0, 1], np.uint8), [0, 255], "black and white"),
        (np.array([0, 1], np.uint16), [0, 255], "black and white"),
    ],
)
def test_the_range_of_values_is_found_and_told(values: NDArray[Any], pixels: list[int], told: str) -> None:
    """Each range has one meaning, and the answer says which."""
    found, text = to_pixels(values, file="x.npy")
    assert found.tolist() == pixels
    assert re.search(told, text)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full((NUM, 4, 4), 300), r"values are int64 in \[300, 300\]; scale them"),
        (np.full((NUM, 4, 4), -7.0), r"float64 in \[-7, -7\]"),
        (np.full((NUM, 4, 4), np.nan), "row 0 holds NaN"),
        (np.full((NUM, 4, 4), 9), "every pixel is 9 of 255"),
        (np.zeros((MIN_ROWS - 1, 4, 4), np.uint8), "19 rows are too few"),
        (np.zeros((NUM, 4, 4), "U3"), "not numbers"),
        (np.zeros((NUM, 4, 4), complex), "not numbers"),
        (np.zeros((0, 4, 4), np.uint8), "holds no values"),
        (np.zeros(NUM, np.uint8), r"shape \(30,\) is none of"),
        (np.zeros((NUM, 4, 4, 4), np.uint8), "with 1 or 3 channels"),
        (np.zeros((NUM, 2, 2, 2, 2), np.uint8), "is none of"),
    ],
    ids=["large", "negative", "nan", "constant", "few", "text", "complex", "empty", "vector", "alpha", "rank 5"],
)
def test_what_is_not_fit_is_refused(tmp_path: Path, array: NDArray[Any], message: str) -> None:
    """The error names the file, what was found, and what to do."""
    with pytest.raises(DataMissing, match=message) as caught:
        read(save(tmp_path / "images.npy", array))
    assert "images.npy" in str(caught.value)


def test_files_that_are_none_are_refused(tmp_path: Path, grey: NDArray[np.uint8]) -> None:
    """Absent, text, pickled objects, a broken archive, a broken image, an empty folder, a size for an array."""
    with pytest.raises(DataMissing, match="no such file"):
        read(tmp_path / "nothing")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(DataMissing, match=r"neither \.npy nor \.npz"):
        read(tmp_path / "notes.txt")
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(DataMissing, match="not a readable file of numbers"):
        read(tmp_path / "objects.npy")
    np.savez(tmp_path / "several.npz", a=grey, b=grey)
    with pytest.raises(DataMissing, match="holds a, b; name the array"):
        read(tmp_path / "several.npz")
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04nonsense")
    with pytest.raises(DataMissing, match=r"broken\.npz: not a readable"):
        read(tmp_path / "broken.npz")
    (tmp_path / "broken.gz").write_bytes(gzip.compress(b"x" * 100)[:-9])
    with pytest.raises(DataMissing, match=r"broken\.gz: not a readable"):
        read(tmp_path / "broken.gz")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataMissing, match="holds no images"):
        read(empty)
    (empty / "a.png").write_bytes(b"\x89PNG nonsense")
    with pytest.raises(DataMissing, match=r"a\.png: not a readable image"):
        read(empty)
    with pytest.raises(DataMissing, match="leave out the image size"):
        read(save(tmp_path / "images.npy", grey), image_size=8)


def test_own_rows_are_divided_without_overlap(tmp_path: Path, grey: NDArray[np.uint8]) -> None:
    """A tenth to validate on and a tenth to test on, by the seed of the split; each row once."""
    config = DataConfig.parse({"name": "own", "path": str(save(tmp_path / "images.npy", grey))})
    dataset = data.load(config)
    assert [len(dataset.rows(split)) for split in data.SPLITS] == [24, 3, 3]
    together = np.concatenate([dataset.rows(split) for split in data.SPLITS])
    assert sorted(map(bytes, together)) == sorted(map(bytes, grey[:, None]))
    other = data.split_own(OwnImages(grey[:, None], "", ""), config.merge({"split_seed": 1}))
    assert other.test.tobytes() != dataset.test.tobytes()
    assert other.sha256 == dataset.sha256


@pytest.mark.parametrize("values", [{"name": "own"}, {"path": "x"}, {"name": "mnist", "path": "x"}])
def test_a_path_belongs_to_own_data_alone(values: dict[str, str]) -> None:
    """Neither own data without a path nor a path for published data."""
    with pytest.raises(ValueError, match="own data need name=own and a path"):
        DataConfig.parse(values)
