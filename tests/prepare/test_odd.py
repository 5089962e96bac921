"""Odd images and sources, each with what becomes of it."""

import os

import numpy as np
import pytest
from PIL import Image

from repa_fast.prepare.crop import center_crop
from repa_fast.prepare.sources import open_source
from tests.data.encoding import encode as saved
from tests.data.encoding import png16, turned
from tests.prepare.writing import rgb, tar, tree, write

R = 16


def frames(kind: str, **options) -> bytes:
    """The first is red, the others blue."""
    images = [Image.new("RGB", (R, R), colour) for colour in ("red", "blue", "blue")]
    return saved(images[0], kind, save_all=True, append_images=images[1:], duration=50, **options)


def cyan() -> bytes:
    """As the JPEGs of ImageNet that are CMYK: inverted, with Adobe's marker."""
    data = saved(Image.new("CMYK", (R, R), (200, 0, 0, 0)), "JPEG", quality=100)
    assert b"Adobe" in data
    return data


def uniform(*colour: int) -> np.ndarray:
    return np.full((R, R, 3), colour, np.uint8)


def three(grey: np.ndarray) -> np.ndarray:
    return np.stack([grey] * 3, -1)


NUMBERS_16 = np.random.default_rng(1).integers(0, 2**16, (R, R, 3), dtype=np.uint16)
HIGH = (NUMBERS_16 >> 8).astype(np.uint8)
GREY = rgb()[..., 0]
RGBA = np.dstack([rgb(), GREY])
LA = Image.fromarray(RGBA).convert("LA")
DOT = rgb()[:1, :1]
PALETTE = Image.fromarray(rgb()).quantize(32)

ODD_IMAGES = {
    "CMYK JPEG is converted": (cyan(), uniform(55, 255, 255)),
    "16-bit colour keeps the high byte": (png16(NUMBERS_16), HIGH),
    "16-bit grey keeps the high byte": (png16(NUMBERS_16[..., :1]), three(HIGH[..., 0])),
    "of an animated GIF the first frame": (frames("GIF"), uniform(255, 0, 0)),
    "of an animated WebP the first frame": (frames("WEBP", lossless=True), uniform(255, 0, 0)),
    "of an animated PNG the first frame": (frames("PNG"), uniform(255, 0, 0)),
    "alpha is dropped": (saved(RGBA), rgb()),
    "alpha of grey is dropped": (saved(LA), three(np.asarray(LA)[..., 0])),
    "grey has three equal channels": (saved(GREY), three(GREY)),
    "1-bit is black and white": (saved(Image.fromarray(GREY > 127)), three(255 * (GREY > 127))),
    "a palette's colours": (saved(PALETTE), np.asarray(PALETTE.convert("RGB"))),
    "EXIF orientation is ignored": (turned(rgb()), rgb()),
    "BMP": (saved(rgb(), "BMP"), rgb()),
    "lossless WebP": (saved(rgb(), "WEBP", lossless=True), rgb()),
    "1x1 is enlarged": (saved(DOT), np.tile(DOT, (R, R, 1))),
    "1x5000 is enlarged where that fits": (saved(np.tile(DOT, (5000, 1, 1))), uniform(*DOT[0, 0])),
    "bytes after the end are ignored": (saved(rgb()) + b"more", rgb()),
}


@pytest.mark.parametrize("case", ODD_IMAGES)
def test_odd_images_have_a_stated_result(case):
    data, expected = ODD_IMAGES[case]
    pixels = center_crop(data, R, "n01440764/a.jpg")  # another suffix than the content
    assert pixels.dtype == np.uint8 and pixels.shape == (R, R, 3)
    assert np.array_equal(pixels, expected)


IN_TAR = ["a.tar//etc/a.jpg", "a.tar/../../b.jpg"]
UPWARD = {"/etc/a.jpg": b"a", "/etc/a.cls": b"0", "../../b.jpg": b"b", "../../b.cls": b"0"}

ODD_SOURCES = {
    "names that are not ASCII": (lambda d: write(d / "猫" / "é 1.jpg"), ["猫/é 1.jpg"]),
    "absolute and upward names in a tar": (lambda d: tar(d / "a.tar", UPWARD), IN_TAR),
    "a plain tar that is called .gz": (
        lambda d: tar(d / "a.tar.gz", UPWARD),
        [name.replace(".tar", ".tar.gz") for name in IN_TAR],
    ),
    "a link to a sibling": (
        lambda d: os.symlink(tree(d) / "dog", d / "wolf"),
        ["cat/b/c.jpg", "dog/a.jpg", "wolf/a.jpg"],
    ),
}


@pytest.mark.parametrize("case", ODD_SOURCES)
def test_odd_sources_have_a_stated_result(tmp_path, case):
    make, expected = ODD_SOURCES[case]
    made = make(tmp_path)
    source = open_source(made if case.startswith("a plain tar") else tmp_path)
    assert [source.read(index).name for index in range(len(source))] == expected
