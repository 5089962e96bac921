"""Which weights a checkpoint has, and whose run it is."""

import shutil
from pathlib import Path

import pytest

from repa_fast.checkpoint.layout import run_folder, weights_of
from tests.eval import checkpoints
from tests.refusals import refused


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with three averages at steps 7 and 9."""
    folder = tmp_path_factory.mktemp("layout") / "run"
    return checkpoints.run(folder, steps=(7, 9), ema_decay="0.9,0.5,0.1")


def test_the_weights_of_a_checkpoint_are_listed(run, tmp_path):
    checkpoint = run / "checkpoints" / "0000007"
    assert weights_of(checkpoint) == ["model", "ema", "ema_2", "ema_3"]
    refused(lambda: weights_of(tmp_path), "is not a complete checkpoint")


def test_a_run_is_found_from_what_is_in_it(run, tmp_path, monkeypatch):
    folder = run / "checkpoints"
    for name in ("0000007", "0000009.pt", "0000007-ema_2.safetensors", "step-7.pt"):
        assert run_folder(folder / name) == run
    assert run_folder(run) == run_folder(folder) == run
    shutil.copytree(folder / "0000007", tmp_path / "some" / "0000007")
    assert run_folder(tmp_path / "some" / "0000007") == tmp_path / "some"
    for name in ("0000007.pt", "checkpoints/last.pt", "x.safetensors"):
        assert run_folder(tmp_path / name) is None
    monkeypatch.chdir(folder)
    assert run_folder(Path("0000007")) == run_folder(Path("0000007.pt")) == run
    for name in (".", "..", "../checkpoints/0000007.pt"):
        assert run_folder(Path(name)).resolve() == run
    monkeypatch.chdir(run)
    assert run_folder(Path("checkpoints/0000007.pt")).resolve() == run
    assert run_folder(tmp_path / "some" / "..") is None
