"""Saves beside training: what is stored, when it is announced, and what happens when one fails."""

import contextlib
import errno
import fcntl
import gc
import json
import os
import threading
from functools import partial
from types import SimpleNamespace
from unittest import mock

import pytest

from repa_fast.checkpoint import writer
from repa_fast.checkpoint.layout import MARKER, path_of, read_native, steps
from repa_fast.train import checkpoint
from repa_fast.train.checkpoint import Checkpointer, CheckpointFailed
from repa_fast.train.step import synthetic_batch, train_step
from tests.refusals import refused
from tests.train.conftest import tiny_state
from tests.train.parallel_ranks import everything, unequal


@pytest.fixture
def state():
    state = tiny_state(enc_type="none")
    train_step(state, synthetic_batch(state, 12)[0])
    return state


@pytest.fixture
def lines():
    """What is announced."""
    return []


@pytest.fixture
def saves(state, tmp_path, lines):
    with contextlib.closing(Checkpointer(tmp_path, state.world)) as saves:
        saves.announce = lines.append
        yield saves


@pytest.fixture
def held(monkeypatch):
    """Writing stops before its files are sealed, until the event is set."""
    release, seal = threading.Event(), writer.seal

    def wait(files):
        assert release.wait(60)
        return seal(files)

    monkeypatch.setattr(writer, "seal", wait)
    yield release
    release.set()


@pytest.fixture
def full_disk(monkeypatch):
    """A list; while it holds anything, no file can be put on the disk."""
    full, sync = [], writer._sync

    def fail(path):
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        sync(path)

    monkeypatch.setattr(writer, "_sync", fail)
    return full


def test_training_goes_on_during_a_save_and_the_next_one_waits_for_it(
    state, saves, held, lines, tmp_path
):
    """What is stored is of the step at which the save began."""
    expected = everything(state)
    first = saves.save(state)
    train_step(state, synthetic_batch(state, 12)[0])
    moved = unequal(everything(state), expected)
    assert {name.split(".")[0] for name in moved} == {"model", "ema", "optimizer"}
    saves.poll()
    assert lines == [] and steps(tmp_path) == []
    threading.Timer(0.3, held.set).start()
    second = saves.save(state)
    assert (first / MARKER).exists() and len(lines) == 1
    assert lines[0].startswith(f"checkpoint {first} paused the run ")
    saves.settle()
    assert (second / MARKER).exists() and len(lines) == 2
    assert float(lines[1].split(" paused the run ")[1].split(" ms")[0]) > 200
    assert unequal(read_native(first, ""), expected) == []
    assert unequal(read_native(second, ""), everything(state)) == []
    assert json.loads((first / "counters.json").read_text())["step"] == 1


def test_what_a_save_leaves_behind_does_not_add_up(state, saves):
    """Without the collections that Python makes when it sees fit; one save leaves about 2,700."""
    counts = []
    gc.disable()
    try:
        for _ in range(10):
            state.step += 1
            saves.save(state, wait=True)
            counts.append(len(gc.get_objects()))
    finally:
        gc.enable()
    growth = (counts[-1] - counts[1]) / (len(counts) - 2)  # other things come and go, by 500 or so
    assert growth < 500 / 3, counts


def test_what_the_first_save_finds_is_not_looked_through_again(state, saves):
    gc.unfreeze()
    saves.save(state, wait=True)
    imported = gc.get_freeze_count()
    state.step += 1
    saves.save(state, wait=True)
    assert gc.get_freeze_count() == imported > len(gc.get_objects())


def test_a_step_that_is_there_is_left_and_said(state, saves, lines):
    target = saves.save(state, wait=True)
    before = {path.name: path.stat().st_mtime_ns for path in target.iterdir()}
    assert saves.save(state, wait=True) == target
    assert {path.name: path.stat().st_mtime_ns for path in target.iterdir()} == before
    assert lines[1] == f"checkpoint {target} is there already"


