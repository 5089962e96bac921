"""Files of images and of references: what is written is read, and what is wrong is named."""

import hashlib
import io
import os
import time
import tracemalloc
import zipfile
from unittest import mock

import numpy as np
import pytest
import torch

from repa_fast.eval import reference
from repa_fast.eval.reference import SHAPES, ImageFile, write_npz
from repa_fast.eval.statistics import Moments
from repa_fast.testing import seeded
from tests.refusals import refused

COUNT, HEIGHT, WIDTH = 11, 6, 9
PIXELS = np.random.default_rng(0).integers(0, 256, (COUNT, HEIGHT, WIDTH, 3), dtype=np.uint8)
NARROW = {"mu": (6,), "sigma": (6, 6), "mu_s": (5,), "sigma_s": (5, 5)}
"""Shapes of moments here: those of published features take 67 MB."""


@pytest.fixture(scope="module", autouse=True)
def narrow():
    with mock.patch.object(reference, "SHAPES", NARROW):
        yield


@pytest.fixture(params=[np.savez, np.savez_compressed])
def images(request, tmp_path):
    request.param(tmp_path / "images.npz", PIXELS)
    return tmp_path / "images.npz"


def assert_pixels(planes, expected: np.ndarray = PIXELS) -> None:
    """Planes (3, H, W) of images are those of the file."""
    assert np.array_equal(torch.stack(list(planes)).permute(0, 2, 3, 1).numpy(), expected)


def moments(width: int, seed: int) -> reference.Statistics:
    of = Moments(width)
    of.update(seeded((3, width), seed=seed))
    return of.statistics()


@pytest.fixture(scope="module")
def given():
    """Images and moments of pool and spatial features."""
    return {"images": PIXELS, "pool": moments(6, seed=0), "spatial": moments(5, seed=1)}


@pytest.fixture(scope="module")
def written(given, tmp_path_factory):
    """A reference of them."""
    path = tmp_path_factory.mktemp("reference") / "new" / "reference.npz"
    reference.write(path, **given)
    return path


# Images


@pytest.mark.parametrize("size", [1, 4, 11, 100])
def test_batches_are_the_images_in_order(images, size):
    file = ImageFile(images)
    assert (file.count, file.height, file.width) == (COUNT, HEIGHT, WIDTH)
    index, planes = zip(*file.batches(size))
    assert max(map(len, planes)) == min(size, COUNT)
    assert torch.cat(index).tolist() == list(range(COUNT))
    assert all(batch.dtype == torch.uint8 for batch in planes)
    assert_pixels(torch.cat(planes))
    for _, batch in file.batches(size):
        batch.zero_()  # may be changed
    assert_pixels(torch.cat([batch for _, batch in file.batches(size)]))


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_processes_share_the_batches(images, world_size):
    found = {}
    for rank in range(world_size):
        for index, planes in ImageFile(images).batches(2, rank, world_size):
            assert int(index[0]) // 2 % world_size == rank
            found.update(zip(index.tolist(), planes))
    assert sorted(found) == list(range(COUNT))
    assert_pixels(found[number] for number in range(COUNT))


def test_one_part_or_batch_is_in_memory_at_a_time(tmp_path):
    """64 MB of images, written and read with less than 8 MB at any time."""
    shape, path = (64, 592, 592, 3), tmp_path / "images.npz"
    parts = (np.full((1, *shape[1:]), number, np.uint8) for number in range(64))
    tracemalloc.start()
    try:
        write_npz(path, parts, shape)
        read = [(int(of.min()), int(of.max())) for _, of in ImageFile(path).batches(1)]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert read == [(number, number) for number in range(64)] and peak < 8e6


def test_the_first_images_are_taken_where_there_are_more_but_not_where_there_are_fewer(images):
    file = ImageFile(images, 7)
    assert file.count == 7
    batches = [planes for _, planes in file.batches(3)]
    assert [len(batch) for batch in batches] == [3, 3, 1]
    assert_pixels(torch.cat(batches), PIXELS[:7])
    assert ImageFile(images, COUNT).count == COUNT
    refused(lambda: ImageFile(images, 12), f"images.npz has {COUNT} images, expected at least 12")


