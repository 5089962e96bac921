"""Images come back untouched, with the right label and in the right order, from every kind."""

import io
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
from tests.prepare.writing import tar, write

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

WNIDS = ("n01440764", "n01443537", "n01484850")
NAMES = [f"{WNIDS[n % 3]}_{n}.JPEG" for n in range(12)]


def image(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6 + number, 9), (20 * number, 7, 9)).save(buffer, format="JPEG")
    return buffer.getvalue()


def items(source: Source) -> list[Item]:
    return [source.read(index) for index in range(len(source))]


def content(source: Source) -> list[tuple[bytes, int]]:
    return [(item.data, item.label) for item in items(source)]


@pytest.fixture
def tree(tmp_path):
    for number, name in reversed(list(enumerate(NAMES))):
        write(tmp_path / "train" / WNIDS[number % 3] / name, image(number))
    return tmp_path / "train"


def test_labels_are_the_positions_of_the_sorted_folders(tree):
    source = open_source(tree)
    assert len(source) == 12 and source.class_names == WNIDS
    expected = sorted(
        (f"{WNIDS[number % 3]}/{name}", image(number), number % 3)
        for number, name in enumerate(NAMES)
    )
    assert [(item.name, item.data, item.label) for item in items(source)] == expected


def test_torchvision_agrees(tree):
    datasets = pytest.importorskip("torchvision.datasets")
    theirs = datasets.ImageFolder(str(tree))
    ours = items(open_source(tree))
    assert [(str(tree / item.name), item.label) for item in ours] == theirs.samples


def test_every_suffix_in_any_case_at_any_depth(tmp_path):
    names = ["a.jpg", "b.JPEG", "c.Png", "d-1.jpg", "d/e.webp", "d/f/g.BMP"]
    for name in [*names, "notes.txt", "h.gif", ".hidden.jpg", "._a.jpg", ".DS_Store"]:
        write(tmp_path / "dog" / name, name)
    write(tmp_path / ".git" / "x.jpg", "")
    write(tmp_path / "README.md", "")
    source = open_source(tmp_path)
    assert [item.name for item in items(source)] == [f"dog/{name}" for name in names]
    assert source.class_names == ("dog",)


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
    assert {item.label for item in items(open_source(tree))} == {0, 1}
    source = open_source(tree, classes=WNIDS)
    assert {item.label for item in items(source)} == {1, 2} and source.class_names == WNIDS


def test_opening_a_tree_asks_no_status_of_its_files(tree, monkeypatch):
    asked = []
    stat = os.stat
    monkeypatch.setattr(os, "stat", lambda path, **k: asked.append(str(path)) or stat(path, **k))
    assert len(open_source(tree, kind="imagefolder")) == 12
    assert asked and not [path for path in asked if path.endswith(".JPEG")]


@pytest.fixture
def flat(tmp_path):
    for number in range(12):
        write(tmp_path / "val" / f"ILSVRC2012_val_{number + 1:08d}.JPEG", image(number))
    return tmp_path / "val"


LABELS = [2, 0, 1, 1, 0, 2, 2, 2, 0, 1, 0, 0]


def test_a_map_of_numbers_in_any_order(flat, tmp_path):
    lines = [f"ILSVRC2012_val_{n + 1:08d}.JPEG {label}" for n, label in enumerate(LABELS)]
    labels = write(tmp_path / "val.txt", "\n".join(reversed(lines)) + "\n\n")
    source = open_source(flat, labels=labels)
    assert content(source) == [(image(n), label) for n, label in enumerate(LABELS)]
    assert items(source)[3].name == "ILSVRC2012_val_00000004.JPEG"
    assert source.class_names == ("0", "1", "2")
    assert open_source(flat, "flat", labels, WNIDS).class_names == WNIDS


def classes_as(kind: str, folder: Path) -> tuple[str, ...] | Path:
    if kind == "folder":
        for wnid in WNIDS:
            (folder / "train" / wnid).mkdir(parents=True)
        return folder / "train"
    if kind == "file":
        words = ("tench, Tinca tinca", "goldfish", "great white shark")
        lines = "\n".join(f"{wnid} {word}" for wnid, word in zip(WNIDS, words))
        return write(folder / "synset_words.txt", lines)
    return WNIDS


@pytest.mark.parametrize("style", ["{name} {wnid}", "{wnid}"])
@pytest.mark.parametrize("kind", ["tuple", "file", "folder"])
def test_wnids_are_looked_up_in_the_classes(flat, tmp_path, style, kind):
    lines = [
        style.format(name=f"ILSVRC2012_val_{n + 1:08d}.JPEG", wnid=WNIDS[label])
        for n, label in enumerate(LABELS)
    ]
    labels = write(tmp_path / "val.txt", "\r\n".join(lines))
    source = open_source(flat, labels=labels, classes=classes_as(kind, tmp_path))
    assert [item.label for item in items(source)] == LABELS and source.class_names == WNIDS


