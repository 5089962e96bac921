"""Files of torch.distributed.checkpoint, read without executing code.

torch reads the index of a checkpoint, `.metadata`, with pickle.load, and what the index declares to
be bytes with torch.load(weights_only=False): both run what a file's author likes. Here the index
may name the classes that describe tensors and nothing else, and bytes are never read: what is not
a tensor lies beside them as JSON.
"""

import pickle
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException, DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

INDEX = ".metadata"
ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorStorageMetadata",
        "TensorProperties",
        "ChunkStorageMetadata",
        "BytesStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"} | {str(v)[6:] for v in vars(torch).values() if isinstance(v, torch.dtype)},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},  # Python 3.13
}
"""By module, all that the indices of torch 2.11 to 2.15 name: the folder's path and tensors."""


class Properties(TensorProperties):
    """torch's, without the fields of later versions, which make those before them fail."""

    def __setstate__(self, state: tuple) -> None:
        super().__setstate__(state[:5])


class Index(pickle.Unpickler):
    """An unpickler that knows the classes of ALLOWED; anything else is an error, not a call."""

    def find_class(self, module: str, name: str) -> object:
        if name not in ALLOWED.get(module, ()):
            raise ValueError(f"it names {module}.{name}, expected descriptions of tensors alone")
        return Properties if name == "TensorProperties" else super().find_class(module, name)


def read_index(checkpoint: Path) -> Metadata:
    """Read what lies in a checkpoint directory, and where.

    ValueError if there is no index, or it is damaged, names foreign code or files elsewhere.
    """
    file = checkpoint / INDEX
    try:
        with open(file, "rb") as stream:
            return _checked(Index(stream).load())
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(f"{file} is not a readable index of a checkpoint: {error}") from error


def load(tensors: dict[str, torch.Tensor], checkpoint: Path, *, no_dist: bool = True) -> None:
    """Read `tensors` by name, in place; DTensors get their shards, however they were saved.

    ValueError if one is missing, unreadable, of another shape, or not a tensor.
    """
    single_process_is_meant()
    reader = _Reader(checkpoint)
    try:
        dcp.load(tensors, storage_reader=reader, planner=_Tensors(reader), no_dist=no_dist)
    except CheckpointException as error:
        raise ValueError(f"{checkpoint} cannot be loaded: {reasons(error)}") from error


def reasons(error: BaseException) -> str:
    """Return an error of a save or load in one line, without the stacks that torch lists."""
    if not isinstance(error, CheckpointException):
        return f"{type(error).__name__}: {error}"
    found = {rank: reasons(failure) for rank, (failure, _) in error.failures.items()}
    if len(set(found.values())) == 1:
        return next(iter(found.values()))
    return "; ".join(f"process {rank}: {text}" for rank, text in found.items())


def single_process_is_meant() -> None:
    """Silence torch's warning that a process saves or loads alone, also from its threads."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")


class _Reader(dcp.FileSystemReader):
    """torch's, with the index read once, at construction, by `read_index`."""

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(checkpoint)
        self._index = read_index(checkpoint)
        self._index.storage_meta = self._index.storage_meta or StorageMeta()
        self._index.storage_meta.load_id = self.load_id

    def read_metadata(self) -> Metadata:
        return self._index


class _Tensors(DefaultLoadPlanner):
    """torch's, refusing to unpickle what an index declares to be bytes."""

    def __init__(self, reader: _Reader) -> None:
        super().__init__()
        self._reader = reader

    def load_bytes(self, read_item, value) -> None:
        file = self._reader.storage_data[read_item.storage_index].relative_path
        raise ValueError(
            f"{self._reader.path / file} holds pickled bytes for {read_item.storage_index.fqn}, "
            "expected a tensor"
        )


def _checked(index: object) -> Metadata:
    if not isinstance(index, Metadata):
        raise ValueError(f"it holds a {type(index).__name__}, expected Metadata")
    for name, entry in index.state_dict_metadata.items():
        if not isinstance(entry, (TensorStorageMetadata, BytesStorageMetadata)):
            raise ValueError(f"{name} is a {type(entry).__name__}, expected a tensor's description")
    for place in index.storage_data.values():
        name = place.relative_path
        if name in ("", "..") or name != Path(name).name:
            raise ValueError(f"it points to {name!r}, expected a file beside it")
    return index
