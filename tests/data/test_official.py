"""Folders as the official code has them: latents and images in files, labels in a list."""

import json
import os
import random
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("lance")

from repa_fast.configs.config import TrainConfig
from repa_fast.data import dataset as dataset_of
from repa_fast.data import official
from repa_fast.data.dataset import Metadata, encode
from repa_fast.data.loader import Loader, read_batch
from repa_fast.data.official import OfficialFolder
from repa_fast.data.open import open_dataset
from repa_fast.data.order import SampleOrder
from repa_fast.prepare.official import ExportConfig, ImportConfig, export_folder, import_folder
from repa_fast.train import run as runs
from repa_fast.train.report import read_metrics
from tests.data.encoding import assert_equal_batches
from tests.data.encoding import encode as saved
from tests.prepare.writing import rgb, write
from tests.refusals import refused

ROWS = 12
SIDE = 32  # image pixels; latents are 4x4
LISTING = Path("vae-sd/dataset.json")


def moments(number: int) -> np.ndarray:
    mean, deviation = np.random.default_rng(number).normal(size=(2, 4, 4, 4)).astype(np.float32)
    return np.concatenate([mean, np.abs(deviation)])


def pixels(number: int) -> np.ndarray:
    return rgb(SIDE, SIDE, seed=100 + number)


def latent_of(root: Path, number: int) -> Path:
    return root / "vae-sd" / f"{number // 5:05d}/img-mean-std-{number:08d}.npy"


def image_of(root: Path, number: int, suffix: str = "png") -> Path:
    return root / "images" / f"{number // 5:05d}/img{number:08d}.{suffix}"


def save_npy(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array)


def piped(path: Path) -> None:
    """Put a pipe in its place that nobody writes to."""
    path.unlink()
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.unlink()
    os.symlink("/dev/zero", path)


@pytest.fixture
def root(tmp_path):
    """Twelve samples of three classes, listed in a shuffled order."""
    folder, listing = tmp_path / "imagenet", []
    for number in range(ROWS):
        latent = latent_of(folder, number)
        save_npy(latent, moments(number))
        write(image_of(folder, number), encode(pixels(number)))
        listing.append([str(latent.relative_to(folder / "vae-sd")), number % 3])
    random.Random(0).shuffle(listing)
    write(folder / LISTING, json.dumps({"labels": listing}))
    return folder


def all_rows(dataset, **options):
    return read_batch(dataset, np.arange(len(dataset)), **options)


def number_of(batch_moments: torch.Tensor) -> int:
    return next(n for n in range(ROWS) if np.array_equal(moments(n), batch_moments.numpy()))


def assert_belong_together(batch) -> None:
    numbers = [number_of(row) for row in batch["moments"]]
    for number, image, label in zip(numbers, batch["image"], batch["label"], strict=True):
        assert np.array_equal(image.numpy().transpose(1, 2, 0), pixels(number))
        assert label == number % 3
    assert sorted(numbers) == list(range(ROWS)) != numbers


def test_latent_image_and_label_belong_together(root):
    dataset = open_dataset(root)
    assert isinstance(dataset, OfficialFolder) and len(dataset) == ROWS
    assert_belong_together(all_rows(dataset))
    assert dataset.metadata == Metadata(
        resolution=SIDE, latent_shape=(4, 4, 4), vae="sd-vae-ft-mse", scale=0.18215, bias=0.0,
        class_names=("0", "1", "2"),
    )  # fmt: skip


def test_names_that_sort_differently_are_paired_by_number(root):
    """Sorted by name, this image would meet another latent; the labels lie beside the images."""
    os.rename(image_of(root, 3), root / "images" / "00000" / "zzz00000003.png")
    os.rename(root / LISTING, root / "images" / "dataset.json")
    assert_belong_together(all_rows(OfficialFolder(root)))


