"""The same .npz by any number of processes, and after any end of them."""

import dataclasses
import errno
import io
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest

from repa_fast import cli, lock
from repa_fast.distributed import World
from repa_fast.eval import generate as generating
from repa_fast.eval.generate import GenerateConfig, generate
from repa_fast.ledger import Ledger
from tests.eval.conftest import BATCH, COUNT
from tests.refusals import refused

ROOT = Path(__file__).parents[2]


class Cut(Exception):
    """The end of a process at a moment that a test chooses."""


def is_last_of_joined(ledger: Ledger, block: int, *_) -> bool:
    return block == 2 and any(ledger.folder.parent.glob(".*.npz-*"))


MOMENTS = {
    "sampling": (generating, "sample_block", lambda sampler, config, block: block == 1),
    "block written, no record": (Ledger, "write", None),
    "sheet": (generating, "save_png", None),
    "json": (generating, "write_whole", lambda path, text: "-n-20-" in path.name),
    "joining": (generating, "_read_block", is_last_of_joined),
    "naming": (os, "rename", lambda path, target: target.suffix == ".npz"),
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
def test_cut_off_it_goes_on_with_what_is_left(make, whole, tmp_path, cut_off, sampled, moment):
    """A process that is killed leaves half a file too."""
    cut_off(make(tmp_path), moment)
    assert (tmp_path / whole.name).exists() == (moment == "removing")
    if moment != "removing":
        (tmp_path / f".{whole.name}-0123abcd").write_bytes(b"half")
    sampled.clear()
    assert_same(generate(make(tmp_path)), whole)
    left = {"sampling": [1, 2], "block written, no record": [0, 1, 2]}
    assert sampled == left.get(moment, [])


def test_a_finished_file_is_left_as_it_is_and_images_of_other_settings_lie_beside(
    make, whole, tmp_path, monkeypatch
):
    for path in whole.parent.iterdir():
        shutil.copy2(path, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(generating, "ImageSampler", None)
        assert generate(make(tmp_path)) == tmp_path / whole.name
    other = generate(make(tmp_path, cfg_scale=1.50000001))  # the name's head has fewer digits
    assert other.name[:-12] == whole.name[:-12] and other.name != whole.name
    kept = {path: path.stat().st_mtime_ns for path in before}
    assert kept == before and len([*tmp_path.iterdir()]) == 2 * len(before)


def test_a_second_launch_is_refused_and_spoils_nothing(make, whole, tmp_path, cut_off):
    cut_off(make(tmp_path), "sampling")
    with lock.hold(tmp_path / f".{whole.stem}.generating"):
        refused(lambda: generate(make(tmp_path)), f"in use by process {os.getpid()} on ")
        assert records(tmp_path) == 1 and not (tmp_path / whole.name).exists()
    assert_same(generate(make(tmp_path)), whole)


def test_nothing_is_joined_that_does_not_match_its_record(
    make, whole, tmp_path, cut_off, sampled, capsys
):
    cut_off(make(tmp_path), "sheet")
    work = tmp_path / f".{whole.stem}.generating"
    flipped = bytearray((work / "000000.npy").read_bytes())
    flipped[-7] ^= 16
    (work / "000000.npy").write_bytes(flipped)
    (work / "000001.json").write_bytes(b"")
    (work / "000002.npy").unlink()
    sampled.clear()
    assert_same(generate(make(tmp_path)), whole)
    assert sampled == [1, 0, 2]  # a damaged record is seen first
    said = [line for line in capsys.readouterr().err.splitlines() if "computed again" in line]
    assert [line.partition(" does not match")[0][-10:] for line in said] == [
        "000000.npy", "000002.npy",
    ]  # fmt: skip


@pytest.mark.parametrize("images", [
    np.uint8(3),
    np.zeros((4, 16, 16, 3), np.uint8),
    np.zeros((BATCH, 16, 16, 3), np.float32),
    np.array([{}]),
])  # fmt: skip
def test_nothing_is_joined_that_matches_its_record_but_is_no_block(
    make, whole, tmp_path, cut_off, images
):
    cut_off(make(tmp_path), "sheet")
    ledger, buffer = tmp_path / f".{whole.stem}.generating", io.BytesIO()
    np.save(buffer, images)
    (ledger / "000001.npy").write_bytes(buffer.getvalue())
    (ledger / "000001.json").write_text(json.dumps({"crc32": zlib.crc32(buffer.getvalue())}))
    assert_same(generate(make(tmp_path)), whole)


def test_a_broken_file_is_kept_aside_and_made_again(make, whole, tmp_path, capsys):
    for path in whole.parent.iterdir():
        shutil.copy2(path, tmp_path)
    for number in (1, 2):
        half = whole.read_bytes()[: whole.stat().st_size // 2]
        (tmp_path / whole.name).write_bytes(half)
        out = generate(make(tmp_path))
        aside = out.with_name(f"{out.name}.broken-{number}")
        assert aside.read_bytes() == half and out.read_bytes() == whole.read_bytes()
        [said] = capsys.readouterr().err.splitlines()
        assert said.startswith(f"repa-fast: {out.name} is broken (") and aside.name in said
    assert len([*tmp_path.iterdir()]) == 5  # those two, and what belongs to the .npz


def test_what_is_wrong_with_a_file_is_seen_without_reading_its_images(whole, tmp_path):
    shape, file, data = (COUNT, 16, 16, 3), tmp_path / "x.npz", whole.read_bytes()
    assert generating.fault_of(whole, shape) == ""
    assert "expected (21, 16, 16, 3)" in generating.fault_of(whole, (21, 16, 16, 3))
    for bad in (b"", data[:100], data[:-1], data[1000:], data.replace(b"arr_1", b"arr_2")):
        file.write_bytes(bad)
        assert generating.fault_of(file, shape)
    np.savez(file, arr_0=np.zeros(shape, np.uint8), arr_1=np.zeros(COUNT - 1, np.int64))
    assert "arr_1 (19,)" in generating.fault_of(file, shape)
    assert generating.fault_of(tmp_path / "none", shape)


@pytest.mark.parametrize("place, done", [("_write_block", 1), ("write_npz", 3)])
def test_a_full_disk_keeps_what_is_written(make, whole, tmp_path, monkeypatch, place, done):
    original = getattr(generating, place)

    def full(*all, **arrays):
        if place == "write_npz" or all[1] == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*all)

    with monkeypatch.context() as patch:
        patch.setattr(generating, place, full)
        message = rf"disk of .* is full, .*; {done} of 3 batches are written and kept"
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
