"""Grids of images, and files of them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

SHOWN_PIXELS = 48
"""Images smaller than this are enlarged by a whole factor, for people to see them."""
GAP = 4
GAP_GREY = 64
TITLE_PIXELS = 14


def arrange(pixels: torch.Tensor, columns: int, titles: Sequence[str] = ()) -> np.ndarray:
    """uint8 images (B, 3, R, R) -> one picture (H, W, 3), row by row, small images enlarged.

    GAP grey pixels lie between neighbours, and grey fills what is left of the last row. `titles`,
    one for each image, are written above them, cut off where they are too long.
    """
    factor = max(1, round(SHOWN_PIXELS / pixels.shape[-1]))
    pixels = pixels.cpu().repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    above = TITLE_PIXELS if titles else 0
    pixels = F.pad(pixels, (0, GAP, above, GAP), value=GAP_GREY)
    count, channels, height, width = pixels.shape
    rows = -(-count // columns)
    canvas = pixels.new_full((rows * columns, channels, height, width), GAP_GREY)
    canvas[:count] = pixels
    grid = canvas.view(rows, columns, channels, height, width).permute(0, 3, 1, 4, 2)
    picture = grid.reshape(rows * height, columns * width, channels)[:-GAP, :-GAP].numpy()
    return _titled(picture, titles, columns, height, width) if titles else picture


def _titled(
    picture: np.ndarray, titles: Sequence[str], columns: int, height: int, width: int
) -> np.ndarray:
    from PIL import Image, ImageDraw, ImageFont

    image, font = Image.fromarray(picture), ImageFont.load_default(TITLE_PIXELS - 3)
    draw = ImageDraw.Draw(image)
    for number, title in enumerate(titles):
        while title and draw.textlength(title, font) > width - GAP:
            title = title[:-1]
        draw.text((number % columns * width, number // columns * height), title, "white", font)
    return np.asarray(image)


def save_png(picture: np.ndarray, path: Path) -> None:
    """Write uint8 (H, W, 3) as PNG."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)