def test_labels_are_those_of_the_images_that_are_taken(images, tmp_path):
    assert ImageFile(images).labels is None
    np.savez(tmp_path / "x.npz", PIXELS, np.arange(COUNT, dtype=np.uint8))
    found = ImageFile(tmp_path / "x.npz", 7).labels
    assert found.tolist() == list(range(7)) and found.dtype == torch.int64


@pytest.mark.parametrize("labels", [np.zeros(COUNT), np.zeros(COUNT - 1, int), np.full(COUNT, "a")])
def test_what_is_no_label_for_each_image_is_refused(tmp_path, labels):
    np.savez(tmp_path / "x.npz", PIXELS, labels)
    words = rf"x.npz: arr_1 is .*, expected integers \({COUNT},\), a label for each image"
    refused(lambda: ImageFile(tmp_path / "x.npz", 7).labels, words)


WANTED = r".* expected uint8 \(N, H, W, 3\)"


@pytest.mark.parametrize("content, message", [
    ({"arr_0": np.zeros((2, 4, 4, 3), np.float32)}, f"arr_0 is .*float32{WANTED}"),
    ({"arr_0": np.zeros((2, 4, 4, 4), np.uint8)}, rf"arr_0 is .*\(2, 4, 4, 4\){WANTED}"),
    ({"arr_0": np.zeros((0, 4, 4, 3), np.uint8)}, rf"arr_0 is .*\(0, 4, 4, 3\){WANTED}"),
    ({"arr_0": np.full(3, None)}, f"arr_0 is object{WANTED}"),
    ({"a\nb": np.zeros(3)}, "lacks arr_0, it has a b"),
    ({"arr_0": np.zeros((4, 4, 3), np.uint8)}, rf"arr_0 is .*\(4, 4, 3\){WANTED}"),
    ({"arr_0": np.asfortranarray(PIXELS)}, f"arr_0 is .*in Fortran order{WANTED}"),
    ({"samples": PIXELS, "labels": np.zeros(3)}, r"lacks arr_0.* it has samples, labels"),
    ("text", "x.npz is not an npz file"),
    (None, "x.npz is not an npz file"),
])  # fmt: skip
def test_other_files_are_refused(tmp_path, content, message):
    if isinstance(content, dict):
        np.savez(tmp_path / "x.npz", **content)
    elif content:
        (tmp_path / "x.npz").write_text(content)
    refused(lambda: ImageFile(tmp_path / "x.npz"), message)


@pytest.mark.parametrize("rank", [0, 1])
def test_damaged_pixels_are_noticed(images, rank):
    with zipfile.ZipFile(images) as archive:
        info = archive.infolist()[0]
    data = bytearray(images.read_bytes())
    middle = info.header_offset + info.compress_size // 2 + 100
    data[middle : middle + 8] = bytes(255 - value for value in data[middle : middle + 8])
    images.write_bytes(data)
    refused(lambda: list(ImageFile(images).batches(2, rank, 2)), "images.npz cannot be read")


def npy_of(images: np.ndarray) -> bytes:
    """As it lies in an npz."""
    buffer = io.BytesIO()
    np.save(buffer, images)
    return buffer.getvalue()


LONG = b"\x93NUMPY\x01\x00\xff\xff" + b" " * 65535


@pytest.mark.parametrize("content, words", [
    (b"", "images.npz cannot be read"),
    (b"text", "images.npz cannot be read"),
    (b"\x93NUMPY\x03\x00", r"images.npz cannot be read: version \(3, 0\) .*, expected \(1, 0\)"),
    (b"\x93NUMPY\x02\x00\xff\xff\xff\xff", "images.npz cannot be read: version"),
    (b"\x93NUMPY\x01\x00\x10", "images.npz cannot be read"),
    pytest.param(LONG, "images.npz cannot be read: Header info length", id="long header"),
    (b"\x93NUMPY\x01\x00\x10\x00" + b"(" * 16, "images.npz cannot be read"),
    (npy_of(PIXELS)[:-100], f"arr_0 ends early, expected {COUNT} images"),
])  # fmt: skip
def test_damaged_headers_and_images_that_end_early_are_noticed(tmp_path, content, words):
    with zipfile.ZipFile(tmp_path / "images.npz", "w") as archive:
        archive.writestr("arr_0.npy", content)
    refused(lambda: list(ImageFile(tmp_path / "images.npz").batches(4)), words)


