"""Encoded images to uint8 RGB, and the errors of bytes that are not one."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageFile

from repa_fast.data import dali, dataset, images
from repa_fast.prepare.crop import center_crop
from tests.data.encoding import bomb, damaged, encode
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


FOREIGN = f"is not an image, expected one of {', '.join(images.FORMATS)}$"
BAD = [(b"", "is empty, expected an image")]
BAD += [(data, FOREIGN) for data in (b"not an image", bytes(200), b"\0\0\0\x20ftypavif" * 9)]
BAD += [(encode(rgb(), kind), FOREIGN) for kind in ("EPS", "TIFF", "DDS", "ICO", "PPM")]
BAD += [
    (header_damaged(), r"cannot be decoded \(Truncated IHDR"),
    (damaged(encode(rgb())), r"cannot be decoded \(broken data stream"),
    (bomb(50000, 50000), r"cannot be decoded \(Image size .2500000000 pixels. exceeds limit"),
    (bomb(10000, 9000), "is 10000x9000, expected at most 89478485 pixels"),
]
BAD += [
    (encode(rgb(height, width)), f"is {width}x{height}, expected 16x16")
    for height, width in ((16, 20), (20, 16), (8, 8), (32, 32))
]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("data, words", BAD, ids=[words for _, words in BAD])
def test_bad_images_are_refused_by_name(data, words):
    for read in (dataset.decode, dali.expect_usual):
        if read is dataset.decode or "broken data" not in words:  # which DALI itself finds
            refused(lambda read=read: read(data, R, "row 7"), f"^row 7: {words}")


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
        assert not message or message.startswith("row 7: "), cut
    assert refusals > 0.9 * len(data)


@pytest.mark.parametrize("kind", ["WEBP", "BMP", "GIF"])
def test_what_can_be_prepared_can_be_a_row(kind):
    data = encode(rgb(), kind)
    assert np.array_equal(dataset.decode(data, R), planes(center_crop(data, R)))


RAISED = (RuntimeError, NotImplementedError, KeyError, Image.DecompressionBombError)


@pytest.mark.parametrize("raised", RAISED)
def test_whatever_a_decoder_raises_is_of_the_image_by_name(monkeypatch, raised):
    def load(self):
        raise raised("AVIF")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    for read in (dataset.decode, center_crop):
        refused(
            lambda read=read: read(encode(rgb()), R, "row 7"), "row 7: cannot be decoded .*AVIF"
        )


def test_what_is_no_fault_of_the_image_is_raised_as_it_is_and_another_size_is_not_decoded(
    monkeypatch,
):
    def load(self):
        raise MemoryError

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    refused(lambda: dataset.decode(encode(rgb()), R), error=MemoryError)
    refused(lambda: dataset.decode(encode(rgb(32, 32)), R), "is 32x32, expected 16x16")


def test_no_image_starts_a_program(monkeypatch, tmp_path):
    """Pillow hands PostScript to Ghostscript, where it is asked to open any format."""
    program, proof = tmp_path / "gs", tmp_path / "proof"
    program.write_text(f"#!/bin/sh\necho 10; touch {proof}\n", encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    postscript = encode(rgb(), "EPS")
    for read in (dataset.decode, dali.expect_usual, center_crop):
        refused(lambda read=read: read(postscript, R, "a.png"), f"a.png: {FOREIGN}")
    assert not proof.exists()
    with pytest.raises(OSError), Image.open(io.BytesIO(postscript)) as image:
        image.load()
    assert proof.exists()


def test_images_are_opened_in_one_place():
    root = Path(dataset.__file__).parents[1]
    opening = re.compile(r"\bImage\.open\(|PIL\.Image import.*\bopen\b")
    found = [p.name for p in root.rglob("*.py") if opening.search(p.read_text(encoding="utf-8"))]
    assert found == ["images.py"]


PROGRAM = f"""
from repa_fast.data.images import open_image
try:
    open_image({bomb(10000, 9000)!r})
except ValueError as error:
    print(error)
"""


def test_a_bomb_costs_no_warning():
    command = [sys.executable, "-W", "default", "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("image: is 10000x9000") and done.stderr == ""
