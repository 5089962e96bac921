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

from repa_fast.testing import assert_within_budget, seeded
from tests.kernels import checks

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = sorted(file.parent.name for file in ROOT.glob("kernels/*/__init__.py"))
OPERATORS = (
    "adaln_forward",
    "adaln_backward",
    "gate_residual_forward",
    "gate_residual_backward",
    "gate_residual_adaln_forward",
    "gate_residual_adaln_backward",
    "align_loss_forward",
    "align_loss_backward",
    "euler_maruyama_step",
)


def arguments(op, dtype=torch.float32):
    tokens = ("prediction", "target") if op == "align_loss" else ("x", "branch")
    names = {
        "adaln": ("x", "shift", "scale"),
        "gate_residual": ("x", "branch", "gate"),
        "gate_residual_adaln": ("x", "branch", "gate", "shift", "scale"),
        "align_loss": tokens,
    }[op]
    return {
        name: seeded((2, 5, 24) if name in tokens else (2, 24), seed=seed, dtype=dtype)
        for seed, name in enumerate(names)
    }


OPS = ("adaln", "gate_residual", "gate_residual_adaln", "align_loss")


@pytest.mark.parametrize("name", OPERATORS)
def test_operator_passes_opcheck(interpreter, name):
    for result in interpreter(checks.opchecked, name):
        assert len(result) >= 4 and set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize("op", OPS)
def test_gradients_pass_the_check_of_opcheck(interpreter, op):
    interpreter(checks.opchecked_with_gradients, op, arguments(op))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize(
    "op, used",
    (
        ("adaln", (True,)),
        ("gate_residual", (True,)),
        ("gate_residual_adaln", (True, True)),
        ("gate_residual_adaln", (True, False)),
        ("gate_residual_adaln", (False, True)),
        ("align_loss", (True,)),
    ),
)
def test_kernels_compile_into_one_graph_that_equals_eager(interpreter, op, used, dtype):
    shape, up_dtype = ((2,), torch.float32) if op == "align_loss" else ((2, 5, 24), dtype)
    upstream = [
        seeded(shape, seed=7 + i, dtype=up_dtype) if u else None for i, u in enumerate(used)
    ]
    compiled, eager = interpreter(checks.compiled_and_eager, op, arguments(op, dtype), upstream)
    for actual, expected in zip(compiled, eager):
        if actual is None or expected is None:
            assert not any(v.any() for v in (actual, expected) if v is not None)
        else:
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("how", ("compiled", "checkpointed"))
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


@pytest.mark.parametrize("linear", (False, True))
@pytest.mark.parametrize("op", OPS)
def test_differentiating_twice_raises(interpreter, op, linear):
    message = interpreter(checks.second_derivative, op, arguments(op), linear)
    assert "cannot be differentiated twice" in message


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
