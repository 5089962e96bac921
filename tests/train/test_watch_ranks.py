"""Two processes: stopping together, and who is to blame."""

import json
import subprocess

import pytest

pytest.importorskip("lance")

from repa_fast.checkpoint.layout import path_of
from repa_fast.data.digits import prepare_digits
from tests.launching import ROOT, launch
from tests.train.watch_ranks import STEPS, TIMEOUT

pytestmark = pytest.mark.usefixtures("torchrun")


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """(torchrun's stderr, folder of what the processes left)."""
    folder = tmp_path_factory.mktemp("ranks")
    digits = str(prepare_digits(folder / "digits"))
    process = launch("tests.train.watch_ranks", 2, OUT=str(folder), DIGITS=digits)
    assert process.returncode == 1, process.stderr
    return process.stderr, folder


def test_both_stop_together_and_say_the_same(ended):
    first, second = (json.loads((ended[1] / f"stopping.{rank}").read_text()) for rank in range(2))
    assert first == second and first["seen"] == list(range(19))
    message, command = first["message"].split("\n")
    assert "checkpoints/0000015" in message
    assert "-m torch.distributed.run --standalone --nproc-per-node=2 -m repa_fast train" in command
    assert "--skip-steps=4" in command and "--parallel=fsdp" in command


@pytest.mark.usefixtures("heavy")
def test_the_command_goes_on_with_both(ended):
    command = json.loads((ended[1] / "stopping.0").read_text())["message"].split("\n")[1]
    process = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    folder = ended[1] / "spikes-from-15" / "checkpoints"
    counters = json.loads((path_of(folder, STEPS) / "counters.json").read_text())
    assert (counters["world_size"], counters["history"]["skipped"]) == (2, 4)


def test_a_process_does_not_wait_for_ever(ended):
    """Nor do those who give up and those who came late disturb the session after theirs."""
    waited = json.loads((ended[1] / "waiting.0").read_text())
    assert TIMEOUT <= waited["seconds"] < 2 * TIMEOUT + 30
    assert f"{1000 * TIMEOUT:.0f}ms" in waited["message"]


def test_torchrun_names_the_process_that_failed_first(ended):
    stderr, _ = ended
    cause = stderr[stderr.index("Root Cause (first observed failure)") :]
    assert "rank      : 1 (local_rank: 1)" in cause
    assert "a GPU fell off the bus" in cause and "in step" in cause


def test_each_process_leaves_its_error(ended):
    logs = ended[1] / "fails" / "logs"
    first, second = ((logs / f"error-rank{rank}.txt").read_text() for rank in (1, 0))
    assert "RuntimeError: a GPU fell off the bus" in first and "after" not in first.split("\n")[0]
    assert second.split("\n")[0].endswith("after error-rank1.txt")
