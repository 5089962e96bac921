import pytest
import torch

from repa_fast import ops
from repa_fast.kernels.gate_residual_adaln.reference import (
    gate_residual_adaln_reference,
    gate_residual_reference,
)
from repa_fast.testing import assert_within_budget, modulation_chunks, seeded

# dtype of the residual stream, dtype of branch and modulation
DTYPES = (
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
)
SHAPES = ((2, 16, 72), (3, 1, 72), (4, 5, 1000))
NAMES = ("x", "branch", "gate", "shift", "scale")


def inputs(shape, x_dtype=torch.float32, dtype=torch.float32):
    batch, _, width = shape
    x = seeded(shape, seed=1, dtype=x_dtype, mean=0.7, std=2.0)
    branch = seeded(shape, seed=2, dtype=dtype)
    shift, scale, gate = modulation_chunks(batch, width, seed=3, dtype=dtype)[:3]
    return x, branch, gate, shift, scale


def formula(x, branch, gate, shift, scale, *, eps=1e-6, work=torch.float64, stream=None):
    """x' rounded to `stream`, if any, and the adaLN of x' in `work`."""
    new = x.to(work) + gate.to(work)[:, None] * branch.to(work)
    new = new if stream is None else new.to(stream)
    xhat, _ = statistics(new.to(work), eps)
    return new, xhat * (1 + scale.to(work)[:, None]) + shift.to(work)[:, None]


def statistics(x, eps):
    centred = x - x.mean(-1, keepdim=True)
    rstd = (centred.square().mean(-1, keepdim=True) + eps) ** -0.5
    return centred * rstd, rstd


def gradient_formula(x, branch, gate, shift, scale, dnew, dy, *, eps=1e-6, work=torch.float64):
    x, branch, gate, scale, dnew, dy = (v.to(work) for v in (x, branch, gate, scale, dnew, dy))
    xhat, rstd = statistics(x + gate[:, None] * branch, eps)
    g = dy * (1 + scale[:, None])
    dx = dnew + rstd * (g - g.mean(-1, keepdim=True) - xhat * (g * xhat).mean(-1, keepdim=True))
    return dx, gate[:, None] * dx, (dx * branch).sum(1), dy.sum(1), (dy * xhat).sum(1)


