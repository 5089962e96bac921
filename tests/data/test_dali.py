"""Batches decoded by DALI: Pillow's, bad rows included, and nothing left behind."""

import gc
import json
import logging
import re
import sys

import numpy as np
import pytest
import torch

from repa_fast.backend import dispatch
from repa_fast.data.dali import GPU_MEAN, DaliDecoder, choose
from repa_fast.data.dataset import LatentDataset
from repa_fast.data.loader import Loader, read_batch
from repa_fast.data.official import OfficialFolder
from repa_fast.data.order import SampleOrder
from tests.data.encoding import (
    COUNT,
    R,
    assert_equal_batches,
    encode,
    noise,
    own_threads,
    write_table,
)
from tests.prepare.writing import write
from tests.refusals import refused

pytest.importorskip("lance")

BATCH = 6
BAD_ROW = 17
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def order():
    return SampleOrder(COUNT, BATCH, 0)


def destroyed(pipelines: list) -> bool:
    gc.collect()
    return all(reference() is None for reference in pipelines)


HALF_PNG = encode(noise(3))[:200]

BAD = {
    "no image": b"not an image",
    "empty": b"",
    "half a PNG": HALF_PNG,
    "half a JPEG": encode(noise(3), "JPEG")[:-60],
    "another size": encode(noise(3, side=R + 8)),
    "another size, turned": encode(noise(3)[: R // 2], "JPEG"),
}


@pytest.mark.parametrize("kind", list(BAD))
def test_a_bad_image_is_named_or_replaced_as_with_pillow(with_dali, tmp_path, caplog, kind):
    bad = write_table(tmp_path / "a.lance", {BAD_ROW: BAD[kind], BAD_ROW + 1: BAD[kind]})
    indices, good = np.array([3, BAD_ROW, 8, BAD_ROW + 1]), np.array([1, 2, 3, 4])
    with DaliDecoder(R, 1, None) as decoder:
        by_pillow = refused(lambda: read_batch(bad, indices))
        by_dali = refused(lambda: read_batch(bad, indices, decoder=decoder))
        assert rf"a.lance row {BAD_ROW}: " in by_dali
        assert re.sub("0x[0-9a-f]+", "", by_dali) == re.sub("0x[0-9a-f]+", "", by_pillow)
        expected_skips, skips = [], []
        expected = read_batch(bad, indices, skipped=expected_skips)
        assert_equal_batches(read_batch(bad, indices, decoder=decoder, skipped=skips), expected)
        assert len(skips) == len(expected_skips) == 3
        assert expected["index"].tolist() == [3, BAD_ROW + 2, 8, BAD_ROW + 2]
        assert "not DALI" not in caplog.text
        assert_equal_batches(read_batch(bad, good, decoder=decoder), read_batch(bad, good))


def test_other_errors_of_dali_are_not_the_images(with_dali, table, monkeypatch):
    with DaliDecoder(R, 1, None) as decoder:
        read_batch(table, np.arange(4), decoder=decoder)

        def run():
            raise RuntimeError("out of memory")

        monkeypatch.setattr(decoder._pipeline, "run", run)
        with pytest.raises(RuntimeError, match="out of memory"):
            read_batch(table, np.arange(4), decoder=decoder, skipped=[])


def test_a_bad_label_is_named(with_dali, table, monkeypatch):
    fetch = LatentDataset.fetch

    def spoiled(self, indices, **options):
        rows = fetch(self, indices, **options)
        return [row._replace(label=9) if row.index == 5 else row for row in rows]

    monkeypatch.setattr(LatentDataset, "fetch", spoiled)
    with DaliDecoder(R, 1, None) as decoder:
        refused(lambda: read_batch(table, np.arange(3, 7), decoder=decoder), "row 5: label is 9")


def test_skipping_rows_reads_on(with_dali, tmp_path, built):
    bad = write_table(tmp_path / "a.lance", {BAD_ROW: HALF_PNG})
    batches, skipped = [], []
    for decode in ("dali-cpu", "torch"):
        order = SampleOrder(COUNT, BATCH, 0)
        with Loader(bad, order, start=0, stop=12, decode=decode, skip_bad=True) as loader:
            batches.append(list(loader))
            skipped.append(loader.skipped)
    for got, expected in zip(*batches, strict=True):
        assert_equal_batches(got, expected)
    assert skipped[0] == skipped[1] and len(skipped[0]) == 2
    assert len(built) > 1 and destroyed(built)


def test_official_folders(with_dali, tmp_path):
    images, latents, labels = tmp_path / "images" / "00000", tmp_path / "vae-sd", []
    for index in range(4):
        labels.append((f"00000/img-mean-std-{index:08d}.npy", index % 2))
        np.save(write(latents / labels[-1][0]), np.zeros((8, R // 8, R // 8), np.float32))
        if index < 3:
            kind = ("PNG", "JPEG", "PNG")[index]
            write(images / f"img{index:08d}.{kind.lower()}", encode(noise(index), kind))
    array = images / "img00000003.npy"
    np.save(array, noise(3).transpose(2, 0, 1))
    write(latents / "dataset.json", json.dumps({"labels": labels}))
    folder, indices = OfficialFolder(tmp_path), np.array([3, 0, 2, 1])
    with DaliDecoder(R, 2, None) as decoder:
        samples, pixels = decoder.decode(folder, folder.fetch(indices), map)
        assert [sample["index"] for sample in samples] == indices.tolist()
        assert torch.equal(pixels, read_batch(folder, indices)["image"])
        np.save(array, np.zeros((3, R, R)))
        refused(lambda: read_batch(folder, indices, decoder=decoder), r"img00000003\.npy: float64")
        array.unlink()
        refused(lambda: read_batch(folder, indices, decoder=decoder), r"3\.npy: cannot be read")


# The choice


@pytest.fixture
def without_dali(monkeypatch):
    for name in ("nvidia.dali", "nvidia.dali.plugin", "nvidia.dali.plugin.pytorch"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.parametrize("decode, device", [("dali-cpu", CPU), ("dali-gpu", CUDA)])
def test_an_explicit_choice_without_dali_names_the_package(
    without_dali, monkeypatch, table, order, decode, device
):
    for cuda, package in (("12.8", "cuda120"), ("13.2", "cuda130"), (None, "cuda130")):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        words = rf"decode is '{decode}', but .*install nvidia-dali-{package} "
        refused(lambda: Loader(table, order, start=0, stop=1, decode=decode, device=device), words)
    assert own_threads() == []


def test_auto_takes_pillow_and_says_why_once_and_what_cannot_be_chosen_is_refused(
    without_dali, caplog
):
    refused(
        lambda: choose("dali-gpu", CPU),
        "'dali-gpu', but the run is on cpu, expected cuda",
    )
    refused(lambda: choose("nvjpeg", CPU), "decode is 'nvjpeg', expected one of auto")
    dispatch._say_once.cache_clear()
    with caplog.at_level(logging.INFO, dispatch.__name__):
        assert [choose("auto", CUDA)[0], choose("auto", CUDA)[0]] == ["torch", "torch"]
        assert "Pillow, since DALI is not there" in caplog.text and len(caplog.records) == 1
        assert [choose("auto", CPU)[0], choose("auto", CPU)[0]] == ["torch", "torch"]
        assert "Pillow, since the run is on cpu" in caplog.text and len(caplog.records) == 2


def test_auto_takes_dali_on_a_gpu_and_one_of_another_cuda_is_refused(
    with_dali, monkeypatch, caplog
):
    import nvidia.dali

    dispatch._say_once.cache_clear()
    major = int(str(nvidia.dali.__cuda_version__)[:2])
    monkeypatch.setattr(torch.version, "cuda", f"{major}.0")
    with caplog.at_level(logging.INFO, dispatch.__name__):
        assert choose("auto", CUDA)[0] == "dali-gpu"
    assert "DALI on the GPU" in caplog.text
    monkeypatch.setattr(torch.version, "cuda", f"{major - 1}.8")
    assert choose("dali-cpu", CUDA) == ("dali-cpu", "asked for")
    refused(lambda: choose("dali-gpu", CUDA), f"install nvidia-dali-cuda{major - 1}0")


# On a GPU


@pytest.mark.gpu
def test_on_a_gpu_batches_are_ready(with_dali, table, order, built):
    options = {"start": 0, "stop": 60, "num_workers": 2}
    on_gpu = {"decode": "dali-gpu", "device": "cuda", "pin_memory": True}
    with Loader(table, order, **on_gpu, **options) as loader:
        sums = []
        for batch in loader:
            assert batch["image"].is_cuda and batch["moments"].is_pinned()
            torch.cuda._sleep(10**6)  # the step is still busy when its batch is let go
            sums.append(batch["image"].double().mean((1, 2, 3)))
        sums = torch.stack(sums).cpu()
    with Loader(table, SampleOrder(COUNT, BATCH, 0), decode="torch", **options) as loader:
        expected = torch.stack([batch["image"].double().mean((1, 2, 3)) for batch in loader])
    assert (sums - expected).abs().max() <= GPU_MEAN
    assert len(built) == 1 and destroyed(built)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", list(BAD))
def test_on_a_gpu_a_bad_image_is_named_or_replaced(with_dali, tmp_path, kind):
    bad = write_table(tmp_path / "a.lance", {BAD_ROW: BAD[kind]})
    indices = np.array([3, BAD_ROW, 8])
    with DaliDecoder(R, 1, CUDA) as decoder:
        with pytest.raises(ValueError, match=rf"a\.lance row {BAD_ROW}: "):
            read_batch(bad, indices, decoder=decoder)
        batch = read_batch(bad, indices, decoder=decoder, skipped=[])
        assert batch["index"].tolist() == [3, BAD_ROW + 1, 8]
