"""Launch sites and bytes of the step against the committed counts, without a GPU."""

import subprocess
import sys

import pytest
import torch

from benchmarks.gpu.pretended import build
from benchmarks.harness.environment import ROOT
from benchmarks.step import traffic
from benchmarks.step.launches import Eager, Launch

COUNTED = traffic.committed("block", 32)[0]["torch"].partition("+")[0]
REASON = build.why_not()
if REASON is None and torch.__version__.partition("+")[0] != COUNTED:
    REASON = f"counts are those of torch {COUNTED}, this is {torch.__version__}"
needs_card = pytest.mark.skipif(REASON is not None, reason=str(REASON))


def check(*flags):
    command = [sys.executable, "-m", "benchmarks.step.traffic", "--check", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_card
def test_a_block_launches_and_moves_what_is_committed():
    assert check("--pieces", "block").count("| backward |") == 1


@needs_card
@pytest.mark.usefixtures("heavy")
@pytest.mark.parametrize("batch, residual", traffic.COMMITTED)
def test_so_does_the_rest_with_other_batches_and_a_bf16_residual(batch, residual):
    pieces = traffic.PIECES if residual == "fp32" else ("block", "outside")
    check("--batch", str(batch), "--residual-dtype", residual, "--pieces", *pieces)


def test_growth_fails_a_little_less_does_not_and_much_less_is_stale():
    launches = [Launch("a", "elementwise", 100_000_000), Launch("b", "casts", 10_000_000)]
    before = traffic.row_of(launches, "block", 32, "fp32", "forward")
    assert (before["launches"], before["elementwise"], before["casts"]) == (2, 100, 10)
    right = {"launches": 2, "elementwise": 102, "casts": 9}
    assert traffic.misses(before | right, before) == []
    for name, counts in {"launches": (3, 1), "elementwise": (103, 89), "stack": (1,)}.items():
        for count in counts:
            (line,) = traffic.misses(before | {name: count}, before)
            assert line.startswith(f"block 32 fp32 forward: {name} {count}, expected ")


def test_operators_that_launch_are_counted_once_and_views_not():
    x = torch.ones(4, 8)
    with Eager() as found:
        y = x.t()[2:].expand(3, 6, 4)
        torch.empty(9)
        z = x.mm(x.t()) + y[0, 0]
        z.add_(1).to(torch.bfloat16)
    assert found.launches == []  # on a CPU nothing is launched
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.Tensor, "is_cuda", True)
        with Eager() as found:
            y = x.t()[2:].expand(3, 6, 4)
            z = x.mm(x.t()) + y[0, 0]
            z.add_(1).to(torch.bfloat16)
    kinds = [(one.name, one.kind, one.nbytes) for one in found.launches]
    assert kinds == [
        ("mm", "matmuls", 4 * 32 + 4 * 16), ("add", "elementwise", 4 * (16 + 4 + 16)),
        ("add_", "elementwise", 4 * 16), ("_to_copy", "casts", 4 * 16 + 2 * 16),
    ]  # fmt: skip
    assert found.launches[0].matmul == (4, 4, 8, "NT")
