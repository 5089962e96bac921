"""What is said of a dataset, and its contact sheet: the right numbers, whatever is in it."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from repa_fast.data import dataset
from repa_fast.data.dataset import LatentDataset, Metadata, encode
from repa_fast.data.digits import pixel_metadata
from repa_fast.eval.contents import (
    describe,
    describe_classes,
    describe_latents,
    latent_statistics,
    open_splits,
    spread,
    write_sheet,
)
from repa_fast.eval.info import InfoConfig, info
from tests.refusals import refused

lance = pytest.importorskip("lance")
pa = pytest.importorskip("pyarrow")

METADATA = Metadata(
    resolution=16, latent_shape=(2, 2, 2), vae="some-vae", scale=-0.5, bias=0.25,
    class_names=("ant", "red\n\x1b[31mbee", "", "wasp" * 100),
)  # fmt: skip


def moments(seed: int, shape=(2, 2, 2)) -> np.ndarray:
    mean, std = np.random.default_rng(seed).standard_normal((2, *shape)).astype(np.float32)
    return np.concatenate([mean, np.abs(std)])


def write(path: Path, labels, metadata: Metadata = METADATA, images=None) -> LatentDataset:
    """A table of these labels, each row's moments those of its number."""
    images = images or [b""] * len(labels)
    rows = [
        {"image": image, "moments": moments(row, metadata.latent_shape), "label": label}
        for row, (label, image) in enumerate(zip(labels, images, strict=True))
    ]
    dataset.write(path, rows, metadata)
    return LatentDataset(path)


def test_rows_are_counted_by_class_and_names_are_cut_to_a_line(tmp_path):
    table = write(tmp_path / "train.lance", [0, 3, 1, 1, 0, 0])
    assert table.labels().tolist() == [0, 3, 1, 1, 0, 0]
    head, classes, latents = describe(table, table.labels())
    assert head == (
        f"{table.uri}: dataset of 6 rows, images of 16 pixels, latents (2, 2, 2) of some-vae "
        "(scale -0.5, bias 0.25), 4 classes"
    )
    assert classes == f"rows of each class: ant: 3; red ?[31mbee: 2; 2: 0; {('wasp' * 100)[:60]}: 1"
    assert latents.startswith("latents as the model sees them, over 6 of 6 rows: mean ")


def test_of_many_classes_the_ends_the_median_and_the_empty_ones_are_said():
    names = tuple(f"class {label}" for label in range(25))
    labels = np.repeat(np.arange(20), [7, *[4] * 16, 5, 2, 9])
    text = "rows of a class: 2 (class 18) to 9 (class 19), median 4; 5 of 25 classes have no row"
    assert describe_classes(labels, names) == text
    odd = np.concatenate([labels, [-1, 25]])
    assert describe_classes(odd, names) == f"{text}; 2 rows have a label of no class"
    none = "rows of a class: none of 25 classes has any; 3 rows have a label of no class"
    assert describe_classes(np.array([-1, -1, 99]), names) == none


def test_statistics_are_those_of_what_the_model_sees(tmp_path):
    table = write(tmp_path / "a.lance", [0] * 150)
    mean, deviation, bad = latent_statistics(table)
    noise = np.random.default_rng(1).standard_normal((150, 400, 2, 2, 2))
    of = np.stack([moments(row) for row in range(150)])[:, None]
    seen = (of[:, :, :2] + of[:, :, 2:] * noise) * METADATA.scale + METADATA.bias
    assert bad == [] and mean.shape == deviation.shape == (2,)
    assert mean == pytest.approx(seen.mean((0, 1, 3, 4)), abs=0.01)  # of 240,000 values
    assert deviation == pytest.approx(seen.std((0, 1, 3, 4)), rel=0.01)
    exact = of[:, 0, :2].astype(np.float64).mean((0, 2, 3)) * -0.5 + 0.25
    assert mean == pytest.approx(exact, rel=1e-12)


def test_of_many_rows_two_thousand_are_read_evenly(tmp_path):
    """Of 4,000 every second one, of the value 0; the others are 1."""
    metadata = replace(METADATA, latent_shape=(1, 1, 1), scale=1.0, bias=0.0)
    rows = (
        {"image": b"", "moments": np.float32([row % 2, 3]).reshape(2, 1, 1), "label": 0}
        for row in range(4000)
    )
    dataset.write(tmp_path / "a.lance", rows, metadata)
    text = "over 2000 of 4000 rows: mean 0; standard deviation 3"
    assert describe_latents(LatentDataset(tmp_path / "a.lance")).endswith(text)


def test_bad_rows_are_said_and_change_no_number(tmp_path):
    """A label and a row of moments are null, as `write` refuses them."""
    whole = write(tmp_path / "a.lance", [0, 1, 1]).table.to_table()
    stored = [*whole["moments"].to_pylist()[:2], None]
    columns = {
        "image": whole["image"],
        "moments": pa.array(stored, whole.schema.field("moments").type),
        "label": pa.array([0, None, 1], pa.int64()),
    }
    lance.write_dataset(pa.table(columns, schema=whole.schema), str(tmp_path / "b.lance"))
    table = LatentDataset(tmp_path / "b.lance")
    mean, _, bad = latent_statistics(table)
    expected = moments(0)[:2].astype(np.float64).mean((1, 2)) * -0.5 + 0.25
    assert mean == pytest.approx(expected, rel=1e-12) and len(bad) == 2
    _, classes, latents = describe(table, table.labels())
    assert "; 1 rows have a label of no class" in classes
    assert "over 1 of 3 rows" in latents and "2 more are bad, the first: " in latents
    assert "b.lance row 1: label is -1" in latents


