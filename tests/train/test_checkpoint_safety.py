"""Checkpoints from strangers: nothing in them is run, and what is refused is named."""

import pickle
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import (
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from repa_fast.checkpoint import reader
from repa_fast.checkpoint.layout import MARKER, load_ema, read_native
from repa_fast.train import checkpoint
from tests.refusals import refused
from tests.train.conftest import tiny_state


class Hostile:
    """Unpickling it creates a file."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self):
        return Path.touch, (self.proof,)


@pytest.fixture(scope="module")
def state():
    return tiny_state(enc_type="none")


@pytest.fixture(scope="module")
def saved(state, tmp_path_factory):
    return checkpoint.save(tmp_path_factory.mktemp("saved"), state)


@pytest.fixture
def target(saved, tmp_path):
    """A checkpoint to do harm to."""
    return shutil.copytree(saved, tmp_path / saved.name)


@pytest.fixture
def index(saved):
    return dcp.FileSystemReader(saved).read_metadata()


@pytest.fixture
def proof(tmp_path):
    return tmp_path / "code-ran"


def write(index: Metadata, target: Path) -> None:
    (target / ".metadata").write_bytes(pickle.dumps(index))


def described(index: Metadata) -> dict:
    entries = index.state_dict_metadata.items()
    return {name: (entry.size, entry.chunks, entry.properties.dtype) for name, entry in entries}


def test_what_torch_writes_is_read_and_is_tensors_alone(saved, state, index):
    found = reader.read_index(saved)
    assert described(found) == described(index)
    assert described(found).keys() == checkpoint.tensors(state).keys()
    assert {type(entry) for entry in found.state_dict_metadata.values()} == {TensorStorageMetadata}


def test_fields_of_later_versions_of_torch_are_left_out(target, index, state, monkeypatch):
    get_state = TensorProperties.__getstate__
    with monkeypatch.context() as later:
        later.setattr(TensorProperties, "__getstate__", lambda p: (*get_state(p), "new"))
        write(index, target)
    refused(dcp.FileSystemReader(target).read_metadata, "too many values")
    assert described(reader.read_index(target)) == described(index)
    checkpoint.load(target, state)


@pytest.mark.parametrize("where", ["planner_data", "size", "checkpoint_id"])
def test_code_in_the_index_is_refused_and_not_run(target, index, state, proof, where):
    entry = next(iter(index.state_dict_metadata.values()))
    holders = {"planner_data": index, "size": entry, "checkpoint_id": index.storage_meta}
    setattr(holders[where], where, Hostile(proof))
    write(index, target)
    words = r"0000000/\.metadata is not .*it names pathlib.*Path\.touch"
    refused(lambda: checkpoint.load(target, state), words)
    refused(lambda: read_native(target, "ema."), words)
    refused(lambda: load_ema(target, state.model), words)
    assert not proof.exists()
    dcp.FileSystemReader(target).read_metadata()
    assert proof.exists()  # torch's own reader runs it


def naming(*names: str) -> bytes:
    """A pickle that looks up a name in a module."""
    stack = (b"\x8c" + bytes([len(name)]) + name.encode() for name in names)
    return b"\x80\x04" + b"".join(stack) + b"\x93."


STRANGERS = [("os", "system"), ("builtins", "eval"), ("torch", "load"), ("torch", "Size.__new__")]
STRANGERS += [("torch.serialization", "load"), ("pathlib", "Path.unlink")]


@pytest.mark.parametrize(
    "content, words",
    [(naming(*names), f"it names {'.'.join(names)}, expected") for names in STRANGERS]
    + [(content, "") for content in (b"", b"\x80\x04N.", b"\x80\x04]}a.", b"garbage")],
)
def test_an_index_that_is_damaged_or_names_anything_else_is_refused(target, content, words):
    (target / ".metadata").write_bytes(content)
    words = rf"\.metadata is not a readable index of a checkpoint: .*{words}"
    refused(lambda: read_native(target, "model."), words)


@pytest.mark.parametrize("path", ["../../outside", "/etc/passwd", "inside/file", ".."])
def test_an_index_cannot_point_outside_its_folder(target, index, path):
    next(iter(index.storage_data.values())).relative_path = path
    write(index, target)
    words = r"\.metadata .*it points to .*expected a file beside it"
    refused(lambda: read_native(target, "model."), words)


def test_bytes_in_place_of_a_tensor_are_refused_and_not_run(state, tmp_path, proof):
    weights = state.model.state_dict()
    target = tmp_path / "0000000"
    hostile = {**weights, "pos_embed": Hostile(proof)}
    dcp.save({"ema": hostile}, checkpoint_id=target, no_dist=True)
    (target / MARKER).write_text("{}")
    words = r"__0_0\.distcp holds pickled bytes for ema\.pos_embed"
    refused(lambda: load_ema(target, state.model), words)
    assert "pos_embed" not in read_native(target, "ema.")  # left out where nobody asks for it
    assert not proof.exists()
    tensors = {f"ema.{name}": tensor for name, tensor in weights.items()}
    dcp.load(tensors, checkpoint_id=target, no_dist=True)
    assert proof.exists()


def test_code_in_a_tensors_place_is_refused_and_not_run(target, index, state, proof):
    shard = target / "__0_0.distcp"
    torch.save(Hostile(proof), shard)
    for place in index.storage_data.values():
        place.offset, place.length = 0, shard.stat().st_size
    write(index, target)
    with pytest.raises(ValueError, match=r"0000000 cannot be loaded: .*[Ww]eights.only"):
        checkpoint.load(target, state)
    assert not proof.exists()
