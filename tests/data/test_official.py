import json
import os
import random

import numpy as np
import pytest
import torch

pytest.importorskip("lance")

from repa_fast.data import official
from repa_fast.data.dataset import encode
from repa_fast.data.loader import Loader, read_batch
from repa_fast.data.official import OfficialFolder
from repa_fast.data.open import open_dataset
from repa_fast.data.order import SampleOrder
from repa_fast.prepare.official import ImportConfig, import_folder
from repa_fast.train import run as runs
from repa_fast.train.report import read_metrics
from tests.prepare.writing import write

ROWS = 12
SIDE = 32  # image pixels; latents are 4x4


def moments(number: int) -> np.ndarray:
    return np.random.default_rng(number).normal(size=(8, 4, 4)).astype(np.float32)


def pixels(number: int) -> np.ndarray:
    return np.random.default_rng(100 + number).integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8)


def names(number: int) -> tuple[str, str]:
    folder = f"{number // 5:05d}"
    return f"{folder}/img-mean-std-{number:08d}.npy", f"{folder}/img{number:08d}.png"


def save_npy(path, array) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array)


@pytest.fixture
def root(tmp_path):
    """Twelve samples of three classes, listed in a shuffled order."""
    folder = tmp_path / "imagenet"
    for number in range(ROWS):
        latent, image = names(number)
        save_npy(folder / "vae-sd" / latent, moments(number))
        write(folder / "images" / image, encode(pixels(number)))
    listing = [[names(number)[0], number % 3] for number in range(ROWS)]
    random.Random(0).shuffle(listing)
    write(folder / "vae-sd" / "dataset.json", json.dumps({"labels": listing}).encode())
    return folder


def all_rows(dataset, **options):
    return read_batch(dataset, np.arange(len(dataset)), **options)


def number_of(batch_moments: torch.Tensor) -> int:
    return next(n for n in range(ROWS) if np.array_equal(moments(n), batch_moments.numpy()))


def test_latent_image_and_label_belong_together(root):
    dataset = open_dataset(root)
    assert isinstance(dataset, OfficialFolder) and len(dataset) == ROWS
    batch = all_rows(dataset)
    numbers = [number_of(row) for row in batch["moments"]]
    assert sorted(numbers) == list(range(ROWS)) != numbers
    for number, image, label in zip(numbers, batch["image"], batch["label"], strict=True):
        assert np.array_equal(image.numpy().transpose(1, 2, 0), pixels(number))
        assert label == number % 3


def test_metadata_is_that_of_the_sd_vae(root):
    meta = OfficialFolder(root).metadata
    assert (meta.resolution, meta.latent_shape) == (SIDE, (4, 4, 4))
    assert (meta.scale, meta.bias, meta.vae) == (0.18215, 0.0, "sd-vae-ft-mse")
    assert meta.class_names == ("0", "1", "2")


def test_names_that_sort_differently_are_paired_by_number(root):
    """Sorted by name, this image would meet another latent."""
    image = names(3)[1]
    os.rename(root / "images" / image, root / "images" / "00000" / "zzz00000003.png")
    batch = all_rows(OfficialFolder(root))
    for row, picture in zip(batch["moments"], batch["image"], strict=True):
        assert np.array_equal(picture.numpy().transpose(1, 2, 0), pixels(number_of(row)))


def test_latents_alone_are_enough_without_an_encoder(root):
    os.rename(root / "images", root / "elsewhere")
    dataset = OfficialFolder(root)
    assert "image" not in all_rows(dataset, images=False)
    with pytest.raises(ValueError, match=r"has no images/, .*--enc-type none"):
        all_rows(dataset)


def test_a_leading_axis_of_one_and_npy_images_are_read(root):
    latent, image = names(7)
    save_npy(root / "vae-sd" / latent, moments(7)[None])
    (root / "images" / image).unlink()
    save_npy(root / "images" / image.replace(".png", ".npy"), pixels(7).transpose(2, 0, 1))
    batch = all_rows(OfficialFolder(root))
    index = [number_of(row) for row in batch["moments"]].index(7)
    assert np.array_equal(batch["image"][index].numpy().transpose(1, 2, 0), pixels(7))


