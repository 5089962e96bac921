"""Encoded images to uint8 RGB, and the errors of bytes that are not one."""

import io

import numpy as np
import pytest
from PIL import Image

from repa_fast.data import dataset
from tests.data.encoding import damaged, encode
from tests.prepare.writing import rgb
from tests.refusals import refused

R = 16


def planes(pixels: np.ndarray) -> np.ndarray:
    return pixels.transpose(2, 0, 1)


def header_damaged() -> bytes:
    data = bytearray(encode(rgb()))
    assert data[12:16] == b"IHDR"
    data[11] = 5  # length of the header chunk; 13 in every PNG
    return bytes(data)


def test_png_is_exact_for_us_and_for_other_readers():
    data = dataset.encode(rgb())
    decoded = dataset.decode(data, R)
    assert decoded.dtype == np.uint8 and decoded.shape == (3, R, R)
    assert np.array_equal(decoded, planes(rgb()))
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == "PNG" and np.array_equal(np.asarray(image), rgb())


def test_grey_has_three_equal_channels_and_rgba_keeps_its_colours():
    grey = rgb()[..., 0]
    assert np.array_equal(dataset.decode(encode(grey), R), np.stack([grey] * 3))
    rgba = np.dstack([rgb(), grey])
    assert np.array_equal(dataset.decode(encode(rgba), R), planes(rgb()))


BROKEN = (b"", b"not an image", bytes(200), header_damaged(), damaged(encode(rgb())))
BAD = [(data, "cannot be decoded") for data in BROKEN]
BAD += [
    (encode(rgb(height, width)), f"is {width}x{height}, expected 16x16")
    for height, width in ((16, 20), (20, 16), (8, 8), (32, 32))
]


@pytest.mark.parametrize("data, words", BAD, ids=[words for _, words in BAD])
def test_bad_images_are_refused_by_name(data, words):
    refused(lambda: dataset.decode(data, R, "row 7"), f"^row 7: {words}")


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_every_cut_is_refused_by_name_or_costs_no_pixel(kind):
    data = encode(rgb(), kind)
    whole = dataset.decode(data, R)
    refusals = 0
    for cut in range(len(data)):
        message = ""
        try:
            assert np.array_equal(dataset.decode(data[:cut], R, "row 7"), whole)
        except ValueError as error:
            message = str(error)
        refusals += bool(message)
        assert not message or message.startswith("row 7: cannot be decoded"), cut
    assert refusals > 0.9 * len(data)
