"""A flipped byte is found by whoever reads the file that it is in, and by nobody else."""

import json
import shutil
from functools import partial

import pytest

from repa_fast import cli
from repa_fast.checkpoint import formats
from repa_fast.checkpoint.export import export
from repa_fast.checkpoint.layout import read_native, read_settings
from repa_fast.checkpoint.marker import damage, trusted
from repa_fast.eval.info import InfoConfig, info
from repa_fast.eval.load import load
from repa_fast.failure import Failure
from repa_fast.train.resume import start_from
from tests.eval import checkpoints
from tests.refusals import refused
from tests.train.conftest import resumed, tiny_state

TENSORS, SETTINGS = ("__0_0.distcp", "index.json"), ("config.json", "counters.json", "dataset.json")
READERS = {
    "read_native": (TENSORS, lambda copy, out: read_native(copy, "ema.")),
    "weights": (TENSORS, lambda copy, out: formats.read_weights(copy)),
    "init": (TENSORS, lambda copy, out: start_from(copy, "repa", tiny_state(enc_type="none"))),
    "settings": (SETTINGS, lambda copy, out: read_settings(copy)),
    "info": (TENSORS + SETTINGS, lambda copy, out: info(InfoConfig(path=str(copy)))),
    "load": (TENSORS + SETTINGS, lambda copy, out: load(copy)),
    "official": (TENSORS + SETTINGS, lambda copy, out: export(copy, "official", out / "x.pt")),
    "safetensors": (
        TENSORS + SETTINGS,
        lambda copy, out: export(copy, "safetensors", out / "x.safetensors"),
    ),
    "resume": (
        TENSORS + SETTINGS,
        lambda copy, out: resumed(out / "run", tiny_state(enc_type="none", resume=str(copy))),
    ),
}
"""(files that it reads, (checkpoint, a folder to write into) -> reads)"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return checkpoints.run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def flip(whole, tmp_path):
    """(file) -> a copy of the checkpoint in which one bit of the file is another."""

    def flip(name: str, at: float = 0.5):
        copy = shutil.copytree(whole / "checkpoints" / "0000007", tmp_path / "0000007")
        data = bytearray((copy / name).read_bytes())
        data[int(at * len(data))] ^= 4
        (copy / name).write_bytes(data)
        return copy

    return flip


@pytest.mark.parametrize("name", TENSORS + SETTINGS)
def test_whoever_reads_it_refuses_and_names_it(flip, tmp_path, name):
    copy = flip(name)
    for files, read in READERS.values():
        if name in files:
            words = rf"0000007 is damaged: wrong checksum of {name} \(--no-verify"
            refused(partial(read, copy, tmp_path), words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0000007"]
    assert damage(copy) == f"wrong checksum of {name}"


def test_what_is_not_read_is_not_compared(flip):
    """Weights for sampling do not depend on the marker's opinion of other files."""
    copy = flip("dataset.json")
    assert read_native(copy, "ema.") and formats.read_weights(copy)


def test_a_missing_file_and_one_that_the_marker_does_not_know_are_damage(flip):
    copy = flip("config.json")
    (copy / "config.json").unlink()
    refused(lambda: read_settings(copy), "0000007 is damaged: missing config.json")
    marker = json.loads((copy / "COMPLETE").read_text())
    del marker["counters.json"]
    (copy / "COMPLETE").write_text(json.dumps(marker))
    with trusted():
        assert read_native(copy, "ema.")
    refused(lambda: read_settings(copy), "config.json|does not know counters.json")
    assert damage(copy, ["counters.json"]) == "its file COMPLETE does not know counters.json"


def test_who_insists_reads_it_as_it_is(flip, tmp_path, capsys):
    copy = flip("__0_0.distcp")  # the bit of a weight
    out = tmp_path / "x.safetensors"
    for argv in (
        ["info", str(copy)],
        ["export", str(copy), "--to", "safetensors", "--out", str(out)],
        ["sample", "--ckpt", str(copy), "--out", str(tmp_path / "x.png"), "--num-steps", "2"],
        ["strip", "--ckpt", str(tmp_path), "--out", str(tmp_path / "y.png"), "--num-steps", "2"],
    ):
        assert cli.main(argv) == 2
        assert "is damaged: wrong checksum of __0_0.distcp" in capsys.readouterr().err
        assert cli.main([*argv, "--no-verify"]) == 0
    state = tiny_state(resume=str(copy), verify=False, batch_size=48, **checkpoints.TINY)
    assert resumed(tmp_path / "run", state) == copy and state.step == 7


def test_exported_weights_have_their_checksum_beside_them(whole, tmp_path):
    out = tmp_path / "x.safetensors"
    export(whole / "checkpoints" / "0000007", "safetensors", out)
    assert load(out).digest == load(whole).digest
    data = bytearray(out.read_bytes())
    data[-5] ^= 1
    out.write_bytes(data)
    for read in (load, formats.read_weights, lambda path: info(InfoConfig(path=str(path)))):
        refused(partial(read, out), r"x\.safetensors is damaged: .* x\.json says")


@pytest.mark.parametrize("to, name", [("official", "x.pt"), ("safetensors", "x.safetensors")])
def test_an_export_that_a_full_disk_refuses_is_one_line(whole, tmp_path, monkeypatch, to, name):
    """torch and safetensors raise errors of their own then."""

    def fails(*_):
        raise RuntimeError("[enforce fail at inline_container.cc:671]\nunexpected pos")

    monkeypatch.setattr("torch.save", fails)
    monkeypatch.setattr("safetensors.torch.save_file", fails)
    call = partial(export, whole / "checkpoints" / "0000007", to, tmp_path / name)
    refused(call, f"{name} could not be written: .*unexpected pos", error=Failure)
    assert list(tmp_path.iterdir()) == []
