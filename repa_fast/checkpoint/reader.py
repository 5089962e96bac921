"""Tensors in files of torch.distributed.checkpoint, read without executing code.

torch reads what an index declares to be bytes with torch.load(weights_only=False), which runs what
a file's author likes. Here bytes are never read: what is not a tensor lies beside them as JSON.
"""

import pickle
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException, DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata

from repa_fast.checkpoint.index import read_index
from repa_fast.checkpoint.marker import expect_intact
from repa_fast.words import one_line


def load(tensors: dict[str, torch.Tensor], checkpoint: Path, *, no_dist: bool = True) -> None:
    """Read `tensors` by name, in place; DTensors get their shards, however they were saved.

    ValueError if one is missing, unreadable, of another shape, or not a tensor, or if a file that
    is read is damaged.
    """
    expect_no_warnings()
    reader = _Reader(checkpoint)
    places = reader.read_metadata().storage_data.items()
    expect_intact(checkpoint, {place.relative_path for of, place in places if of.fqn in tensors})
    try:
        dcp.load(tensors, storage_reader=reader, planner=_Tensors(reader), no_dist=no_dist)
    except CheckpointException as error:
        raise ValueError(f"{checkpoint} cannot be loaded: {reasons(error)}") from error


def reasons(error: BaseException) -> str:
    """Return an error of a save or load in one line, without the stacks that torch lists."""
    if isinstance(error, pickle.UnpicklingError):  # torch's text advises to run it
        return "what lies in the place of a tensor is none"
    if not isinstance(error, CheckpointException):
        return one_line(f"{type(error).__name__}: {error}")
    found = {rank: reasons(failure) for rank, (failure, _) in error.failures.items()}
    if len(set(found.values())) == 1:
        return next(iter(found.values()))
    return "; ".join(f"process {rank}: {text}" for rank, text in found.items())


def expect_no_warnings() -> None:
    """Silence torch, also in its threads: a process may save alone, and nothing is overwritten."""
    for message in ("torch.distributed is disabled", "Detected an existing checkpoint"):
        warnings.filterwarnings("ignore", message=message)


class _Reader(dcp.FileSystemReader):
    """torch's, with the index read once, at construction, by `read_index`."""

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(checkpoint)
        self._index = read_index(checkpoint)
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
