"""Encoded images: opened in this one place, by format, size and the name of what is bad."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from repa_fast.words import one_line

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
"""All that is opened, whatever a file is called: of Pillow's others some start programs."""
MAX_PIXELS = 89_478_485
"""Of an image: 0.25 GiB, where Pillow warns of decompression bombs."""

# such an image is refused, row by row
warnings.filterwarnings("ignore", "Image size .* could be decompression bomb")


def open_image(data: bytes, name: str = "image", side: int | None = None) -> "Image.Image":
    """Read an image's header, not yet its pixels.

    Raises:
        ValueError: none of `FORMATS`, damaged, of more than `MAX_PIXELS`, or not of `side` x `side`
            pixels where that is given; says so of `name`.
    """
    from PIL import Image

    if not data:
        raise ValueError(f"{one_line(name)}: is empty, expected an image")
    with decoding(name):
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    expect_pixels(f"{one_line(name)}: is", *image.size)
    if side is not None and image.size != (side, side):
        size = f"{image.width}x{image.height}"
        raise ValueError(f"{one_line(name)}: is {size}, expected {side}x{side}")
    return image


def to_rgb(image: "Image.Image", name: str = "image") -> "Image.Image":
    """Decode an opened image's first frame to 8-bit RGB; ValueError says what is wrong of `name`.

    Of 16 bits the high byte stays, of alpha nothing.
    """
    from PIL import Image

    with decoding(name):
        image.load()
        if image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        return image.convert("RGB")


@contextmanager
def decoding(name: str) -> Iterator[None]:
    """Raise ValueError with the image's name, whatever a decoder stumbles over."""
    from PIL import UnidentifiedImageError

    try:
        yield
    except MemoryError:  # is no fault of the image: MAX_PIXELS bounds its needs
        raise
    except UnidentifiedImageError as error:
        expected = f"expected one of {', '.join(FORMATS)}"
        raise ValueError(f"{one_line(name)}: is not an image, {expected}") from error
    except Exception as error:
        raise ValueError(f"{one_line(name)}: cannot be decoded ({one_line(error)})") from error


def expect_pixels(what: str, width: int, height: int) -> None:
    """Raise ValueError for more than `MAX_PIXELS`."""
    if width * height > MAX_PIXELS:
        raise ValueError(f"{what} {width}x{height}, expected at most {MAX_PIXELS} pixels")
