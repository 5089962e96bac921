"""What every source of images shares."""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from repa_fast.data.official import read_bytes
from repa_fast.words import one_line, short, some

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
SHARD_NUMBER = re.compile(r"[-_.]?\d+(-of-\d+)?(-[0-9a-f]{16})?$")
NO_CLASSES = "(names need the list of classes)"
LABEL = re.compile(r"-?[0-9]{1,9}")
WNID_LINE = re.compile(r"^(n\d{8})\s.*")

Classes = Sequence[str] | str | Path


@dataclass(frozen=True)
class Item:
    """One image."""

    name: str  # unique in its source, for errors
    data: bytes  # the encoded file, untouched
    label: int  # class index


class Source(Protocol):
    """Labelled images by index, in an order that depends on the names alone."""

    class_names: tuple[str, ...]  # one per class; labels index it

    def __len__(self) -> int: ...

    def read(self, index: int) -> Item:
        """Read one image, 0 <= index < len; any thread may call; ValueError names a bad one."""
        ...

    def identity(self) -> dict[str, str]:
        """Return hashes of names and labels: what tells another source without reading images."""
        ...


class Files:
    """Images that are files, in order: `names`, relative to `root`, have `labels`."""

    def __init__(self, root: Path, names: Sequence[str], labels: Sequence[int]) -> None:
        self.root = root
        self._names = np.array(list(map(os.fsencode, names)), dtype=np.bytes_)
        self._labels = np.array(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._names)

    def read(self, index: int) -> Item:
        """Read one image; see `Source.read`."""
        name = os.fsdecode(self._names[index])
        return Item(name, read_bytes(self.root / name), int(self._labels[index]))

    def identity(self) -> dict[str, str]:
        """Return hashes of the files' names and of the labels."""
        return {"names": hashed(self._names), "labels": hashed(self._labels)}


class Subset:
    """`n` different images of a source, drawn by `seed`, in its order and with all its classes.

    Raises:
        ValueError: `n` is not in 1..len(source).
    """

    def __init__(self, source: Source, n: int, seed: int) -> None:
        if not 1 <= n <= len(source):
            raise ValueError(f"subset of {n} images, expected 1..{len(source)}")
        self.class_names, self._source = source.class_names, source
        drawn = np.random.default_rng(seed).choice(len(source), n, replace=False)
        self._indices = np.sort(drawn)

    def __len__(self) -> int:
        return len(self._indices)

    def read(self, index: int) -> Item:
        """Read an image as the source does."""
        return self._source.read(int(self._indices[index]))

    def identity(self) -> dict[str, str]:
        """Return the source's, and a hash of the choice."""
        return self._source.identity() | {"subset": hashed(self._indices)}


