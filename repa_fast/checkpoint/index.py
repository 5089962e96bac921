"""The index of a checkpoint: its tensors, and where their parts lie.

torch writes it with pickle, and reading that builds whatever objects its author likes. Here it is
JSON, which the writer compares with torch's. Of a checkpoint that has torch's alone the pickle is
read by Python's own unpickler, in which nothing is called: what the file asks to be built becomes
an inert `Made`, of which descriptions of tensors are then read, or which is refused.

The JSON is {"tensors": {name: [dtype, shape, parts]}, "bytes": {name: part}}, with a part
[offset in the tensor, shape, file, first byte, bytes]. Bytes (pickled objects) are never read.
"""

import io
import pickle
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from repa_fast.checkpoint.marker import expect_intact
from repa_fast.whole import parse_json, read_regular
from repa_fast.words import one_line, short

INDEX, PICKLED = "index.json", ".metadata"
KINDS = ("float16", "bfloat16", "float32", "float64", "bool")
KINDS += ("uint8", "int8", "int16", "int32", "int64")
DTYPES = {name: getattr(torch, name) for name in KINDS}
DESCRIBES = "torch.distributed.checkpoint.metadata."
MOST = 2**62
"""Above any number of elements or bytes."""
NAMES = {
    *(DESCRIBES + name for name in ("Metadata", "MetadataIndex", "StorageMeta")),
    *(DESCRIBES + name for name in ("TensorStorageMetadata", "BytesStorageMetadata")),
    *(DESCRIBES + name for name in ("TensorProperties", "ChunkStorageMetadata")),
    DESCRIBES + "_MEM_FORMAT_ENCODING",
    "torch.distributed.checkpoint.filesystem._StorageInfo",
    "torch.serialization._get_layout",
    "torch.Size",
    "pathlib.PosixPath",
    "pathlib._local.PosixPath",  # Python 3.13
    *(f"torch.{name}" for name in DTYPES),
}
"""All that the indices of torch 2.11 to 2.15 name: the folder's path and tensors."""


def read_index(checkpoint: Path) -> Metadata:
    """Read what lies in a checkpoint directory, and where.

    ValueError if there is no index, or it is damaged, names foreign code or files elsewhere.
    """
    own = (checkpoint / INDEX).exists()
    file = checkpoint / (INDEX if own else PICKLED)
    expect_intact(checkpoint, [file.name])
    try:
        data = read_regular(file)
        metadata = metadata_of(parse_json(data, file) if own else described_by_pickle(data))
        _expect_long_enough(checkpoint, metadata)
        return metadata
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        reason = one_line(f"{type(error).__name__}: {error}")
        raise ValueError(f"{file} is not a readable index of a checkpoint: {reason}") from error


def describe(metadata: Metadata, places: dict[MetadataIndex, _StorageInfo]) -> dict:
    """Return what torch's metadata says of tensors that lie in `places`, as the JSON has it."""
    tensors = {}
    for name, entry in metadata.state_dict_metadata.items():
        parts = []
        for chunk in entry.chunks:
            place = places[MetadataIndex(name, chunk.offsets)]
            where = [place.relative_path, place.offset, place.length]
            parts.append([[*chunk.offsets], [*chunk.sizes], *where])
        tensors[name] = [str(entry.properties.dtype)[6:], [*entry.size], parts]
    return {"tensors": tensors, "bytes": {}}


def metadata_of(described: dict) -> Metadata:
    """Return torch's metadata for what the JSON says; ValueError where that cannot be."""
    entries: dict = {}
    places = {}
    for name, (dtype, shape, parts) in described["tensors"].items():
        size, chunks = _sizes(shape), []
        if prod(axis or 1 for axis in size) >= MOST:  # torch multiplies axes beside a 0 too
            raise ValueError(f"{name} has shape {short(shape)}, expected less than 2^62 elements")
        for offset, sizes, *where in parts:
            offset, sizes = _sizes(offset), _sizes(sizes)
            if not len(size) == len(offset) == len(sizes):
                raise ValueError(f"{name} has {len(size)} axes, a part of it others")
            if any(a + b > c for a, b, c in zip(offset, sizes, size)):
                raise ValueError(f"{name} has shape {shape}, a part of it ends outside")
            chunks.append(ChunkStorageMetadata(offset, sizes))
            place = places[MetadataIndex(name, offset)] = _place(*where)
            if place.length < prod(sizes) * DTYPES[dtype].itemsize:
                raise ValueError(
                    f"{name} has shape {shape}, a part of it only {place.length} bytes"
                )
        if sum(prod(chunk.sizes) for chunk in chunks) != prod(size) or _overlap(chunks):
            raise ValueError(f"{name} has shape {shape}, its parts do not cover it")
        properties = TensorProperties(dtype=DTYPES[dtype])
        entries[name] = TensorStorageMetadata(properties, size, chunks)
    for name, where in described["bytes"].items():
        entries[name] = BytesStorageMetadata()
        places[MetadataIndex(name)] = _place(*where)
    return Metadata(entries, storage_data=places, storage_meta=StorageMeta())


