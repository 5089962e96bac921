"""Bad tars and tables, each refused with an error that names file, member or row."""

import gzip
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from repa_fast.prepare.sources import open_source
from tests.prepare.writing import tar, write

IMAGES = ([b"a", b"b"],)
LABELS = ([0, 1],)
NAMED = {"huggingface": json.dumps({"info": {"features": {"label": {"names": ["cat"]}}}})}


def table(path: Path, **columns) -> Path:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    metadata = columns.pop("metadata", None)
    made = pa.table({name: pa.array(*value) for name, value in columns.items()})
    parquet.write_table(made.replace_schema_metadata(metadata), path)
    return path


GOOD = {"a.jpg": b"x" * 700, "a.cls": b"0", "b.jpg": b"y" * 700, "b.cls": b"1"}


def cut(path: Path, size: int) -> Path:
    write(path, tar(path, GOOD).read_bytes()[:size])
    return path


def doubled(path: Path) -> Path:
    with tarfile.open(path, "w") as archive:
        for _ in range(2):
            archive.addfile(tarfile.TarInfo("a.jpg"), io.BytesIO())
    return path


def linked(path: Path) -> Path:
    with tarfile.open(path, "w") as archive:
        header = tarfile.TarInfo("a.jpg")
        header.type, header.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(header)
    return path


def zeroed(path: Path) -> Path:
    """The header of b.jpg is damaged; tarfile takes it for the end."""
    data = bytearray(tar(path, GOOD).read_bytes())
    start = data.index(b"b.jpg")
    data[start + 100] ^= 1
    return write(path, bytes(data))


BAD_TARS: dict[str, tuple[Callable, str]] = {
    "gzip": (
        lambda p: write(p, gzip.compress(tar(p, GOOD).read_bytes())),
        "a.tar: is compressed with gzip, expected a plain tar",
    ),
    "a folder of gzip": (
        lambda p: write(p.with_name("a-1.tar.gz"), gzip.compress(bytes(512))).parent,
        "a-1.tar.gz: is compressed with gzip, expected a plain tar",
    ),
    "xz": (lambda p: write(p, b"\xfd7zXZ\x00" + bytes(512)), "is compressed with xz"),
    "empty file": (lambda p: write(p), "a.tar: is not a whole tar"),
    "no tar": (lambda p: write(p, "text " * 300), "a.tar: is not a whole tar"),
    "cut in an image": (lambda p: cut(p, 1000), "is not a whole tar .unexpected end of data"),
    "cut in a header": (lambda p: cut(p, 1536 + 300), "truncated or damaged at byte 1536"),
    "cut between members": (lambda p: cut(p, 1536), "truncated or damaged at byte 1536"),
    "damaged header": (zeroed, "truncated or damaged at byte 2560"),
    "no members": (lambda p: tar(p, {}), "no image in 1 shards"),
    "no label": (
        lambda p: tar(p, {"a.jpg": b"", "b.jpg": b"", "b.cls": b"0"}),
        "a.tar: 1 images have no label: a.jpg; expected .cls",
    ),
    "JSON without label": (
        lambda p: tar(p, {"a.jpg": b"", "a.json": b'{"text": 1}'}),
        "1 images have no label: a.jpg",
    ),
    "no image": (lambda p: tar(p, GOOD | {"c.cls": b"0"}), "a.tar: 1 labels have no image: /?c"),
    "label is no number": (
        lambda p: tar(p, GOOD | {"b.cls": b"cat"}),
        "b.cls: label is 'cat', expected an integer",
    ),
    "labels disagree": (
        lambda p: tar(p, GOOD | {"b.json": b'{"label": 0}'}),
        "b.json gives label 0, expected 1 as before",
    ),
    "JSON is none": (lambda p: tar(p, GOOD | {"b.json": b"{"}), "b.json: is not json text"),
    "label out of range": (lambda p: tar(p, GOOD | {"b.cls": b"-3"}), "b.jpg: label is -3"),
    "two images": (
        lambda p: tar(p, GOOD | {"a.png": b""}),
        "a.png and a.jpg share a key, expected one image",
    ),
    "a name twice": (doubled, "a.jpg and a.jpg share a key"),
    "image is a link": (linked, "a.jpg is a link, expected a file"),
}


@pytest.mark.parametrize("case", BAD_TARS)
def test_bad_tars_are_refused_by_name(tmp_path, case):
    make, message = BAD_TARS[case]
    path = make(tmp_path / "a.tar")
    with pytest.raises(ValueError, match=message):
        open_source(path)