@pytest.mark.parametrize(
    "part, message",
    [
        (0, r"1 labels in .*dataset\.json have no counterpart among latents: 00000/00000004"),
        (1, r"1 latents have no counterpart among images: 00000/00000004"),
    ],
)
def test_a_missing_file_is_named(root, part, message):
    (root / ("vae-sd", "images")[part] / names(4)[part]).unlink()
    with pytest.raises(ValueError, match=message):
        OfficialFolder(root)


def test_extra_files_are_named(root):
    write(root / "images" / "00009" / "img00000099.png", encode(pixels(0)))
    with pytest.raises(ValueError, match=r"1 images have no counterpart among latents: 00009/"):
        OfficialFolder(root)
    (root / "images" / "00009" / "img00000099.png").unlink()
    save_npy(root / "vae-sd" / "00009" / "img-mean-std-00000099.npy", moments(0))
    with pytest.raises(ValueError, match=r"1 latents have no counterpart among labels"):
        OfficialFolder(root)


@pytest.mark.parametrize("content", [{"labels": None}, {}])
def test_missing_labels_are_an_error(root, content):
    (root / "vae-sd" / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"dataset\.json has no labels"):
        OfficialFolder(root)


def test_labels_may_lie_beside_the_images(root):
    os.rename(root / "vae-sd" / "dataset.json", root / "images" / "dataset.json")
    assert len(OfficialFolder(root)) == ROWS
    (root / "images" / "dataset.json").unlink()
    with pytest.raises(ValueError, match=r"has no vae-sd/dataset\.json"):
        OfficialFolder(root)


def test_the_walk_happens_once_and_again_when_the_listing_changes(root, monkeypatch):
    walked = []
    walk = official._walk
    monkeypatch.setattr(official, "_walk", lambda *a: walked.append(a[0].name) or walk(*a))
    first = all_rows(OfficialFolder(root))
    assert walked == ["vae-sd", "images"]
    again = all_rows(OfficialFolder(root))
    assert walked == ["vae-sd", "images"]
    assert all(torch.equal(first[name], again[name]) for name in first)
    listing = json.loads((root / "vae-sd" / "dataset.json").read_text())
    listing["labels"] = [[name, 1] for name, _ in listing["labels"]]
    (root / "vae-sd" / "dataset.json").write_text(json.dumps(listing))
    assert set(all_rows(OfficialFolder(root))["label"].tolist()) == {1}
    assert len(walked) == 4