@pytest.mark.parametrize("place, value", [(6, 1), (8, 99)])  # encrypted; a method that is not known
def test_an_archive_that_cannot_be_unpacked_is_named(tmp_path, place, value):
    np.savez(tmp_path / "images.npz", PIXELS)
    data = bytearray((tmp_path / "images.npz").read_bytes())
    for start in (data.index(b"PK\x03\x04"), data.index(b"PK\x01\x02") + 2):
        data[start + place] = value
    (tmp_path / "images.npz").write_bytes(data)
    refused(lambda: ImageFile(tmp_path / "images.npz"), "images.npz cannot be read: ")


def in_parts(size: int):
    return np.split(PIXELS, range(size, COUNT, size))


def test_an_npz_is_that_of_numpy_whatever_its_parts_and_the_hour(tmp_path, monkeypatch):
    labels = np.arange(COUNT)
    write_npz(tmp_path / "x.npz", in_parts(3), PIXELS.shape, arr_1=labels)
    np.savez(tmp_path / "numpy.npz", PIXELS, labels)
    with np.load(tmp_path / "x.npz") as got, np.load(tmp_path / "numpy.npz") as expected:
        assert got.files == expected.files
        for name in got.files:
            assert got[name].dtype == expected[name].dtype
            assert np.array_equal(got[name], expected[name])
    assert [path.name for path in tmp_path.glob(".*")] == []
    monkeypatch.setattr(time, "time", lambda: 2e9)
    write_npz(tmp_path / "later.npz", in_parts(COUNT), PIXELS.shape, arr_1=labels)
    assert (tmp_path / "later.npz").read_bytes() == (tmp_path / "x.npz").read_bytes()


@pytest.mark.parametrize("count", [COUNT - 1, COUNT + 1])
def test_parts_that_do_not_add_up_leave_no_file(tmp_path, count):
    expected = (count, *PIXELS.shape[1:])
    words = rf"{PIXELS.size} values, expected the \({count}, 6, 9, 3\)"
    refused(lambda: write_npz(tmp_path / "x.npz", in_parts(3), expected), words)
    assert os.listdir(tmp_path) == []


# References


def test_a_reference_comes_back_as_it_was_written_in_adms_layout(written, given):
    loaded = reference.load(written)
    for name in ("pool", "spatial"):
        for array, wanted in zip(getattr(loaded, name), given[name], strict=True):
            assert array.dtype == np.float64 and np.array_equal(array, wanted)
    assert loaded.images.path == written and loaded.images.count == COUNT
    assert_pixels(next(loaded.images.batches(COUNT))[1])
    digest = hashlib.sha256(written.read_bytes()).hexdigest()[:16]
    assert loaded.images.name == f"{written.name}, sha256 {digest}"
    with np.load(written) as content:
        shapes = {key: content[key].shape for key in content.files}
    assert shapes == NARROW | {"arr_0": PIXELS.shape}
    assert os.listdir(written.parent) == [written.name]
    pool, spatial = 2048, 2023
    published = {"mu": (pool,), "sigma": (pool,) * 2, "mu_s": (spatial,), "sigma_s": (spatial,) * 2}
    assert published == SHAPES


def rewritten(path, target, **changes):
    """A copy with other arrays; None leaves one out."""
    with np.load(path) as content:
        arrays = {key: content[key] for key in content.files} | changes
    np.savez(target, **{key: array for key, array in arrays.items() if array is not None})
    return target


