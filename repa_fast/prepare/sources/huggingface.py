"""A Hugging Face dataset on disk: Parquet files as downloaded, or Arrow files of save_to_disk."""

import functools
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from repa_fast.data.features import describing
from repa_fast.whole import open_regular, parse_json
from repa_fast.words import one_line, short

from .base import Classes, Item, Labeller, hashed, read_classes, shard_files, sizes

if TYPE_CHECKING:
    import pyarrow as pa

SUFFIXES = (".parquet", ".arrow")
LABEL_COLUMNS = ("label", "labels")
ARROW_FILE_MAGIC = b"ARROW1"
ARROW_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"
GROUPS_KEPT = 2


class HuggingFaceDataset:
    """Rows of all files, sorted by file name.

    The image column is a struct with the field `bytes`, or binary; the label column, `label` or
    `labels`, holds integers. Class names come from the schema's metadata where `datasets` left
    them. Opening reads the labels; of the images a row group (or a batch of Arrow) at a time is
    read when needed and the last two are kept, so that reading in order reads everything once.

    Args:
        path: a folder of .parquet or .arrow files, one such file, or a pattern.
        classes: the classes in the order of their labels, instead of the schema's.

    Raises:
        ValueError: no file or no row, files of several splits or kinds, a damaged file, a column
            that is missing or has another type, a label that is missing or out of range.
    """

    def __init__(self, path: str | Path, classes: Classes | None = None) -> None:
        files = shard_files(Path(path), SUFFIXES)
        kinds = sorted({file.suffix for file in files})
        if len(kinds) > 1:
            raise ValueError(f"{path} has {' and '.join(kinds)} files, expected one kind")
        self._groups: list[tuple[Path, int, str, int]] = []  # file, number in it, column, row in it
        self._lock = threading.Lock()
        self._images = functools.lru_cache(GROUPS_KEPT)(self._read_group)
        labels, names, sizes = [], None, [0]
        for file in files:
            found, of_file, groups = self._index(file)
            if names is not None and of_file != names:
                raise ValueError(f"{file}: has other class names than {files[0]}")
            names = of_file
            labels.append(found)
            sizes += groups
        self._labels = np.concatenate(labels)
        if not len(self._labels):
            raise ValueError(f"{path}: no row in {len(files)} files, expected some")
        self._starts = np.cumsum(sizes)
        labeller = Labeller(read_classes(classes) or names or None)
        self.class_names = labeller.names(self._labels, self._name)

    def __len__(self) -> int:
        return len(self._labels)

    def read(self, index: int) -> Item:
        """Read one image; the name is FILE:ROW; see `Source.read`."""
        label, name = int(self._labels[index]), self._name(index)
        group, row = self._find(index)
        with self._lock:
            images = self._images(group)
        value = images[row].as_py()
        if isinstance(value, dict):
            outside, value = value.get("path"), value["bytes"]
            if value is None and outside:
                only = f"has only a path, {short(outside)}"
                raise ValueError(f"{name}: {only}, expected the image itself")
        if value is None:
            raise ValueError(f"{name}: image is null, expected bytes")
        return Item(name, value, label)

    def identity(self) -> dict[str, str]:
        """Return hashes of the files' names and sizes, and of the labels."""
        files = list(dict.fromkeys(file for file, *_ in self._groups))
        return {"names": hashed(sizes(files)), "labels": hashed(self._labels)}

    def _find(self, index: int) -> tuple[int, int]:
        """Return the group of a row, and the row in it."""
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        return group, index - int(self._starts[group])

    def _name(self, index: int) -> str:
        group, row = self._find(index)
        file, _, _, first = self._groups[group]
        return f"{file.name}:{first + row}"

    def _index(self, file: Path) -> tuple[np.ndarray, tuple[str, ...], list[int]]:
        """Note a file's groups; return labels, int64, class names, () without any, and sizes."""
        import pyarrow as pa

        try:
            reader = _reader(file)
            image, label = _image_column(reader.schema, file), _label_column(reader.schema, file)
            column = pa.chunked_array(reader.read(label), reader.schema.field(label).type)
            column.validate(full=True)  # what it says of itself may lead outside of the file
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"{file}: cannot be read ({one_line(error)})") from error
        if column.null_count:
            row = column.is_null().index(True).as_py()
            raise ValueError(f"{file.name}:{row}: label is null, expected an integer")
        sizes = reader.group_sizes
        firsts = np.cumsum([0, *sizes[:-1]]).tolist()
        self._groups += [(file, number, image, firsts[number]) for number in range(len(sizes))]
        return column.to_numpy().astype(np.int64), _class_names(reader.schema, label, file), sizes

    def _read_group(self, group: int) -> "pa.Array":
        """Return the image column of a group."""
        import pyarrow as pa

        file, number, column, _ = self._groups[group]
        try:
            images = _reader(file).read_group(number, column)
            images.validate(full=True)
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"{file}: cannot be read ({one_line(error)})") from error
        return images


