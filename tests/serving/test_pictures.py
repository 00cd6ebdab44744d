"""Pictures show the pixels that came, in their order."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from serving import pictures


def _read(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        assert image.mode == "L"
        return np.asarray(image)


@pytest.mark.parametrize("shape", [(3, 8, 8), (3, 1, 8, 8)])
def test_each_image_is_shown_enlarged_and_exact(tmp_path: Path, shape: tuple[int, ...], seed: int) -> None:
    """An 8 x 8 image becomes 56 x 56 pixels, each value seven by seven times, four pixels apart."""
    images = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    path = tmp_path / "new" / "grid.png"
    pictures.save_grid(path, [("", images)])
    canvas = _read(path)
    assert canvas.shape == (4 + 60, 3 * 60 + 4)
    for index in range(3):
        left = 4 + 60 * index
        shown = canvas[4:60, left : left + 56]
        np.testing.assert_array_equal(shown, images[index].reshape(8, 8).repeat(7, 0).repeat(7, 1))
    assert (canvas[:4] == 255).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_floats_and_bytes_give_the_same_picture(tmp_path: Path, dtype: type[np.floating]) -> None:
    """Intensities in [0, 1] are drawn as their nearest 255ths; what is outside is clipped."""
    pixels = np.array([[[0, 51, 102], [153, 204, 255]]], np.uint8)
    pictures.save_grid(tmp_path / "a.png", [("", pixels)])
    pictures.save_grid(tmp_path / "b.png", [("", (pixels / 255).astype(dtype))])
    np.testing.assert_array_equal(_read(tmp_path / "a.png"), _read(tmp_path / "b.png"))
    pictures.save_grid(tmp_path / "c.png", [("", np.array([[[-1.0, 2.0]]]))])
    assert set(np.unique(_read(tmp_path / "c.png"))) == {0, 255}


def test_colour_is_kept(tmp_path: Path) -> None:
    """Three channels are red, green and blue; grey rows beside them stay grey."""
    red = np.zeros((1, 3, 60, 60), np.float32)
    red[:, 0] = 1
    pictures.save_grid(tmp_path / "grid.png", [("", red), ("", np.full((1, 60, 60), 7, np.uint8))])
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.mode == "RGB"
        assert picture.getpixel((10, 10)) == (255, 0, 0)
        assert picture.getpixel((10, 74)) == (7, 7, 7)


def test_rows_stand_below_each_other_under_their_labels(tmp_path: Path) -> None:
    """A label takes eighteen pixels and has ink; the widest row sets the width."""
    black = np.zeros((2, 56, 56), np.uint8)
    pictures.save_grid(tmp_path / "grid.png", [("input", black), ("", black[:1])])
    canvas = _read(tmp_path / "grid.png")
    assert canvas.shape == (18 + 60 + 60 + 4, 2 * 60 + 4)
    assert canvas[4:22].min() < 128
    assert (canvas[22:78, 4:60] == 0).all()
    assert (canvas[82:138, 4:60] == 0).all()
    assert (canvas[82:138, 64:] == 255).all()


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((8, 8), True),
        ((1, 28, 28), True),
        ((3, 28, 28), True),
        ((2, 28, 28), False),
        ((16,), False),
        ((1, 1, 8, 8), False),
        ((), False),
    ],
)
def test_grey_and_colour_images_can_be_drawn(shape: tuple[int, ...], expected: bool) -> None:  # noqa: FBT001 - a table
    """Rows of (height, width) or of 1 or 3 such channels are images, others are not."""
    assert pictures.are_images(shape) is expected
