"""SIGKILL to one of two processes, to both, and to torchrun with them; `make chaos` has fifty."""

import pytest

from benchmarks.faults import chaos
from benchmarks.faults.chaos import Kill
from tests.faults.conftest import STEPS

KILLS = [
    Kill("training", "rank 1", after=8, wait=0.3),
    Kill("checkpointing", "rank 0", after=2, wait=0.1),
    Kill("resuming", "both", after=1, wait=0.2),
    Kill("checkpointing", "all", after=2, wait=0.0),
]


@pytest.mark.usefixtures("torchrun", "heavy")
def test_four_kills_change_nothing(whole, tmp_path):
    """Nor does torchrun alone; `disturbed` raises where a promise or a bit is not kept."""
    calm, run = chaos.undisturbed(whole.flags, tmp_path / "calm"), tmp_path / "run"
    assert chaos.differences(tmp_path / "calm", whole.run) == []
    *rows, last = chaos.disturbed(whole.flags, run, KILLS, calm["start_seconds"], whole.run)
    assert [row["target"] for row in rows] == [kill.target for kill in KILLS]
    assert all(row["resumed_at"] is not None for row in rows) and last["identical"]
    phases = {row["phase"] for row in rows}  # resuming is starting where no save was through yet
    assert "checkpointing" in phases and phases & {"starting", "resuming"}
    assert last["announced"] >= STEPS // chaos.SAVE_EVERY - len(KILLS)
