"""Two processes: stopping together, and who is to blame."""

import json
import subprocess

import pytest

pytest.importorskip("lance")

from repa_fast.checkpoint.layout import path_of
from tests.launching import ROOT
from tests.train import watch_ranks
from tests.train.watch_ranks import POISONED, STEPS, TIMEOUT


@pytest.fixture(scope="module")
def stopped(ranks, digits_dir, tmp_path_factory):
    """(what both processes saw of a run that spikes, folder of the run)."""
    folder = tmp_path_factory.mktemp("stopped")
    return ranks(watch_ranks.spike, digits_dir, folder), folder


def test_both_stop_together_and_say_the_same(stopped):
    (first, second), _ = stopped
    assert first == second and first["seen"] == list(range(POISONED + 2))
    message, command = first["message"].split("\n")
    assert "checkpoints/0000010" in message
    assert "-m torch.distributed.run --standalone --nproc-per-node=2 -m repa_fast train" in command
    assert "--skip-steps=2" in command and "--parallel" not in command  # the run's own


@pytest.mark.usefixtures("heavy", "torchrun")
def test_the_command_goes_on_with_both(stopped):
    (found, _), folder = stopped
    command = found["message"].split("\n")[1]
    process = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    target = path_of(folder / "spikes-from-10" / "checkpoints", STEPS)
    counters = json.loads((target / "counters.json").read_text())
    assert (counters["world_size"], counters["history"]["skipped"]) == (2, 2)


@pytest.mark.usefixtures("heavy")
def test_a_process_does_not_wait_for_ever(torchrun, digits_dir, tmp_path):
    """Nor do those who give up disturb the next session, whose first error is named the cause."""
    process = torchrun("tests.train.watch_ranks", 2, OUT=str(tmp_path), DIGITS=digits_dir)
    assert process.returncode == 1, process.stderr
    waited = json.loads((tmp_path / "waited.0").read_text())
    assert TIMEOUT <= waited["seconds"] < 2 * TIMEOUT + 30
    assert f"{1000 * TIMEOUT:.0f}ms" in waited["message"]
    cause = process.stderr[process.stderr.index("Root Cause (first observed failure)") :]
    for words in ("rank      : 1 (local_rank: 1)", "a GPU fell off the bus", "in step"):
        assert words in cause
    logs = tmp_path / "fails" / "logs"
    first, second = ((logs / f"error-rank{rank}.txt").read_text() for rank in (1, 0))
    assert "RuntimeError: a GPU fell off the bus" in first and "after" not in first.split("\n")[0]
    assert second.split("\n")[0].endswith("after error-rank1.txt")