def test_names_may_have_any_letters(root, tmp_path):
    for kind in ("vae-sd", "images"):
        os.rename(root / kind / "00000", root / kind / "é")
    os.rename(image_of(root, 7), root / "images" / "00001" / "猫00000007.png")
    write(root / LISTING, (root / LISTING).read_text().replace("00000/", "\\u00e9/"))
    os.rename(root, tmp_path / "ñ")
    for _ in ("paired", "cached"):
        assert_belong_together(all_rows(OfficialFolder(tmp_path / "ñ")))


def test_latents_alone_are_enough_without_an_encoder(root):
    os.rename(root / "images", root / "elsewhere")
    dataset = OfficialFolder(root)
    assert "image" not in all_rows(dataset, images=False)
    refused(lambda: all_rows(dataset), r"has no images/, .*--enc-type none")


def test_a_leading_axis_of_one_and_npy_images_are_read(root):
    save_npy(latent_of(root, 7), moments(7)[None])
    image_of(root, 7).unlink()
    save_npy(image_of(root, 7, "npy"), pixels(7).transpose(2, 0, 1))
    assert_belong_together(all_rows(OfficialFolder(root)))


LABELS_LACK = r"1 labels in .*dataset\.json have no counterpart among latents: 00000/00000004"
LATENTS_LACK = "1 latents have no counterpart among"
MISMATCHES = [
    (lambda root: latent_of(root, 4).unlink(), LABELS_LACK),
    (lambda root: image_of(root, 4).unlink(), f"{LATENTS_LACK} images: 00000/00000004"),
    (lambda root: save_npy(latent_of(root, 99), moments(0)), f"{LATENTS_LACK} labels"),
    (lambda root: write(image_of(root, 99)), "1 images have no counterpart among latents: 00019/"),
    (lambda root: (root / LISTING).unlink(), r"has no vae-sd/dataset\.json"),
    (lambda root: piped(root / LISTING), r"has no vae-sd/dataset\.json, expected the labels"),
    (lambda root: endless(root / LISTING), r"has no vae-sd/dataset\.json, expected the labels"),
    (lambda root: save_npy(root / "vae-sd/a\n\x1b/x1.npy", moments(0)), r"labels .*: a \?/1$"),
]


@pytest.mark.parametrize("harm, words", MISMATCHES, ids=[words for _, words in MISMATCHES])
def test_files_and_labels_that_do_not_match_are_named(root, harm, words):
    harm(root)
    refused(lambda: OfficialFolder(root), words)


PAIR = r"expected \[name, class\] with an integer class"
NAME = "00000/img-mean-std-00000004.npy"
LISTINGS = [
    (b"", "Expecting value"),
    (b"\xff{", "'utf-8' codec can't decode"),
    (b"[" * 100_000, "recursion"),
    *[(text, "has no labels, expected a list") for text in (
        b"{}", b"null", b"[]", b'"labels"', b'{"labels": null}', b'{"labels": []}',
        b'{"labels": {"a.npy": 3}}', b'{"labels": "a.npy"}', b'{"labels": 3}',
    )],
    *[(json.dumps({"labels": [item]}).encode(), PAIR) for item in (
        None, NAME, 3, [], [NAME], [NAME, 1, 2], [3, NAME], [[NAME, 1]], {NAME: 1}, [NAME, "1"],
        [NAME, 0.5], [NAME, None], [NAME, True], [NAME, [0, 1]],
    )],
    (json.dumps({"labels": [[NAME, -1]]}).encode(), r"label of '0.*' is -1, expected 0\.\.1000000"),
    (json.dumps({"labels": [[NAME, 10**12]]}).encode(), "is 1000000000000, expected 0"),
    (json.dumps({"labels": [[NAME, 1]] * 2}).encode(), "lists 2 names, 1 of them different"),
    (json.dumps({"labels": [["a\nb", 1]]}).encode(), r"'a.nb' has no number"),
]  # fmt: skip


