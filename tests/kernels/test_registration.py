import json
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

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = sorted(file.parent.name for file in ROOT.glob("kernels/*/__init__.py"))


@pytest.mark.parametrize("how", (pytest.param("compiled", marks=pytest.mark.heavy), "checkpointed"))
def test_a_block_with_kernels_gives_the_same_bits(interpreter, how):
    eager = interpreter(checks.block_results, "eager", "triton")
    other = interpreter(checks.block_results, how, "triton")
    torch.testing.assert_close(other, eager, rtol=0, atol=0)


def test_a_block_under_autocast_has_dtypes_and_accuracy_of_the_reference(interpreter):
    outputs, gradients = interpreter(checks.block_results, "autocast", "triton")
    working, working_gradients = checks.block_results("autocast", "reference")
    oracle, oracle_gradients = checks.block_results("fp64", "reference")
    assert [v.dtype for v in outputs] == [torch.float32, torch.bfloat16, torch.bfloat16]
    assert {v.dtype for v in gradients} == {torch.float32}
    for a, o, w in zip(outputs, oracle, working):
        assert_within_budget("output", a, o, w)
    for a, o, w in zip(gradients, oracle_gradients, working_gradients):
        assert_within_budget("gradient", a, o.double(), w)


TWICE = """
import importlib, json, sys
import torch
packages, folders = sys.argv[1].split(","), sys.argv[2].split(",")
modules = [importlib.import_module(f"{p}.{f}.op") for p in packages for f in folders]
from repa_fast.kernels.adaln import adaln
adalns = [sys.modules[f"{p}.adaln.op"].adaln for p in packages]
x, v = torch.randn(2, 3, 8), torch.randn(2, 8)
how = "reference" if len(sys.argv) < 4 else sys.argv[3]
results = [op(x, v, v, implementation=how) for op in adalns]
print(json.dumps({
    "modules": len({id(module) for module in modules}),
    "equal": torch.equal(*results),
}))
"""


@pytest.mark.usefixtures("heavy")
@pytest.mark.parametrize("packages", ("kernels,repa_fast.kernels", "repa_fast.kernels,kernels"))
def test_both_names_of_the_ops_can_be_imported_in_one_process(packages):
    assert {"adaln", "align_loss", "euler_maruyama_step", "gate_residual_adaln"} <= set(FOLDERS)
    how = ["triton"] if find_spec("triton") else []
    process = subprocess.run(
        [sys.executable, "-c", TWICE, packages, ",".join(FOLDERS), *how],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stdout.splitlines()[-1])
    assert result == {"modules": 2 * len(FOLDERS), "equal": True}


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
