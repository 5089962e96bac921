"""SIGKILL to one of two processes, to both, and to torchrun with them; `make chaos` has fifty."""

import pytest

from benchmarks.faults import chaos
from benchmarks.faults.chaos import Kill
from tests.faults.conftest import STEPS

pytestmark = pytest.mark.usefixtures("torchrun", "heavy")

KILLS = [
    Kill("training", "rank 1", after=8, wait=0.3),
    Kill("checkpointing", "rank 0", after=2, wait=0.1),
    Kill("resuming", "both", after=1, wait=0.2),
    Kill("checkpointing", "all", after=2, wait=0.0),
]


def killed(whole, run, kills, start_seconds=0.0):
    """The rows of kills, from `disturbed`: it raises where a promise or a bit is not kept."""
    *rows, last = chaos.disturbed(whole.flags, run, kills, start_seconds, whole.run)
    assert [row["target"] for row in rows] == [kill.target for kill in kills]
    assert all(row["resumed_at"] is not None for row in rows) and last["identical"]
    return rows, last["announced"]


def test_a_kill_during_a_save_changes_nothing(undisturbed, tmp_path):
    kill = Kill("checkpointing", "rank 0", after=8, wait=0.1)
    (row,), _ = killed(undisturbed(15), tmp_path / "run", [kill])
    assert row["resumed_at"] >= chaos.SAVE_EVERY and row["reached"] >= kill.after


def test_four_kills_change_nothing(whole, tmp_path):
    """Nor does torchrun alone."""
    calm = chaos.undisturbed(whole.flags, tmp_path / "calm")
    assert chaos.differences(tmp_path / "calm", whole.run) == []
    rows, announced = killed(whole, tmp_path / "run", KILLS, calm["start_seconds"])
    phases = {row["phase"] for row in rows}  # resuming is starting where no save was through yet
    assert "checkpointing" in phases and phases & {"starting", "resuming"}
    assert announced >= STEPS // chaos.SAVE_EVERY - len(KILLS)