def test_a_folder_that_cannot_be_written_is_cached_at_home(root, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (root / official.CACHE_NAME).mkdir()  # nothing can take this name
    assert len(OfficialFolder(root)) == ROWS
    assert len(list((tmp_path / "home" / ".cache" / "repa-fast").iterdir())) == 1
    monkeypatch.setattr(official, "_walk", None)
    assert len(OfficialFolder(root)) == ROWS


BAD = {
    "image": (lambda root: write(root / "images" / names(4)[1], b"no image"), "cannot be decoded"),
    "size": (
        lambda root: write(root / "images" / names(4)[1], encode(pixels(4)[:16])),
        "is 32x16, expected 32x32",
    ),
    "latent": (lambda root: write(root / "vae-sd" / names(4)[0], b"no array"), "not a .npy array"),
    "shape": (
        lambda root: save_npy(root / "vae-sd" / names(4)[0], np.zeros((8, 2, 2), np.float32)),
        r"\(8, 2, 2\), expected \(8, 4, 4\)",
    ),
    "nan": (
        lambda root: save_npy(root / "vae-sd" / names(4)[0], moments(4) * np.nan),
        "moments are not finite",
    ),
    "gone": (lambda root: (root / "images" / names(4)[1]).unlink(), "cannot be read"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_samples_are_named_or_replaced_and_counted(root, kind):
    dataset = OfficialFolder(root)
    good = all_rows(dataset)
    index = [number_of(row) for row in good["moments"]].index(4)
    harm, message = BAD[kind]
    harm(root)
    with pytest.raises(ValueError, match=rf"0000004\..*{message}"):
        all_rows(dataset)
    skipped = []
    batch = all_rows(dataset, skipped=skipped)
    assert len(skipped) == 1 and "00000004" in skipped[0]
    expected = list(range(ROWS))
    expected[index] = (index + 1) % ROWS
    assert batch["index"].tolist() == expected
    assert torch.equal(batch["moments"], good["moments"][expected])


def test_replacement_is_a_function_of_the_row(root):
    dataset = OfficialFolder(root)
    numbers = [number_of(row) for row in all_rows(dataset)["moments"]]
    for index in (2, 3):
        write(root / "vae-sd" / names(numbers[index])[0], b"")
    for indices in ([2], [2, 3], [5, 2]):
        batch = read_batch(dataset, np.array(indices), skipped=[])
        assert batch["index"][indices.index(2)] == 4


def test_a_folder_with_no_good_row_is_an_error_even_when_skipping(root):
    dataset = OfficialFolder(root)
    for number in range(ROWS):
        write(root / "vae-sd" / names(number)[0], b"")
    with pytest.raises(ValueError, match="has no good row"):
        read_batch(dataset, np.array([0]), skipped=[])


def test_imported_twin_gives_the_same_batches(root, tmp_path):
    out = import_folder(ImportConfig(data_dir=root, out=tmp_path / "native"))
    ours, twin = OfficialFolder(root), open_dataset(out)
    assert twin.metadata == ours.metadata
    order = SampleOrder(ROWS, 4, seed=0)
    with (
        Loader(ours, order, start=0, stop=6, num_workers=3) as a,
        Loader(twin, order, start=0, stop=6, num_workers=3) as b,
    ):
        pairs = list(zip(a, b, strict=True))
    assert len(pairs) == 6
    for x, y in pairs:
        assert x.keys() == y.keys()
        assert all(torch.equal(x[name], y[name]) for name in x)
    stored = twin.rows(np.arange(ROWS))["image"]
    assert stored == [ours.image_bytes(index) for index in range(ROWS)]


def test_import_leaves_nothing_behind_when_a_file_is_bad(root, tmp_path):
    write(root / "vae-sd" / names(11)[0], b"")
    with pytest.raises(ValueError, match="00000011"):
        import_folder(ImportConfig(data_dir=root, out=tmp_path / "native"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["imagenet"]


def test_import_without_images(root, tmp_path):
    out = import_folder(ImportConfig(data_dir=root, out=tmp_path / "native", images=False))
    twin = open_dataset(out)
    assert twin.rows(np.arange(2))["image"] == [b"", b""]
    assert torch.equal(
        all_rows(twin, images=False)["moments"], all_rows(OfficialFolder(root))["moments"]
    )


@pytest.mark.parametrize("on_bad_sample", ["error", "skip"])
def test_a_run_on_an_official_folder(root, tmp_path, on_bad_sample):
    from repa_fast.configs.config import TrainConfig

    config = TrainConfig(
        exp_name="run",
        output_dir=str(tmp_path),
        data_dir=str(root),
        resolution=SIDE,
        num_classes=3,
        model="SiT-S/2",
        hidden_size=16,
        depth=1,
        num_heads=2,
        enc_type="none",
        batch_size=4,
        max_train_steps=3,
        log_every=3,
        sampling_steps=0,
        report_to="none",
        on_bad_sample=on_bad_sample,
    )
    OfficialFolder(root)
    write(root / "vae-sd" / names(4)[0], b"")
    if on_bad_sample == "error":
        with pytest.raises(ValueError, match="00000004"):
            runs.train(config)
        return
    run = runs.train(config)
    assert read_metrics(run / "metrics.jsonl")[-1]["bad_samples"] == 1
