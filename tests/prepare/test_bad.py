"""Bad images, tars, tables, folders and label files: what is made, how it is read, what is said."""

import gzip
import io
import json
import os
import struct
import tarfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from repa_fast.prepare.crop import center_crop
from repa_fast.prepare.sources import open_source
from tests.data.encoding import bomb, damaged
from tests.data.encoding import encode as saved
from tests.prepare.writing import rgb, tar, tree, write
from tests.refusals import refused

R = 16
NAME = "n01440764/a.jpg"  # whose suffix is another than the content's
GOOD = {"a.jpg": b"x" * 700, "a.cls": b"0", "b.jpg": b"y" * 700, "b.cls": b"1"}
IMAGES, LABELS = ([b"a", b"b"],), ([0, 1],)
DEEP = "[" * 100_000


def named(names: object) -> dict[str, str]:
    """A schema's metadata."""
    return {"huggingface": json.dumps({"info": {"features": {"label": {"names": names}}}})}


NAMED = named(["cat"])

# What is made


def shard(folder: Path) -> Path:
    return tar(folder / "a.tar", GOOD)


def cut(folder: Path, size: int) -> Path:
    return write(folder / "a.tar", shard(folder).read_bytes()[:size])


def damaged_header(folder: Path) -> Path:
    """That of b.jpg; tarfile takes it for the end."""
    data = bytearray(shard(folder).read_bytes())
    data[data.index(b"b.jpg") + 100] ^= 1
    return write(folder / "a.tar", bytes(data))


def linked_member(folder: Path) -> Path:
    with tarfile.open(folder / "a.tar", "w") as archive:
        header = tarfile.TarInfo("a.jpg")
        header.type, header.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(header)
    return folder / "a.tar"


