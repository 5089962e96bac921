import pytest
import torch

from repa_fast import ops
from repa_fast.kernels.gate_residual_adaln.reference import (
    gate_residual_adaln_reference,
    gate_residual_reference,
)
from repa_fast.testing import assert_within_budget, modulation_chunks, seeded
from tests.kernels import checks

# dtype of the residual stream, dtype of branch and modulation
DTYPES = (
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
)
MIXED = (
    (torch.float32, torch.bfloat16, torch.float32, torch.float32, torch.float32),
    (torch.bfloat16, torch.float32, torch.float16, torch.bfloat16, torch.float32),
    (torch.float16, torch.bfloat16, torch.float32, torch.float16, torch.bfloat16),
)
# Eight chunks of tokens per sample in the backward pass: even, uneven, and fewer.
SHAPES = (
    (1, 8, 72),
    (3, 1, 72),
    (2, 5, 1000),
    (1, 9, 1152),
    (1, 11, 72),
    (1, 17, 72),
    (1, 33, 72),
    (8, 3, 1),
)
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


def gradient_formula(
    x, branch, gate, shift, scale, dnew, dy, *, eps=1e-6, work=torch.float64, stream=None
):
    """Gradients in `work`; `stream` is what x' and its gradient are rounded to, if anything.

    Of a single column g - mean(g) is the rounding of g, as in test_adaln.
    """
    exact = dy.double() * (1 + scale.double()[:, None])
    x, branch, gate, scale, dnew, dy = (v.to(work) for v in (x, branch, gate, scale, dnew, dy))
    new = x + gate[:, None] * branch
    xhat, rstd = statistics(new if stream is None else new.to(stream).to(work), eps)
    g = dy * (1 + scale[:, None])
    first = (exact - g.double()).to(work) if x.shape[-1] == 1 else g
    rest = 0 if x.shape[-1] == 1 else g.mean(-1, keepdim=True)
    dx = dnew + rstd * (first - rest - xhat * (g * xhat).mean(-1, keepdim=True))
    dx = dx if stream is None else dx.to(stream).to(work)
    return dx, gate[:, None] * dx, (dx * branch).sum(1), dy.sum(1), (dy * xhat).sum(1)


