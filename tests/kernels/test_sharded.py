import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.kernels.sharded import gradients

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("torchrun")


@pytest.mark.parametrize("compiled", (pytest.param(False, marks=pytest.mark.heavy), True))
def test_fsdp_on_two_processes_gives_the_gradients_of_one(tmp_path, can_interpret, compiled):
    out = tmp_path / "gradients.pt"
    env = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "COMPILED": str(int(compiled)),
        "OUT": str(out),
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    process = subprocess.run(
        [*command, "-m", "tests.kernels.sharded"], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    sharded = torch.load(out)
    working, exact = (gradients("reference", dtype=d) for d in (torch.bfloat16, torch.float32))
    assert sharded.keys() == exact.keys() and len(exact) > 30
    for name, expected in exact.items():
        band = torch.finfo(torch.bfloat16).eps / 2 * expected.norm()
        allowed = 2 * (working[name] - expected).norm() + band
        assert 0 < (sharded[name] - expected).norm() <= allowed, name
