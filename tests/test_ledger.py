"""What a process finds that starts while the first one commits, or after a kill."""

import os
import shutil
from functools import partial

import pytest

from repa_fast import ledger
from repa_fast.ledger import Ledger, read_dict, share
from repa_fast.whole import open_own, read_regular, whole_or_not, write_whole
from tests.refusals import refused

UNITS = 4


@pytest.fixture
def folder(tmp_path):
    return tmp_path / ".work"


def finish(folder):
    """All units are done, as after a kill just before the commit."""
    work = Ledger(folder, {"recipe": 1})
    for unit in range(UNITS):
        work.write(unit, {})


def test_each_process_gets_its_own_unfinished_units(folder):
    Ledger(folder, {}).write(2, {})
    shares = [share(folder, {}, UNITS, rank, 2, lambda: False)[1] for rank in (0, 1)]
    assert shares == [[0], [1, 3]]


def test_a_late_process_leaves_no_folder(folder):
    assert share(folder, {}, UNITS, 1, 2, lambda: True) is None
    assert not folder.exists()


@pytest.mark.parametrize("moment", ("made", "recipe", "listed"))
def test_a_commit_at_any_moment_leaves_nothing_to_do(folder, monkeypatch, moment):
    finish(folder)
    committed = []

    def commit():
        committed.append(True)
        shutil.rmtree(folder)

    if moment == "made":  # between the folder and its recipe
        (folder / "recipe.json").unlink()
        write = ledger.write_whole
        monkeypatch.setattr(ledger, "write_whole", lambda *a: (commit(), write(*a)))
    elif moment == "recipe":  # between the recipe and the records
        same = Ledger._expect_same
        monkeypatch.setattr(Ledger, "_expect_same", lambda *a: (same(*a), commit()))
    else:
        left = Ledger.left
        monkeypatch.setattr(Ledger, "left", lambda *a: (left(*a), commit())[0])
    assert share(folder, {"recipe": 1}, UNITS, 1, 2, lambda: bool(committed)) is None
    assert committed and not folder.exists()


def test_a_folder_that_someone_else_removed_is_an_error(folder, monkeypatch):
    monkeypatch.setattr(ledger, "write_whole", lambda *a: shutil.rmtree(folder))
    with pytest.raises(FileNotFoundError):
        share(folder, {}, UNITS, 1, 2, lambda: False)


def test_what_changed_is_said_by_name_and_in_short(folder):
    begun = {"metadata": {"vae": "a", "classes": ["x"] * 1000}, "batch": 4, "more": 1}
    now = {"metadata": {"vae": "b", "classes": ["y"] * 1000}, "batch": 4, "labels": "c"}
    Ledger(folder, begun)
    words = (
        r"metadata.vae: 'a', now 'b'; metadata.classes: \['x', .*; labels: not recorded, now 'c'"
    )
    message = refused(lambda: Ledger(folder, now), words, "go on with the same, or remove it")
    assert len(message) < 400


@pytest.mark.parametrize("content", ["", '{"rows": ', "3"])
def test_a_damaged_record_is_an_unfinished_unit(folder, content, capsys):
    finish(folder)
    (folder / "000002.json").write_text(content, encoding="utf-8")
    again, left = share(folder, {"recipe": 1}, UNITS, 0, 1, lambda: False)
    assert left == [2] and "1 of 4 finished blocks are damaged" in capsys.readouterr().err
    refused(lambda: again.read(2), "000002.json is damaged")
    again.write(2, {})
    assert again.done() == [0, 1, 2, 3]


def test_waiting_says_for_whom_and_not_at_every_moment(folder, capsys, monkeypatch):
    work, clock, missing = Ledger(folder, {}), [0.0], [3, 2, 1]
    work.write(0, {})
    said = {}

    def sleep(seconds):
        clock[0] += seconds
        if text := capsys.readouterr().err:
            said[clock[0]] = text
        if clock[0] % 100 == 0:
            work.write(missing.pop(), {})

    monkeypatch.setattr(ledger.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(ledger.time, "sleep", sleep)
    work.wait_for(UNITS, lambda: None, world_size=2)
    first = f"repa-fast: waiting for 3 of 4 blocks of processes 0, 1 (of 2): {folder}\n"
    last = f"repa-fast: waiting for 1 of 4 blocks of process 1 (of 2): {folder}\n"
    assert said[10.5] == said[70.5] == first and said[210.5] == last and len(said) == 6
    work.wait_for(UNITS, lambda: None)


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "[a].json"
    write_whole(path, "old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        refused(lambda: write_whole(path, "new"), "No space left", error=OSError)
    assert os.listdir(tmp_path) == [path.name] and path.read_text(encoding="utf-8") == "old"


def test_what_is_nested_without_end_is_damaged(tmp_path):
    (tmp_path / "recipe.json").write_text("[" * 200_000)
    refused(lambda: read_dict(tmp_path / "recipe.json"), "recipe.json is damaged .*, expected JSON")


def test_pipes_devices_and_links_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "there")
    (tmp_path / "there").touch()
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "zero"):
        refused(partial(read_regular, tmp_path / name), "is not a regular file", error=OSError)
    for name in ("pipe", "link", "zero"):
        with pytest.raises(OSError, match=name):
            open_own(tmp_path / name)
    assert read_regular(tmp_path / "link") == b""


def test_a_name_that_is_taken_meanwhile_stays_the_others(tmp_path):
    out = tmp_path / "x.pt"

    def late():
        with whole_or_not(out) as partial:
            partial.write_text("late")
            out.write_text("theirs")

    refused(late, "x.pt exists already")
    assert out.read_text() == "theirs" and os.listdir(tmp_path) == ["x.pt"]
