"""Checkpoints from strangers: nothing in them is run, and what is refused is named."""

import json
import pickle
import random
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
from repa_fast.checkpoint.index import describe, described_by_pickle, metadata_of
from repa_fast.checkpoint.layout import load_weights, read_native
from repa_fast.checkpoint.marker import MARKER, trusted
from repa_fast.train import checkpoint
from tests.refusals import refused
from tests.sealing import reseal
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


def write(index: Metadata | bytes, target: Path) -> None:
    """Put an index into a checkpoint, which has no other, as earlier versions wrote them."""
    data = index if isinstance(index, bytes) else pickle.dumps(index)
    (target / ".metadata").write_bytes(data)
    (target / "index.json").unlink()
    reseal(target)


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
    refused(lambda: load_weights(target, state.model), words)
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
    write(content, target)
    words = rf"\.metadata is not a readable index of a checkpoint: .*{words}"
    refused(lambda: read_native(target, "model."), words)


DEEP = (1, 1)
for _ in range(40):
    DEEP = (DEEP, DEEP)


class Laughing:
    """A size of two of what is before it, forty times over."""

    def __reduce__(self):
        return torch.Size, (DEEP,)


@pytest.mark.parametrize("where", ["size", "fqn"])
def test_what_doubles_again_and_again_is_refused_at_once(target, index, where):
    if where == "size":
        next(iter(index.state_dict_metadata.values())).size = Laughing()
    else:
        object.__setattr__(next(iter(index.storage_data)), "fqn", DEEP)
    write(index, target)
    refused(lambda: read_native(target, "ema."), r"\.metadata is not a readable index")


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
    reseal(target)
    words = r"__0_0\.distcp holds pickled bytes for ema\.pos_embed"
    refused(lambda: load_weights(target, state.model), words)
    assert "pos_embed" not in read_native(target, "ema.")  # left out where nobody asks for it
    assert not proof.exists()
    tensors = {f"ema.{name}": tensor for name, tensor in weights.items()}
    dcp.load(tensors, checkpoint_id=target, no_dist=True)
    assert proof.exists()


def test_code_in_a_tensors_place_is_refused_and_not_run(target, index, state, proof):
    shard = target / "__0_0.distcp"
    torch.save([Hostile(proof), bytes(1 << 20)], shard)  # as long as any tensor
    for place in index.storage_data.values():
        place.offset, place.length = 0, shard.stat().st_size
    write(index, target)
    words = "0000000 cannot be loaded: what lies in the place of a tensor is none"
    assert "weights_only" not in refused(lambda: checkpoint.load(target, state), words)
    assert not proof.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02cpathlib\nPosixPath\nN}X\x04\0\0\0nameX\x05\0\0\0owneds\x86b.",
        b"\x80\x02cpathlib\nPosixPath\nX\x04\0\0\0nameX\x05\0\0\0owneds.",
        b"\x80\x02ctorch\nSize\n(dX\x01\0\0\0xX\x01\0\0\0yub.",
    ],
    ids=["state", "item", "items"],
)
def test_a_pickle_cannot_change_a_class_of_this_process(target, content):
    """BUILD on a class sets its attributes: so Path.name, which an export writes to, was owned."""
    write(content, target)
    refused(lambda: read_native(target, "ema."), r"\.metadata is not a readable index")
    assert Path("a/b").name == "b" and not hasattr(torch.Size, "x")


def test_the_index_is_json_and_says_what_torchs_does(saved, index):
    own = json.loads((saved / "index.json").read_text())
    assert (
        own
        == describe(index, index.storage_data)
        == described_by_pickle((saved / ".metadata").read_bytes())
    )
    assert described(metadata_of(own)) == described(index)


OPCODES = [v for v in vars(pickle).values() if isinstance(v, bytes) and len(v) == 1]
OPCODES += [b"cos\nsystem\n", b"cpathlib\nPosixPath\n", b"ctorch\nSize\n", b"(", b")R", b"}b"]


def mutated(data: bytes, draw: random.Random) -> bytes:
    """With a few bytes changed, cut out or put in."""
    found = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        place, kind = draw.randrange(len(found) or 1), draw.randrange(4)
        if kind == 0:
            found[place : place + 1] = bytes([draw.randrange(256)])
        elif kind == 1:
            del found[place : place + draw.randint(1, 8)]
        elif kind == 2:
            found[place:place] = draw.choice(OPCODES)
        else:
            found = found[:place]
    return bytes(found)


@pytest.mark.parametrize("count", [500, pytest.param(100_000, marks=pytest.mark.heavy)])
@pytest.mark.parametrize("name", [".metadata", "index.json"])
def test_of_a_mutated_index_only_value_errors_come(tmp_path, name, count):
    """Or an index, where the mutation hit what does not matter, or makes another one."""
    weights = {"ema": {"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}}
    dcp.save(weights, checkpoint_id=tmp_path, no_dist=True)
    data = (tmp_path / ".metadata").read_bytes()
    if name == "index.json":
        data = json.dumps(described_by_pickle(data)).encode()
    before = {kind: dict(vars(kind)) for kind in (Metadata, type(Path()), TensorProperties)}
    draw, messages = random.Random(0), []
    (tmp_path / MARKER).touch()
    with trusted():
        for _ in range(count):
            (tmp_path / name).write_bytes(mutated(data, draw))
            try:
                assert isinstance(reader.read_index(tmp_path), Metadata)
            except ValueError as error:
                messages.append(str(error))
    assert len(messages) > count / 2
    assert not [text for text in messages if "\n" in text]
    assert before == {kind: dict(vars(kind)) for kind in before}


@pytest.mark.parametrize(
    "tensors, words",
    [
        ({"a": ["float32", [2, 3], []]}, "a has shape .*, its parts do not cover it"),
        ({"a": ["float32", [2], [[[1], [2], "x", 0, 8]]]}, "a part of it ends outside"),
        ({"a": ["float32", [2], [[[0], [1], "x", 0, 8]] * 2]}, "its parts do not cover it"),
        ({"a": ["float32", [2], [[[0, 0], [2, 1], "x", 0, 8]]]}, "1 axes, a part of it others"),
        ({"a": ["float32", [2], [[[0], [2], "../x", 0, 8]]]}, r"points to '\.\./x'"),
        ({"a": ["float32", [2], [[[0], [2], "x", -1, 8]]]}, "expected whole numbers"),
        ({"a": ["float32", [2.0], [[[0], [2], "x", 0, 8]]]}, "expected whole numbers"),
        ({"a": ["object", [2], [[[0], [2], "x", 0, 8]]]}, "object"),
        ({"a": ["quint8", [2], [[[0], [2], "x", 0, 8]]]}, "quint8"),
        ({"a": ["float32", [2**61, 2**61, 0], []]}, "less than 2.62 elements"),
        ({"a": ["float32", [2**40], [[[0], [2**40], "x", 0, 8]]]}, "a part of it only 8 bytes"),
        ({"a": ["float32", [2**40], [[[0], [2**40], "x", 0, 2**43]]]}, "bytes of x, which has 8"),
        ([], "AttributeError"),
    ],
)
def test_an_index_that_cannot_be_is_refused(tmp_path, tensors, words):
    (tmp_path / "x").write_bytes(bytes(8))
    (tmp_path / "index.json").write_text(json.dumps({"tensors": tensors, "bytes": {}}))
    reseal(tmp_path)
    refused(lambda: read_native(tmp_path, ""), r"index\.json is not a readable index.*", words)