def test_single_precision_statistics_are_widened(written, given, tmp_path):
    mean = given["pool"][0].astype(np.float32)
    got = reference.load(rewritten(written, tmp_path / "single.npz", mu=mean)).pool[0]
    assert got.dtype == np.float64 and np.array_equal(got, mean)


@pytest.mark.parametrize("changes, message", [
    ({"mu_s": None, "sigma_s": None}, "lacks mu_s, sigma_s, it has arr_0, mu, sigma$"),
    ({"arr_0": None}, "lacks arr_0, it has mu"),
    ({"mu": np.zeros(5)}, r"mu is float64 \(5,\), expected floating point \(6,\)"),
    ({"sigma_s": np.zeros((5, 7))}, r"sigma_s .*expected floating point \(5, 5\)"),
    ({"mu_s": np.zeros(5, int)}, "mu_s is int64"),
    ({"mu_s": np.full(5, np.nan)}, "mu_s is not finite"),
    ({"mu": np.full(6, None)}, r"mu is object \(6,\), expected floating point"),
    ({"sigma": -np.eye(6)}, "sigma is no covariance, expected a symmetric matrix whose"),
    ({"sigma": np.triu(np.ones((6, 6)))}, "sigma is no covariance"),
    ({"sigma_s": np.eye(5, k=1) * 1e308 - np.eye(5, k=-1) * 1e308}, "sigma_s is no covariance"),
    ({"arr_0": np.zeros(3)}, "arr_0 is float64"),
])  # fmt: skip
def test_references_that_are_not_are_refused(written, tmp_path, changes, message):
    target = rewritten(written, tmp_path / "changed.npz", **changes)
    refused(lambda: reference.load(target), rf"changed.npz.*{message}")


def test_a_covariance_may_be_symmetric_to_rounding(written, given, tmp_path):
    cov = given["pool"][1].astype(np.float32)
    cov[0, 1] *= 1 + 2 * np.finfo(np.float32).eps
    assert cov[0, 1] != cov[1, 0]
    reference.load(rewritten(written, tmp_path / "single.npz", sigma=cov))


def test_an_array_is_read_only_if_its_header_is_right(written, tmp_path, monkeypatch):
    """A small file may mean arrays that take gigabytes."""
    target = rewritten(written, tmp_path / "changed.npz", mu=np.zeros((7, 1)))
    monkeypatch.setattr(np.lib.format, "read_array", None)
    words = r"changed\.npz: mu is float64 \(7, 1\), expected floating point \(6,\)"
    refused(lambda: reference.load(target), words)


def test_a_pipe_or_a_device_is_no_archive(tmp_path):
    os.mkfifo(tmp_path / "pipe.npz")
    os.symlink("/dev/zero", tmp_path / "zero.npz")
    for name in ("pipe.npz", "zero.npz"):
        refused(lambda name=name: reference.load(tmp_path / name), f"{name} is not an npz file")


def test_a_link_is_replaced_and_what_it_leads_to_is_left(given, tmp_path):
    mine, link = tmp_path / "mine", tmp_path / "reference.npz"
    mine.write_text("kept")
    for name in (link.name, f".{link.name}.partial"):
        os.symlink(mine, tmp_path / name)
    reference.write(link, **given)
    assert mine.read_text() == "kept" and not link.is_symlink()
    assert reference.load(link).images.count == COUNT


@pytest.mark.parametrize("change, message", [
    ({"pool": (np.zeros(5), np.zeros((5, 5)))}, r"mu is float64 \(5,\)"),
    ({"images": PIXELS.astype(np.float32)}, "images are float32"),
    ({"images": PIXELS[0]}, r"expected uint8 \(N, H, W, 3\)"),
])  # fmt: skip
def test_what_is_no_reference_is_not_written(given, tmp_path, change, message):
    refused(lambda: reference.write(tmp_path / "reference.npz", **given | change), message)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_older_file(given, tmp_path, monkeypatch):
    path = tmp_path / "reference.npz"
    path.write_text("older")

    def full(file, array):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    refused(lambda: reference.write(path, **given), "No space", error=OSError)
    assert path.read_text() == "older" and os.listdir(tmp_path) == ["reference.npz"]
