"""The same .npz by any number of processes, and after any end of them."""

import errno
import random
import resource
import shutil

import pytest

from repa_fast import cli
from repa_fast.eval import generate as generating
from repa_fast.eval.generate import generate
from tests.eval.generating import (
    BATCH,
    MOMENTS,
    Cut,
    arguments,
    assert_same,
    cut,
    cut_at,
    in_world,
    killed,
    records,
)
from tests.refusals import refused


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


@pytest.mark.parametrize("kills", [1, pytest.param(4, marks=pytest.mark.heavy)])
def test_killed_at_random_moments_and_gone_on_with(make, tmp_path, kills):
    generator, blocks = random.Random(0), 2 + 3 * kills
    settings = {"num_fid_samples": blocks * BATCH, "num_steps": 30}
    config = make(tmp_path / "killed", **settings)
    for _ in range(kills):
        done = records(tmp_path / "killed")
        killed(config, after=done + 1, pause=generator.uniform(0, 0.05))
    assert kills <= records(tmp_path / "killed") < blocks
    assert_same(generate(config), generate(make(tmp_path / "whole", **settings)))


@pytest.mark.parametrize("moment", MOMENTS)
def test_cut_off_it_goes_on_with_what_is_left(make, whole, tmp_path, monkeypatch, sampled, moment):
    with monkeypatch.context() as patch:
        cut_at(patch, moment)
        with pytest.raises(Cut):
            generate(make(tmp_path))
    assert (tmp_path / whole.name).exists() == (moment == "removing")
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
    monkeypatch.setattr(generating, "ImageSampler", cut)
    assert generate(make(tmp_path)) == tmp_path / whole.name
    other = make(tmp_path, cfg_scale=1.50000001)  # the name has fewer digits
    refused(lambda: generate(other), r"cfg_scale: 1\.5, now 1\.50000001.*--sample-dir")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_begun_work_of_other_settings_is_not_gone_on_with(make, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        cut_at(patch, "joining")
        with pytest.raises(Cut):
            generate(make(tmp_path))
    other = make(tmp_path, cfg_scale=1.50000001)
    refused(lambda: generate(other), r"cfg_scale: 1\.5, now 1\.50000001")


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