def hashed(*arrays: np.ndarray) -> str:
    """Return 16 hexadecimal digits of a SHA-256 over the bytes of arrays."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()[:16]


def sizes(files: Sequence[Path]) -> np.ndarray:
    """Return names and bytes of files, of which both tell when another has taken its place."""
    return np.array([f"{file.name} {file.stat().st_size}".encode() for file in files])


def read_classes(classes: Classes | None) -> tuple[str, ...] | None:
    """Return class names in the order of their labels.

    Args:
        classes: the names; or a text file with one a line ("n01440764 tench" names n01440764);
            or a folder whose sorted subfolders are the classes.

    Raises:
        ValueError: there are none, or one occurs twice.
    """
    if classes is None:
        return None
    where = "classes"
    if isinstance(classes, str | Path):
        where = str(classes)
        if Path(classes).is_dir():
            classes = [entry.name for entry in scan(classes) if is_dir(entry)]
        else:
            lines = map(str.strip, read_text(Path(classes)).splitlines())
            classes = [WNID_LINE.sub(r"\1", line) for line in lines if line]
    if not classes:
        raise ValueError(f"{where}: no class, expected at least one")
    if repeated := repeats(classes):
        raise ValueError(f"{where}: {some(repeated)} twice, expected different classes")
    return tuple(classes)


class Labeller:
    """Reads labels that are class indices, or names where the classes are known."""

    def __init__(self, classes: tuple[str, ...] | None) -> None:
        self.classes = classes
        self._index = {name: index for index, name in enumerate(classes or ())}

    def label(self, value: object, where: str) -> int:
        """Return the class index that an int or a text means; ValueError where it means none."""
        if isinstance(value, str) and value in self._index:
            return self._index[value]
        if isinstance(value, int | str) and LABEL.fullmatch(str(value)):
            return int(value)
        known = f"or one of {len(self._index)} classes" if self._index else NO_CLASSES
        where = one_line(where)
        raise ValueError(f"{where}: label is {short(value)}, expected an integer {known}")

    def names(self, labels: np.ndarray, name_of: Callable[[int], str]) -> tuple[str, ...]:
        """Return the classes, or "0", "1", ... if they are not known.

        Labels are int64 (N); `name_of` is the name of image i, for errors.

        Raises:
            ValueError: a label has no class; or the classes are not known and some number below
                the largest label never occurs (counted from 1, or a part of a larger set).
        """
        count = len(self.classes) if self.classes else int(labels.max()) + 1
        bad = np.flatnonzero((labels < 0) | (labels >= count))
        if len(bad):
            first = int(bad[0])
            expected = f"0..{count - 1}" if self.classes else "at least 0"
            raise ValueError(
                f"{one_line(name_of(first))}: label is {labels[first]}, expected {expected}"
                f" ({len(bad)} such labels)"
            )
        if self.classes:
            return self.classes
        present = np.unique(labels)
        if len(present) < count:
            missing = np.flatnonzero(present != np.arange(len(present)))
            largest = one_line(name_of(int(labels.argmax())))
            raise ValueError(
                f"{largest}: label is {count - 1}, but no image has label {missing[0]}; expected "
                "every one from 0, or the list of classes"
            )
        return tuple(map(str, range(count)))


def repeats(names: Sequence[str]) -> list[str]:
    """Return the names that occur more than once, in order."""
    return [name for name, count in Counter(names).items() if count > 1]


def scan(folder: str | Path) -> list[os.DirEntry]:
    """List a folder, sorted by name, without hidden entries and without a stat per file.

    Raises:
        ValueError: it cannot be read, or a name is not UTF-8; names it.
    """
    try:
        with os.scandir(folder) as entries:
            found = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise ValueError(f"{folder}: cannot be listed ({error.strerror})") from error
    for entry in found:
        try:
            entry.name.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{folder}: name {entry.name!a} is not UTF-8") from None
    return sorted(found, key=lambda entry: entry.name)


def is_dir(entry: os.DirEntry) -> bool:
    """Return whether an entry is a folder or a link to one; ValueError of a link to nothing."""
    try:
        if entry.is_symlink():
            os.stat(entry.path)
        return entry.is_dir()
    except OSError as error:
        reason = f"is a link that leads nowhere ({error.strerror})"
        raise ValueError(f"{entry.path}: {reason}") from error


def is_image(name: str) -> bool:
    """Return whether a name has an image's suffix, in any case."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def read_text(path: Path) -> str:
    """Read a UTF-8 file; ValueError where it cannot be read or decoded."""
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 text ({error})") from error


def shard_files(path: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """List the files a path means: itself, a folder's, or those a pattern like DIR/train-* fits.

    Raises:
        ValueError: none; one is no regular file; or a folder's belong to several splits (train-*,
            validation-*).
    """
    if path.is_file():
        return [path]
    found = map(Path, scan(path)) if path.is_dir() else sorted(path.parent.glob(path.name))
    files = [file for file in found if file.name.endswith(suffixes)]
    if not files:
        raise ValueError(f"{path}: no file, expected some that end in {', '.join(suffixes)}")
    if odd := [file.name for file in files if not file.is_file()]:  # pipes, devices, folders
        raise ValueError(f"{path}: {some(odd)} is no regular file, expected only such")
    endings = re.compile(f"({'|'.join(map(re.escape, suffixes))})$")
    # train-00000-of-00294.parquet -> train
    splits = sorted({SHARD_NUMBER.sub("", endings.sub("", file.name)) for file in files})
    if path.is_dir() and len(splits) > 1:
        raise ValueError(
            f"{path} has files of {len(splits)} splits ({some(splits)}), expected one; "
            f"give a pattern such as {path}/{splits[0]}*"
        )
    return files