def test_a_listing_that_is_none_is_refused_by_name(root):
    for text, words in LISTINGS:
        write(root / LISTING, text)
        refused(lambda: OfficialFolder(root), r"vae-sd/dataset\.json", words)


def spoiled(cache: Path, **changes) -> None:
    """Rewrite the cached index with other arrays; None leaves one out."""
    with np.load(cache) as stored:
        arrays = dict(stored) | changes
    np.savez(cache, **{name: array for name, array in arrays.items() if array is not None})


def test_a_cached_index_that_is_none_is_made_anew(root, monkeypatch):
    """And never unpickled: what lies in the folder may be a stranger's."""
    first, cache, paired = all_rows(OfficialFolder(root)), root / official.CACHE_NAME, []
    pair, whole = official.pair, cache.read_bytes()
    monkeypatch.setattr(official, "pair", lambda *given: paired.append(0) or pair(*given))
    harms = [partial(Path.write_bytes, data=data) for data in (b"", b"x", whole[:300], whole[:-9])]
    harms += [partial(spoiled, **{name: None}) for name in ("state", "latents", "images", "labels")]
    harms += [lambda path: np.savez_compressed(path, **dict(np.load(path)))]
    harms += [
        partial(spoiled, **changes)
        for changes in (
            {"latents": np.array([Path("x")] * ROWS, dtype=object)},
            {"labels": np.arange(ROWS - 1)},
            {"labels": np.full(ROWS, 10**12)},
            {"labels": np.zeros(ROWS)},
            {"images": np.array([b"a"])},
            {"latents": np.array([b"a"])[0]},
        )
    ]
    for number, harm in enumerate(harms, 1):
        harm(cache)
        again = all_rows(OfficialFolder(root))
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert len(paired) == number
    assert len(OfficialFolder(root)) == ROWS and len(paired) == len(harms)


def test_an_array_that_is_no_image_is_named_whoever_asks(root):
    image_of(root, 4).unlink()
    path = image_of(root, 4, "npy")
    save_npy(path, np.asfortranarray(pixels(4).transpose(2, 0, 1)))
    dataset = OfficialFolder(root)
    assert_belong_together(all_rows(dataset))
    index = [number_of(row) for row in all_rows(dataset)["moments"]].index(4)
    for array in (pixels(4), pixels(4).transpose(2, 0, 1).astype(np.uint16), moments(4)[0]):
        save_npy(path, array)
        for read in (dataset.image_bytes, lambda index: dataset.decode((index, True))):
            refused(partial(read, index), r"00000004\.npy: .*, expected uint8 \(3, 32, 32\)")


def test_the_walk_happens_once_and_again_when_the_listing_changes(root, monkeypatch):
    walked = []
    walk = official._walk
    monkeypatch.setattr(official, "_walk", lambda *a: walked.append(a[0].name) or walk(*a))
    first, again = all_rows(OfficialFolder(root)), all_rows(OfficialFolder(root))
    assert walked == ["vae-sd", "images"]
    assert all(torch.equal(first[name], again[name]) for name in first)
    listing = json.loads((root / LISTING).read_text())["labels"]
    write(root / LISTING, json.dumps({"labels": [[name, 1] for name, _ in listing]}))
    assert set(all_rows(OfficialFolder(root))["label"].tolist()) == {1}
    assert len(walked) == 4