def test_a_tar_that_shrank_is_named(tmp_path):
    path = tar(tmp_path / "a.tar", GOOD)
    source = open_source(path)
    write(path, path.read_bytes()[:2560])
    assert source.read(0).data == GOOD["a.jpg"]
    with pytest.raises(ValueError, match=r"a\.tar/b\.jpg: ends after 0 bytes, expected 700"):
        source.read(1)


def cut_stream(path: Path) -> Path:
    """Without the second batch and the end mark."""
    pa = pytest.importorskip("pyarrow")
    made = pa.table({"image": pa.array(*IMAGES), "label": pa.array(*LABELS)})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, made.schema) as writer:
        writer.write_table(made.slice(0, 1))
        whole = sink.tell()
        writer.write_table(made.slice(1, 1))
    os.truncate(path, whole)
    return path


BAD_TABLES: dict[str, tuple[Callable, str]] = {
    "no image column": (
        lambda p: table(p, picture=(["a"],), label=([0],)),
        r"no column image of bytes, expected one; columns are picture \(string\), label",
    ),
    "no label column": (
        lambda p: table(p, image=IMAGES, fine_label=LABELS),
        r"no column label or labels, expected one; columns are image \(binary\), fine_label",
    ),
    "label is text": (
        lambda p: table(p, image=IMAGES, label=(["0", "1"],)),
        "column label is string, expected integers",
    ),
    "label is null": (
        lambda p: table(p, image=IMAGES, label=([0, None],)),
        "a.parquet:1: label is null, expected an integer",
    ),
    "label out of range": (
        lambda p: table(p, image=IMAGES, label=LABELS, metadata=NAMED),
        r"a.parquet:1: label is 1, expected 0\.\.0",
    ),
    "hidden test labels": (
        lambda p: table(p, image=IMAGES, label=([-1, -1],)),
        r"a.parquet:0: label is -1, expected at least 0 \(2 such labels\)",
    ),
    "no rows": (
        lambda p: table(p, image=([b"a"][:0], "binary"), label=([0][:0], "int64")),
        "no row in 1 files",
    ),
    "damaged metadata": (
        lambda p: table(p, image=IMAGES, label=LABELS, metadata={"huggingface": "{"}),
        "metadata .*, expected JSON of datasets",
    ),
    "truncated": (
        lambda p: write(p, table(p, image=IMAGES, label=LABELS).read_bytes()[:-20]),
        "a.parquet: cannot be read",
    ),
    "no parquet": (lambda p: write(p, b"text"), "a.parquet: cannot be read"),
    "no arrow": (lambda p: write(p.with_suffix(".arrow"), b"text" * 9), "a.arrow: cannot be read"),
    "arrow cut between batches": (
        lambda p: cut_stream(p.with_suffix(".arrow")),
        "a.arrow: cannot be read .no stream of Arrow, or it is truncated",
    ),
    "both kinds": (
        lambda p: write(table(p, image=IMAGES, label=LABELS).with_suffix(".arrow")).parent,
        "has .arrow and .parquet files, expected one kind",
    ),
    "other classes": (
        lambda p: (
            table(p.with_name("a-0.parquet"), image=IMAGES, label=LABELS)
            and table(p.with_name("a-1.parquet"), image=IMAGES, label=LABELS, metadata=NAMED).parent
        ),
        "a-1.parquet: has other class names than .*a-0.parquet",
    ),
}


@pytest.mark.parametrize("case", BAD_TABLES)
def test_bad_tables_are_refused_by_name(tmp_path, case):
    make, message = BAD_TABLES[case]
    path = make(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=message):
        open_source(path)


@pytest.mark.parametrize(
    "images, message",
    [
        ([b"a", None], "a.parquet:1: image is null, expected bytes"),
        ([{"bytes": b"a", "path": "x"}, None], "a.parquet:1: image is null, expected bytes"),
        (
            [{"bytes": b"a", "path": "x"}, {"bytes": None, "path": "y.jpg"}],
            "a.parquet:1: has only a path, 'y.jpg', expected the image itself",
        ),
    ],
)
def test_a_null_image_is_named_when_it_is_read(tmp_path, images, message):
    source = open_source(table(tmp_path / "a.parquet", image=(images,), label=LABELS))
    assert source.read(0).data == b"a"
    with pytest.raises(ValueError, match=message):
        source.read(1)
