"""Images come back untouched, with the right label and in the right order, from every kind."""

import json
import os
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from repa_fast.prepare.sources import Item, Source, Subset, huggingface, open_source
from tests.data.encoding import encode
from tests.prepare.writing import tar, write
from tests.refusals import refused

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

WNIDS = ("n01440764", "n01443537", "n01484850")
NAMES = [f"{WNIDS[n % 3]}_{n}.JPEG" for n in range(12)]
LABELS = [2, 0, 1, 1, 0, 2, 2, 2, 0, 1, 0, 0]
SHARDS = ((1, range(7, 12)), (0, range(7)))


def image(number: int) -> bytes:
    return encode(Image.new("RGB", (6 + number, 9), (20 * number, 7, 9)), "JPEG")


IN_ORDER = [(image(n), n % 3) for n in range(12)]
LABELLED = [(image(n), label) for n, label in enumerate(LABELS)]


def items(source: Source) -> list[Item]:
    return [source.read(index) for index in range(len(source))]


def names(source: Source) -> list[str]:
    return [item.name for item in items(source)]


def labels_of(source: Source) -> list[int]:
    return [item.label for item in items(source)]


def content(source: Source) -> list[tuple[bytes, int]]:
    return [(item.data, item.label) for item in items(source)]


# Class folders


def save_tree(folder: Path) -> Path:
    for number, name in reversed(list(enumerate(NAMES))):
        write(folder / WNIDS[number % 3] / name, image(number))
    return folder


@pytest.fixture
def tree(tmp_path):
    return save_tree(tmp_path / "train")


def test_labels_are_the_positions_of_the_sorted_folders_as_in_torchvision(tree):
    source = open_source(tree)
    assert source.class_names == WNIDS
    expected = [Item(f"{WNIDS[n % 3]}/{name}", image(n), n % 3) for n, name in enumerate(NAMES)]
    assert items(source) == sorted(expected, key=lambda item: item.name)
    datasets = pytest.importorskip("torchvision.datasets")
    theirs = datasets.ImageFolder(str(tree)).samples
    assert [(str(tree / item.name), item.label) for item in items(source)] == theirs


def test_every_suffix_in_any_case_at_any_depth(tmp_path):
    found = ["a.jpg", "b.JPEG", "c.Png", "d-1.jpg", "d/e.webp", "d/f/g.BMP"]
    for name in [*found, "notes.txt", "h.gif", ".hidden.jpg", "._a.jpg", ".DS_Store"]:
        write(tmp_path / "dog" / name, name)
    write(tmp_path / ".git" / "x.jpg")
    write(tmp_path / "README.md")
    source = open_source(tmp_path)
    assert names(source) == [f"dog/{name}" for name in found] and source.class_names == ("dog",)