def leaves(*tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


@pytest.mark.parametrize("x_dtype, dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_is_within_budget(shape, x_dtype, dtype):
    args = inputs(shape, x_dtype, dtype)
    oracle = formula(*args)
    new, y = formula(*args, work=torch.float32, stream=x_dtype)
    actual_new, actual_y = ops.gate_residual_adaln(*args)
    assert_within_budget("x'", actual_new, oracle[0], new)
    assert_within_budget("y", actual_y, oracle[1], y.to(dtype))
    assert_within_budget("gate_residual", ops.gate_residual(*args[:3]), oracle[0], new)


@pytest.mark.parametrize("x_dtype, dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_the_closed_forms_within_budget(shape, x_dtype, dtype):
    args = leaves(*inputs(shape, x_dtype, dtype))
    upstream = seeded(shape, seed=4, dtype=x_dtype), seeded(shape, seed=5, dtype=dtype)
    got = torch.autograd.grad(ops.gate_residual_adaln(*args), args, upstream)
    oracle = gradient_formula(*args, *upstream)
    working = gradient_formula(*args, *upstream, work=torch.float32)
    for name, arg, a, o, w in zip(NAMES, args, got, oracle, working):
        assert_within_budget(f"d{name}", a, o, w.to(arg.dtype))


@pytest.mark.parametrize("x_dtype, dtype", DTYPES)
def test_gate_residual_gradients_are_within_budget(x_dtype, dtype):
    x, branch, gate = leaves(*inputs((2, 16, 72), x_dtype, dtype)[:3])
    upstream = seeded((2, 16, 72), seed=4, dtype=x_dtype)
    got = torch.autograd.grad(ops.gate_residual(x, branch, gate), (x, branch, gate), upstream)
    assert torch.equal(got[0], upstream)
    exact = []
    for work in (torch.float64, torch.float32):
        d, b, g = (v.to(work) for v in (upstream, branch, gate))
        exact.append((g[:, None] * d, (d * b).sum(1)))
    for name, a, o, w in zip(("dbranch", "dgate"), got[1:], *exact):
        assert_within_budget(name, a, o, w.to(dtype))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("which", range(2))
def test_a_result_one_percent_wrong_exceeds_the_budget(which, dtype):
    args = inputs((2, 16, 72), dtype, dtype)
    oracle = formula(*args)[which]
    working = formula(*args, work=torch.float32)[which]
    with pytest.raises(AssertionError, match="result: "):
        assert_within_budget("result", (1.01 * working).to(dtype), oracle, working.to(dtype))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("which", range(5))
def test_a_gradient_one_percent_wrong_exceeds_the_budget(which, dtype):
    args = inputs((2, 16, 72), dtype, dtype)
    upstream = (seeded((2, 16, 72), seed=seed, dtype=dtype) for seed in (4, 5))
    args = (*args, *upstream)
    oracle = gradient_formula(*args)[which]
    working = gradient_formula(*args, work=torch.float32)[which]
    with pytest.raises(AssertionError, match="gradient: "):
        assert_within_budget("gradient", (1.01 * working).to(dtype), oracle, working.to(dtype))


def test_eps_is_added_to_the_variance():
    args = inputs((2, 4, 72))
    _, y = ops.gate_residual_adaln(*args, eps=0.5)
    working = formula(*args, eps=0.5, work=torch.float32)[1]
    assert_within_budget("y", y, formula(*args, eps=0.5)[1], working)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_the_product_is_not_rounded_before_the_sum(dtype):
    _, branch, gate, *_ = inputs((2, 16, 72), dtype, dtype)
    x = -(gate[:, None] * branch)  # the rounded product, so that the sum is its rounding error
    oracle = x.double() + gate.double()[:, None] * branch.double()
    working = (x.float() + gate.float()[:, None] * branch.float()).to(dtype)
    assert oracle.any()
    assert_within_budget("x'", ops.gate_residual(x, branch, gate), oracle, working)


def test_a_single_column_gives_the_shift():
    args = inputs((2, 7, 1), torch.float64, torch.float64)
    new, y = ops.gate_residual_adaln(*args)
    scale, shift = args[4], args[3]
    # x' - mean is 0 up to a rounding of x', which 1 / sqrt(eps) = 1000 magnifies
    bound = 1000 * torch.finfo(torch.float64).eps * (new.abs() * (1 + scale[:, None].abs())).max()
    assert (y - shift[:, None]).abs().max() <= bound


def test_gradcheck():
    args = leaves(*inputs((2, 3, 5), torch.float64, torch.float64))
    assert torch.autograd.gradcheck(ops.gate_residual_adaln, args)
    assert torch.autograd.gradcheck(ops.gate_residual, args[:3])


def test_gradient_reaches_its_own_chunk_of_a_strided_tensor():
    x, branch, *_ = inputs((2, 3, 5), torch.float64, torch.float64)
    (modulation,) = leaves(seeded((2, 30), seed=3, dtype=torch.float64))
    gate, shift, scale = modulation.chunk(6, dim=-1)[2:5]
    assert not gate.is_contiguous()
    upstream = [seeded((2, 3, 5), seed=seed, dtype=torch.float64) for seed in (4, 5)]
    new, y = ops.gate_residual_adaln(x, branch, gate, shift, scale)
    torch.autograd.backward((new, y), upstream)
    expected = torch.zeros(2, 30, dtype=torch.float64)
    args = (v.detach() for v in (x, branch, gate, shift, scale))
    expected[:, 10:25] = torch.cat(gradient_formula(*args, *upstream)[2:], dim=-1)
    torch.testing.assert_close(modulation.grad, expected, rtol=1e-12, atol=1e-12)


def test_strided_inputs_give_what_contiguous_ones_give():
    args = inputs((2, 6, 8))
    strided = [v.transpose(1, 2).contiguous().transpose(1, 2) for v in args[:2]]
    assert not strided[0].is_contiguous() and not args[2].is_contiguous()
    expected = ops.gate_residual_adaln(*(v.contiguous() for v in args))
    actual = ops.gate_residual_adaln(*strided, *args[2:])
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("x_dtype, dtype", DTYPES)
def test_stream_keeps_its_dtype_and_adaln_takes_that_of_shift_unless_told(x_dtype, dtype):
    args = inputs((2, 3, 8), x_dtype, dtype)
    assert ops.gate_residual(*args[:3]).dtype == x_dtype
    assert [v.dtype for v in ops.gate_residual_adaln(*args)] == [x_dtype, dtype]
    for out_dtype in (torch.float32, torch.bfloat16, torch.float16):
        results = ops.gate_residual_adaln(*args, out_dtype=out_dtype)
        assert [v.dtype for v in results] == [x_dtype, out_dtype]


def test_it_is_gate_residual_followed_by_adaln():
    x, branch, gate, shift, scale = inputs((2, 5, 72), torch.float32, torch.bfloat16)
    new, y = ops.gate_residual_adaln(x, branch, gate, shift, scale)
    alone = ops.gate_residual(x, branch, gate)
    for name, actual, separate in (("x'", new, alone), ("y", y, ops.adaln(alone, shift, scale))):
        oracle = formula(x, branch, gate, shift, scale)[0 if name == "x'" else 1]
        assert_within_budget(name, actual, oracle, separate)


def test_references_compute_in_fp64():
    args = inputs((2, 5, 72), torch.float64, torch.float64)
    actual = gate_residual_adaln_reference(*args, eps=1e-6, out_dtype=torch.float64)
    assert [v.dtype for v in actual] == [torch.float64] * 2
    torch.testing.assert_close(actual, formula(*args), rtol=1e-12, atol=1e-12)
    alone = gate_residual_reference(*args[:3])
    torch.testing.assert_close(alone, formula(*args)[0], rtol=1e-12, atol=1e-12)


def test_empty_batch_runs_forward_and_backward():
    args = leaves(*inputs((0, 4, 8)))
    new, y = ops.gate_residual_adaln(*args)
    assert new.shape == y.shape == (0, 4, 8)
    (new.sum() + y.sum()).backward()
    assert [v.grad.shape for v in args] == [v.shape for v in args]
    assert ops.gate_residual(*args[:3]).shape == (0, 4, 8)


@pytest.mark.parametrize("op, count", ((ops.gate_residual, 3), (ops.gate_residual_adaln, 5)))
def test_compiles_into_one_graph_that_equals_eager(op, count):
    args = leaves(*inputs((2, 4, 8), torch.float32, torch.bfloat16)[:count])
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    results = []
    for run in (compiled, op):
        out = run(*args)
        out = out if isinstance(out, tuple) else (out,)
        upstream = [seeded(o.shape, seed=4 + i, dtype=o.dtype) for i, o in enumerate(out)]
        results.append([*out, *torch.autograd.grad(out, args, upstream)])
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


@pytest.mark.parametrize(
    "argument, wrong, got, expected",
    (
        ("x", torch.ones(2, 8), "(2, 8)", "(B, N, D)"),
        ("x", torch.ones(2, 4, 8).long(), "torch.int64", "floating"),
        ("branch", torch.ones(2, 3, 8), "(2, 3, 8)", "(2, 4, 8)"),
        ("branch", torch.ones(2, 4, 8).long(), "torch.int64", "floating"),
        ("gate", torch.ones(2, 7), "(2, 7)", "(2, 8)"),
        ("gate", torch.ones(2, 8).long(), "torch.int64", "floating"),
        ("shift", torch.ones(3, 8), "(3, 8)", "(2, 8)"),
        ("shift", torch.ones(2, 8).long(), "torch.int64", "floating"),
        ("scale", torch.ones(2, 1, 8), "(2, 1, 8)", "(2, 8)"),
        ("scale", torch.ones(2, 8).bool(), "torch.bool", "floating"),
    ),
)
def test_wrong_arguments_are_named_with_expected_and_got(argument, wrong, got, expected):
    args = dict(zip(NAMES, inputs((2, 4, 8)))) | {argument: wrong}
    calls = [(ops.gate_residual_adaln, args)]
    if argument in NAMES[:3]:
        calls.append((ops.gate_residual, {name: args[name] for name in NAMES[:3]}))
    for op, arguments in calls:
        with pytest.raises(ValueError) as error:
            op(**arguments)
        message = str(error.value).replace("expected a ", "expected ")
        for part in (f"{op.__name__}: ", f"{argument} ", got, f"expected {expected}"):
            assert part in message
