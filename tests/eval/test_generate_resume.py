"""The same .npz by any number of processes, and after any end of them."""

import errno
import functools
import random
import resource
import shutil

import pytest

from repa_fast.eval import generate as generating
from repa_fast.eval.generate import generate
from tests.eval import checkpoints
from tests.eval.generating import (
    BATCH,
    Cut,
    assert_same,
    config_of,
    cut,
    cut_at,
    killed,
    records,
    start,
)


@pytest.fixture(autouse=True)
def same_precision():
    with checkpoints.precision_kept():
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return checkpoints.run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def make(run):
    """(folder, settings) -> config."""
    return functools.partial(config_of, run)


@pytest.fixture(scope="module")
def whole(make, tmp_path_factory):
    """Made at once by one process."""
    return generate(make(tmp_path_factory.mktemp("whole")))


def test_two_processes_write_the_same_file(make, whole, tmp_path):
    config = make(tmp_path)
    processes = {rank: start(config, rank, 2) for rank in (1, 0)}
    for rank, process in processes.items():
        printed, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
        assert printed.split() == ([] if rank else [str(tmp_path / whole.name)])
    assert_same(tmp_path / whole.name, whole)


def test_processes_take_every_second_block_and_the_first_waits_for_the_others(
    make, whole, tmp_path, monkeypatch
):
    made = []

    def sample_block(sampler, config, block):
        made.append(block)
        return original(sampler, config, block)

    original = generating.sample_block
    monkeypatch.setattr(generating, "sample_block", sample_block)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert not generate(make(tmp_path)).exists()
    assert made == [1]
    monkeypatch.setenv("RANK", "0")
    assert_same(generate(make(tmp_path)), whole)
    assert made == [1, 0, 2]


def test_another_number_of_processes_goes_on(make, whole, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "2")
    generate(make(tmp_path))
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.delenv("RANK")
    assert_same(generate(make(tmp_path)), whole)


def test_killed_and_gone_on_with(make, tmp_path):
    settings = {"num_fid_samples": 40, "num_steps": 30}
    killed(make(tmp_path / "killed", **settings), after=2, pause=0.02)
    assert 2 <= records(tmp_path / "killed") < 5
    out = generate(make(tmp_path / "killed", **settings))
    assert_same(out, generate(make(tmp_path / "whole", **settings)))


@pytest.mark.usefixtures("heavy")
def test_killed_at_ten_random_moments_and_gone_on_with(make, tmp_path):
    generator = random.Random(0)
    settings = {"num_fid_samples": 30 * BATCH, "num_steps": 30}
    config = make(tmp_path / "killed", **settings)
    for _ in range(10):
        done = records(tmp_path / "killed")
        killed(config, after=done + 1, pause=generator.uniform(0, 0.2))
    assert 10 <= records(tmp_path / "killed") < 30
    assert_same(generate(config), generate(make(tmp_path / "whole", **settings)))


@pytest.mark.parametrize(
    "moment, left, finished",
    [
        ("sampling", [1, 2], False),
        ("block written, no record", [0, 1, 2], False),
        ("sheet", [], False),
        ("json", [], False),
        ("joining", [], False),
        ("naming", [], False),
        ("removing", [], True),
    ],
)
def test_cut_off_it_goes_on_with_what_is_left(
    make, whole, tmp_path, monkeypatch, moment, left, finished
):
    with monkeypatch.context() as patch:
        cut_at(patch, moment)
        with pytest.raises(Cut):
            generate(make(tmp_path))
    assert (tmp_path / whole.name).exists() == finished
    made, sample_block = [], generating.sample_block
    monkeypatch.setattr(
        generating,
        "sample_block",
        lambda *all: made.append(all[2]) or sample_block(*all),
    )
    out = generate(make(tmp_path))
    assert made == left
    partial = out.with_name(f".{out.name}.partial")
    if moment in ("joining", "naming"):
        assert not partial.exists()
    assert_same(out, whole)


def test_a_finished_file_is_left_as_it_is(make, whole, tmp_path, monkeypatch):
    for path in whole.parent.iterdir():
        shutil.copy2(path, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    monkeypatch.setattr(generating, "ImageSampler", cut)
    assert generate(make(tmp_path)) == tmp_path / whole.name
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_begun_work_of_other_settings_is_not_gone_on_with(make, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        cut_at(patch, "joining")
        with pytest.raises(Cut):
            generate(make(tmp_path))
    with pytest.raises(ValueError, match=r"cfg_scale: 1\.5, now 1\.50000001"):
        generate(make(tmp_path, cfg_scale=1.50000001))


@pytest.mark.parametrize("place", ["_write_block", "write_npz"])
def test_a_full_disk_keeps_what_is_written(make, whole, tmp_path, monkeypatch, place):
    original = getattr(generating, place)

    def full(*all, **arrays):
        if place == "write_npz" or all[1] == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*all)

    with monkeypatch.context() as patch:
        patch.setattr(generating, place, full)
        done = 1 if place == "_write_block" else 3
        message = rf"disk of .* is full; {done} of 3 batches are written and kept"
        with pytest.raises(RuntimeError, match=message):
            generate(make(tmp_path))
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
