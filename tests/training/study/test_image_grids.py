"""Images in grids: each where it belongs."""

import numpy as np
import pytest
import torch

from training.study import figures
from training.study.image_grids import draw_images, label_lines, tiled


def test_images_stand_line_by_line_with_a_line_of_grey_around() -> None:
    """Five images of 2x3 in two columns: three lines, the last one short."""
    images = torch.arange(5.0).div(10).view(5, 1, 1, 1).expand(5, 1, 2, 3)
    grid = tiled(images, num_columns=2)
    assert grid.shape == (3 * 3 + 1, 2 * 4 + 1)
    for number in range(5):
        line, column = divmod(number, 2)
        block = grid[1 + 3 * line : 3 + 3 * line, 1 + 4 * column : 4 + 4 * column]
        np.testing.assert_array_equal(block, np.float32(number / 10))
    for grey in (grid[0], grid[3], grid[:, 0], grid[:, 4], grid[7:9, 5:8]):
        assert len(np.unique(grey)) == 1


@pytest.mark.parametrize("num", [1, 6])
def test_a_grid_is_drawn_without_ticks(num: int) -> None:
    """Black stays 0 and white 1 whatever the images hold; labels stand to the left of their lines."""
    made = figures.figure()
    where = figures.axes(made)[0, 0]
    draw_images(where, torch.full((num, 1, 4, 4), 0.5), num_columns=3, title="half")
    label_lines(where, ("first", "second"), 4)
    (image,) = where.images
    assert image.get_clim() == (0, 1)
    assert not where.axison
    first, second = where.texts
    assert first.get_position()[0] < 0
    assert second.get_position()[1] - first.get_position()[1] == 5
