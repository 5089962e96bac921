"""Checkpoints from strangers: nothing in them is run, and what is refused is named."""

import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, TensorProperties

from repa_fast.checkpoint import reader
from repa_fast.checkpoint.layout import MARKER, load_ema, read_native
from repa_fast.train import checkpoint


class Hostile:
    """Unpickling it creates a file."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self):
        return Path.touch, (self.proof,)


@pytest.fixture
def state(make_state):
    return make_state(enc_type="none")


@pytest.fixture
def target(state, tmp_path):
    return checkpoint.save(tmp_path / "checkpoints", state)


@pytest.fixture
def proof(tmp_path):
    return tmp_path / "code-ran"


def described(index: Metadata) -> dict:
    entries = index.state_dict_metadata.items()
    return {name: (entry.size, entry.chunks, entry.properties.dtype) for name, entry in entries}


def test_what_torch_writes_is_read(target, state):
    found = described(reader.read_index(target))
    assert found == described(dcp.FileSystemReader(target).read_metadata())
    assert found.keys() == checkpoint.tensors(state).keys()


def test_fields_of_later_versions_of_torch_are_left_out(target, state, monkeypatch):
    index = dcp.FileSystemReader(target).read_metadata()
    get_state = TensorProperties.__getstate__
    with monkeypatch.context() as later:
        later.setattr(TensorProperties, "__getstate__", lambda p: (*get_state(p), "new"))
        (target / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(ValueError, match="too many values"):
        dcp.FileSystemReader(target).read_metadata()
    assert described(reader.read_index(target)) == described(index)
    checkpoint.load(target, state)


def hide(index: Metadata, proof: Path, where: str) -> None:
    if where == "planner_data":
        index.planner_data = Hostile(proof)
    elif where == "size":
        next(iter(index.state_dict_metadata.values())).size = Hostile(proof)
    else:
        index.storage_meta.checkpoint_id = Hostile(proof)


@pytest.mark.parametrize("where", ["planner_data", "size", "storage_meta"])
def test_code_in_the_index_is_refused_and_not_run(target, state, proof, where):
    index = dcp.FileSystemReader(target).read_metadata()
    hide(index, proof, where)
    (target / ".metadata").write_bytes(pickle.dumps(index))
    for read in (
        lambda: checkpoint.load(target, state),
        lambda: read_native(target, "ema."),
        lambda: load_ema(target, state.model),
    ):
        with pytest.raises(
            ValueError, match=r"0000000/\.metadata is not .*it names pathlib.*Path\.touch"
        ):
            read()
    assert not proof.exists()
    dcp.FileSystemReader(target).read_metadata()
    assert proof.exists()  # torch's own reader runs it


@pytest.mark.parametrize(
    "names",
    [("os", "system"), ("builtins", "eval"), ("torch", "load"), ("torch", "Size.__new__"),
     ("torch.serialization", "load"), ("pathlib", "Path.unlink")],
)  # fmt: skip
def test_names_that_are_no_description_are_refused(tmp_path, names):
    stack = [b"\x80\x04", *(b"\x8c" + bytes([len(n)]) + n.encode() for n in names), b"\x93."]
    (tmp_path / ".metadata").write_bytes(b"".join(stack))
    with pytest.raises(ValueError, match=rf"\.metadata .*it names {'.'.join(names)}"):
        reader.read_index(tmp_path)


def test_bytes_in_place_of_a_tensor_are_refused_and_not_run(state, tmp_path, proof):
    weights = state.model.state_dict()
    target = tmp_path / "0000000"
    hostile = {**weights, "pos_embed": Hostile(proof)}
    dcp.save({"ema": hostile}, checkpoint_id=target, no_dist=True)
    (target / MARKER).write_text("{}")
    with pytest.raises(ValueError, match=r"__0_0\.distcp holds pickled bytes for ema\.pos_embed"):
        load_ema(target, state.model)
    assert "pos_embed" not in read_native(target, "ema.")  # left out where nobody asks for it
    assert not proof.exists()
    tensors = {f"ema.{name}": tensor for name, tensor in weights.items()}
    dcp.load(tensors, checkpoint_id=target, no_dist=True)
    assert proof.exists()


def test_code_in_a_tensors_place_is_refused_and_not_run(target, state, proof):
    shard = target / "__0_0.distcp"
    torch.save(Hostile(proof), shard)
    index = dcp.FileSystemReader(target).read_metadata()
    for place in index.storage_data.values():
        place.offset, place.length = 0, shard.stat().st_size
    (target / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(ValueError, match=r"0000000 cannot be loaded: .*[Ww]eights.only"):
        checkpoint.load(target, state)
    assert not proof.exists()


@pytest.mark.parametrize("path", ["../../outside", "/etc/passwd", "inside/file", ".."])
def test_an_index_cannot_point_outside_its_folder(target, path):
    index = dcp.FileSystemReader(target).read_metadata()
    next(iter(index.storage_data.values())).relative_path = path
    (target / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(ValueError, match=r"\.metadata .*it points to .*expected a file beside it"):
        read_native(target, "model.")


@pytest.mark.parametrize("content", [b"", b"\x80\x04N.", b"\x80\x04]}a.", b"garbage"])
def test_a_damaged_index_is_named(target, content):
    (target / ".metadata").write_bytes(content)
    with pytest.raises(ValueError, match=r"\.metadata is not a readable index of a checkpoint"):
        read_native(target, "model.")


def test_no_checkpoint_holds_anything_but_tensors(target):
    entries = reader.read_index(target).state_dict_metadata.values()
    assert {type(entry).__name__ for entry in entries} == {"TensorStorageMetadata"}
