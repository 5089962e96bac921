"""Tests that need processes of torchrun's start them here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def launch(
    module: str, processes: int, *, timeout: float = 240, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a module of the tests under torchrun, on one thread per process."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={processes}", "-m", module]
    return subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout
    )


@pytest.fixture(scope="session")
def torchrun():
    """`launch`, for what two processes that live on cannot show: more of them, or how they end."""
    return launch
