"""Encoded images to uint8 RGB, and the errors of bytes that are not one."""

import io

import numpy as np
import pytest
from PIL import Image

from repa_fast.data import dataset
from repa_fast.data.digits import digits_metadata, pixel_moments
from repa_fast.data.loader import read_batch
from tests.data.encoding import encode

R = 16


def pixels(seed: int = 0, height: int = R, width: int = R, channels: int = 3) -> np.ndarray:
    shape = (height, width, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_png_round_trip_is_exact():
    decoded = dataset.decode(dataset.encode(pixels()), R)
    assert decoded.dtype == np.uint8 and decoded.shape == (3, R, R)
    assert np.array_equal(decoded, pixels().transpose(2, 0, 1))


def test_png_is_what_other_readers_read():
    with Image.open(io.BytesIO(dataset.encode(pixels()))) as image:
        assert image.format == "PNG" and np.array_equal(np.asarray(image), pixels())


def test_jpeg_decodes():
    ramp = np.linspace(0, 255, R).astype(np.uint8)
    smooth = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None], np.uint8(90)), -1)
    decoded = dataset.decode(encode(smooth, "JPEG", quality=95, subsampling=0), R)
    assert decoded.shape == (3, R, R) and decoded.dtype == np.uint8
    assert np.abs(decoded.astype(int) - smooth.transpose(2, 0, 1)).mean() < 2


def test_grey_becomes_three_equal_channels():
    grey = pixels()[..., 0]
    assert np.array_equal(dataset.decode(encode(grey), R), np.stack([grey] * 3))


def test_rgba_keeps_its_colours():
    rgba = pixels(channels=4)
    assert np.array_equal(dataset.decode(encode(rgba), R), rgba[..., :3].transpose(2, 0, 1))


@pytest.mark.parametrize("data", [b"", b"not an image", bytes(200)])
def test_corrupt_bytes_are_refused_by_name(data):
    with pytest.raises(ValueError, match=r"^row 7: cannot be decoded"):
        dataset.decode(data, R, "row 7")


@pytest.mark.parametrize("encoding", ["PNG", "JPEG"])
def test_every_cut_is_refused_by_name_or_costs_no_pixel(encoding):
    data = encode(pixels(), encoding)
    whole = dataset.decode(data, R)
    refused = 0
    for cut in range(len(data)):
        message = ""
        try:
            assert np.array_equal(dataset.decode(data[:cut], R, "row 7"), whole)
        except ValueError as error:
            message = str(error)
        if message:
            refused += 1
            assert message.startswith("row 7: cannot be decoded"), cut
    assert refused > 0.9 * len(data)


def test_a_damaged_header_is_refused_by_name():
    data = bytearray(encode(pixels()))
    assert data[12:16] == b"IHDR"
    data[11] = 5  # length of the header chunk; 13 in every PNG
    with pytest.raises(ValueError, match=r"^row 7: cannot be decoded"):
        dataset.decode(bytes(data), R, "row 7")


def test_a_damaged_body_is_refused_by_name():
    data = bytearray(encode(pixels()))
    start = data.index(b"IDAT") + 10
    data[start : start + 40] = bytes(40)
    with pytest.raises(ValueError, match=r"^row 7: cannot be decoded"):
        dataset.decode(bytes(data), R, "row 7")


@pytest.mark.parametrize("height, width", [(16, 20), (20, 16), (8, 8), (32, 32)])
def test_another_size_is_refused_by_name(height, width):
    with pytest.raises(ValueError, match=rf"^row 7: is {width}x{height}, expected 16x16"):
        dataset.decode(encode(pixels(height=height, width=width)), R, "row 7")


@pytest.mark.parametrize("broken", [b"not an image", encode(pixels(height=8, width=8))])
def test_a_batch_names_the_row_of_a_bad_image(tmp_path, broken):
    pytest.importorskip("lance")
    stack = np.stack([pixels(seed) for seed in range(6)])
    rows = [
        {"image": dataset.encode(image), "moments": moments, "label": 0}
        for image, moments in zip(stack, pixel_moments(stack))
    ]
    rows[4]["image"] = broken
    dataset.write(tmp_path / "a.lance", rows, digits_metadata())
    table = dataset.LatentDataset(tmp_path / "a.lance")
    good = read_batch(table, np.array([5, 0]))["image"].numpy()
    assert np.array_equal(good, stack[[5, 0]].transpose(0, 3, 1, 2))
    with pytest.raises(ValueError, match=r"a\.lance row 4: "):
        read_batch(table, np.array([5, 4, 0]))
