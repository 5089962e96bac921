"""SIGKILL to one of two processes, to both, and to torchrun with them; `make chaos` has fifty."""

import pytest

from benchmarks.faults import chaos
from benchmarks.faults.chaos import Kill

pytestmark = pytest.mark.usefixtures("torchrun")

KILLS = [
    Kill("training", "rank 1", after=8, wait=0.3),
    Kill("checkpointing", "rank 0", after=2, wait=0.1),
    Kill("resuming", "both", after=1, wait=0.2),
    Kill("checkpointing", "all", after=2, wait=0.0),
]


def test_four_kills_change_nothing(whole, tmp_path):
    """Which `disturbed` compares: it raises where a promise is not kept or a bit differs."""
    rows = chaos.disturbed(whole.flags, tmp_path / "run", KILLS, whole.start_seconds, whole.run)
    kills, run = rows[:-1], rows[-1]
    assert [row["target"] for row in kills] == [kill.target for kill in KILLS]
    phases = {row["phase"] for row in kills}  # resuming is starting where no save was through yet
    assert "checkpointing" in phases and phases & {"starting", "resuming"}
    assert all(row["resumed_at"] is not None for row in kills)
    assert run["identical"] and run["announced"] >= 40 // chaos.SAVE_EVERY - len(KILLS)