def test_two_failures_in_a_row_warn_and_a_third_raises(state, saves, full_disk, lines, tmp_path):
    """The third is waited for: training goes on if it succeeds."""

    def save(step: int, full: bool) -> None:
        state.step, full_disk[:] = step, [full] * full
        saves.save(state)

    for step, full in ((1, False), (2, True), (3, False), (4, True)):
        save(step, full)
        saves.settle()
        assert not saves.failing
    assert [line.startswith("WARNING: ") for line in lines] == [False, True, False, True]
    assert f"{tmp_path / '0000002'} was not written: OSError: [Errno 28]" in lines[1]
    assert "newest whole one is 0000001" in lines[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0000001", "0000003"]
    save(5, full=True)
    saves.settle()
    assert saves.failing
    save(6, full=False)
    assert steps(tmp_path) == [1, 3, 6] and not saves.failing
    save(7, full=True)
    save(8, full=True)
    saves.settle()
    with pytest.raises(CheckpointFailed, match="0000009 was not written"):
        save(9, full=True)
    assert steps(tmp_path) == [1, 3, 6]


def test_too_little_space_is_said_with_both_sizes_before_anything_is_written(
    state, saves, tmp_path, monkeypatch
):
    """What is asked for is a little more than what is taken."""
    needed = sum(tensor.nbytes + writer.HEADER_BYTES for tensor in everything(state).values())
    free, there = iter([1000, needed - 1, needed]), []

    def usage(folder):
        there.append(list(folder.iterdir()))
        return SimpleNamespace(free=next(free))

    monkeypatch.setattr(writer.shutil, "disk_usage", usage)
    for words in (r"0000001 needs 0\.0\d+ GiB, and .* 9\.31e-07 GiB f", "0000001 needs "):
        with pytest.raises(CheckpointFailed, match=words):
            saves.save(state, wait=True)
    assert there == [[], []] and list(tmp_path.iterdir()) == []
    assert (saves.save(state, wait=True) / "__0_0.distcp").stat().st_size <= needed


def test_a_folder_that_is_read_only_is_a_failure_not_a_crash(state, saves, tmp_path, lines):
    """A file where the directory would be: a folder's rights do not stop the superuser."""
    path_of(tmp_path, 1).write_text("in the way")
    saves.save(state)
    saves.settle()
    assert lines[0].startswith("WARNING: ") and "0000001 was not written: FileE" in lines[0]
    with pytest.raises(CheckpointFailed, match=r"0000001 was .*newest whole one is none"):
        saves.save(state, wait=True)


def test_old_checkpoints_that_cannot_be_removed_do_not_spoil_the_new_one(
    state, saves, tmp_path, monkeypatch, caplog
):
    state.config.keep_last = 1
    saves.save(state, wait=True)
    state.step = 2
    refusal = PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr(writer.shutil, "rmtree", mock.Mock(side_effect=refusal))
    assert (saves.save(state, wait=True) / MARKER).exists()
    assert "were not removed: [Errno 13]" in caplog.text


def test_directories_of_steps_without_a_marker_are_cleaned_and_nothing_else(tmp_path):
    for name in ("0000001", "0000002", "0000003", "1", "other", "12345678"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__0_0.distcp").write_text("x")
    (tmp_path / "0000001" / MARKER).write_text("{}")
    (tmp_path / "0000004").write_text("a file")
    (tmp_path / "0000005").symlink_to(tmp_path / "other")
    assert [path.name for path in writer.clean(tmp_path)] == ["0000002", "0000003", "12345678"]
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["0000001", "0000004", "0000005", "1", "other"]
    assert (tmp_path / "other" / "__0_0.distcp").exists()
    assert writer.clean(tmp_path / "nowhere") == []


def test_one_that_is_being_written_is_not_cleaned(state, saves, held, tmp_path):
    half = path_of(tmp_path, 9)
    half.mkdir()
    target = saves.save(state)
    while not list(target.glob("*.distcp")):
        pass
    assert writer.clean(tmp_path) == [half]
    held.set()
    saves.settle()
    assert steps(tmp_path) == [1] and writer.damage(target) == ""


def test_a_marker_that_is_cut_off_is_damage(tmp_path):
    for text in ("", '{"a', "null", "[]"):
        (tmp_path / MARKER).write_text(text)
        assert writer.damage(tmp_path).startswith("it cannot be read")


def test_another_task_is_refused_where_the_tensors_would_fit(state, tmp_path):
    target = checkpoint.save(tmp_path, state)
    for name, ours, theirs in (("path_type", "linear", "cosine"), ("prediction", "v", "noise")):
        other = tiny_state(enc_type="none", **{name: theirs})
        words = f"of a run with {name} '{ours}', expected '{theirs}': .*--init-from"
        refused(partial(checkpoint.load, target, other), words)
    stored = json.loads((target / "dataset.json").read_text())
    (target / "dataset.json").write_text(json.dumps(stored | {"scale": 0.18215}))
    words = r"of a run with scale 0\.18215, expected 1\.0: "
    refused(partial(checkpoint.load, target, state), words)


def test_the_last_are_kept_and_every_nth_and_later_ones(state, saves, tmp_path):
    """A later one is damaged: it was passed over, and its step will be written again."""
    for state.step in (2, 4, 6, 9):
        saves.save(state, wait=True)
    state.config.keep_last, state.config.keep_every = 2, 4
    state.step = 7
    saves.save(state, wait=True)
    assert steps(tmp_path) == [4, 6, 7, 9]
    assert [int(path.name) for path in sorted(tmp_path.iterdir())] == [4, 6, 7, 9]


def test_what_another_process_writes_is_left_to_it(state, saves, tmp_path):
    target = path_of(tmp_path, state.step)
    target.mkdir()
    (target / "__0_0.distcp").write_bytes(b"theirs")
    folder = os.open(target, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    try:
        with pytest.raises(CheckpointFailed, match="is being written by another process"):
            saves.save(state, wait=True)
    finally:
        os.close(folder)
    assert (target / "__0_0.distcp").read_bytes() == b"theirs"
