"""Whole runs in processes of their own: killed, stopped, resumed, and on two ranks."""

import os
import random
import signal
import time

import pytest

pytest.importorskip("lance")
pytest.importorskip("tyro")

from benchmarks.faults import chaos
from benchmarks.faults.chaos_run import descendants
from repa_fast.train import checkpoint
from repa_fast.train.run import main
from tests.train.runs import STEPS, command, ended, flags, start

pytestmark = pytest.mark.usefixtures("torchrun")

ONCE = ["--checkpointing-steps", str(STEPS)]


def interrupt(arguments: list[str], at: int, number: int, delay: float = 0.0) -> int:
    """Signal all processes `delay` s after the first line of a step >= `at`; returns the status."""
    process = start(arguments)
    for line in process.stdout:
        if line.startswith("step ") and int(line.split()[1].split("/")[0]) >= at:
            time.sleep(delay)
            for pid in [process.pid, *descendants(process.pid)]:
                os.kill(pid, number)
            break
    process.communicate(timeout=120)
    return process.returncode


@pytest.fixture(scope="module")
def undisturbed(digits_dir, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed")
    main(flags(digits_dir, output, *ONCE))
    return output / "run"


def test_a_run_that_is_killed_and_then_stopped_ends_bit_identical(
    digits_dir, undisturbed, tmp_path
):
    """After SIGKILL there is what had been saved; at SIGTERM the run saves, and exits with 0."""
    folder = tmp_path / "run" / "checkpoints"
    own = flags(digits_dir, tmp_path, "--resume", "auto")
    assert interrupt(command(own), 8, signal.SIGKILL) == -signal.SIGKILL
    killed = checkpoint.steps(folder)[-1]
    assert 3 <= killed < STEPS
    assert interrupt(command([*own, *ONCE]), killed + 1, signal.SIGTERM) == 0
    assert killed < checkpoint.steps(folder)[-1] < STEPS
    main(own)
    assert chaos.differences(tmp_path / "run", undisturbed) == []


@pytest.mark.usefixtures("heavy")
def test_a_compiled_run_of_two_ranks_killed_twice_is_bit_identical(digits_dir, tmp_path):
    """Killed at random moments after some steps."""
    whole, run = tmp_path / "whole", tmp_path / "killed"
    ended(start(command(flags(digits_dir, whole, "--compile"), ranks=2)))
    arguments = command(flags(digits_dir, run, "--compile", "--resume", "auto"), ranks=2)
    draw = random.Random(0)
    for at in (8, 16):
        delay = draw.uniform(0, 0.1)
        assert interrupt(arguments, at, signal.SIGKILL, delay) == -signal.SIGKILL
    ended(start(arguments))
    assert chaos.differences(run / "run", whole / "run") == []


@pytest.mark.usefixtures("heavy")
def test_two_ranks_equal_one_process(digits_dir, undisturbed, tmp_path):
    ended(start(command(flags(digits_dir, tmp_path), ranks=2)))
    ours, theirs = chaos.readings(tmp_path / "run"), chaos.readings(undisturbed)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for a, b in zip(ours, theirs, strict=True):
        for name in ("loss", "denoise", "grad_norm", "align/digits-vit"):
            assert a[name] == pytest.approx(b[name], abs=1e-6, rel=1e-6)
    assert ours[-1]["step"] == checkpoint.steps(tmp_path / "run" / "checkpoints")[-1] == STEPS