def test_one_number_a_line(flat, tmp_path):
    labels = write(tmp_path / "val.txt", "".join(f"{label}\n" for label in LABELS))
    assert [item.label for item in items(open_source(flat, labels=labels))] == LABELS


def test_the_devkits_ids_become_positions_of_sorted_wnids(flat, tmp_path):
    """Ids 1, 2, 3 are the last, the first and the middle wnid; 4 is a parent."""
    scipy_io = pytest.importorskip("scipy.io")
    kinds = [("ILSVRC2012_ID", "i4"), ("WNID", "O"), ("num_children", "i4")]
    rows = [(1, WNIDS[2], 0), (2, WNIDS[0], 0), (3, WNIDS[1], 0), (4, "n99999999", 3)]
    data = tmp_path / "devkit" / "data"
    data.mkdir(parents=True)
    scipy_io.savemat(data / "meta.mat", {"synsets": np.array(rows, dtype=kinds)})
    ids = [{2: 1, 0: 2, 1: 3}[label] for label in LABELS]
    truth = data / "ILSVRC2012_validation_ground_truth.txt"
    write(truth, "".join(f"{number}\n" for number in ids))
    source = open_source(flat, labels=truth)
    assert [item.label for item in items(source)] == LABELS and source.class_names == WNIDS
    write(truth, "".join("4\n" for _ in ids))
    with pytest.raises(ValueError, match=r"line 1: label is '4', expected an id of .*meta\.mat"):
        open_source(flat, labels=truth)


def test_a_folder_with_dataset_json(tmp_path):
    names = [f"{n // 5:05d}/img{n:08d}.png" for n in range(12)]
    for number, name in enumerate(names):
        write(tmp_path / name, image(number))
    pairs = [[name, label] for name, label in zip(names, LABELS)]
    write(tmp_path / "dataset.json", json.dumps({"labels": pairs[::-1]}))
    source = open_source(tmp_path)
    assert content(source) == [(image(n), label) for n, label in enumerate(LABELS)]


def table(numbers: range, named: bool = True, struct: bool = True) -> "pa.Table":
    data = [image(number) for number in numbers]
    values = data
    if struct:
        values = [{"bytes": d, "path": NAMES[n]} for n, d in zip(numbers, data)]
    columns = {
        "image": pa.array(values),
        "label": pa.array([number % 3 for number in numbers], pa.int64()),
    }
    made = pa.table(columns)
    if named:
        features = {"label": {"names": list(WNIDS), "_type": "ClassLabel"}}
        made = made.replace_schema_metadata(
            {"huggingface": json.dumps({"info": {"features": features}})}
        )
    return made


def save_arrow(path: Path, made: "pa.Table", file_format: bool) -> None:
    opened = pa.ipc.new_file if file_format else pa.ipc.new_stream
    with pa.OSFile(str(path), "wb") as sink, opened(sink, made.schema) as writer:
        writer.write_table(made, max_chunksize=2)


def save_shards(folder: Path, kind: str, **options) -> Path:
    for shard, numbers in ((1, range(7, 12)), (0, range(7))):
        made, name = table(numbers, **options), f"train-{shard:05d}-of-00002"
        if kind == "parquet":
            parquet.write_table(made, folder / f"{name}.parquet", row_group_size=3)
        else:
            save_arrow(folder / f"{name}.arrow", made, kind == "file")
    return folder


@pytest.mark.parametrize("kind", ["parquet", "stream", "file"])
@pytest.mark.parametrize("struct", [True, False])
def test_a_hugging_face_dataset(tmp_path, kind, struct):
    source = open_source(save_shards(tmp_path, kind, struct=struct))
    assert content(source) == [(image(n), n % 3) for n in range(12)]
    assert source.class_names == WNIDS
    suffix = "parquet" if kind == "parquet" else "arrow"
    assert source.read(8).name == f"train-00001-of-00002.{suffix}:1"


def test_without_class_names_in_the_schema(tmp_path):
    save_shards(tmp_path, "parquet", named=False)
    assert open_source(tmp_path).class_names == ("0", "1", "2")
    assert open_source(tmp_path, classes=WNIDS).class_names == WNIDS


def test_images_are_read_by_row_group_and_only_when_needed(tmp_path, monkeypatch):
    save_shards(tmp_path, "parquet")
    read = []
    read_group = huggingface._Parquet.read_group
    monkeypatch.setattr(
        huggingface._Parquet, "read_group", lambda *a: read.append(a[1]) or read_group(*a)
    )
    source = open_source(tmp_path)
    assert read == []
    items(source)
    assert read == [0, 1, 2, 0, 1]


