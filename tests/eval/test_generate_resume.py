"""The same .npz by any number of processes, and after any end of them."""

import dataclasses
import errno
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from repa_fast import cli
from repa_fast.distributed import World
from repa_fast.eval import generate as generating
from repa_fast.eval.generate import GenerateConfig, generate
from repa_fast.ledger import Ledger
from tests.eval.conftest import BATCH
from tests.refusals import refused

ROOT = Path(__file__).parents[2]


class Cut(Exception):
    """The end of a process at a moment that a test chooses."""


def is_last_of_joined(block: Path) -> bool:
    return block.stem == "000002" and any(block.parents[1].glob("*.partial"))


MOMENTS = {
    "sampling": (generating, "sample_block", lambda sampler, config, block: block == 1),
    "block written, no record": (Ledger, "write", None),
    "sheet": (generating, "save_png", None),
    "json": (generating, "write_whole", lambda path, text: "n-20.json" in path.name),
    "joining": (np, "load", is_last_of_joined),
    "naming": (Path, "replace", lambda path, target: target.suffix == ".npz"),
    "removing": (Ledger, "remove", None),
}
"""Where a process may end: (owner, function, at which of its calls; at the first if None)."""


@pytest.fixture
def cut_off(monkeypatch):
    """(config, moment) -> generate until then."""

    def end(config, moment: str) -> None:
        owner, name, is_then = MOMENTS[moment]
        original = getattr(owner, name)

        def call(*arguments, **options):
            if is_then is None or is_then(*arguments):
                raise Cut
            return original(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, call)
            with pytest.raises(Cut):
                generate(config)

    return end


@pytest.fixture
def sampled(monkeypatch):
    """The blocks that are sampled."""
    made, sample_block = [], generating.sample_block

    def spied(sampler, config, block):
        made.append(block)
        return sample_block(sampler, config, block)

    monkeypatch.setattr(generating, "sample_block", spied)
    return made


def be(monkeypatch, rank: int, world_size: int) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world_size))


def arguments(config: GenerateConfig) -> list[str]:
    """The command line of a config."""
    given = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    plain = vars(GenerateConfig(ckpt=""))
    changed = {name: value for name, value in given.items() if value != plain[name]}
    return [f"--{name.replace('_', '-')}={value}" for name, value in changed.items()]


def in_world(world: World, config: GenerateConfig) -> Path:
    """As one of the processes of `ranks`."""
    return generate(config)


def records(folder: Path) -> int:
    """Finished blocks of the work in a folder."""
    return len(list(folder.glob(".*.generating/[0-9]*.json")))


def assert_same(out: Path, expected: Path) -> None:
    """The same file, byte by byte, and nothing but what belongs beside it."""
    assert out.name == expected.name and out.read_bytes() == expected.read_bytes()
    left = sorted(path.suffix for path in out.parent.iterdir())
    assert left == [".json", ".npz", ".png"]


def test_two_processes_write_the_same_file(ranks, make, whole, tmp_path):
    assert ranks(in_world, make(tmp_path)) == [tmp_path / whole.name] * 2
    assert_same(tmp_path / whole.name, whole)


def test_processes_take_every_second_block_and_the_first_waits_for_the_others(
    make, whole, tmp_path, monkeypatch, sampled, capsys
):
    """As commands, of which the first alone says where the file is."""
    out = tmp_path / whole.name
    for rank, made, printed in ((1, [1], ""), (0, [1, 0, 2], f"{out}\n")):
        be(monkeypatch, rank, 2)
        assert cli.main(["generate", *arguments(make(tmp_path))]) == 0
        assert capsys.readouterr().out == printed
        assert sampled == made and out.exists() == (rank == 0)
    assert_same(out, whole)


def test_another_number_of_processes_goes_on(make, whole, tmp_path, monkeypatch):
    be(monkeypatch, 2, 3)
    generate(make(tmp_path))
    be(monkeypatch, 0, 1)
    assert_same(generate(make(tmp_path)), whole)


@pytest.mark.usefixtures("heavy")
def test_killed_at_random_moments_and_gone_on_with(make, tmp_path):
    kills, generator = 4, random.Random(0)
    blocks, folder = 2 + 3 * kills, tmp_path / "killed"
    settings = {"num_fid_samples": blocks * BATCH, "num_steps": 30}
    config = make(folder, **settings)
    command = [sys.executable, "-m", "repa_fast.eval.generate", *arguments(config)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for _ in range(kills):
        after, deadline = records(folder) + 1, time.monotonic() + 60
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        while records(folder) < after:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(generator.uniform(0, 0.05))
        assert process.poll() is None
        process.kill()
        process.communicate()
    assert kills <= records(folder) < blocks
    assert_same(generate(config), generate(make(tmp_path / "whole", **settings)))


@pytest.mark.parametrize("moment", MOMENTS)
def test_cut_off_it_goes_on_with_what_is_left_and_with_no_other_settings(
    make, whole, tmp_path, cut_off, sampled, moment
):
    """A process that is killed leaves half a file too."""
    cut_off(make(tmp_path), moment)
    other = make(tmp_path, cfg_scale=1.50000001)  # the name has fewer digits
    refused(lambda: generate(other), r"cfg_scale: 1\.5, now 1\.50000001")
    assert (tmp_path / whole.name).exists() == (moment == "removing")
    if moment != "removing":
        (tmp_path / f".{whole.name}.partial").write_bytes(b"half")
    sampled.clear()
    assert_same(generate(make(tmp_path)), whole)
    left = {"sampling": [1, 2], "block written, no record": [0, 1, 2]}
    assert sampled == left.get(moment, [])


def test_a_finished_file_is_left_as_it_is_and_is_not_taken_for_that_of_other_settings(
    make, whole, tmp_path, monkeypatch
):
    for path in whole.parent.iterdir():
        shutil.copy2(path, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    monkeypatch.setattr(generating, "ImageSampler", None)
    assert generate(make(tmp_path)) == tmp_path / whole.name
    other = make(tmp_path, cfg_scale=1.50000001)
    refused(lambda: generate(other), r"cfg_scale: 1\.5, now 1\.50000001.*--sample-dir")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("place, done", [("_write_block", 1), ("write_npz", 3)])
def test_a_full_disk_keeps_what_is_written(make, whole, tmp_path, monkeypatch, place, done):
    original = getattr(generating, place)

    def full(*all, **arrays):
        if place == "write_npz" or all[1] == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*all)

    with monkeypatch.context() as patch:
        patch.setattr(generating, place, full)
        message = rf"disk of .* is full; {done} of 3 batches are written and kept"
        refused(lambda: generate(make(tmp_path)), message, error=RuntimeError)
    assert records(tmp_path) == done
    assert_same(generate(make(tmp_path)), whole)


def test_the_systems_own_error_is_passed_on(make, whole, tmp_path):
    """numpy's tofile would say how many bytes were not written, but not why."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, old[1]))  # a block has 6 kB
    try:
        with pytest.raises(OSError) as raised:
            generate(make(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert raised.value.errno == errno.EFBIG
    assert_same(generate(make(tmp_path)), whole)
