import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx

from repa_fast.testing import assert_within_budget
from tests.kernels import checks
from tests.kernels.table import INTERPRETED, OPS

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("kernels", "repa_fast.kernels")
FOLDERS = sorted(file.parent.name for file in ROOT.glob("kernels/*/__init__.py"))


@INTERPRETED
@pytest.mark.parametrize("how", (pytest.param("compiled", marks=pytest.mark.heavy), "checkpointed"))
def test_a_block_with_kernels_gives_the_same_bits(interpreter, how):
    eager = interpreter(checks.block_results, "eager", "triton")
    other = interpreter(checks.block_results, how, "triton")
    torch.testing.assert_close(other, eager, rtol=0, atol=0)


@INTERPRETED
def test_a_block_under_autocast_has_dtypes_and_accuracy_of_the_reference(interpreter):
    outputs, gradients = interpreter(checks.block_results, "autocast", "triton")
    working, working_gradients = checks.block_results("autocast", "reference")
    oracle, oracle_gradients = checks.block_results("fp64", "reference")
    assert [v.dtype for v in outputs] == [torch.float32, torch.bfloat16, torch.bfloat16]
    assert {v.dtype for v in gradients} == {torch.float32}
    for values in zip(outputs, oracle, working):
        assert_within_budget("output", *values)
    for actual, exact, plain in zip(gradients, oracle_gradients, working_gradients):
        assert_within_budget("gradient", actual, exact.double(), plain)


TWICE = """
import importlib, sys
import torch
how, *names = sys.argv[1:]
assert len({id(importlib.import_module(name)) for name in names}) == len(names)
x, v = torch.randn(2, 3, 8), torch.randn(2, 8)
adalns = [sys.modules[name].adaln for name in names if name.endswith(".adaln.op")]
assert torch.equal(*(adaln(x, v, v, implementation=how) for adaln in adalns))
"""


@pytest.mark.usefixtures("heavy")
@pytest.mark.parametrize("packages", (PACKAGES, PACKAGES[::-1]))
def test_both_names_of_the_ops_can_be_imported_in_one_process(packages):
    assert set(OPS) - {"gate_residual"} <= set(FOLDERS)
    names = [f"{package}.{folder}.op" for package in packages for folder in FOLDERS]
    how = "triton" if find_spec("triton") else "reference"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", TWICE, how, *names]
    process = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize("device", ("cuda", "cpu"))
def test_on_a_gpu_a_compiled_graph_launches_the_kernels_itself(device):
    """Fake tensors of a GPU need none; what torch.compile's tracing makes of an operator."""
    pytest.importorskip("triton")

    def call(x, shift, scale):
        return torch.ops.repa_fast.adaln_forward(x, shift, scale, 1e-6, torch.bfloat16)

    with FakeTensorMode():
        x, vector = torch.empty(2, 8, 72, device=device), torch.empty(2, 72, device=device)
        graph = make_fx(dispatch_functionalize(call))(x, vector, vector).graph
    called = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    launched = "triton_kernel_wrapper_functional" in called
    assert launched == (device == "cuda")
    assert ("repa_fast.adaln_forward.default" in called) == (device == "cpu")
