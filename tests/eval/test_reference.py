"""Files of images and of references: what is written is read, and what is wrong is named."""

import hashlib
import os
import zipfile

import numpy as np
import pytest
import torch

from repa_fast.eval import reference
from repa_fast.eval.reference import ImageFile
from repa_fast.eval.statistics import Moments
from repa_fast.testing import seeded

COUNT, HEIGHT, WIDTH = 11, 6, 9


def pixels(count: int = COUNT) -> np.ndarray:
    shape = (count, HEIGHT, WIDTH, 3)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture(params=[np.savez, np.savez_compressed])
def images(request, tmp_path):
    request.param(tmp_path / "images.npz", pixels())
    return tmp_path / "images.npz"


def moments(width: int, count: int = 3, seed: int = 0) -> reference.Statistics:
    of = Moments(width)
    of.update(seeded((count, width), seed=seed))
    return of.statistics()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A reference and its moments of pool and spatial features."""
    path = tmp_path_factory.mktemp("reference") / "new" / "reference.npz"
    pool, spatial = moments(2048, seed=0), moments(2023, seed=1)
    reference.write(path, images=pixels(), pool=pool, spatial=spatial)
    return path, pool, spatial


@pytest.mark.parametrize("size", [1, 4, 11, 100])
def test_batches_are_the_images_in_order(images, size):
    file = ImageFile(images)
    assert (file.count, file.height, file.width) == (COUNT, HEIGHT, WIDTH)
    index, planes = zip(*file.batches(size))
    assert max(map(len, planes)) == min(size, COUNT)
    assert torch.cat(index).tolist() == list(range(COUNT))
    assert all(batch.dtype == torch.uint8 for batch in planes)
    assert np.array_equal(torch.cat(planes).permute(0, 2, 3, 1).numpy(), pixels())


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_processes_share_the_batches(images, world_size):
    found = {}
    for rank in range(world_size):
        for index, planes in ImageFile(images).batches(2, rank, world_size):
            assert int(index[0]) // 2 % world_size == rank
            found.update(zip(index.tolist(), planes))
    assert sorted(found) == list(range(COUNT))
    together = torch.stack([found[i] for i in range(COUNT)])
    assert np.array_equal(together.permute(0, 2, 3, 1).numpy(), pixels())


def test_batches_can_be_changed(images):
    for _, batch in ImageFile(images).batches(4):
        batch.zero_()
    assert np.array_equal(next(ImageFile(images).batches(COUNT))[1][0, 0], pixels()[0, :, :, 0])


def test_only_the_batch_is_in_memory(tmp_path):
    """64 MB of images, read with less than 8 MB at any time."""
    import tracemalloc

    np.savez(tmp_path / "images.npz", np.zeros((64, 592, 592, 3), np.uint8))
    tracemalloc.start()
    read = sum(len(index) for index, _ in ImageFile(tmp_path / "images.npz").batches(1))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert read == 64 and peak < 8e6


def test_the_first_images_are_taken_where_there_are_more(images):
    file = ImageFile(images, 7)
    assert file.count == 7
    batches = [planes for _, planes in file.batches(3)]
    assert [len(batch) for batch in batches] == [3, 3, 1]
    assert np.array_equal(torch.cat(batches).permute(0, 2, 3, 1).numpy(), pixels()[:7])


def test_fewer_images_than_asked_for_are_refused(images):
    with pytest.raises(ValueError, match=f"images.npz has {COUNT} images, expected at least 12"):
        ImageFile(images, 12)
    assert ImageFile(images, COUNT).count == COUNT


@pytest.mark.parametrize(
    "array, message",
    [
        (np.zeros((2, 4, 4, 3), np.float32), "float32"),
        (np.zeros((2, 4, 4, 4), np.uint8), r"\(2, 4, 4, 4\)"),
        (np.zeros((4, 4, 3), np.uint8), r"\(4, 4, 3\)"),
        (np.asfortranarray(pixels()), "in Fortran order"),
    ],
)
def test_other_arrays_are_refused(tmp_path, array, message):
    np.savez(tmp_path / "images.npz", array)
    with pytest.raises(ValueError, match=rf"arr_0 is .*{message}.* expected uint8 \(N, H, W, 3\)"):
        ImageFile(tmp_path / "images.npz")


def test_files_that_are_no_npz_are_refused(tmp_path):
    (tmp_path / "text").write_text("text")
    for name in ("text", "absent"):
        with pytest.raises(ValueError, match=f"{name} is not an npz file"):
            ImageFile(tmp_path / name)
    np.savez(tmp_path / "other.npz", samples=pixels(), labels=np.zeros(3))
    with pytest.raises(ValueError, match=r"lacks arr_0.* it has samples, labels"):
        ImageFile(tmp_path / "other.npz")


@pytest.mark.parametrize("rank", [0, 1])
def test_damaged_pixels_are_noticed(images, rank):
    with zipfile.ZipFile(images) as archive:
        info = archive.infolist()[0]
    data = bytearray(images.read_bytes())
    middle = info.header_offset + info.compress_size // 2 + 100
    data[middle : middle + 8] = bytes(255 - value for value in data[middle : middle + 8])
    images.write_bytes(data)
    with pytest.raises(ValueError, match=r"images.npz cannot be read"):
        list(ImageFile(images).batches(2, rank, 2))


def test_images_that_end_early_are_noticed(tmp_path):
    whole = tmp_path / "array.npy"
    np.save(whole, pixels())
    with zipfile.ZipFile(tmp_path / "images.npz", "w") as archive:
        archive.writestr("arr_0.npy", whole.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"arr_0 ends early, expected {COUNT} images"):
        list(ImageFile(tmp_path / "images.npz").batches(4))


@pytest.mark.parametrize("start", [b"", b"text", b"\x93NUMPY\x03\x00", b"\x93NUMPY\x01\x00\x10"])
def test_damaged_headers_are_noticed(tmp_path, start):
    with zipfile.ZipFile(tmp_path / "images.npz", "w") as archive:
        archive.writestr("arr_0.npy", start)
    with pytest.raises(ValueError, match=r"images.npz cannot be read"):
        ImageFile(tmp_path / "images.npz")


def test_a_reference_comes_back_as_it_was_written(written):
    path, pool, spatial = written
    loaded = reference.load(path)
    for got, expected in ((loaded.pool, pool), (loaded.spatial, spatial)):
        for array, wanted in zip(got, expected, strict=True):
            assert array.dtype == np.float64 and np.array_equal(array, wanted)
    assert loaded.images.path == path and loaded.images.count == COUNT
    _, planes = next(loaded.images.batches(COUNT))
    assert np.array_equal(planes.permute(0, 2, 3, 1).numpy(), pixels())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    assert loaded.images.name == f"{path.name}, sha256 {digest}"


def test_the_layout_is_adms(written):
    path, _, _ = written
    with np.load(path) as content:
        shapes = {key: content[key].shape for key in content.files}
    assert shapes == {
        "arr_0": (COUNT, HEIGHT, WIDTH, 3),
        "mu": (2048,),
        "sigma": (2048, 2048),
        "mu_s": (2023,),
        "sigma_s": (2023, 2023),
    }
    assert os.listdir(path.parent) == [path.name]


def rewritten(path, target, **changes):
    """A copy with other arrays; None leaves one out."""
    with np.load(path) as content:
        arrays = {key: content[key] for key in content.files} | changes
    np.savez(target, **{key: array for key, array in arrays.items() if array is not None})
    return target


def test_single_precision_statistics_are_widened(written, tmp_path):
    path, (mean, _), _ = written
    target = rewritten(path, tmp_path / "single.npz", mu=mean.astype(np.float32))
    got = reference.load(target).pool[0]
    assert got.dtype == np.float64 and np.array_equal(got, mean.astype(np.float32))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"mu_s": None, "sigma_s": None}, "lacks mu_s, sigma_s, it has arr_0, mu, sigma$"),
        ({"arr_0": None}, "lacks arr_0, it has mu"),
        ({"mu": np.zeros(2023)}, r"mu is float64 \(2023,\), expected floating point \(2048,\)"),
        ({"sigma_s": np.zeros((2023, 7))}, r"sigma_s .*expected floating point \(2023, 2023\)"),
        ({"mu_s": np.zeros(2023, int)}, "mu_s is int64"),
        ({"mu_s": np.full(2023, np.nan)}, "mu_s is not finite"),
        ({"mu": np.full(2048, None)}, "cannot be read: Object arrays"),
        ({"arr_0": np.zeros(3)}, "arr_0 is float64"),
    ],
)
def test_references_that_are_not_are_refused(written, tmp_path, changes, message):
    target = rewritten(written[0], tmp_path / "changed.npz", **changes)
    with pytest.raises(ValueError, match=rf"changed.npz.*{message}"):
        reference.load(target)


def test_moments_of_other_features_are_not_written(tmp_path):
    given = {"images": pixels(), "pool": moments(2048), "spatial": moments(2023)}
    wrong = [
        ({"pool": moments(2023)}, r"mu is float64 \(2023,\)"),
        ({"images": pixels().astype(np.float32)}, "images are float32"),
        ({"images": pixels()[0]}, r"expected uint8 \(N, H, W, 3\)"),
    ]
    for change, message in wrong:
        with pytest.raises(ValueError, match=message):
            reference.write(tmp_path / "reference.npz", **given | change)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_older_file(tmp_path, monkeypatch):
    path = tmp_path / "reference.npz"
    path.write_text("older")

    def full(file, array):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OSError, match="No space"):
        reference.write(path, images=pixels(), pool=moments(2048), spatial=moments(2023))
    assert path.read_text() == "older" and os.listdir(tmp_path) == ["reference.npz"]
