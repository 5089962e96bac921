"""WebDataset: tar files in which the members of a sample share their name up to the first dot."""

import os
import tarfile
from pathlib import Path
from typing import BinaryIO

import numpy as np

from repa_fast.whole import open_regular, parse_json
from repa_fast.words import one_line, some

from .base import Classes, Item, Labeller, hashed, is_image, read_classes, shard_files, sizes

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
"""The compressed ones to be refused, if they are."""
BLOCK = 512
COMPRESSIONS = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}


class WebDataset:
    """Images of all shards, sorted by shard and then as they lie in it.

    A sample is an image and KEY.cls (an integer, or the name of a class) or KEY.json with the field
    `label`. Opening passes over the headers once; an image is read at its offset. Member names are
    never used as paths. Hidden members and samples of neither image nor label are passed over.

    Args:
        path: a folder of .tar files, one such file, or a pattern.
        classes: the classes in the order of their labels.

    Raises:
        ValueError: no shard or no image, shards of several splits, a compressed, truncated or
            damaged tar, a sample without image or label, a name that occurs twice in a shard, a
            label out of range.
    """

    def __init__(self, path: str | Path, classes: Classes | None = None) -> None:
        self._shards = shard_files(Path(path), SUFFIXES)
        labeller = Labeller(read_classes(classes))
        names, shard_of, spans, labels = [], [], [], []
        for number, file in enumerate(self._shards):
            for name, span, label in _Shard(file, labeller).samples():
                names.append(os.fsencode(name))
                shard_of.append(number)
                spans.append(span)
                labels.append(label)
        if not names:
            raise ValueError(f"{path}: no image in {len(self._shards)} shards, expected some")
        self._names, self._labels = np.array(names, dtype=np.bytes_), np.array(labels, np.int64)
        self._shard_of, self._spans = np.array(shard_of, np.int32), np.array(spans, np.int64)
        self.class_names = labeller.names(self._labels, self._name)

    def __len__(self) -> int:
        return len(self._names)

    def read(self, index: int) -> Item:
        """Read one image; the name is SHARD/MEMBER; see `Source.read`."""
        name = self._name(index)
        file = self._shards[self._shard_of[index]]
        start, size = (int(value) for value in self._spans[index])
        try:
            with open_regular(file) as shard:
                data = _read_at(shard, start, size)
        except OSError as error:
            raise ValueError(f"{file}: cannot be read ({error.strerror or error})") from error
        if len(data) != size:
            raise ValueError(f"{one_line(name)}: ends after {len(data)} bytes, expected {size}")
        return Item(name, data, int(self._labels[index]))

    def identity(self) -> dict[str, str]:
        """Return hashes of shards and members, and of the labels."""
        names = hashed(sizes(self._shards), self._names, self._shard_of, self._spans)
        return {"names": names, "labels": hashed(self._labels)}

    def _name(self, index: int) -> str:
        return f"{self._shards[self._shard_of[index]].name}/{os.fsdecode(self._names[index])}"


class _Shard:
    """One tar: images and labels by key, found in one pass."""

    def __init__(self, file: Path, labeller: Labeller) -> None:
        self.file = file
        self.labeller = labeller
        self.images: dict[str, tuple[str, tuple[int, int]]] = {}
        self.labels: dict[str, int] = {}

    def samples(self) -> list[tuple[str, tuple[int, int], int]]:
        """Return (member, (offset, bytes), label) of each image, as they lie in the shard."""
        self._pass()
        lone = [name for key, (name, _) in self.images.items() if key not in self.labels]
        if lone:
            raise ValueError(
                f"{self.file}: {len(lone)} images have no label: {some(lone)}; expected .cls, or "
                ".json with a field label"
            )
        lone = [key for key in self.labels if key not in self.images]
        if lone:
            raise ValueError(f"{self.file}: {len(lone)} labels have no image: {some(lone)}")
        return [(name, span, self.labels[key]) for key, (name, span) in self.images.items()]

    def _pass(self) -> None:
        try:
            with open_regular(self.file) as stream:
                begin = stream.read(BLOCK)
                for magic, name in COMPRESSIONS.items():
                    if begin.startswith(magic):
                        raise ValueError(
                            f"{self.file}: is compressed with {name}, expected a plain tar; unpack "
                            "it once (images do not shrink)"
                        )
                stream.seek(0)
                with tarfile.open(fileobj=stream, mode="r:") as archive:
                    while (member := archive.next()) is not None:
                        archive.members.clear()  # or it keeps them all
                        self._take(member, stream)
                # zeros, since tarfile takes a damaged header for the end
                if _read_at(stream, archive.offset, BLOCK) != bytes(BLOCK):
                    raise ValueError(
                        f"{self.file}: is truncated or damaged at byte {archive.offset}, expected "
                        "a member or the end mark"
                    )
        except (OSError, tarfile.TarError) as error:
            raise ValueError(f"{self.file}: is not a whole tar ({one_line(error)})") from error

    def _take(self, member: tarfile.TarInfo, stream: BinaryIO) -> None:
        folder, _, base = member.name.rpartition("/")
        stem, _, extension = base.partition(".")
        key = f"{folder}/{stem}"
        if member.isdir() or not stem:
            return
        if not is_image(base) and extension not in ("cls", "json"):
            return
        where = f"{self.file}: {one_line(member.name)}"
        if not member.isreg():
            raise ValueError(f"{where} is a link, expected a file")
        if member.issparse():  # its bytes are not where it begins
            raise ValueError(f"{where} is sparse, expected a plain file; make the tar anew")
        if is_image(base):
            if key in self.images:
                other = one_line(self.images[key][0])
                raise ValueError(f"{where} and {other} share a key, expected one image per key")
            self.images[key] = (member.name, (member.offset_data, member.size))
        else:
            data = _read_at(stream, member.offset_data, member.size)
            label = self._label(where, extension, data)
            if label is not None and self.labels.setdefault(key, label) != label:
                raise ValueError(
                    f"{where} gives label {label}, expected {self.labels[key]} as before"
                )

    def _label(self, where: str, extension: str, data: bytes) -> int | None:
        """Return the label of a .cls or .json; None for a .json without the field."""
        try:
            text = data.decode().strip()
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}: is not {extension} text ({error})") from error
        value = {"label": text} if extension == "cls" else parse_json(text, where)
        if not isinstance(value, dict) or "label" not in value:
            return None
        return self.labeller.label(value["label"], where)


def _read_at(stream: BinaryIO, start: int, size: int) -> bytes:
    stream.seek(start)
    return stream.read(size)
