"""Kills of two processes, and other faults, against an undisturbed run; `make chaos` has more."""

import subprocess
import sys

import pytest

from benchmarks.faults import chaos
from benchmarks.faults.chaos_faults import FAULTS, FULL_DISK, Fault
from benchmarks.harness.rows import read
from tests.faults.conftest import STEPS
from tests.launching import ROOT

pytestmark = pytest.mark.usefixtures("torchrun", "heavy")

KILLS = [
    Fault("training", "rank 1", after=8, wait=0.3),
    Fault("checkpointing", "rank 0", after=2, wait=0.1),
    Fault("resuming", "both", after=1, wait=0.2),
    Fault("checkpointing", "all", after=2, wait=0.0),
]


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


def test_faults_that_are_no_kills_change_nothing(tmp_path):
    """A flipped byte, a full disk, a second run, torchrun killed alone, and SIGHUP, once each."""
    command = [sys.executable, "-m", "benchmarks.faults.chaos", "--out", tmp_path / "rows.jsonl"]
    command += ["--faults", str(len(FAULTS)), "--kinds", *FAULTS, "--memory-steps", "0"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert printed.returncode == 0, printed.stderr
    rows = read(tmp_path / "rows.jsonl")
    faults = [row for row in rows if row["kind"] == "fault"]
    expected = set(FAULTS) - ({FULL_DISK} if "no disk is filled up" in printed.stdout else set())
    assert {row["fault"] for row in faults} == expected and len(faults) == len(FAULTS)
    assert all(row["resumed_at"] is not None for row in faults)
    assert all(row["lost_steps"] == 0 for row in faults if row["fault"] == "SIGHUP")
    assert all(row["identical"] for row in rows if row["kind"] == "run")