@pytest.mark.parametrize(
    "labels, count, chosen",
    [
        ([2, 0, 0, 0, 1, 0], 4, [0, 0, 1, 2]),
        ([2, 0, 0, 0, 1, 0], 25, [0, 0, 0, 0, 1, 2]),
        (list(range(100)) * 2, 25, list(range(0, 100, 4))),
        ([5] * 50, 25, [5] * 25),
    ],
)
def test_rows_are_spread_over_classes(labels, count, chosen):
    labels = np.array(labels)
    rows = spread(labels, count)
    assert labels[rows].tolist() == chosen and len(set(rows.tolist())) == len(rows)


def flat(level: int, side: int = 16) -> bytes:
    return encode(np.full((side, side, 3), level, np.uint8))


@pytest.mark.parametrize("side", [16, 300])
def test_the_sheet_shows_rows_of_every_class_under_its_name(tmp_path, side):
    """Ten classes, each of a grey level of its own; one image is none."""
    metadata = pixel_metadata(16, tuple("abcdefghij"))
    labels = [*range(10)] * 6
    images = [flat(20 * label, side) for label in labels]
    images[0] = b"no image"
    metadata = replace(metadata, resolution=side)
    table = write(tmp_path / "train.lance", labels, metadata, images)
    out = tmp_path / "new" / "sheet.png"
    text = info(InfoConfig(path=str(tmp_path), sheet=str(out)))
    assert f"24 rows of {table.uri}: {out}; 1 rows are bad, the first: " in text
    with Image.open(out) as image:
        pixels = np.asarray(image)
    tile, above = (128, 14) if side == 16 else (256, 14)
    assert pixels.shape == (5 * (tile + above + 4) - 4, 5 * (tile + 4) - 4, 3)
    centres = pixels[above + tile // 2 :: tile + above + 4, tile // 2 :: tile + 4, 0].reshape(-1)
    expected = np.repeat(np.arange(10) * 20, [2, *[3] * 4, *[2] * 5])
    assert centres[:24].tolist() == expected.tolist()
    assert (pixels[:above, :tile] > 150).any(), "a title"


def test_a_sheet_that_cannot_be_is_refused(tmp_path):
    table = write(tmp_path / "train.lance", [0, 1])
    path, out = str(tmp_path), str(tmp_path / "x.png")
    words = "no image for the sheet: .*row 0: is empty"
    refused(lambda: info(InfoConfig(path=path, sheet=out)), words)
    refused(lambda: info(InfoConfig(path=path, sheet="x.jpg")), "expected the name of a .png file")
    refused(lambda: write_sheet(table, np.array([-1, 9]), Path(out)), "no row has a label")
    refused(lambda: info(InfoConfig(path=str(tmp_path / "none"), sheet=out)), "none does not exist")
    assert not Path(out).exists()


def test_splits_are_those_that_there_are(tmp_path):
    write(tmp_path / "val.lance", [0])
    assert [table.uri for table in open_splits(str(tmp_path))] == [str(tmp_path / "val.lance")]
    write(tmp_path / "train.lance", [0, 1])
    lines = info(InfoConfig(path=str(tmp_path))).splitlines()
    heads = [line.split(",")[0] for line in lines if "dataset of" in line]
    assert heads == [
        f"{tmp_path / 'train.lance'}: dataset of 2 rows",
        f"{tmp_path / 'val.lance'}: dataset of 1 rows",
    ]
    text = info(InfoConfig(path=str(tmp_path / "val.lance")))
    assert text.count("dataset of") == 1
    (tmp_path / "val.lance" / "_versions").rename(tmp_path / "gone")
    for damaged in (tmp_path / "val.lance" / "data").iterdir():
        damaged.write_bytes(b"")
    assert len(open_splits(str(tmp_path))) == 1


def test_an_official_folder_is_described_too(tmp_path):
    listing = []
    for number, label in enumerate((2, 0, 2)):
        latent = tmp_path / "vae-sd" / "00000" / f"img-mean-std-{number:08d}.npy"
        latent.parent.mkdir(parents=True, exist_ok=True)
        np.save(latent, moments(number, (4, 2, 2)))
        image = tmp_path / "images" / "00000" / f"img{number:08d}.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        image.write_bytes(flat(100 * number))
        listing.append([f"00000/{latent.name}", label])
    (tmp_path / "vae-sd" / "dataset.json").write_text(json.dumps({"labels": listing}))
    out = tmp_path / "sheet.png"
    text = info(InfoConfig(path=str(tmp_path), sheet=str(out)))
    assert f"{tmp_path}: dataset of 3 rows, images of 16 pixels" in text
    assert "rows of each class: 0: 1; 1: 0; 2: 2" in text
    of = np.stack([moments(number, (4, 2, 2)) for number in range(3)])[:, :4]
    mean = [f"{value:.3g}" for value in of.mean((0, 2, 3)) * 0.18215]
    assert f"over 3 of 3 rows: mean {', '.join(mean)}; " in text
    with Image.open(out) as image:
        assert np.asarray(image)[80, 64::132, 0].tolist() == [100, 0, 200, 64, 64]


def test_the_bundled_digits_have_their_name(digits_dir, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "digits").symlink_to(digits_dir)
    monkeypatch.chdir(tmp_path)
    lines = info(InfoConfig(path="digits")).splitlines()
    assert lines[0].startswith("data/digits/train.lance: dataset of 1500 rows, images of 16 pixels")
    assert lines[3].startswith("data/digits/val.lance: dataset of 297 rows, images of 16 pixels")
    assert "; 9: 150" in lines[1] and "over 297 of 297 rows: mean -0.3" in lines[5]
