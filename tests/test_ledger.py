"""What a process finds that starts while the first one commits."""

import shutil

import pytest

from repa_fast import ledger
from repa_fast.ledger import Ledger, share

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