def sparse_member(folder: Path) -> Path:
    """Whose bytes in the tar are an image, and its own are a hole and then those."""
    data = saved(rgb())
    with tarfile.open(folder / "a.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        header = tarfile.TarInfo("a.jpg")
        header.size = len(data)
        holes = {"GNU.sparse.map": f"512,{len(data)}", "GNU.sparse.size": str(len(data) + 512)}
        header.pax_headers = holes
        archive.addfile(header, io.BytesIO(data))
    return folder / "a.tar"


def piped(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(path)
    return path


def endless(path: Path) -> Path:
    os.symlink("/dev/zero", path)
    return path


def outside(folder: Path) -> Path:
    """A stream whose second image ends far behind its buffer."""
    pa, path = pytest.importorskip("pyarrow"), folder / "a.arrow"
    made = pa.record_batch([pa.array(*IMAGES), pa.array(*LABELS)], names=["image", "label"])
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, made.schema) as writer:
        writer.write_batch(made)
    data, ends = path.read_bytes(), struct.pack("<3i", 0, 1, 2)
    assert data.count(ends) == 1
    return write(path, data.replace(ends, struct.pack("<3i", 0, 1, 2**31 - 1)))


def parquet(folder: Path, name: str = "a.parquet", metadata: dict | None = None, **given) -> Path:
    """Two good rows, but for the columns that are given: (values, type), or None."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    given = {"image": IMAGES, "label": LABELS} | given
    made = pa.table({column: pa.array(*value) for column, value in given.items() if value})
    pq.write_table(made.replace_schema_metadata(metadata), folder / name)
    return folder / name


def cut_stream(folder: Path) -> Path:
    """Without the second batch and the end mark."""
    pa, path = pytest.importorskip("pyarrow"), folder / "a.arrow"
    made = pa.table({"image": pa.array(*IMAGES), "label": pa.array(*LABELS)})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, made.schema) as writer:
        writer.write_table(made.slice(0, 1))
        whole = sink.tell()
        writer.write_table(made.slice(1, 1))
    os.truncate(path, whole)
    return path


# How it is read


def crop(folder: Path, data: bytes, side: int = R) -> np.ndarray:
    return center_crop(data, side, NAME)


def whole(folder: Path, _: object):
    return open_source(folder)


def file(folder: Path, path: Path):
    return open_source(path)


def first_image(folder: Path, path: Path):
    return open_source(path).read(0)


def members(folder: Path, made: dict[str, bytes] | list[tuple[str, bytes]]):
    return open_source(tar(folder / "a.tar", made))


def columns(folder: Path, made: dict):
    return open_source(parquet(folder, **made))


def second(folder: Path, images: list):
    """The second image of a table whose first one is good."""
    source = columns(folder, {"image": (images,)})
    assert source.read(0).data == b"a"
    return source.read(1)


def asked(folder: Path, options: dict):
    return open_source(tree(folder), **options)


def labelled(folder: Path, text: object, images: str = "abc", **options):
    """A flat folder of images with a file of labels, or without it."""
    for image in images:
        write(folder / "val" / f"{image}.jpg")
    labels = folder / ("map.json" if str(text).startswith("{") else "map.txt")
    if callable(text):
        text(labels)
    elif text is not None:
        write(labels, text)
    return open_source(folder / "val", labels=labels, **options)


BAD_IMAGES = [
    (saved(rgb(64, 64), "JPEG")[:-500], r"cannot be decoded \(image file is truncated"),
    (saved(rgb(64, 64))[:5000], r"cannot be decoded \(image file is truncated"),
    (damaged(saved(rgb())), r"cannot be decoded \(broken data stream"),
    (saved(rgb(), "JPEG")[:30], r"cannot be decoded \(Truncated File Read"),
    (b"", "is empty, expected an image"),
    (b"404 not found", "is not an image, expected one of JPEG, PNG, WEBP"),
    (saved(rgb(), "PDF"), "is not an image"),
    (saved(rgb(), "EPS"), "is not an image"),
    (saved(rgb(), "TIFF"), "is not an image"),
    (bomb(30000, 30000), r"cannot be decoded \(Image size \(900000000 pixels\) exceeds limit"),
    (bomb(10000, 9000), "is 10000x9000, expected at most 89478485 pixels"),
    (bomb(0, 0), "is not an image"),
]
BAD_NAME = [(b"text", r"a .?\.jpg: is not an image")]

GZIP = "is compressed with gzip, expected a plain tar"
BAD_FILES = [
    (lambda d: d / "x", "x does not exist. Looked for class folders .*/CLASS/IMAGE"),
    (lambda d: write(d / "a.zip"), "a.zip: no source of images. Looked for"),
    (lambda d: write(d / "a.parquet", parquet(d).read_bytes()[:-20]), "a.parquet: cannot be read"),
    (lambda d: write(d / "a.parquet", b"text"), "a.parquet: cannot be read"),
    (lambda d: write(d / "a.arrow", b"text" * 9), "a.arrow: cannot be read"),
    (cut_stream, "a.arrow: cannot be read .no stream of Arrow, or it is truncated"),
    (lambda d: write(d / "a.tar", gzip.compress(shard(d).read_bytes())), f"a.tar: {GZIP}"),
    (lambda d: write(d / "a.tar", b"\xfd7zXZ\x00" + bytes(512)), "is compressed with xz"),
    (lambda d: write(d / "a.tar"), "a.tar: is not a whole tar"),
    (lambda d: write(d / "a.tar", "text " * 300), "a.tar: is not a whole tar"),
    (lambda d: cut(d, 1000), "is not a whole tar .unexpected end of data"),
    (lambda d: cut(d, 1536 + 300), "truncated or damaged at byte 1536"),
    (lambda d: cut(d, 1536), "truncated or damaged at byte 1536"),
    (damaged_header, "truncated or damaged at byte 2560"),
    (linked_member, "a.jpg is a link, expected a file"),
    (sparse_member, "a.tar: a.jpg is sparse, expected a plain file"),
    (lambda d: piped(d / "a.tar"), "a.tar is no regular file, expected only such"),
    (lambda d: piped(d / "a.arrow"), "a.arrow is no regular file"),
    (lambda d: endless(d / "a.parquet"), "a.parquet is no regular file"),
]

BAD_MEMBERS = [
    ({}, "no image in 1 shards"),
    (GOOD | {"c.jpg": b""}, "a.tar: 1 images have no label: c.jpg; expected .cls"),
    ({"a.jpg": b"", "a.json": b'{"text": 1}'}, "1 images have no label: a.jpg"),
    (GOOD | {"c.cls": b"0"}, "a.tar: 1 labels have no image: /?c"),
    (GOOD | {"b.cls": b"cat"}, "b.cls: label is 'cat', expected an integer"),
    (GOOD | {"b.json": b'{"label": 0}'}, "b.json gives label 0, expected 1 as before"),
    (GOOD | {"b.json": b"{"}, "b.json is damaged .Expecting property name.*, expected JSON"),
    (GOOD | {"b.cls": b"-3"}, "b.jpg: label is -3"),
    (GOOD | {"a.png": b""}, "a.png and a.jpg share a key, expected one image"),
    ([("a.jpg", b"")] * 2, "a.jpg and a.jpg share a key"),
    (GOOD | {"b.json": DEEP.encode()}, "b.json is damaged .*recursion.*, expected JSON"),
    (GOOD | {"b.json": b"\xff"}, "b.json: is not json text"),
    (GOOD | {"a\n\x1b.jpg": b""}, "1 images have no label: a .?.jpg"),
    (GOOD | {"b.json": json.dumps({"label": ["x" * 999] * 99}).encode()}, "label is .'xxx"),
]

TYPED = {"bytes": b"a", "path": "x"}
NULL_IMAGE = "a.parquet:1: image is null, expected bytes"

NULL_IMAGES = [
    ([b"a", None], NULL_IMAGE),
    ([TYPED, None], NULL_IMAGE),
    ([TYPED, TYPED | {"bytes": None}], "1: has only a path, 'x', expected the image itself"),
]

NO_IMAGE = r"no column image of bytes, .*; columns are label \(int64\), picture \(string\)"
NO_LABEL = r"no column label or labels, expected one; columns are image \(binary\), fine_label"
BAD_COLUMNS = [
    ({"image": None, "picture": (["a", "b"],)}, NO_IMAGE),
    ({"label": None, "fine_label": LABELS}, NO_LABEL),
    ({"label": (["0", "1"],)}, "column label is string, expected integers"),
    ({"label": ([0, None],)}, "a.parquet:1: label is null, expected an integer"),
    ({"metadata": NAMED}, r"a.parquet:1: label is 1, expected 0\.\.0"),
    ({"label": ([-1, -1],)}, r"a.parquet:0: label is -1, expected at least 0 \(2 such labels\)"),
    ({"image": ([], "binary"), "label": ([], "int64")}, "no row in 1 files"),
    ({"metadata": {"huggingface": "{"}}, "a.parquet: metadata is damaged .*, expected JSON"),
    ({"metadata": {"huggingface": DEEP}}, "metadata is damaged .*recursion.*, expected JSON"),
    ({"metadata": {"huggingface": "[]"}}, "metadata .*, expected JSON of datasets"),
    *[
        ({"metadata": named(names)}, "a.parquet: metadata: class names are .*, expected a list of")
        for names in (__file__, "/dev/zero", "", [1, 2], [["a"], ["b"]], 5, {"a": 1}, [None])
    ],
    ({"metadata": named(["a\n", "a\n"])}, "a.parquet: metadata: classes: a twice"),
]

NOWHERE = "is a link that leads nowhere"
BAD_FOLDERS = [
    (lambda d: None, "no source of images. Looked for .*parquet, .arrow and .tar"),
    (lambda d: (tree(d) / "eel").mkdir(), "no image in 1 class folders, expected some: eel"),
    (lambda d: os.symlink(tree(d) / "cat", d / "cat/b/back"), "b/back: is a link back to .*/cat,"),
    (lambda d: os.symlink(tree(d) / "dog/x", d / "dog/x"), f"dog/x: {NOWHERE}"),
    (lambda d: os.symlink("/gone/b.jpg", tree(d) / "dog/b.jpg"), f"b.jpg: {NOWHERE} .No such file"),
    (lambda d: os.symlink("/gone", tree(d) / "eel"), f"eel: {NOWHERE}"),
    (lambda d: os.mkfifo(tree(d) / "dog" / "b.jpg"), "dog/b.jpg: is neither a file nor a folder"),
    (lambda d: write(tree(d) / "c.png"), "1 images without a class folder: c.png; expected CLASS/"),
    (lambda d: write(d / "a.jpg"), "has images and no class folders, expected their labels"),
    (lambda d: (tree(d / "train"), tree(d / "val")), "the splits train, val, .*; give .*/train"),
    (lambda d: write(tree(d) / "dog" / os.fsdecode(b"\xff.jpg")), r"'\\udcff.jpg' is not UTF-8"),
    (lambda d: write(tree(d) / "dataset_dict.json", "{}"), "has the splits cat, dog, expected one"),
    (lambda d: (shard(d), piped(d / "a-1.tar")), "a-1.tar is no regular file, expected only such"),
    (lambda d: (d / "a.parquet").mkdir(), "a.parquet is no regular file"),
    (lambda d: write(d / "a-1.tar.gz", gzip.compress(bytes(512))), f"a-1.tar.gz: {GZIP}"),
    (lambda d: (parquet(d), write(d / "a.arrow")), "has .arrow and .parquet files, expected one"),
    (
        lambda d: (parquet(d, "a-0.parquet"), parquet(d, "a-1.parquet", NAMED)),
        "a-1.parquet: has other class names than .*a-0.parquet",
    ),
]

BAD_OPTIONS = [
    ({"kind": "zip"}, "kind is 'zip', expected one of auto, imagefolder, flat"),
    ({"kind": "flat"}, "no labels given and no dataset.json"),
    ({"kind": "webdataset"}, "no file, expected some that end in .tar"),
    ({"kind": "huggingface"}, "no file, expected some that end in .parquet, .arrow"),
    ({"kind": "imagefolder", "labels": "x"}, "labels are given for .* of kind imagefolder"),
    ({"classes": ["cat"]}, "class folder dog, expected one of 1 classes"),
    ({"classes": ["cat", "dog", "cat"]}, "classes: cat twice"),
    ({"classes": []}, "classes: no class, expected at least one"),
    ({"classes": ["a\n\x1b", "a\n\x1b"]}, "classes: a .? twice"),
]

BAD_LABELS = [
    (None, r": cannot be read \(No such file"),
    ("a.jpg 0\nb.jpg\nc.jpg 1", "line 2: 'b.jpg', expected an image and its"),
    ("a.jpg 0\nb.jpg one\nc.jpg 1", "line 2: label is 'one', expected an int"),
    ("a.jpg n01440764", "line 1: label is 'n01440764', expected an integer"),
    ("a.jpg 0\nb.jpg 1\nc.jpg 1\na.jpg 0", "a.jpg twice, expected each image once"),
    ("a.jpg 0\nb.jpg 1\nc.jpg 1\nd.jpg 0", "1 labels have no image: d.jpg"),
    ("a.jpg 0\nc.jpg 1", "1 images have no label: b.jpg"),
    ("a.jpg 0\nb.jpg -1\nc.jpg 1", "b.jpg: label is -1, expected at least 0"),
    ("a.jpg 1\nb.jpg 2\nc.jpg 1", "b.jpg: label is 2, but no image has label 0"),
    ("a.jpg 0\nb.jpg 2\nc.jpg 0", "b.jpg: label is 2, but no image has label 1"),
    ("a.jpg 0\nb.jpg 99999999999\nc.jpg 0", "line 2: label is '99999999999', expected"),
    ("0\n1", "2 labels, expected 3, one each"),
    ("0\n1\n1 0", "line 3: label is '1 0', expected an integer"),
    ("1\n2\n3", "labels start at 1, expected 0; .* meta.mat beside the file"),
    ("\n", "is empty, expected labels"),
    (b"\xff\xfe\x00", "is not UTF-8 text"),
    ('{"labels": null}', "TypeError.*, expected {"),
    ("{", "is damaged .*, expected JSON"),
    ('{"labels":' + DEEP, "is damaged .*recursion.*, expected JSON"),
    ("1" * 5000 + "\n0\n0", r"line 1: label is '1+\.\.\.1+', expected an integer"),
    ("a.jpg " + "1" * 5000, r"line 1: label is '1+\.\.\.1+', expected an integer"),
    (piped, "is not a regular file"),
    (endless, "is not a regular file"),
    ('{"labels": [["a.jpg", 0.5]]}', "a.jpg: label is 0.5, expected an integer"),
]

WITHOUT_CLASS = [
    ("a.jpg eel", "label is 'eel', expected an integer or one of 2 classes"),
    ("a.jpg 2", r"label is 2, expected 0\.\.1"),
]

WIDE = [(saved(rgb(1, 5000)), "of 5000x1 pixels, resized 1280000x256, expected at most 89478485")]
IMAGE = r"^n01440764/a\.jpg: "

BAD = {  # how it is read, what is said first, and rows of what is made and what is said then
    "image": (crop, IMAGE, BAD_IMAGES),
    "name": (lambda _, data: center_crop(data, R, "a\n\x1b.jpg"), "", BAD_NAME),
    "wide image": (partial(crop, side=256), IMAGE, WIDE),
    "file": (file, "", BAD_FILES),
    "tar": (members, "", BAD_MEMBERS),
    "table": (columns, "", BAD_COLUMNS),
    "outside": (
        first_image,
        "",
        [(outside, r"a.arrow: cannot be read \(Offset invariant failure")],
    ),
    "null image": (second, "", NULL_IMAGES),
    "folder": (whole, "", BAD_FOLDERS),
    "options": (asked, "", BAD_OPTIONS),
    "labels": (labelled, "{folder}/map.*", BAD_LABELS),
    "no class": (partial(labelled, images="a", classes=["cat", "dog"]), "", WITHOUT_CLASS),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    "kind, make, words",
    [
        pytest.param(kind, make, words, id=f"{kind}: {words}")
        for kind, (_, _, rows) in BAD.items()
        for make, words in rows
    ],
)
def test_what_is_bad_is_refused_by_name(tmp_path, kind, make, words):
    read, first, _ = BAD[kind]
    made = make(tmp_path) if callable(make) and kind != "labels" else make
    refused(lambda: read(tmp_path, made), first.format(folder=tmp_path) + words)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF"])
def test_any_damage_is_a_value_error_by_name(kind):
    generator, data, refusals = np.random.default_rng(0), saved(rgb(32, 32), kind), 0
    for _ in range(200):
        harmed = bytearray(data[: generator.integers(1, len(data) + 1)])
        for place in generator.integers(0, min(len(harmed), 200), 3):
            harmed[place] = generator.integers(0, 256)
        try:
            assert center_crop(bytes(harmed), R, "a").shape == (R, R, 3)
        except ValueError as error:
            refusals += 1
            assert str(error).startswith("a: ")  # noqa: PT017
    assert refusals > 50


# What was good when it was opened


def test_a_tar_that_shrank_and_a_file_that_vanished_are_named(tmp_path):
    path = shard(tmp_path)
    source, folder = open_source(path), open_source(tree(tmp_path / "tree"))
    write(path, path.read_bytes()[:2560])
    assert source.read(0).data == GOOD["a.jpg"]
    refused(lambda: source.read(1), r"a\.tar/b\.jpg: ends after 0 bytes, expected 700")
    (tmp_path / "tree/dog/a.jpg").unlink()
    refused(lambda: folder.read(1), r"dog/a\.jpg: cannot be read \(No such file")


def test_what_may_not_be_read_is_named(tmp_path):
    source = open_source(tree(tmp_path))
    (tmp_path / "dog" / "a.jpg").chmod(0)
    if os.access(tmp_path / "dog" / "a.jpg", os.R_OK):
        pytest.skip("root may read everything")
    refused(lambda: source.read(1), r"dog/a\.jpg: cannot be read \(Permission denied\)")
    (tmp_path / "dog").chmod(0)
    try:
        refused(lambda: open_source(tmp_path), r"dog: cannot be listed \(Permission denied\)")
    finally:
        (tmp_path / "dog").chmod(0o755)