def test_threads_that_want_one_row_group_read_it_once(tmp_path, monkeypatch):
    save_shards(tmp_path, "parquet")
    read = []
    read_group = huggingface._Parquet.read_group

    def slow(*arguments):
        read.append(arguments[1])
        time.sleep(0.05)
        return read_group(*arguments)

    monkeypatch.setattr(huggingface._Parquet, "read_group", slow)
    source = open_source(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        got = [item.data for item in pool.map(source.read, [0, 1, 2, 0, 1, 2, 0, 1])]
    assert got == [image(index) for index in [0, 1, 2, 0, 1, 2, 0, 1]] and read == [0]


def test_a_repository_with_its_files_in_data_and_a_pattern_for_the_split(tmp_path):
    (tmp_path / "data").mkdir()
    save_shards(tmp_path / "data", "parquet")
    assert len(open_source(tmp_path)) == 12
    parquet.write_table(table(range(3)), tmp_path / "data" / "validation-00000-of-00001.parquet")
    with pytest.raises(
        ValueError, match=r"2 splits \(train, validation\), expected one; .*train\*"
    ):
        open_source(tmp_path)
    assert len(open_source(tmp_path / "data" / "train-*")) == 12
    assert len(open_source(tmp_path / "data" / "validation-00000-of-00001.parquet")) == 3


def label_member(number: int, style: str) -> tuple[str, bytes]:
    if style == "json":
        return "json", json.dumps({"label": number % 3, "width": 5}).encode()
    text = WNIDS[number % 3] if style == "wnid" else f"{number % 3}\n"
    return "cls", text.encode()


def shards(folder: Path, style: str, **options) -> Path:
    for shard, numbers in ((1, range(7, 12)), (0, range(7))):
        members = []
        for number in numbers:
            extension, label = label_member(number, style)
            sample = [(f"{number:04d}.jpg", image(number)), (f"{number:04d}.{extension}", label)]
            members += sample if number % 2 else sample[::-1]
        tar(folder / f"train-{shard:06d}.tar", members, **options)
    return folder


@pytest.mark.parametrize("style", ["cls", "json", "wnid"])
@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_webdataset_shards(tmp_path, style, form):
    source = open_source(shards(tmp_path, style, format=form), classes=WNIDS)
    assert content(source) == [(image(n), n % 3) for n in range(12)]
    assert source.read(8).name == "train-000001.tar/0008.jpg" and source.class_names == WNIDS


def test_long_names_and_other_members_of_a_sample(tmp_path):
    key = "folder/" + "x" * 150 + "é"
    members = [
        ("folder", b""),
        (f"{key}.jpg", image(1)),
        (f"{key}.json", b'{"caption": "a fish"}'),
        (f"{key}.cls", b"0"),
        (f"{key}.txt", b"a fish"),
        ("._hidden.jpg", b"no image"),
        ("README.md", b""),
    ]
    source = open_source(tar(tmp_path / "a.tar", members))
    assert [(item.name, item.data) for item in items(source)] == [(f"a.tar/{key}.jpg", image(1))]


@pytest.fixture(params=["tree", "flat", "parquet", "stream", "tar"])
def source(request, tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    if request.param in ("parquet", "stream"):
        return open_source(save_shards(folder, request.param))
    if request.param == "tar":
        return open_source(shards(folder, "cls"))
    for number, name in enumerate(NAMES):
        write(folder / (WNIDS[number % 3] if request.param == "tree" else "") / name, image(number))
    if request.param == "tree":
        return open_source(folder)
    lines = "\n".join(f"{name} {number % 3}" for number, name in enumerate(NAMES))
    return open_source(folder, labels=write(tmp_path / "labels.txt", lines))


def test_keys_may_repeat_in_other_folders_and_other_shards(tmp_path):
    for shard in (0, 1):
        members = [(f"{folder}/1.{kind}", b"0") for kind in ("jpg", "cls") for folder in "ab"]
        tar(tmp_path / f"{shard}.tar", members)
    names = ["0.tar/a/1.jpg", "0.tar/b/1.jpg", "1.tar/a/1.jpg", "1.tar/b/1.jpg"]
    assert [item.name for item in items(open_source(tmp_path))] == names


def test_names_are_unique_and_order_repeats(source):
    names = [item.name for item in items(source)]
    assert len(set(names)) == 12 == len(source)
    assert {(item.data, item.label) for item in items(source)} == {
        (image(number), number % 3) for number in range(12)
    }


def test_threads_read_what_one_reads(source):
    expected = items(source)
    indices = np.random.default_rng(0).integers(0, 12, 200).tolist()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(source.read, indices)) == [expected[index] for index in indices]


def test_beyond_the_end_is_an_error(source):
    with pytest.raises(IndexError):
        source.read(12)


def test_a_subset_is_a_function_of_the_seed_in_the_sources_order(source):
    everything = [item.name for item in items(source)]
    part = Subset(source, 5, seed=3)
    chosen = [item.name for item in items(part)]
    assert len(part) == len(set(chosen)) == 5 and part.class_names == source.class_names
    assert chosen == sorted(chosen, key=everything.index)
    assert chosen == [item.name for item in items(Subset(source, 5, seed=3))]
    assert chosen != [item.name for item in items(Subset(source, 5, seed=4))]
    assert items(Subset(source, 12, seed=0)) == items(source)
    for count in (0, 13):
        with pytest.raises(ValueError, match=rf"subset of {count} images, expected 1\.\.12"):
            Subset(source, count, seed=0)
