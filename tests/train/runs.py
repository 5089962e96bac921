"""Runs of train.py on the digits in processes of their own, and when two runs are the same."""

import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from repa_fast.train import checkpoint
from repa_fast.train.state import TrainState
from tests.launching import ROOT
from tests.train.conftest import TINY

STEPS = 24
FLAGS = {"--preset": "digits"} | {f"--{n.replace('_', '-')}": str(v) for n, v in TINY.items()}
FLAGS |= {"--log-every": "4", "--checkpointing-steps": "3", "--max-train-steps": str(STEPS)}


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
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(arguments, cwd=ROOT, env=environment, **output)


def until(process: subprocess.Popen, line: str) -> None:
    """Read on until a line begins with a pattern."""
    if not any(re.match(line, printed) for printed in process.stdout):
        raise AssertionError(f"it ended without {line}")


def ended(process: subprocess.Popen, status: int = 0) -> str:
    """What a process still prints, which ends with a status."""
    output, _ = process.communicate(timeout=240)
    assert process.returncode == status, output
    return output
