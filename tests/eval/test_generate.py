"""Many images to one .npz: what is in it and beside it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from repa_fast.checkpoint.export import export
from repa_fast.eval import generate as generating
from repa_fast.eval import pictures
from repa_fast.eval.generate import generate
from repa_fast.eval.sampling import ImageSampler, labels_of
from tests.eval import checkpoints
from tests.eval.conftest import COUNT
from tests.refusals import refused

CPU = torch.device("cpu")


def test_the_images_are_the_samplers_in_blocks_of_a_whole_batch(
    whole, make, loaded, tmp_path, monkeypatch
):
    """Another batch size may change the last bit, on a GPU more often than here."""
    config, asked, images = make(tmp_path), [], ImageSampler.images
    sampler = ImageSampler(loaded, config, CPU)
    numbers = np.arange(24)  # the last block is padded
    labels = labels_of(numbers, 10, 0, "random")
    blocks = [sampler.images(n, labels[n], 0) for n in np.split(numbers, 3)]
    expected = torch.cat(blocks)[:COUNT].permute(0, 2, 3, 1).numpy()
    with np.load(whole) as found:
        assert found["arr_0"].dtype == np.uint8 and found["arr_1"].dtype == np.int64
        assert np.array_equal(found["arr_0"], expected)
        assert np.array_equal(found["arr_1"], labels[:COUNT])
    assert expected.std() > 20

    def spied(sampler, index, labels, seed):
        asked.append(index.tolist())
        return images(sampler, index, labels, seed)

    monkeypatch.setattr(ImageSampler, "images", spied)
    generate(config)
    assert asked == [list(range(8)), list(range(8, 16)), list(range(16, 24))]


@pytest.mark.parametrize("settings, labels", [
    ({"labels": "balanced"}, [*range(10), *range(10)]),
    ({"class_label": 7}, [7] * 20),
    ({"class_label": 0, "labels": "balanced"}, [0] * 20),
    ({"global_seed": 3}, labels_of(np.arange(20), 10, 3, "random").tolist()),
])  # fmt: skip
def test_labels_are_those_asked_for(make, whole, tmp_path, settings, labels):
    with np.load(generate(make(tmp_path, **settings))) as found, np.load(whole) as other:
        assert found["arr_1"].tolist() == labels
        assert found["arr_0"].shape == (20, 16, 16, 3)
        assert not np.array_equal(found["arr_0"], other["arr_0"])


def test_only_classes_of_the_dataset_are_sampled(make, tmp_path):
    """A label table may have more rows, which training never met."""
    wide = checkpoints.run(tmp_path / "wide", num_classes=30)
    for kind in ("random", "balanced"):
        with np.load(generate(make(tmp_path / kind, ckpt=str(wide), labels=kind))) as found:
            assert len(set(found["arr_1"])) > 5 and found["arr_1"].max() < 10


@pytest.mark.parametrize("count, batch", [(8, 8), (9, 8), (3, 1)])
def test_there_are_as_many_images_as_asked_for_the_first_of_more(
    make, whole, tmp_path, count, batch
):
    config = make(tmp_path, num_fid_samples=count, per_proc_batch_size=batch)
    with np.load(generate(config)) as few, np.load(whole) as many:
        assert few["arr_0"].shape == (count, 16, 16, 3) and few["arr_1"].shape == (count,)
        assert np.array_equal(few["arr_1"], many["arr_1"][:count])
        assert batch != 8 or np.array_equal(few["arr_0"], many["arr_0"][:count])


def test_the_settings_lie_beside(whole, run, loaded):
    described = json.loads(whole.with_suffix(".json").read_text())
    assert described["num_steps"] == 2 and described["cfg_scale"] == 1.5
    assert (described["path_type"], described["prediction"]) == ("linear", "v")
    assert described["step"] == 7 and described["digest"] == loaded.digest
    assert Path(described["ckpt"]) == (run / "checkpoints" / "0000007").resolve()
    assert described["torch"] == torch.__version__


def test_a_contact_sheet_lies_beside_with_titles(whole):
    with Image.open(whole.with_suffix(".png")) as image:
        sheet = np.asarray(image)
    above, pitch = pictures.TITLE_PIXELS, 48 + pictures.GAP
    rows = -(-COUNT // generating.SHEET_COLUMNS)
    assert sheet.shape[0] == rows * (pitch + above) - pictures.GAP
    with np.load(whole) as found:
        for number in (0, 9, 19):
            row, column = divmod(number, generating.SHEET_COLUMNS)
            top, left = row * (pitch + above), column * pitch
            shown = sheet[top + above : top + above + 48 : 3, left : left + 48 : 3]
            assert np.array_equal(shown, found["arr_0"][number])
            assert (sheet[top : top + above, left : left + 48] != pictures.GAP_GREY).any()


def test_images_are_pngs_too_where_asked(make, whole, tmp_path):
    out = generate(make(tmp_path, pngs=True))
    assert out.read_bytes() == whole.read_bytes()
    files = sorted(out.with_suffix("").iterdir())
    assert [file.name for file in files] == [f"{number:06d}.png" for number in range(COUNT)]
    with np.load(out) as found:
        for file, expected in zip(files, found["arr_0"], strict=True):
            assert np.array_equal(np.asarray(Image.open(file)), expected)


def test_images_are_in_the_runs_folder_or_for_other_weights_in_samples(
    make, run, loaded, tmp_path, monkeypatch
):
    few = {"num_fid_samples": 2, "sample_dir": ""}
    assert generating.folder_of(make("", **few)) == run / "generated"
    (run / "generated").symlink_to(tmp_path)
    refused(lambda: generate(make("", **few)), "generated is a link, expected a file or folder of")
    (run / "generated").unlink()
    export(loaded.source, "safetensors", tmp_path / "x.safetensors")
    monkeypatch.chdir(tmp_path)
    out = generate(make("", ckpt="x.safetensors", **few))
    assert out.parent == Path("samples") and out.exists()


@pytest.mark.parametrize("settings, message", [
    ({"num_fid_samples": 0}, "num_fid_samples is 0, expected at least 1"),
    ({"per_proc_batch_size": 0}, "per_proc_batch_size is 0, expected at least 1"),
    ({"class_label": 10}, r"class_label is 10, expected 0\.\.9"),
    ({"class_label": -2}, r"class_label is -2, expected 0\.\.9"),
    ({"resolution": 256}, "resolution is 256, expected 16"),
    ({"num_classes": 1000}, "num_classes is 1000, expected 10"),
    ({"model": "SiT-XL/2"}, "expected SiT-XL/2"),
])  # fmt: skip
def test_what_does_not_fit_the_weights_is_refused(make, tmp_path, settings, message):
    refused(lambda: generate(make(tmp_path, **settings)), message)
    assert list(tmp_path.iterdir()) == []
