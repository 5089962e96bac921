"""Odd and bad images, each with what becomes of it: an exact array, or an error that names it."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from repa_fast.prepare.crop import center_crop
from tests.data.encoding import encode as saved
from tests.data.encoding import png16, png_of

R = 16


def rgb(height: int = R, width: int = R) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def frames(kind: str) -> bytes:
    """The first is red, the others blue."""
    images = [Image.new("RGB", (R, R), colour) for colour in ("red", "blue", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    return saved(images[0], kind, save_all=True, append_images=images[1:], duration=50, **options)


def bomb(width: int, height: int) -> bytes:
    """Claims a size; has no pixels."""
    return png_of(struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), zlib.compress(b""))


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(rgb(), "PNG", exif=exif)


def damaged_png() -> bytes:
    data = bytearray(saved(rgb()))
    start = data.index(b"IDAT") + 10
    data[start : start + 40] = bytes(40)
    return bytes(data)


def adobe_cmyk() -> tuple[bytes, np.ndarray]:
    """Uniform cyan, as the JPEGs of ImageNet that are CMYK: inverted, with Adobe's marker."""
    data = saved(Image.new("CMYK", (R, R), (200, 0, 0, 0)), "JPEG", quality=100)
    assert b"Adobe" in data
    return data, np.full((R, R, 3), (55, 255, 255), np.uint8)


RED = np.full((R, R, 3), (255, 0, 0), np.uint8)
DEEP = np.random.default_rng(1).integers(0, 2**16, (R, R, 3), dtype=np.uint16)
GREY = rgb()[..., 0]
BITS = GREY > 127
RGBA = np.dstack([rgb(), rgb()[..., 0]])
LA = Image.fromarray(RGBA).convert("LA")
DOT = rgb()[:1, :1]
PALETTE = Image.fromarray(rgb()).quantize(32)


def three(grey: np.ndarray) -> np.ndarray:
    return np.stack([grey] * 3, -1)


ODD_IMAGES = {
    "CMYK JPEG is converted": adobe_cmyk(),
    "16-bit colour keeps the high byte": (png16(DEEP), (DEEP >> 8).astype(np.uint8)),
    "16-bit grey keeps the high byte": (
        png16(DEEP[..., :1]),
        three((DEEP[..., 0] >> 8).astype(np.uint8)),
    ),
    "of an animated GIF the first frame": (frames("GIF"), RED),
    "of an animated WebP the first frame": (frames("WEBP"), RED),
    "of an animated PNG the first frame": (frames("PNG"), RED),
    "alpha is dropped": (saved(RGBA), rgb()),
    "alpha of grey is dropped": (saved(LA), three(np.asarray(LA)[..., 0])),
    "grey has three equal channels": (saved(GREY), three(GREY)),
    "1-bit is black and white": (saved(Image.fromarray(BITS)), three(BITS * np.uint8(255))),
    "a palette's colours": (saved(PALETTE), np.asarray(PALETTE.convert("RGB"))),
    "EXIF orientation is ignored": (turned(), rgb()),
    "BMP": (saved(rgb(), "BMP"), rgb()),
    "lossless WebP": (saved(rgb(), "WEBP", lossless=True), rgb()),
    "1x1 is enlarged": (saved(DOT), np.tile(DOT, (R, R, 1))),
    "1x5000 is enlarged where that fits": (
        saved(np.tile(DOT, (5000, 1, 1))),
        np.tile(DOT, (R, R, 1)),
    ),
    "bytes after the end are ignored": (saved(rgb()) + b"more", rgb()),
}


@pytest.mark.parametrize("case", ODD_IMAGES)
def test_odd_images_have_a_stated_result(case):
    data, expected = ODD_IMAGES[case]
    pixels = center_crop(data, R, "n01440764/a.jpg")  # the name has another suffix than the content
    assert pixels.dtype == np.uint8 and pixels.shape == (R, R, 3)
    assert np.array_equal(pixels, expected)


BAD_IMAGES = {
    "truncated JPEG": (
        lambda: saved(rgb(64, 64), "JPEG")[:-500],
        R,
        r"cannot be decoded \(image file is truncated",
    ),
    "truncated PNG": (
        lambda: saved(rgb(64, 64))[:5000],
        R,
        r"cannot be decoded \(image file is truncated",
    ),
    "damaged PNG": (damaged_png, R, r"cannot be decoded \(broken data stream"),
    "a JPEG's first bytes": (
        lambda: saved(rgb(), "JPEG")[:30],
        R,
        r"cannot be decoded \(Truncated File Read",
    ),
    "zero bytes": (lambda: b"", R, "is empty, expected an image"),
    "text": (lambda: b"404 not found", R, "is not an image, expected one of JPEG, PNG, WEBP"),
    "PDF": (lambda: saved(rgb(), "PDF"), R, "is not an image"),
    "EPS": (lambda: saved(rgb(), "EPS"), R, "is not an image"),
    "TIFF": (lambda: saved(rgb(), "TIFF"), R, "is not an image"),
    "huge": (
        lambda: bomb(30000, 30000),
        R,
        r"cannot be decoded \(Image size \(900000000 pixels\) exceeds limit",
    ),
    "large": (lambda: bomb(10000, 9000), R, "is 10000x9000, expected at most 89478485 pixels"),
    "1x5000": (
        lambda: saved(rgb(1, 5000)),
        256,
        "of 5000x1 pixels, resized 1280000x256, expected at most 89478485 pixels",
    ),
    "0x0": (lambda: bomb(0, 0), R, "is not an image"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("case", BAD_IMAGES)
def test_bad_images_are_refused_by_name(case):
    make, resolution, message = BAD_IMAGES[case]
    with pytest.raises(ValueError, match=rf"^n01440764/a\.jpg: {message}"):
        center_crop(make(), resolution, "n01440764/a.jpg")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF"])
def test_any_damage_is_a_value_error_by_name(kind):
    generator = np.random.default_rng(0)
    data = saved(rgb(32, 32), kind)
    refused = 0
    for _ in range(200):
        harmed = bytearray(data[: generator.integers(1, len(data) + 1)])
        for place in generator.integers(0, min(len(harmed), 200), 3):
            harmed[place] = generator.integers(0, 256)
        message = ""
        try:
            assert center_crop(bytes(harmed), R, "a").shape == (R, R, 3)
        except ValueError as error:
            message = str(error)
        refused += bool(message)
        assert not message or message.startswith("a: ")
    assert refused > 50
