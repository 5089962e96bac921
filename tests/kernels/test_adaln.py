"""adaln, and what gate_residual_adaln has of it."""

import functools

import pytest
import torch

from repa_fast.testing import assert_within_budget
from tests.kernels.evaluate import evaluate
from tests.kernels.table import ADALN, BF16, F16, F32, F64, OPS, on


@on("adaln")
@pytest.mark.parametrize("out_dtype", (BF16, F16))
def test_a_result_is_rounded_to_nearest(op, run, out_dtype):
    arguments = op.arguments((2, 5, 72))
    (exact,), _ = run(op.name, arguments)
    (y,), _ = run(op.name, arguments, out_dtype=out_dtype)
    assert torch.equal(y, exact.to(out_dtype))


@pytest.mark.parametrize("name", ADALN)
@pytest.mark.parametrize("eps", (1e-6, 0.5))
def test_eps_is_added_to_the_variance_and_1e_6_by_default(name, eps):
    op = OPS[name]
    arguments = op.arguments((2, 4, 72))
    arguments |= {token: 1e-3 * arguments[token] for token in op.tokens}  # a variance like eps
    call = functools.partial(evaluate, name, arguments, None)
    (*_, y), _ = call({"eps": eps})
    (oracle, working) = (
        op.results(arguments, [None] * len(op.outputs), work, eps=eps)[0][-1] for work in (F64, F32)
    )
    assert_within_budget("y", y, oracle, working)
    (*_, default), _ = call({})
    assert torch.equal(default, y) == (eps == 1e-6)
