"""Odd and bad folders and label files, each with what becomes of it."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from repa_fast.prepare.sources import open_source
from tests.prepare.writing import tar, write


def tree(root: Path) -> Path:
    """dog/a.jpg, cat/b/c.jpg."""
    write(root / "dog" / "a.jpg", b"x")
    write(root / "cat" / "b" / "c.jpg", b"x")
    return root


def names_of(source) -> list[str]:
    return [source.read(index).name for index in range(len(source))]


ODD_SOURCES: dict[str, tuple[Callable, list[str]]] = {
    "hidden files are passed over": (
        lambda d: open_source(
            [write(tree(d) / "dog" / name) for name in (".DS_Store", ".b.jpg", "._a.jpg")] and d
        ),
        ["cat/b/c.jpg", "dog/a.jpg"],
    ),
    "other files are passed over": (
        lambda d: open_source(write(tree(d) / "dog" / "Thumbs.db").parents[1]),
        ["cat/b/c.jpg", "dog/a.jpg"],
    ),
    "names that are not ASCII": (
        lambda d: open_source(write(d / "猫" / "é 1.jpg").parents[1]),
        ["猫/é 1.jpg"],
    ),
    "tar members with absolute and upward names": (
        lambda d: open_source(
            tar(
                d / "a.tar",
                {"/etc/a.jpg": b"a", "/etc/a.cls": b"0", "../../b.jpg": b"b", "../../b.cls": b"0"},
            )
        ),
        ["a.tar//etc/a.jpg", "a.tar/../../b.jpg"],
    ),
    "a plain tar that is called .gz": (
        lambda d: open_source(tar(d / "a.tar.gz", {"a.jpg": b"a", "a.cls": b"0"})),
        ["a.tar.gz/a.jpg"],
    ),
    "a link to a sibling": (
        lambda d: open_source(os.symlink(tree(d) / "dog", d / "wolf") or d),
        ["cat/b/c.jpg", "dog/a.jpg", "wolf/a.jpg"],
    ),
}


@pytest.mark.parametrize("case", ODD_SOURCES)
def test_odd_sources_have_a_stated_result(tmp_path, case):
    make, expected = ODD_SOURCES[case]
    assert names_of(make(tmp_path)) == expected


BAD_FOLDERS: dict[str, tuple[Callable, str]] = {
    "nothing there": (
        lambda d: d / "x",
        "x does not exist. Looked for class folders .*/CLASS/IMAGE",
    ),
    "empty folder": (lambda d: d, "no source of images. Looked for .*parquet, .arrow and .tar"),
    "another file": (lambda d: write(d / "a.zip"), "a.zip: no source of images. Looked for"),
    "empty class folder": (
        lambda d: (tree(d) / "eel").mkdir() or d,
        "no image in 1 class folders, expected some: eel",
    ),
    "symlink loop": (
        lambda d: os.symlink(tree(d) / "cat", d / "cat" / "b" / "back") or d,
        "cat/b/back: is a link back to .*/cat, expected no circle",
    ),
    "link to itself": (
        lambda d: os.symlink(tree(d) / "dog" / "x", d / "dog" / "x") or d,
        "dog/x: is a link that leads nowhere",
    ),
    "dangling link to an image": (
        lambda d: os.symlink("/gone/b.jpg", tree(d) / "dog" / "b.jpg") or d,
        "dog/b.jpg: is a link that leads nowhere .No such file",
    ),
    "dangling link to a class": (
        lambda d: os.symlink("/gone", tree(d) / "eel") or d,
        "eel: is a link that leads nowhere",
    ),
    "pipe": (
        lambda d: os.mkfifo(tree(d) / "dog" / "b.jpg") or d,
        "dog/b.jpg: is neither a file nor a folder",
    ),
    "image without a class": (
        lambda d: write(tree(d) / "loose.png").parent,
        "1 images without a class folder: loose.png; expected CLASS/IMAGE",
    ),
    "images alone": (
        lambda d: write(d / "a.jpg").parent,
        "has images and no class folders, expected their labels",
    ),
    "splits": (
        lambda d: tree(d / "train") and tree(d / "val") and d,
        "has the splits train, val, expected classes; give .*/train",
    ),
    "not UTF-8": (
        lambda d: write(tree(d) / "dog" / os.fsdecode(b"\xff.jpg")).parents[1],
        r"name '\\udcff.jpg' is not UTF-8",
    ),
    "DatasetDict": (
        lambda d: write(tree(d) / "dataset_dict.json", "{}").parent,
        "has the splits cat, dog, expected one",
    ),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_bad_folders_are_refused_by_name(tmp_path, case):
    make, message = BAD_FOLDERS[case]
    path = make(tmp_path)
    with pytest.raises(ValueError, match=message):
        open_source(path)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kind": "zip"}, "kind is 'zip', expected one of auto, imagefolder, flat"),
        ({"kind": "flat"}, "no labels given and no dataset.json"),
        ({"kind": "webdataset"}, "no file, expected some that end in .tar"),
        ({"kind": "huggingface"}, "no file, expected some that end in .parquet, .arrow"),
        ({"kind": "imagefolder", "labels": "x"}, "labels are given for .* of kind imagefolder"),
        ({"classes": ["cat"]}, "class folder dog, expected one of 1 classes"),
        ({"classes": ["cat", "dog", "cat"]}, "classes: cat twice"),
        ({"classes": []}, "classes: no class, expected at least one"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        open_source(tree(tmp_path), **options)


def test_what_may_not_be_read_is_named(tmp_path):
    source = open_source(tree(tmp_path))
    (tmp_path / "dog" / "a.jpg").chmod(0)
    if os.access(tmp_path / "dog" / "a.jpg", os.R_OK):
        pytest.skip("root may read everything")
    with pytest.raises(ValueError, match=r"dog/a\.jpg: cannot be read \(Permission denied\)"):
        source.read(1)
    (tmp_path / "dog").chmod(0)
    try:
        with pytest.raises(ValueError, match=r"dog: cannot be listed \(Permission denied\)"):
            open_source(tmp_path)
    finally:
        (tmp_path / "dog").chmod(0o755)


def test_a_file_that_vanished_is_named(tmp_path):
    source = open_source(tree(tmp_path))
    (tmp_path / "dog" / "a.jpg").unlink()
    with pytest.raises(ValueError, match=r"dog/a\.jpg: cannot be read \(No such file"):
        source.read(1)


BAD_LABELS = {
    "line without label": ("a.jpg 0\nb.jpg\nc.jpg 1", "line 2: 'b.jpg', expected an image and its"),
    "label is no number": (
        "a.jpg 0\nb.jpg one\nc.jpg 1",
        "line 2: label is 'one', expected an int",
    ),
    "wnid without classes": (
        "a.jpg n01440764",
        "line 1: label is 'n01440764', expected an integer",
    ),
    "image twice": ("a.jpg 0\nb.jpg 1\nc.jpg 1\na.jpg 0", "a.jpg twice, expected each image once"),
    "image missing": ("a.jpg 0\nb.jpg 1\nc.jpg 1\nd.jpg 0", "1 labels have no image: d.jpg"),
    "label missing": ("a.jpg 0\nc.jpg 1", "1 images have no label: b.jpg"),
    "negative": ("a.jpg 0\nb.jpg -1\nc.jpg 1", "b.jpg: label is -1, expected at least 0"),
    "counted from 1": ("a.jpg 1\nb.jpg 2\nc.jpg 1", "b.jpg: label is 2, but no image has label 0"),
    "a gap": ("a.jpg 0\nb.jpg 2\nc.jpg 0", "b.jpg: label is 2, but no image has label 1"),
    "absurd": ("a.jpg 0\nb.jpg 99999999999\nc.jpg 0", "line 2: label is '99999999999', expected"),
    "too few lines": ("0\n1", "2 labels, expected 3, one each"),
    "two labels in a line": ("0\n1\n1 0", "line 3: label is '1 0', expected an integer"),
    "the devkit's ids": ("1\n2\n3", "labels start at 1, expected 0; .* meta.mat beside the file"),
    "empty": ("\n", "is empty, expected labels"),
    "binary": (b"\xff\xfe\x00", "is not UTF-8 text"),
    "JSON without labels": ('{"labels": null}', "TypeError.*, expected {"),
    "no JSON": ("{", "JSONDecodeError.*, expected {"),
    "JSON label is no number": (
        '{"labels": [["a.jpg", 0.5], ["b.jpg", 0], ["c.jpg", 1]]}',
        "a.jpg: label is 0.5, expected an integer",
    ),
}


@pytest.mark.parametrize("case", BAD_LABELS)
def test_bad_label_files_are_refused_by_name(tmp_path, case):
    text, message = BAD_LABELS[case]
    for name in "abc":
        write(tmp_path / "val" / f"{name}.jpg")
    labels = write(tmp_path / ("map.json" if "JSON" in case else "map.txt"), text)
    with pytest.raises(ValueError, match=rf"{labels}.*{message}"):
        open_source(tmp_path / "val", labels=labels)


@pytest.mark.parametrize(
    "label, message",
    [
        ("eel", "label is 'eel', expected an integer or one of 2 classes"),
        ("2", "label is 2, expected 0..1"),
    ],
)
def test_a_label_without_a_class_is_refused(tmp_path, label, message):
    write(tmp_path / "val" / "a.jpg")
    labels = write(tmp_path / "map.txt", f"a.jpg {label}")
    with pytest.raises(ValueError, match=message):
        open_source(tmp_path / "val", labels=labels, classes=["cat", "dog"])


def test_a_missing_label_file_is_named(tmp_path):
    write(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match=r"map\.txt: cannot be read \(No such file"):
        open_source(tmp_path, labels=tmp_path / "map.txt")
