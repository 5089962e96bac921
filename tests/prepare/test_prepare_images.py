"""`repa-fast prepare images`, from photographs to a training step."""

import contextlib
import dataclasses
import io
import json

import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_images

from repa_fast.cli import main
from repa_fast.data.dataset import LatentDataset
from repa_fast.prepare.crop import center_crop
from repa_fast.prepare.images import ImagesConfig, prepare_images
from repa_fast.prepare.official import ExportConfig, ImportConfig, export_folder, import_folder
from tests.data import encoding
from tests.prepare.writing import write
from tests.refusals import refused

RESOLUTION = 32


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Ten JPEG crops of two photographs in class folders."""
    folder = tmp_path_factory.mktemp("photographs")
    generator = np.random.default_rng(0)
    for label, pixels in zip(("n01", "n02"), load_sample_images().images):
        for number in range(5):
            height, width = generator.integers(70, 300, size=2)
            top, left = generator.integers(0, 100, size=2)
            crop = pixels[top : top + height, left : left + width]
            write(folder / label / f"{number}.JPEG", encoding.encode(crop, "JPEG", quality=90))
    return folder


def settings(photographs, out, **changes):
    options = {"vae": "none", "resolution": RESOLUTION, "num_workers": 2, "batch_size": 4}
    return ImagesConfig(data_dir=str(photographs), out=str(out), **(options | changes))


def files(photographs):
    return sorted(photographs.glob("*/*.JPEG"))


@pytest.mark.parametrize("kind", ("png", "jpeg"))
def test_the_table_holds_crops_moments_and_labels(photographs, tmp_path, kind):
    said = prepare_images(settings(photographs, tmp_path / "out", image=kind))
    assert "10 rows of 10 images" in said
    table = LatentDataset(tmp_path / "out")
    assert table.metadata.class_names == ("n01", "n02") and table.metadata.vae == "none"
    for index, file in enumerate(files(photographs)):
        crop = center_crop(file.read_bytes(), RESOLUTION).transpose(2, 0, 1)
        sample = table.decode(table.fetch(np.array([index]))[0])
        assert sample["label"] == index // 5
        np.testing.assert_array_equal(sample["moments"][:3], crop.astype(np.float32) / 127.5 - 1)
        error = np.abs(sample["image"].astype(int) - crop).mean()
        assert error == 0 if kind == "png" else 0 < error < 6


def test_original_files_are_kept_byte_for_byte(photographs, tmp_path):
    crops = [center_crop(file.read_bytes(), RESOLUTION) for file in files(photographs)[:3]]
    encoded = [encoding.encode(crop, optimize=True) for crop in crops]
    for number, data in enumerate(encoded):
        write(tmp_path / "cropped" / "a" / f"{number}.png", data)
    prepare_images(settings(tmp_path / "cropped", tmp_path / "out", image="original"))
    assert LatentDataset(tmp_path / "out").rows(np.arange(3))["image"] == encoded
    config = settings(photographs, tmp_path / "other", image="original")
    refused(lambda: prepare_images(config), "expected 32x32")


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    """(folder, module) of a random one that divides the side by 8."""
    pytest.importorskip("diffusers")
    module = encoding.autoencoder(blocks=4)
    folder = tmp_path_factory.mktemp("vae")
    module.save_pretrained(folder)
    return str(folder), module


@pytest.mark.xdist_group("diffusers")
@pytest.mark.parametrize("precision", ("fp32", "bf16"))
def test_moments_are_the_autoencoders(photographs, tmp_path, autoencoder, precision):
    folder, module = autoencoder
    prepare_images(settings(photographs, tmp_path, vae=folder, precision=precision))
    table = LatentDataset(tmp_path)
    assert table.metadata.latent_shape == (4, 4, 4) and table.metadata.scale == 0.18215
    crops = np.stack([center_crop(f.read_bytes(), RESOLUTION) for f in files(photographs)])
    x = torch.from_numpy(crops.transpose(0, 3, 1, 2)).float() / 127.5 - 1
    with torch.no_grad():
        latent = module.encode(x).latent_dist
    expected = torch.cat([latent.mean, latent.std], dim=1)
    moments = torch.tensor(table.rows(np.arange(10))["moments"])
    error = (moments - expected).norm() / expected.norm()
    assert error < 1e-6 if precision == "fp32" else 1e-6 < error < 0.02


def test_a_flat_val_folder_takes_its_labels_and_classes(photographs, tmp_path):
    lines = []
    for number, file in enumerate(files(photographs)[3:7]):
        name = f"ILSVRC2012_val_{number:08d}.JPEG"
        write(tmp_path / "val" / name, file.read_bytes())
        lines.append(f"{name} {file.parent.name}")
    labels = write(tmp_path / "labels.txt", "\n".join(lines))
    options = {"labels": str(labels), "classes": str(photographs), "split": "val"}
    prepare_images(settings(tmp_path / "val", tmp_path / "out", **options))
    table = LatentDataset(tmp_path / "out", "val")
    assert table.rows(np.arange(4))["label"].tolist() == [0, 0, 1, 1]


def test_a_subset_is_chosen_by_its_seed_and_pixel_latents_are_no_official_folder(
    photographs, tmp_path
):
    images = []
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        prepare_images(settings(photographs, tmp_path / out, subset=4, seed=seed))
        images.append(LatentDataset(tmp_path / out).rows(np.arange(4))["image"])
    assert images[0] == images[1] != images[2]
    config = ExportConfig(data_dir=tmp_path / "a", out=tmp_path / "official")
    refused(lambda: export_folder(config), "an official folder means 1/8 of the side")


def said_by(world, arguments):
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert main(arguments) == 0
    return said.getvalue()


def test_two_processes_write_one_table_and_one_says_so(photographs, tmp_path, ranks):
    out = tmp_path / "out"
    flags = ["--data-dir", photographs, "--out", out, "--resolution", RESOLUTION, "--vae", "none"]
    first, second = ranks(said_by, ["prepare", "images", *map(str, flags)])
    assert first.count("10 rows of 10 images") == 1 and second.strip() == ""
    assert len(LatentDataset(out)) == 10


def test_from_photographs_to_training_by_commands_alone(photographs, tmp_path, capsys):
    out, flags = str(tmp_path / "out"), ["--resolution", str(RESOLUTION), "--vae", "none"]
    assert main(["prepare", "images", "--data-dir", str(photographs), "--out", out, *flags]) == 0
    assert main(["prepare", "images", "--data-dir", "", "--out", out, "--verify"]) == 0
    assert "10 rows, all as they were written" in capsys.readouterr().out
    assert main(["info", out]) == 0
    assert "10 rows, images of 32 pixels" in capsys.readouterr().out
    train = (
        "--model SiT-S/8 --hidden-size 32 --depth 2 --num-heads 2 --encoder-depth 1 "
        "--enc-type none --num-classes 2 --max-train-steps 2 --batch-size 4 --log-every 1 "
        f"--report-to none --exp-name run --sampling-steps 0 --resolution {RESOLUTION}"
    )
    folders = ["--data-dir", out, "--output-dir", str(tmp_path)]
    assert main(["train", *folders, *train.split()]) == 0
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in metrics] == [1, 2]


@pytest.mark.xdist_group("diffusers")
@pytest.mark.parametrize("kind", ("png", "jpeg"))
def test_exported_and_imported_again_it_is_the_same_table(photographs, tmp_path, autoencoder, kind):
    prepare_images(settings(photographs, tmp_path / "a", image=kind, vae=autoencoder[0]))
    folder = tmp_path / "official"
    flags = ["--data-dir", str(tmp_path / "a"), "--out", str(folder)]
    assert main(["prepare", "export-official", *flags]) == 0
    suffix = {"png": "png", "jpeg": "jpg"}[kind]
    assert (folder / f"images/00000/img00000009.{suffix}").exists()
    moments = np.load(folder / "vae-sd/00000/img-mean-std-00000003.npy")
    before = LatentDataset(tmp_path / "a").rows(np.arange(10))
    np.testing.assert_array_equal(moments, before["moments"][3], strict=True)
    labels = json.loads((folder / "vae-sd/dataset.json").read_text())["labels"]
    assert labels[5] == ["00000/img-mean-std-00000005.npy", 1]
    import_folder(ImportConfig(data_dir=folder, out=tmp_path / "b"))
    after = LatentDataset(tmp_path / "b").rows(np.arange(10))
    np.testing.assert_equal(after, before)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"data_dir": "/nowhere"}, "/nowhere.* does not exist"),
        ({"subset": 11}, r"subset of 11 images.* 1\.\.10"),
        ({"labels": "/no/labels.txt"}, "/no/labels.txt"),
        ({"data_dir": "", "verify": True}, "no dataset at"),
    ],
)
def test_wrong_options_are_named(photographs, tmp_path, changes, words):
    config = dataclasses.replace(settings(photographs, tmp_path / "out"), **changes)
    refused(lambda: prepare_images(config), words)
    assert not (tmp_path / "out").exists()