def _expect_long_enough(checkpoint: Path, metadata: Metadata) -> None:
    """Raise ValueError if a part ends behind its file: files bound the memory of tensors."""
    ends: dict[str, int] = {}
    for place in metadata.storage_data.values():
        name = place.relative_path
        ends[name] = max(ends.get(name, 0), place.offset + place.length)
    for name, end in ends.items():
        file = checkpoint / name
        if file.exists() and file.stat().st_size < end:
            raise ValueError(f"it reads {end} bytes of {name}, which has {file.stat().st_size}")


def _sizes(values: list) -> torch.Size:
    if not all(type(value) is int and 0 <= value < MOST for value in values):
        raise ValueError(f"a shape or offset is {short(values)}, expected whole numbers")
    return torch.Size(values)


def _overlap(chunks: list[ChunkStorageMetadata]) -> bool:
    """Return whether two parts of a tensor have an element in common."""
    if len(chunks) < 2:
        return False
    start = np.array([chunk.offsets for chunk in chunks])
    end = start + np.array([chunk.sizes for chunk in chunks])
    apart = (np.maximum(start[:, None], start) >= np.minimum(end[:, None], end)).any(-1)
    np.fill_diagonal(apart, True)
    return not apart.all()


def _place(file: str, start: int, length: int) -> _StorageInfo:
    if file in ("", "..") or file != Path(file).name:
        raise ValueError(f"it points to {file!r}, expected a file beside it")
    return _StorageInfo(file, *_sizes([start, length]))


@dataclass(eq=False, slots=True)
class Made:
    """What a pickle asks to be built: the name of a class or function, its arguments, its state."""

    name: str
    arguments: object = None
    state: object = None


class Inert(pickle._Unpickler):
    """Python's own unpickler, with the opcodes that indices have; it looks nothing up."""

    def find_class(self, module: str, name: str) -> Made:
        if f"{module}.{name}" not in NAMES:
            raise ValueError(f"it names {module}.{name}, expected descriptions of tensors alone")
        return Made(f"{module}.{name}".removeprefix(DESCRIBES))

    def load_reduce(self) -> None:
        arguments, made = self.stack.pop(), self.stack.pop()
        if type(made) is not Made or made.arguments is not None or type(arguments) is not tuple:
            raise ValueError("it calls what is no class or function")
        self.append(Made(made.name, arguments))

    def load_build(self) -> None:
        state, made = self.stack.pop(), self.stack[-1]
        if type(made) is not Made or made.arguments is None:
            raise ValueError("it gives a state to what is no object")
        made.state = state

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def load_setitems(self) -> None:
        self._set(self.pop_mark())

    def _set(self, items: list) -> None:
        found = self.stack[-1]
        if type(found) is not dict or {*map(type, items[::2])} - {str, Made}:
            raise ValueError("it sets items of what is no dictionary by name")
        found.update(zip(items[::2], items[1::2], strict=True))

    dispatch = {
        op[0]: pickle._Unpickler.dispatch[op[0]]
        for op in (
            *(pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.GLOBAL),
            *(pickle.STACK_GLOBAL, pickle.MEMOIZE, pickle.BINPUT, pickle.LONG_BINPUT),
            *(pickle.BINGET, pickle.LONG_BINGET, pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE),
            *(pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.BINUNICODE),
            *(pickle.SHORT_BINUNICODE, pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1),
            *(pickle.TUPLE2, pickle.TUPLE3, pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS),
            pickle.EMPTY_DICT,
        )
    } | {
        pickle.REDUCE[0]: load_reduce,
        pickle.NEWOBJ[0]: load_reduce,
        pickle.BUILD[0]: load_build,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
    }


def described_by_pickle(data: bytes) -> dict:
    """Return what a pickled index says, as the JSON has it; any exception if it is none."""
    index = _state(Inert(io.BytesIO(data)).load(), "Metadata")
    places = {}
    for key, info in index["storage_data"].items():
        key, info = _state(key, "MetadataIndex"), _state(info, "_StorageInfo")
        where = [info["relative_path"], info["offset"], info["length"]]
        offset = key.get("offset")
        if type(key["fqn"]) is not str:
            raise ValueError("it describes a tensor without a name")
        places[key["fqn"], offset and tuple(_size(offset))] = where
    tensors, objects = {}, {}
    for name, entry in index["state_dict_metadata"].items():
        if entry.name == "BytesStorageMetadata":
            objects[name] = places[name, None]
            continue
        entry = _state(entry, "TensorStorageMetadata")
        dtype = _state(entry["properties"], "TensorProperties", tuple)[0]
        parts = []
        for chunk in (_state(chunk, "ChunkStorageMetadata") for chunk in entry["chunks"]):
            offset, sizes = _size(chunk["offsets"]), _size(chunk["sizes"])
            parts.append([offset, sizes, *places[name, tuple(offset)]])
        tensors[name] = [dtype.name.removeprefix("torch."), _size(entry["size"]), parts]
    return {"tensors": tensors, "bytes": objects}


def _state(made: Made, name: str, kind: type = dict) -> dict:
    """Return the state of an object of that class; ValueError if it is another's."""
    got = made.name.rpartition(".")[2] if type(made) is Made else type(made).__name__
    if got != name or type(made.state) is not kind:
        raise ValueError(f"it holds a {got}, expected {name}")
    return made.state


def _size(made: Made) -> list[int]:
    """Return the numbers of a torch.Size."""
    if type(made) is not Made or made.name != "torch.Size":
        raise ValueError(f"it holds a {type(made).__name__}, expected torch.Size")
    return [*_sizes(*made.arguments)]
