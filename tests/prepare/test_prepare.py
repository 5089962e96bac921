"""The bundled digits as a native dataset, and latents between moments and pixels."""

import os
import shutil
import stat
from dataclasses import replace

import numpy as np
import pytest
import torch

from repa_fast.data import dataset, digits, latents
from repa_fast.data.dataset import LatentDataset, Metadata
from repa_fast.data.digits import digit_images, digits_metadata
from repa_fast.testing import seeded
from repa_fast.whole import whole_or_not
from tests.prepare.writing import write
from tests.refusals import refused

pytest.importorskip("lance")
pytest.importorskip("sklearn")

LEVELS = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, -1)


@pytest.mark.parametrize("split, count", [("train", 1500), ("val", 297)])
def test_the_table_holds_the_split_as_pixel_latents_and_nothing_else_is_left(
    digits_dir, split, count
):
    table = LatentDataset(digits_dir, split)
    pixels, labels = digit_images(split)
    assert len(table) == count == len(pixels)
    rows = table.rows(np.arange(count))
    assert np.array_equal(rows["label"], labels)
    mean, std = rows["moments"][:, :3], rows["moments"][:, 3:]
    planes = pixels.transpose(0, 3, 1, 2)
    assert np.array_equal(mean, planes.astype(np.float32) / 127.5 - 1)
    assert np.array_equal(std, np.zeros_like(mean))
    assert np.array_equal([dataset.decode(data, 16) for data in rows["image"]], planes)
    assert table.metadata == digits_metadata() == Metadata(
        resolution=16, latent_shape=(3, 16, 16), vae="none", scale=1.0, bias=0.0,
        class_names=tuple("0123456789"),
    )  # fmt: skip
    assert sorted(os.listdir(digits_dir)) == ["train.lance", "val.lance"]
    assert os.listdir(os.path.dirname(digits_dir)) == ["digits"]


def test_an_existing_folder_is_refused_and_untouched(tmp_path):
    mine = write(tmp_path / "digits" / "mine", "kept")
    refused(lambda: digits.prepare_digits(tmp_path / "digits"), "exists already")
    assert sorted(tmp_path.rglob("*")) == [mine.parent, mine] and mine.read_text() == "kept"


@pytest.mark.parametrize("mask, mode", [(0o077, 0o700), (0o002, 0o775)])
def test_files_and_folders_have_the_permissions_of_the_umask(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        with whole_or_not(tmp_path / "digits") as partial:
            write(partial / "x", "").chmod(0o400)
        with whole_or_not(tmp_path / "file") as partial:
            write(partial, "").chmod(0o400)  # as safetensors does
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "digits").stat().st_mode) == mode
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode & 0o666


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_half_way_leaves_nothing(tmp_path, monkeypatch, error):
    written = []

    def write_half(uri, *_, **__):
        written.append(write(uri / "part", "half"))
        if len(written) == 2:
            raise error

    monkeypatch.setattr(dataset, "write", write_half)
    with pytest.raises(error):
        digits.prepare_digits(tmp_path / "digits")
    assert len(written) == 2 and os.listdir(tmp_path) == []


def test_processes_that_race_to_prepare_the_digits_all_find_them(tmp_path, monkeypatch):
    """The other one finishes between our writing and our renaming."""
    rename = os.rename

    def late(source, target):
        shutil.copytree(source, target)
        rename(source, target)

    monkeypatch.setattr(os, "rename", late)
    out = tmp_path / "nested" / "digits"
    for _ in range(2):
        assert digits.ensure_digits(out) == out and os.listdir(out.parent) == ["digits"]


def test_a_sample_is_scaled_and_shifted():
    moments, noise = (seeded((3, n, 5, 5), seed=n, dtype=torch.float64) for n in (4, 2))
    metadata = replace(digits_metadata(), scale=0.25, bias=-1.5)
    expected = (moments[:, :2] + moments[:, 2:] * noise) * 0.25 - 1.5
    got = latents.sample(moments, noise, metadata)
    torch.testing.assert_close(got, expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("scale, bias", [(1.0, 0.0), (0.5, 0.25), (3.0, -1.0)])
def test_pixels_come_back_exactly_from_their_moments(scale, bias):
    metadata = replace(digits_metadata(), scale=scale, bias=bias)
    moments = torch.from_numpy(digits.pixel_moments(LEVELS))
    assert moments.dtype == torch.float32 and moments.shape == (1, 6, 16, 16)
    clean = latents.sample(moments, torch.randn(1, 3, 16, 16), metadata)
    decoded = latents.to_pixels(clean, metadata)
    assert decoded.dtype == torch.uint8
    assert np.array_equal(decoded.numpy(), LEVELS.transpose(0, 3, 1, 2))


def test_pixels_are_rounded_and_clamped_and_latents_of_an_autoencoder_are_refused():
    values = torch.tensor([-3.0, -1.0, 99.4 / 127.5 - 1, 99.6 / 127.5 - 1, 1.0, 3.0])
    decoded = latents.to_pixels(values.view(1, 1, 1, 6), digits_metadata())
    assert decoded.flatten().tolist() == [0, 0, 99, 100, 255, 255]
    metadata = replace(digits_metadata(), vae="sd-vae-ft-mse")
    assert not latents.can_decode(metadata) and latents.can_decode(digits_metadata())
    refused(lambda: latents.to_pixels(torch.zeros(1, 3, 16, 16), metadata), "sd-vae-ft-mse")
