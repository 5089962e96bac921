"""Saves beside training: what is stored, when it is announced, and what happens when one fails."""

import errno
import gc
import json
import os
import shutil
import threading
from contextlib import closing
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest

from repa_fast.checkpoint import layout, marker, writer
from repa_fast.checkpoint.layout import path_of, read_native, steps
from repa_fast.checkpoint.marker import MARKER, damage
from repa_fast.lock import LockLost, hold
from repa_fast.train import checkpoint
from repa_fast.train.checkpoint import Checkpointer, CheckpointFailed
from repa_fast.train.step import synthetic_batch, train_step
from tests.refusals import refused
from tests.sealing import reseal
from tests.train.conftest import resumed, tiny_state
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
    with closing(Checkpointer(tmp_path, state.world)) as saves:
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


def test_what_the_first_save_finds_is_not_looked_through_again(state, saves, monkeypatch):
    """Frozen once: the count alone may fall between, as what is frozen ends with its last user."""
    frozen, freeze = [], gc.freeze
    monkeypatch.setattr(gc, "freeze", lambda: (frozen.append(state.step), freeze()))
    gc.unfreeze()
    first = state.step
    saves.save(state, wait=True)
    imported = gc.get_freeze_count()
    state.step += 1
    saves.save(state, wait=True)
    assert frozen == [first] and imported >= gc.get_freeze_count() > len(gc.get_objects())


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


def test_a_marker_that_is_cut_off_is_damage(tmp_path):
    for text in ("", '{"a', "null", "[]", '{"../x": 1}', "\0"):
        (tmp_path / MARKER).write_text(text)
        assert damage(tmp_path).startswith("its file COMPLETE cannot be read")


def test_another_task_is_refused_where_the_tensors_would_fit(state, tmp_path):
    target = checkpoint.save(tmp_path, state)
    for name, ours, theirs in (("path_type", "linear", "cosine"), ("prediction", "v", "noise")):
        other = tiny_state(enc_type="none", **{name: theirs})
        words = f"of a run with {name} '{ours}', expected '{theirs}': .*--init-from"
        refused(partial(checkpoint.load, target, other), words)
    stored = json.loads((target / "dataset.json").read_text())
    (target / "dataset.json").write_text(json.dumps(stored | {"scale": 0.18215}))
    reseal(target)
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


def changed(target: Path) -> Path:
    """A checkpoint with another byte in its largest file."""
    shard = target / "__0_0.distcp"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    return target


def test_what_is_no_file_of_a_checkpoint_does_not_damage_it(state, saves, tmp_path, lines):
    target = saves.save(state, wait=True)
    (target / ".ipynb_checkpoints").mkdir()
    (target / "notes.txt").write_text("mine")
    assert damage(target) == ""
    saves.save(state, wait=True)
    assert lines[-1] == f"checkpoint {target} is there already"


def test_a_damaged_one_is_moved_aside_and_never_removed(state, saves, tmp_path):
    for name in ("0000001.damaged", "0000001.damaged1"):
        target = changed(saves.save(state, wait=True))
        content = (target / "__0_0.distcp").read_bytes()
        saves.save(state, wait=True)
        assert damage(target) == "" and steps(tmp_path) == [1]
        assert (tmp_path / name / "__0_0.distcp").read_bytes() == content
        assert damage(tmp_path / name) == "wrong checksum of __0_0.distcp"
    assert writer.clean(tmp_path) == []


def test_one_that_cannot_be_read_is_not_damaged(state, saves, tmp_path, monkeypatch):
    """A resume stops there; a save of its step moves it aside, and it is whole again later."""
    target, read = saves.save(state, wait=True), marker.checksum

    def fails(file: Path) -> int:
        if file.parent == target:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(file))
        return read(file)

    with monkeypatch.context() as broken:
        broken.setattr(marker, "checksum", fails)
        state.config.resume = "auto"
        with pytest.raises(OSError, match="Input/output error"):
            resumed(tmp_path, state)
        saves.save(state, wait=True)
    assert damage(target) == "" and damage(tmp_path / "0000001.damaged") == ""


def test_links_are_never_followed_when_anything_is_removed(state, saves, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    other = shutil.copytree(saves.save(state, wait=True), elsewhere / "0000001")
    shutil.rmtree(path_of(tmp_path, 1))
    path_of(tmp_path, 1).symlink_to(other)
    state.config.keep_last = 1
    state.step = 2
    saves.save(state, wait=True)
    assert steps(tmp_path) == [2] and damage(other) == ""
    content = (changed(other) / "__0_0.distcp").read_bytes()
    path_of(tmp_path, 3).symlink_to(other)
    state.step = 3
    saves.save(state, wait=True)
    assert damage(path_of(tmp_path, 3)) == "" and not path_of(tmp_path, 3).is_symlink()
    assert (other / "__0_0.distcp").read_bytes() == content


def test_none_becomes_complete_once_another_launch_holds_the_run(state, held, tmp_path, lines):
    folder, taken = tmp_path / "checkpoints", "was taken over by process 1 on node7"
    with hold(tmp_path) as lock, closing(Checkpointer(folder, state.world, lock)) as saves:
        saves.announce = lines.append
        saves.save(state)
        (tmp_path / "lock").write_text('{"token": "x", "host": "node7", "process": 1}')
        held.set()
        saves.settle()
        assert taken in lines[-1] and not list(folder.iterdir())
        with pytest.raises(LockLost, match=taken):
            saves.save(state)


def test_what_is_not_ours_in_a_steps_folder_stays(state, saves, tmp_path):
    """A model of another program, a run, a copy with files of its own: left, or moved aside."""
    for name, file in (("0000001", "model.pt"), ("0000009", "checkpoints/0000003/COMPLETE")):
        (tmp_path / name / file).parent.mkdir(parents=True)
        (tmp_path / name / file).write_text("theirs")
    assert writer.clean(tmp_path) == []
    saves.save(state, wait=True)
    assert (tmp_path / "0000001.damaged" / "model.pt").read_text() == "theirs"
    assert (tmp_path / "0000009" / "checkpoints" / "0000003" / "COMPLETE").exists()


def test_checkpoints_that_cannot_be_seen_are_not_none(tmp_path, monkeypatch):
    """Taken for none they would begin the run anew, over its metrics."""
    refusal = PermissionError(errno.EACCES, "Permission denied", str(tmp_path))
    monkeypatch.setattr(layout.os, "listdir", mock.Mock(side_effect=refusal))
    with pytest.raises(PermissionError, match="Permission denied"):
        steps(tmp_path)
