import pytest
import torch

from repa_fast import ops
from repa_fast.testing import assert_within_budget
from tests.kernels.table import BF16, F16, F32, F64, KERNELS, OPS, PAIRS, assert_same

OP = OPS["gate_residual_adaln"]


@pytest.mark.parametrize("unused", (0, 1))
@pytest.mark.parametrize("stream, dtype", PAIRS)
def test_an_output_may_be_unused(run, unused, stream, dtype):
    arguments = OP.arguments(stream=stream, dtype=dtype)
    upstream = OP.upstream(arguments)
    upstream[unused] = None
    OP.expect_budgets(run, arguments, upstream)


@pytest.mark.usefixtures("heavy")
@pytest.mark.parametrize("run", KERNELS[:1], indirect=True)
@pytest.mark.parametrize("dtype", (F32, BF16))
@pytest.mark.parametrize("unused", (0, 1))
def test_it_compiles_into_one_graph_of_which_an_output_is_unused(run, unused, dtype):
    arguments = OP.arguments((2, 5, 24), dtype=dtype)
    upstream = OP.upstream(arguments)
    upstream[unused] = None
    eager, compiled = (run(OP.name, arguments, upstream, compiled=how) for how in ("", "static"))
    assert_same(compiled, eager)


@pytest.mark.parametrize("stream, dtype", PAIRS)
def test_the_gradient_of_the_stream_is_the_upstream_gradient_of_gate_residual(run, stream, dtype):
    op = OPS["gate_residual"]
    arguments = op.arguments((2, 9, 72), stream, dtype)
    (upstream,) = op.upstream(arguments)
    _, (dx, *_) = run(op.name, arguments, [upstream])
    assert torch.equal(dx, upstream)


@pytest.mark.parametrize("dtype", (BF16, F16))
def test_the_product_is_not_rounded_before_the_sum(dtype):
    op = OPS["gate_residual"]
    arguments = op.arguments((2, 16, 72), dtype, dtype)
    # the rounded product, so that the sum is its rounding error
    arguments["x"] = -(arguments["gate"][:, None] * arguments["branch"])
    (oracle,), (working,) = (op.results(arguments, [None], work)[0] for work in (F64, F32))
    assert oracle.any()
    assert_within_budget("x'", ops.gate_residual(**arguments), oracle, working)
