"""Runs of train.py on the digits: flags, processes, and what they come to."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.faults import chaos
from repa_fast.train import checkpoint
from repa_fast.train.state import TrainState
from tests.train.conftest import TINY

ROOT = Path(__file__).parents[2]
STEPS = 24
FLAGS = {
    "--preset": "digits",
    **{f"--{name.replace('_', '-')}": str(value) for name, value in TINY.items()},
    "--log-every": "4",
    "--checkpointing-steps": "3",
    "--max-train-steps": str(STEPS),
}


def assert_same_weights(state: TrainState, expected: TrainState) -> None:
    """Weights, averages and the optimizer's state are the same, to the bit."""
    ours, theirs = checkpoint.tensors(state), checkpoint.tensors(expected)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def assert_same_state(state: TrainState, expected: TrainState) -> None:
    """And so is all else that a checkpoint holds."""
    assert_same_weights(state, expected)
    assert torch.equal(state.metrics.sums, expected.metrics.sums)
    assert state.scaler.state_dict() == expected.scaler.state_dict()
    assert (state.step, state.history) == (expected.step, expected.history)


def flags(digits_dir: str, output: Path, *more: str) -> list[str]:
    """The flags of a run in OUTPUT/run."""
    named = FLAGS | {"--data-dir": digits_dir, "--output-dir": str(output), "--exp-name": "run"}
    return [part for pair in named.items() for part in pair] + list(more)


def command(flags: list[str], ranks: int = 1) -> list[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [sys.executable, *(torchrun if ranks > 1 else []), "train.py", *flags]


def start(arguments: list[str]) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        arguments, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip


def finish(arguments: list[str]) -> str:
    """What a command prints until it ends well."""
    process = start(arguments)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    return output


def descendants(pid: int) -> list[int]:
    """Processes below `pid`: torchrun's workers are in sessions of their own."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children] + [d for c in children for d in descendants(int(c))]


def assert_bit_identical(run: Path, undisturbed: Path) -> None:
    """Metrics, and all tensors of the last checkpoint, are the same."""
    assert chaos.differences(run, undisturbed) == []