class _Parquet:
    def __init__(self, file: Path) -> None:
        import pyarrow.parquet as parquet

        self._file = parquet.ParquetFile(file)
        self.schema = self._file.schema_arrow
        footer = self._file.metadata
        self.group_sizes = [footer.row_group(n).num_rows for n in range(footer.num_row_groups)]

    def read(self, column: str) -> "list[pa.Array]":
        return self._file.read(columns=[column]).column(column).chunks

    def read_group(self, number: int, column: str) -> "pa.Array":
        return self._file.read_row_group(number, columns=[column]).column(column)


class _Arrow:
    """Batches lie in memory-mapped files: finding them reads their headers alone."""

    def __init__(self, file: Path) -> None:
        import pyarrow as pa

        with open_regular(file) as bytes_of:
            random_access = bytes_of.read(len(ARROW_FILE_MAGIC)) == ARROW_FILE_MAGIC
            bytes_of.seek(max(0, file.stat().st_size - len(ARROW_STREAM_END)))
            ended = bytes_of.read() == ARROW_STREAM_END
        if not random_access and not ended:  # pyarrow takes a cut between batches for the end
            raise pa.ArrowInvalid("no stream of Arrow, or it is truncated: the end mark is missing")
        opened = pa.ipc.open_file if random_access else pa.ipc.open_stream
        reader = opened(pa.memory_map(str(file)))
        self.schema = reader.schema
        if random_access:
            self._batches = [reader.get_batch(n) for n in range(reader.num_record_batches)]
        else:
            self._batches = list(reader)
        self.group_sizes = [batch.num_rows for batch in self._batches]

    def read(self, column: str) -> "list[pa.Array]":
        return [batch.column(column) for batch in self._batches]

    def read_group(self, number: int, column: str) -> "pa.Array":
        return self._batches[number].column(column)


def _reader(file: Path) -> _Parquet | _Arrow:
    return _Parquet(file) if file.suffix == ".parquet" else _Arrow(file)


def _image_column(schema: "pa.Schema", file: Path) -> str:
    import pyarrow.types as types

    def holds_bytes(kind: "pa.DataType") -> bool:
        if types.is_struct(kind):
            return kind.get_field_index("bytes") >= 0 and holds_bytes(kind.field("bytes").type)
        return types.is_binary(kind) or types.is_large_binary(kind)

    fits = [field.name for field in schema if holds_bytes(field.type)]
    if "image" not in fits and len(fits) != 1:
        raise _no_column(schema, file, "image of bytes")
    return "image" if "image" in fits else fits[0]


def _label_column(schema: "pa.Schema", file: Path) -> str:
    import pyarrow.types as types

    found = [name for name in LABEL_COLUMNS if name in schema.names]
    if not found:
        raise _no_column(schema, file, " or ".join(LABEL_COLUMNS))
    kind = schema.field(found[0]).type
    if not types.is_integer(kind):
        raise ValueError(f"{file}: column {found[0]} is {kind}, expected integers")
    return found[0]


def _no_column(schema: "pa.Schema", file: Path, name: str) -> ValueError:
    columns = one_line(", ".join(f"{field.name} ({field.type})" for field in schema))
    return ValueError(f"{file}: no column {name}, expected one; columns are {columns}")


def _class_names(schema: "pa.Schema", label: str, file: Path) -> tuple[str, ...]:
    where = f"{file}: metadata"
    content = parse_json((schema.metadata or {}).get(b"huggingface", b"{}"), where)
    try:
        names = content.get("info", {}).get("features", {}).get(label, {}).get("names")
    except AttributeError as error:
        raise ValueError(f"{where} {error}, expected JSON of datasets") from error
    if names is None or names == []:
        return ()
    # never a text, which for read_classes is the path of a file here
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{where}: class names are {short(names)}, expected a list of texts")
    with describing(where):
        return read_classes(names)