def leaves(*tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


def upstreams(shape, x_dtype=torch.float32, dtype=torch.float32):
    return seeded(shape, seed=4, dtype=x_dtype), seeded(shape, seed=5, dtype=dtype)


def named(args):
    return dict(zip(NAMES, args))


def expect_budgets(run, args, upstream, out_dtype=None):
    """Both outputs and all gradients against the closed forms; an unused output counts as zero."""
    x, *_, shift, _ = args
    out_dtype = out_dtype or shift.dtype
    (new, y), got = run("gate_residual_adaln", named(args), upstream, out_dtype=out_dtype)
    oracle, working = formula(*args), formula(*args, work=torch.float32, stream=x.dtype)
    assert_within_budget("x'", new, oracle[0], working[0])
    assert_within_budget("y", y, oracle[1], working[1].to(out_dtype))
    upstream = [torch.zeros_like(x) if up is None else up for up in upstream]
    oracle = gradient_formula(*args, *upstream)
    working = gradient_formula(*args, *upstream, work=torch.float32, stream=x.dtype)
    for name, arg, a, o, w in zip(NAMES, args, got, oracle, working):
        a = torch.zeros_like(arg) if a is None else a
        assert_within_budget(f"d{name}", a, o, w.to(arg.dtype))


def expect_gate_residual_budgets(run, args, dnew):
    x, branch, gate = args
    (new,), (dx, *got) = run("gate_residual", named(args), [dnew])
    assert torch.equal(dx, dnew)
    results = []
    for work in (torch.float64, torch.float32):
        d, b, g = (v.to(work) for v in (dnew, branch, gate))
        results.append((x.to(work) + g[:, None] * b, g[:, None] * d, (d * b).sum(1)))
    for name, like, a, o, w in zip(("x'", "dbranch", "dgate"), args, (new, *got), *results):
        assert_within_budget(name, a, o, w.to(like.dtype))


@pytest.mark.parametrize("x_dtype, dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_results_and_gradients_are_the_closed_forms_within_budget(run, shape, x_dtype, dtype):
    expect_budgets(run, inputs(shape, x_dtype, dtype), upstreams(shape, x_dtype, dtype))


@pytest.mark.parametrize("x_dtype, dtype", DTYPES)
@pytest.mark.parametrize("shape", ((2, 9, 72), (1, 17, 1152)))
def test_gate_residual_and_its_gradients_are_within_budget(run, shape, x_dtype, dtype):
    args = inputs(shape, x_dtype, dtype)[:3]
    expect_gate_residual_budgets(run, args, upstreams(shape, x_dtype, dtype)[0])


@pytest.mark.parametrize("dtypes", MIXED)
def test_every_argument_may_have_its_own_dtype(run, dtypes):
    args = [v.to(dtype) for v, dtype in zip(inputs((2, 3, 24)), dtypes)]
    upstream = upstreams((2, 3, 24), dtypes[0], dtypes[3])
    expect_budgets(run, args, upstream)
    expect_gate_residual_budgets(run, args[:3], upstream[0])


@pytest.mark.parametrize("out_dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_out_dtype_is_that_of_the_adaln_only(run, out_dtype):
    args = inputs((2, 3, 24), torch.float32, torch.bfloat16)
    expect_budgets(run, args, upstreams((2, 3, 24), torch.float32, out_dtype), out_dtype)


@pytest.mark.parametrize("layout", checks.TOKENS)
def test_tokens_may_lie_anyhow_in_memory(run, layout):
    lay = checks.TOKENS[layout]
    x, branch, *vectors = inputs((2, 3, 24), torch.float32, torch.bfloat16)
    dnew, dy = upstreams((2, 3, 24), torch.float32, torch.bfloat16)
    expect_budgets(run, (lay(x), lay(branch), *vectors), (dnew, dy))
    expect_gate_residual_budgets(run, (lay(x), lay(branch), vectors[0]), dnew)


@pytest.mark.parametrize("layout", checks.TOKENS)
def test_upstream_gradients_may_lie_anyhow_in_memory(run, layout):
    args = inputs((2, 3, 24), torch.float32, torch.bfloat16)
    dnew, dy = (checks.TOKENS[layout](v) for v in upstreams((2, 3, 24), dtype=torch.bfloat16))
    expect_budgets(run, args, (dnew, dy))
    expect_gate_residual_budgets(run, args[:3], dnew)


@pytest.mark.parametrize("layout", checks.VECTORS)
def test_vectors_may_lie_anyhow_in_memory(run, layout):
    x, branch, *vectors = inputs((2, 3, 24), torch.float32, torch.bfloat16)
    upstream = upstreams((2, 3, 24), torch.float32, torch.bfloat16)
    args = (x, branch, *(checks.VECTORS[layout](v) for v in vectors))
    expect_budgets(run, args, upstream)
    expect_gate_residual_budgets(run, args[:3], upstream[0])


@pytest.mark.parametrize("unused", (0, 1))
@pytest.mark.parametrize("x_dtype, dtype", DTYPES)
def test_an_output_may_be_unused(run, unused, x_dtype, dtype):
    upstream = list(upstreams((2, 3, 24), x_dtype, dtype))
    upstream[unused] = None
    expect_budgets(run, inputs((2, 3, 24), x_dtype, dtype), upstream)


@pytest.mark.parametrize("shape", ((0, 4, 24), (2, 0, 24), (0, 0, 24)))
def test_nothing_gives_nothing_and_vectors_without_tokens_have_gradient_zero(run, shape):
    args, upstream = inputs(shape), upstreams(shape)
    expect_budgets(run, args, upstream)
    expect_gate_residual_budgets(run, args[:3], upstream[0])
    _, got = run("gate_residual_adaln", named(args), upstream)
    assert [v.shape for v in got] == [v.shape for v in args]
    assert not any(v.any() for v in got)


def test_two_evaluations_agree_in_every_bit(run):
    args, upstream = inputs((2, 9, 72), dtype=torch.bfloat16), upstreams((2, 9, 72))
    for op, count, up in (("gate_residual_adaln", 5, upstream), ("gate_residual", 3, upstream[:1])):
        first, second = (run(op, named(args[:count]), up) for _ in range(2))
        torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("run", checks.KERNELS, indirect=True)
@pytest.mark.parametrize("op, count", (("gate_residual", 3), ("gate_residual_adaln", 5)))
def test_a_sample_does_not_depend_on_its_batch(run, op, count):
    args, upstream = inputs((2, 11, 72))[:count], upstreams((2, 11, 72))[: 1 + (count == 5)]
    batch = run(op, named(args), upstream)
    alone = run(op, named([v[1:2] for v in args]), [v[1:2] for v in upstream])
    for of_batch, of_alone in zip(batch, alone):
        for a, b in zip(of_batch, of_alone):
            assert torch.equal(a[1:2], b)


@pytest.mark.parametrize("implementation", checks.EVERYWHERE)
@pytest.mark.parametrize("op, count", (("gate_residual", 3), ("gate_residual_adaln", 5)))
def test_inputs_are_not_modified(request, implementation, op, count):
    call = checks.caller(request, implementation)
    args, upstream = inputs((2, 3, 24))[:count], upstreams((2, 3, 24))[: 1 + (count == 5)]
    assert call(checks.modified, op, named(args), list(upstream)) == []


@pytest.mark.parametrize("implementation", checks.EVERYWHERE)
def test_gradient_of_the_modulation_lies_in_its_chunks(request, implementation):
    call = checks.caller(request, implementation)
    x, branch, *_ = inputs((2, 3, 24))
    modulation = seeded((2, 6 * 24), seed=3, std=0.5)
    chunks, upstream = {"gate": 2, "shift": 3, "scale": 4}, upstreams((2, 3, 24))
    arguments = {"x": x, "branch": branch}
    got = call(
        checks.modulation_gradient, "gate_residual_adaln", arguments, modulation, chunks, upstream
    )
    vectors = modulation.chunk(6, dim=-1)[2:5]
    oracle, working = (
        torch.cat(gradient_formula(x, branch, *vectors, *upstream, work=work)[2:], dim=-1)
        for work in (torch.float64, torch.float32)
    )
    assert not got[:, : 2 * 24].any() and not got[:, 5 * 24 :].any()
    assert_within_budget("dmodulation", got[:, 2 * 24 : 5 * 24], oracle, working)


@pytest.mark.parametrize("run", checks.KERNELS, indirect=True)
@pytest.mark.parametrize("which", range(5))
def test_kernels_refuse_fp64_with_a_reason(run, which):
    args = list(inputs((2, 3, 24)))
    args[which] = args[which].double()
    with pytest.raises(ValueError, match=r"gate_residual_adaln: .*'triton'.*torch\.float64"):
        run("gate_residual_adaln", named(args))
    if which < 3:
        with pytest.raises(ValueError, match=r"gate_residual: .*'triton'.*torch\.float64"):
            run("gate_residual", named(args[:3]))


def test_rows_of_vectors_may_lie_beyond_2_31_elements(interpreter):
    args = inputs((2, 2, 24), torch.bfloat16, torch.bfloat16)
    upstream = upstreams((2, 2, 24), torch.bfloat16, torch.bfloat16)
    for op, count in (("gate_residual", 3), ("gate_residual_adaln", 5)):
        names = NAMES[2:count]
        results = interpreter(
            checks.far_vectors, op, named(args[:count]), names, upstream[: 1 + (count == 5)]
        )
        if results is None:
            pytest.skip("no address space for 4 GiB")
        for far, near in zip(*results):
            assert torch.equal(far, near)


@pytest.mark.gpu
@pytest.mark.usefixtures("heavy")
def test_a_sample_beyond_2_31_elements_is_within_budget():
    tokens, width = 256, 1152
    batch = 2**31 // (tokens * width) + 2
    sample = inputs((1, tokens, width), torch.bfloat16, torch.bfloat16)
    dsample = upstreams((1, tokens, width), torch.bfloat16, torch.bfloat16)
    args = [v.to("cuda").repeat(batch, *[1] * (v.ndim - 1)).requires_grad_() for v in sample]
    upstream = [v.to("cuda").expand(batch, -1, -1) for v in dsample]
    assert args[0].numel() > 2**31
    outputs = ops.gate_residual_adaln(*args, implementation="triton")
    gradients = torch.autograd.grad(outputs, args, upstream)

    def last(op, arguments, upstream, **options):
        return [v[-1:].cpu() for v in outputs], [v[-1:].cpu() for v in gradients]

    expect_budgets(last, sample, dsample)


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