def test_a_folder_that_cannot_be_written_is_cached_at_home(root, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (root / official.CACHE_NAME).mkdir()  # nothing can take this name
    assert len(OfficialFolder(root)) == ROWS
    assert len(list((tmp_path / "home" / ".cache" / "repa-fast").iterdir())) == 1
    monkeypatch.setattr(official, "_walk", None)
    assert len(OfficialFolder(root)) == ROWS


def header(shape: str, end: str = "}") -> bytes:
    """An array's file without the array."""
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, {end}".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


BAD = [  # image, what becomes of it, and what is said
    (True, lambda path: write(path, b"no image"), "is not an image"),
    (True, lambda path: write(path, encode(pixels(4))[:90]), "cannot be decoded"),
    (True, lambda path: write(path, encode(pixels(4)[:16])), "is 32x16, expected 32x32"),
    (True, Path.unlink, "cannot be read"),
    *[(image, harm, "is not a regular file") for image in (0, 1) for harm in (piped, endless)],
    (False, lambda path: write(path, b"no array"), "not a .npy array"),
    (False, lambda path: save_npy(path, moments(4)[:, :2, :2]), r"\(8, 2, 2\), .* \(8, 4, 4\)"),
    (False, lambda path: save_npy(path, moments(4) * np.nan), "moments are not finite"),
    (False, lambda path: save_npy(path, -moments(4)), "a standard deviation is below 0"),
    (False, lambda path: save_npy(path, moments(4).astype(complex)), "moments are complex128"),
    (False, lambda path: save_npy(path, moments(4).astype(str)), r"moments are <U\d+ .*float32"),
    (False, lambda path: save_npy(path, moments(4)[:0]), r"float32 \(0, 4, 4\), .* \(2C, h, w\)"),
    (False, lambda path: np.save(path, [{}], allow_pickle=True), "not a .npy array .Object"),
    (False, lambda path: write(path, header("(8, 4, 10**15)", "")), "not a .npy array"),
    (False, lambda path: write(path, header("(8, 4, 9000000000000)")), "not a .npy array"),
    (False, lambda path: write(path, header("()" + " " * 20000)), "not a .npy array .Header"),
    (False, lambda path: write(path, b"PK\x03\x04" + bytes(99)), "not a .npy array .the magic"),
]


@pytest.mark.parametrize(
    "image, harm, words", BAD, ids=[f"{kind}-{words}" for kind, _, words in BAD]
)
def test_bad_samples_are_named_or_replaced_and_counted(root, image, harm, words):
    dataset = OfficialFolder(root)
    good = all_rows(dataset)
    index = [number_of(row) for row in good["moments"]].index(4)
    harm((image_of if image else latent_of)(root, 4))
    refused(lambda: all_rows(dataset), rf"0000004\..*{words}")
    skipped = []
    batch = all_rows(dataset, skipped=skipped)
    assert len(skipped) == 1 and "00000004" in skipped[0]
    expected = list(range(ROWS))
    expected[index] = (index + 1) % ROWS
    assert batch["index"].tolist() == expected
    assert torch.equal(batch["moments"], good["moments"][expected])


def test_replacement_is_a_function_of_the_row_and_a_folder_without_a_good_one_is_refused(root):
    dataset = OfficialFolder(root)
    numbers = [number_of(row) for row in all_rows(dataset)["moments"]]
    for index in (2, 3):
        write(latent_of(root, numbers[index]), b"")
    for indices in ([2], [2, 3], [5, 2]):
        batch = read_batch(dataset, np.array(indices), skipped=[])
        assert batch["index"][indices.index(2)] == 4
    for number in range(ROWS):
        write(latent_of(root, number), b"")
    refused(lambda: read_batch(dataset, np.array([0]), skipped=[]), "has no good row")


def test_imported_twin_gives_the_same_batches(root, tmp_path):
    out = import_folder(ImportConfig(data_dir=root, out=tmp_path / "native"))
    ours, twin = OfficialFolder(root), open_dataset(out)
    assert twin.metadata == ours.metadata
    batches = []
    for dataset in (ours, twin):
        order = SampleOrder(ROWS, 4, seed=0)
        with Loader(dataset, order, start=0, stop=6, num_workers=3) as loader:
            batches.append(list(loader))
    for x, y in zip(*batches, strict=True):
        assert_equal_batches(x, y)
    assert len(batches[0]) == 6
    stored = twin.rows(np.arange(ROWS))["image"]
    assert stored == [ours.image_bytes(index) for index in range(ROWS)]


def test_import_without_images_and_nothing_is_left_behind_when_a_file_is_bad(root, tmp_path):
    config = ImportConfig(data_dir=root, out=tmp_path / "native", images=False)
    twin = open_dataset(import_folder(config))
    assert twin.rows(np.arange(2))["image"] == [b"", b""]
    of_twin, of_folder = (all_rows(of, images=False) for of in (twin, OfficialFolder(root)))
    assert torch.equal(of_twin["moments"], of_folder["moments"])
    write(latent_of(root, 11), b"")
    refused(lambda: import_folder(replace(config, out=tmp_path / "bad")), "00000011")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["imagenet", "native"]


def exported(folder: Path, *rows: dict) -> Path:
    """What becomes of a table with good rows but for what is given."""
    good = {"image": encode(pixels(0)), "moments": moments(0), "label": 0}
    latents = {"resolution": SIDE, "latent_shape": (4, 4, 4), "vae": "sd-vae-ft-mse"}
    metadata = Metadata(**latents, scale=0.18215, bias=0.0, class_names=("a", "b"))
    made = [good, *[good | row for row in rows]]
    # as a stranger's table, which nobody has checked
    batch = dataset_of.record_batch(made, dataset_of.schema(metadata))
    pytest.importorskip("lance").write_dataset(
        pytest.importorskip("pyarrow").Table.from_batches([batch]), str(folder / "train.lance")
    )
    return export_folder(ExportConfig(data_dir=folder, out=folder / "official"))


def test_an_exported_table_comes_back_and_images_are_called_by_their_format(tmp_path):
    jpeg = saved(Image.fromarray(pixels(2)), "JPEG")
    out = exported(tmp_path, {"moments": moments(1), "label": 1}, {"image": jpeg})
    assert [path.suffix for path in sorted(out.glob("images/*/*"))] == [".png", ".png", ".jpg"]
    back = open_dataset(import_folder(ImportConfig(data_dir=out, out=tmp_path / "back")))
    stored, again = (of.rows(np.arange(3)) for of in (open_dataset(tmp_path), back))
    np.testing.assert_equal(again, stored)


BAD_ROWS = [
    ({"label": None}, r"label is -1, expected 0\.\.1"),
    ({"label": 7}, r"label is 7, expected 0\.\.1"),
    ({"moments": moments(0) * np.nan}, "moments are not finite"),
    ({"moments": -moments(0)}, "a standard deviation is below 0"),
    ({"image": b"MZ no image"}, "is not an image"),
    ({"image": None}, "some rows have an image, expected all or none"),
    ({"image": encode(pixels(0)[:16, :16])}, "is 16x16, expected 32x32"),
    ({"image": saved(Image.fromarray(pixels(0)), "GIF")}, "image is GIF, expected PNG or JPEG"),
]


@pytest.mark.parametrize("changes, words", BAD_ROWS, ids=[words for _, words in BAD_ROWS])
def test_a_bad_row_is_not_exported_and_nothing_is_left(tmp_path, changes, words):
    refused(lambda: exported(tmp_path, {}, changes), f"train.lance row 2: .*{words}")
    assert os.listdir(tmp_path) == ["train.lance"]


@pytest.mark.parametrize("on_bad_sample", ["error", "skip"])
def test_a_run_on_an_official_folder(root, tmp_path, on_bad_sample):
    config = TrainConfig(
        exp_name="run", output_dir=str(tmp_path), data_dir=str(root), resolution=SIDE,
        num_classes=3, model="SiT-S/2", hidden_size=16, depth=1, num_heads=2, enc_type="none",
        batch_size=4, max_train_steps=3, log_every=3, sampling_steps=0, report_to="none",
        on_bad_sample=on_bad_sample,
    )  # fmt: skip
    OfficialFolder(root)
    write(latent_of(root, 4), b"")
    if on_bad_sample == "error":
        refused(lambda: runs.train(config), "00000004")
        return
    run = runs.train(config)
    assert read_metrics(run / "metrics.jsonl")[-1]["bad_samples"] == 1