def test_links_to_folders_and_files_are_followed(tree, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    os.rename(tree / WNIDS[1], elsewhere)
    os.symlink(elsewhere, tree / WNIDS[1])
    os.symlink(elsewhere / NAMES[1], tree / WNIDS[0] / "zzz.jpg")
    source = open_source(tree)
    assert len(source) == 13
    assert content(source)[4:6] == [(image(1), 0), (image(1), 1)]


def test_a_tree_of_some_classes_keeps_their_labels(tree, tmp_path):
    os.rename(tree / WNIDS[0], tmp_path / "gone")
    assert set(labels_of(open_source(tree))) == {0, 1}
    source = open_source(tree, classes=WNIDS)
    assert set(labels_of(source)) == {1, 2} and source.class_names == WNIDS


def test_opening_a_tree_asks_no_status_of_its_files(tree, monkeypatch):
    asked = []
    stat = os.stat
    monkeypatch.setattr(os, "stat", lambda path, **k: asked.append(str(path)) or stat(path, **k))
    assert len(open_source(tree, kind="imagefolder")) == 12
    assert asked and not [path for path in asked if path.endswith(".JPEG")]


# Flat folders


@pytest.fixture
def flat(tmp_path):
    for number in range(12):
        write(tmp_path / "val" / f"ILSVRC2012_val_{number + 1:08d}.JPEG", image(number))
    return tmp_path / "val"


def lines(form: str) -> list[str]:
    return [
        form.format(name=f"ILSVRC2012_val_{n + 1:08d}.JPEG", label=label, wnid=WNIDS[label])
        for n, label in enumerate(LABELS)
    ]


def test_a_map_of_numbers_in_any_order_or_one_number_a_line(flat, tmp_path):
    labels = write(tmp_path / "val.txt", "\n".join(reversed(lines("{name} {label}"))) + "\n\n")
    source = open_source(flat, labels=labels)
    assert content(source) == LABELLED and source.class_names == ("0", "1", "2")
    assert items(source)[3].name == "ILSVRC2012_val_00000004.JPEG"
    assert open_source(flat, "flat", labels, WNIDS).class_names == WNIDS
    labels = write(tmp_path / "val.txt", "\n".join(lines("{label}")) + "\n")
    assert labels_of(open_source(flat, labels=labels)) == LABELS


def in_folders(folder: Path) -> Path:
    for wnid in WNIDS:
        (folder / "train" / wnid).mkdir(parents=True)
    return folder / "train"


def in_a_file(folder: Path) -> Path:
    words = ("tench, Tinca tinca", "goldfish", "great white shark")
    text = "\n".join(f"{wnid} {word}" for wnid, word in zip(WNIDS, words))
    return write(folder / "synset_words.txt", text)


@pytest.mark.parametrize("form", ["{name} {wnid}", "{wnid}"])
@pytest.mark.parametrize("classes", [lambda folder: WNIDS, in_a_file, in_folders])
def test_wnids_are_looked_up_in_the_classes(flat, tmp_path, form, classes):
    labels = write(tmp_path / "val.txt", "\r\n".join(lines(form)))
    source = open_source(flat, labels=labels, classes=classes(tmp_path))
    assert labels_of(source) == LABELS and source.class_names == WNIDS


def test_the_devkits_ids_become_positions_of_sorted_wnids(flat, tmp_path):
    """Ids 1, 2, 3 are the last, the first and the middle wnid; 4 is a parent."""
    scipy_io = pytest.importorskip("scipy.io")
    kinds = [("ILSVRC2012_ID", "i4"), ("WNID", "O"), ("num_children", "i4")]
    rows = [(1, WNIDS[2], 0), (2, WNIDS[0], 0), (3, WNIDS[1], 0), (4, "n99999999", 3)]
    ids = [{2: 1, 0: 2, 1: 3}[label] for label in LABELS]
    truth = tmp_path / "devkit" / "data" / "ILSVRC2012_validation_ground_truth.txt"
    write(truth, "".join(f"{number}\n" for number in ids))
    scipy_io.savemat(truth.with_name("meta.mat"), {"synsets": np.array(rows, dtype=kinds)})
    source = open_source(flat, labels=truth)
    assert labels_of(source) == LABELS and source.class_names == WNIDS
    write(truth, "4\n" * 12)
    words = r"line 1: label is '4', expected an id of .*meta\.mat"
    refused(lambda: open_source(flat, labels=truth), words)


# Tables


def table(numbers: range, named: bool = True, struct: bool = True) -> "pa.Table":
    data = [image(number) for number in numbers]
    if struct:
        data = [{"bytes": d, "path": NAMES[n]} for n, d in zip(numbers, data)]
    labels = pa.array([number % 3 for number in numbers], pa.int64())
    made = pa.table({"image": pa.array(data), "label": labels})
    features = {"label": {"names": list(WNIDS), "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return made.replace_schema_metadata(metadata) if named else made


def save_shards(folder: Path, kind: str = "parquet", **options) -> Path:
    folder.mkdir(exist_ok=True)
    for shard, numbers in SHARDS:
        made, name = table(numbers, **options), f"train-{shard:05d}-of-00002"
        if kind == "parquet":
            parquet.write_table(made, folder / f"{name}.parquet", row_group_size=3)
            continue
        opened = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
        with opened(str(folder / f"{name}.arrow"), made.schema) as writer:
            writer.write_table(made, max_chunksize=2)
    return folder


@pytest.mark.parametrize("kind", ["parquet", "stream", "file"])
@pytest.mark.parametrize("struct", [True, False])
def test_a_hugging_face_dataset(tmp_path, kind, struct):
    source = open_source(save_shards(tmp_path, kind, struct=struct))
    assert content(source) == IN_ORDER and source.class_names == WNIDS
    suffix = "parquet" if kind == "parquet" else "arrow"
    assert source.read(8).name == f"train-00001-of-00002.{suffix}:1"


def test_images_are_read_by_row_group_once_and_only_when_needed(tmp_path, monkeypatch):
    read, read_group = [], huggingface._Parquet.read_group

    def slow(*arguments):
        read.append(arguments[1])
        time.sleep(0.05)
        return read_group(*arguments)

    monkeypatch.setattr(huggingface._Parquet, "read_group", slow)
    source = open_source(save_shards(tmp_path))
    assert read == []
    items(source)
    assert read == [0, 1, 2, 0, 1]
    read.clear()
    wanted = [0, 1, 2, 0, 1, 2, 0, 1]
    with ThreadPoolExecutor(8) as pool:
        got = [item.data for item in pool.map(open_source(tmp_path).read, wanted)]
    assert got == [image(index) for index in wanted] and read == [0]


def test_a_repository_with_its_files_in_data_without_class_names_and_a_pattern_for_the_split(
    tmp_path,
):
    folder = save_shards(tmp_path / "data", named=False)
    assert len(open_source(tmp_path)) == 12
    assert open_source(tmp_path).class_names == ("0", "1", "2")
    assert open_source(tmp_path, classes=WNIDS).class_names == WNIDS
    parquet.write_table(table(range(3)), folder / "validation-00000-of-00001.parquet")
    words = r"2 splits \(train, validation\), expected one; .*train\*"
    refused(lambda: open_source(tmp_path), words)
    assert len(open_source(folder / "train-*")) == 12
    assert len(open_source(folder / "validation-00000-of-00001.parquet")) == 3


# Tars


LABEL_MEMBERS = {
    "cls": lambda n: ("cls", f"{n % 3}\n".encode()),
    "json": lambda n: ("json", json.dumps({"label": n % 3, "width": 5}).encode()),
    "wnid": lambda n: ("cls", WNIDS[n % 3].encode()),
}


def save_tars(folder: Path, style: str = "cls", **options) -> Path:
    for shard, numbers in SHARDS:
        members = []
        for number in numbers:
            suffix, label = LABEL_MEMBERS[style](number)
            sample = [(f"{number:04d}.jpg", image(number)), (f"{number:04d}.{suffix}", label)]
            members += sample if number % 2 else sample[::-1]
        tar(folder / f"train-{shard:06d}.tar", members, **options)
    return folder


@pytest.mark.parametrize("style", LABEL_MEMBERS)
@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_webdataset_shards(tmp_path, style, form):
    source = open_source(save_tars(tmp_path, style, format=form), classes=WNIDS)
    assert content(source) == IN_ORDER and source.class_names == WNIDS
    assert source.read(8).name == "train-000001.tar/0008.jpg"


def test_long_names_and_other_members_of_a_sample(tmp_path):
    key = "folder/" + "x" * 150 + "é"
    members = {f"{key}.jpg": image(1), f"{key}.json": b'{"caption": "a fish"}', f"{key}.cls": b"0"}
    members |= {"folder": b"", f"{key}.txt": b"a fish", "._hidden.jpg": b"no image", "a.md": b""}
    source = open_source(tar(tmp_path / "a.tar", members))
    assert [(item.name, item.data) for item in items(source)] == [(f"a.tar/{key}.jpg", image(1))]


def test_keys_may_repeat_in_other_folders_and_other_shards(tmp_path):
    members = [(f"{folder}/1.{kind}", b"0") for kind in ("jpg", "cls") for folder in "ab"]
    for shard in "01":
        tar(tmp_path / f"{shard}.tar", members)
    expected = [f"{shard}.tar/{folder}/1.jpg" for shard in "01" for folder in "ab"]
    assert names(open_source(tmp_path)) == expected


# All kinds


def save_flat(folder: Path) -> Path:
    """With dataset.json, in another order."""
    pairs = [[f"{n // 5:05d}/img{n:08d}.png", n % 3] for n in range(12)]
    for number, (name, _) in enumerate(pairs):
        write(folder / name, image(number))
    return write(folder / "dataset.json", json.dumps({"labels": pairs[::-1]})).parent


def save_stream(folder: Path) -> Path:
    return save_shards(folder, "stream")


@pytest.fixture(params=[save_tree, save_flat, save_shards, save_stream, save_tars])
def source(request, tmp_path):
    return open_source(request.param(tmp_path / "source"))


def test_names_are_unique_and_sorted_and_threads_read_what_one_reads(source):
    assert names(source) == sorted(set(names(source))) and len(source) == 12
    assert set(content(source)) == set(IN_ORDER)
    expected, indices = items(source), np.random.default_rng(0).integers(0, 12, 200).tolist()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(source.read, indices)) == [expected[index] for index in indices]
    with pytest.raises(IndexError):
        source.read(12)


def test_a_subset_is_a_function_of_the_seed_in_the_sources_order(source):
    everything, part = names(source), Subset(source, 5, seed=3)
    chosen = names(part)
    assert len(part) == len(set(chosen)) == 5 and part.class_names == source.class_names
    assert chosen == sorted(chosen, key=everything.index)
    assert chosen == names(Subset(source, 5, seed=3)) != names(Subset(source, 5, seed=4))
    assert items(Subset(source, 12, seed=0)) == items(source)
    for count in (0, 13):
        words = rf"subset of {count} images, expected 1\.\.12"
        refused(lambda count=count: Subset(source, count, seed=0), words)
