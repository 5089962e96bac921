import numpy as np
import pytest
import torch

from repa_fast.eval import pictures


def numbered(count: int, side: int) -> torch.Tensor:
    """Images (count, 3, side, side) whose every pixel and channel has its own value."""
    return torch.randint(
        1, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.manual_seed(0)
    )


@pytest.mark.parametrize("side, factor", [(16, 3), (24, 2), (48, 1), (64, 1)])
@pytest.mark.parametrize("count, columns, rows", [(6, 3, 2), (5, 3, 2), (4, 4, 1), (3, 1, 3)])
def test_a_grid_shows_the_images_row_by_row(side, factor, count, columns, rows):
    images = numbered(count, side)
    picture = pictures.arrange(images, columns)
    cell, pitch = side * factor, side * factor + pictures.GAP
    expected = np.full((rows * pitch, columns * pitch, 3), pictures.GAP_GREY, np.uint8)
    for index in range(count):
        top, left = index // columns * pitch, index % columns * pitch
        enlarged = images[index].permute(1, 2, 0).numpy().repeat(factor, 0).repeat(factor, 1)
        expected[top : top + cell, left : left + cell] = enlarged
    assert picture.dtype == np.uint8 and pictures.GAP > 0
    assert np.array_equal(picture, expected[: -pictures.GAP, : -pictures.GAP])


def test_a_picture_is_saved_exactly(tmp_path):
    from PIL import Image

    picture = pictures.arrange(numbered(4, 16), 2)
    pictures.save_png(picture, tmp_path / "samples" / "0000010.png")
    with Image.open(tmp_path / "samples" / "0000010.png") as image:
        assert np.array_equal(np.asarray(image), picture)


def test_titles_stand_above_their_images_and_change_nothing_else():
    images = numbered(5, 48)
    plain, titled = pictures.arrange(images, 3), pictures.arrange(images, 3, ["a title"] * 5)
    above, pitch = pictures.TITLE_PIXELS, 48 + pictures.GAP
    for row in range(2):
        rows = titled[row * (pitch + above) :]
        assert np.array_equal(rows[above : above + 48], plain[row * pitch : row * pitch + 48])
        for column in range(3):
            title = rows[:above, column * pitch : column * pitch + 48]
            assert (title != pictures.GAP_GREY).any() == (3 * row + column < 5)


def test_a_long_title_stays_in_its_column():
    titled = pictures.arrange(numbered(2, 48), 2, ["W" * 100, ""])
    assert (titled[: pictures.TITLE_PIXELS, 48 + pictures.GAP :] == pictures.GAP_GREY).all()
