"""The bundled digits as a native dataset, and latents between moments and pixels."""

import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from repa_fast.data import dataset, digits, latents
from repa_fast.data.dataset import LatentDataset
from repa_fast.data.digits import digit_images, digits_metadata
from tests.refusals import refused

pytest.importorskip("lance")
pytest.importorskip("sklearn")

LEVELS = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, -1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("prepare") / "nested" / "digits"
    assert digits.prepare_digits(out) == out
    return out


@pytest.mark.parametrize("split, count", [("train", 1500), ("val", 297)])
def test_the_table_holds_the_split(folder, split, count):
    table = LatentDataset(folder, split)
    pixels, labels = digit_images(split)
    assert len(table) == count == len(pixels)
    rows = table.rows(np.arange(count))
    assert np.array_equal(rows["label"], labels)
    mean, std = rows["moments"][:, :3], rows["moments"][:, 3:]
    planes = pixels.transpose(0, 3, 1, 2)
    assert np.array_equal(mean, planes.astype(np.float32) / 127.5 - 1)
    assert np.array_equal(std, np.zeros_like(mean))
    decoded = np.stack([dataset.decode(data, 16) for data in rows["image"]])
    assert np.array_equal(decoded, planes)


def test_the_metadata_describes_pixel_latents_and_nothing_else_is_left(folder):
    metadata = LatentDataset(folder).metadata
    assert metadata == digits_metadata()
    assert (metadata.resolution, metadata.latent_shape) == (16, (3, 16, 16))
    assert (metadata.vae, metadata.scale, metadata.bias) == ("none", 1.0, 0.0)
    assert metadata.class_names == tuple("0123456789")
    assert sorted(os.listdir(folder)) == ["train.lance", "val.lance"]
    assert os.listdir(folder.parent) == ["digits"]


def test_an_existing_folder_is_refused_and_untouched(tmp_path):
    out = tmp_path / "digits"
    out.mkdir()
    (out / "mine").write_text("kept")
    refused(lambda: digits.prepare_digits(out), "exists already")
    assert os.listdir(tmp_path) == ["digits"] and os.listdir(out) == ["mine"]
    assert (out / "mine").read_text() == "kept"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_half_way_leaves_nothing(tmp_path, monkeypatch, error):
    written = []

    def write(uri, *_, **__):
        uri.mkdir()
        (uri / "part").write_text("half")
        written.append(uri)
        if len(written) == 2:
            raise error

    monkeypatch.setattr(dataset, "write", write)
    with pytest.raises(error):
        digits.prepare_digits(tmp_path / "digits")
    assert len(written) == 2
    assert os.listdir(tmp_path) == []


def test_processes_that_race_to_prepare_the_digits_all_find_them(tmp_path, monkeypatch):
    """The other one finishes between our writing and our renaming."""
    rename = digits.os.rename

    def late(source, target):
        shutil.copytree(source, target)
        rename(source, target)

    monkeypatch.setattr(digits.os, "rename", late)
    for _ in range(2):
        assert digits.ensure_digits(tmp_path / "digits") == tmp_path / "digits"
        assert os.listdir(tmp_path) == ["digits"]


def test_a_sample_is_scaled_and_shifted():
    generator = torch.Generator().manual_seed(0)
    moments = torch.randn(3, 4, 5, 5, generator=generator, dtype=torch.float64)
    noise = torch.randn(3, 2, 5, 5, generator=generator, dtype=torch.float64)
    metadata = replace(digits_metadata(), scale=0.25, bias=-1.5)
    expected = (moments[:, :2].numpy() + moments[:, 2:].numpy() * noise.numpy()) * 0.25 - 1.5
    got = latents.sample(moments, noise, metadata).numpy()
    assert np.allclose(got, expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("scale, bias", [(1.0, 0.0), (0.5, 0.25), (3.0, -1.0)])
def test_pixels_come_back_exactly_from_their_moments(scale, bias):
    metadata = replace(digits_metadata(), scale=scale, bias=bias)
    moments = torch.from_numpy(digits.pixel_moments(LEVELS))
    assert moments.dtype == torch.float32 and moments.shape == (1, 6, 16, 16)
    clean = latents.sample(moments, torch.randn(1, 3, 16, 16), metadata)
    decoded = latents.to_pixels(clean, metadata)
    assert decoded.dtype == torch.uint8
    assert np.array_equal(decoded.numpy(), LEVELS.transpose(0, 3, 1, 2))


def test_pixels_are_rounded_and_clamped():
    values = torch.tensor([-3.0, -1.0, 99.4 / 127.5 - 1, 99.6 / 127.5 - 1, 1.0, 3.0])
    decoded = latents.to_pixels(values.view(1, 1, 1, 6), digits_metadata())
    assert decoded.flatten().tolist() == [0, 0, 99, 100, 255, 255]


def test_latents_of_an_autoencoder_are_refused():
    metadata = replace(digits_metadata(), vae="sd-vae-ft-mse")
    assert not latents.can_decode(metadata) and latents.can_decode(digits_metadata())
    refused(lambda: latents.to_pixels(torch.zeros(1, 3, 16, 16), metadata), "sd-vae-ft-mse")
