"""Encoded images to uint8 RGB, and the errors of bytes that are not one."""

import io

import numpy as np
import pytest
from PIL import Image

from repa_fast.data import dataset
from repa_fast.data.loader import read_batch
from tests.data.encoding import R as SIDE
from tests.data.encoding import damaged, encode, noise, write_table
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


def test_jpeg_decodes():
    ramp = np.linspace(0, 255, R).astype(np.uint8)
    smooth = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None], np.uint8(90)), -1)
    decoded = dataset.decode(encode(smooth, "JPEG", quality=95, subsampling=0), R)
    assert decoded.shape == (3, R, R) and decoded.dtype == np.uint8
    assert np.abs(decoded.astype(int) - planes(smooth)).mean() < 2


def test_grey_has_three_equal_channels_and_rgba_keeps_its_colours():
    grey = rgb()[..., 0]
    assert np.array_equal(dataset.decode(encode(grey), R), np.stack([grey] * 3))
    rgba = np.dstack([rgb(), grey])
    assert np.array_equal(dataset.decode(encode(rgba), R), planes(rgb()))


BAD = [
    (b"", "cannot be decoded"),
    (b"not an image", "cannot be decoded"),
    (bytes(200), "cannot be decoded"),
    (header_damaged(), "cannot be decoded"),
    (damaged(encode(rgb())), "cannot be decoded"),
    (encode(rgb(16, 20)), "is 20x16, expected 16x16"),
    (encode(rgb(20, 16)), "is 16x20, expected 16x16"),
    (encode(rgb(8, 8)), "is 8x8, expected 16x16"),
    (encode(rgb(32, 32)), "is 32x32, expected 16x16"),
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


@pytest.mark.parametrize("broken", [b"not an image", encode(rgb(8, 8))], ids=["none", "size"])
def test_a_batch_names_the_row_of_a_bad_image(tmp_path, broken):
    pytest.importorskip("lance")
    table = write_table(tmp_path / "a.lance", {4: broken})
    good = read_batch(table, np.array([6, 0]))["image"].numpy()
    assert np.array_equal(good, np.stack([planes(noise(6, SIDE)), planes(noise(0, SIDE))]))
    refused(lambda: read_batch(table, np.array([5, 4, 0])), r"a\.lance row 4: ")
