import pytest
import torch

from repa_fast import ops
from repa_fast.kernels.adaln.reference import adaln_reference
from repa_fast.testing import assert_within_budget, modulation_chunks, seeded
from tests.kernels import checks

# dtype of the residual stream, dtype of the modulation
DTYPES = (
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
)
MIXED = (
    (torch.float32, torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.float32, torch.float16),
    (torch.float16, torch.float16, torch.bfloat16),
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


def inputs(shape, x_dtype=torch.float32, dtype=torch.float32, *, mean=0.7, std=2.0):
    batch, _, width = shape
    x = seeded(shape, seed=1, dtype=x_dtype, mean=mean, std=std)
    return x, *modulation_chunks(batch, width, seed=2, dtype=dtype)[:2]


def named(args):
    return dict(zip(("x", "shift", "scale"), args))


def statistics(x, eps):
    centred = x - x.mean(-1, keepdim=True)
    rstd = (centred.square().mean(-1, keepdim=True) + eps) ** -0.5
    return centred * rstd, rstd


def formula(x, shift, scale, *, eps=1e-6, work=torch.float64):
    x, shift, scale = (v.to(work) for v in (x, shift, scale))
    return statistics(x, eps)[0] * (1 + scale[:, None]) + shift[:, None]


def gradient_formula(x, shift, scale, dy, *, eps=1e-6, work=torch.float64):
    """Gradients in `work`; of a single column g - mean(g) with the first g unrounded.

    There all of dx cancels, and what is left is the rounding of that product: a GPU's compiler
    contracts it into the subtraction, a CPU's does not.
    """
    exact = dy.double() * (1 + scale.double()[:, None])
    x, shift, scale, dy = (v.to(work) for v in (x, shift, scale, dy))
    xhat, rstd = statistics(x, eps)
    g = dy * (1 + scale[:, None])
    first = (exact - g.double()).to(work) if x.shape[-1] == 1 else g
    rest = 0 if x.shape[-1] == 1 else g.mean(-1, keepdim=True)
    dx = rstd * (first - rest - xhat * (g * xhat).mean(-1, keepdim=True))
    return dx, dy.sum(1), (dy * xhat).sum(1)


def leaves(*tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


def expect_budgets(run, args, dy, out_dtype=None):
    """The result and all gradients against the closed forms."""
    out_dtype = out_dtype or args[1].dtype
    (y,), got = run("adaln", named(args), [dy], out_dtype=out_dtype)
    assert_within_budget("y", y, formula(*args), formula(*args, work=torch.float32).to(out_dtype))
    oracle = gradient_formula(*args, dy)
    working = gradient_formula(*args, dy, work=torch.float32)
    for name, arg, a, o, w in zip(("dx", "dshift", "dscale"), args, got, oracle, working):
        assert_within_budget(name, a, o, w.to(arg.dtype))


@pytest.mark.parametrize("x_dtype, dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_result_and_gradients_are_the_closed_forms_within_budget(run, shape, x_dtype, dtype):
    expect_budgets(run, inputs(shape, x_dtype, dtype), seeded(shape, seed=3, dtype=dtype))


@pytest.mark.parametrize("dtypes", MIXED)
def test_every_argument_may_have_its_own_dtype(run, dtypes):
    args = [v.to(dtype) for v, dtype in zip(inputs((2, 3, 24)), dtypes)]
    expect_budgets(run, args, seeded((2, 3, 24), seed=3, dtype=dtypes[1]))


@pytest.mark.parametrize("out_dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_result_and_its_gradient_may_have_another_dtype(run, out_dtype):
    args = inputs((2, 3, 24), torch.float32, torch.bfloat16)
    expect_budgets(run, args, seeded((2, 3, 24), seed=3, dtype=out_dtype), out_dtype)


@pytest.mark.parametrize("out_dtype", (torch.bfloat16, torch.float16))
def test_result_is_rounded_to_nearest(run, out_dtype):
    args = inputs((2, 5, 72))
    (exact,), _ = run("adaln", named(args))
    (y,), _ = run("adaln", named(args), out_dtype=out_dtype)
    assert torch.equal(y, exact.to(out_dtype))


@pytest.mark.parametrize("layout", checks.TOKENS)
def test_tokens_may_lie_anyhow_in_memory(run, layout):
    x, *vectors = inputs((2, 3, 24), torch.float32, torch.bfloat16)
    dy = seeded((2, 3, 24), seed=3, dtype=torch.bfloat16)
    expect_budgets(run, (checks.TOKENS[layout](x), *vectors), dy)


@pytest.mark.parametrize("layout", checks.TOKENS)
def test_the_upstream_gradient_may_lie_anyhow_in_memory(run, layout):
    dy = seeded((2, 3, 24), seed=3, dtype=torch.bfloat16)
    args = inputs((2, 3, 24), torch.float32, torch.bfloat16)
    expect_budgets(run, args, checks.TOKENS[layout](dy))


@pytest.mark.parametrize("layout", checks.VECTORS)
def test_vectors_may_lie_anyhow_in_memory(run, layout):
    x, *vectors = inputs((2, 3, 24), torch.float32, torch.bfloat16)
    dy = seeded((2, 3, 24), seed=3, dtype=torch.bfloat16)
    expect_budgets(run, (x, *(checks.VECTORS[layout](v) for v in vectors)), dy)


@pytest.mark.parametrize("shape", ((0, 4, 24), (2, 0, 24), (0, 0, 24)))
def test_nothing_gives_nothing_and_vectors_without_tokens_have_gradient_zero(run, shape):
    args = inputs(shape)
    expect_budgets(run, args, torch.ones(shape))
    _, got = run("adaln", named(args), [torch.ones(shape)])
    assert [v.shape for v in got] == [v.shape for v in args]
    assert not any(v.any() for v in got)


def test_two_evaluations_agree_in_every_bit(run):
    args, dy = inputs((2, 9, 72), dtype=torch.bfloat16), seeded((2, 9, 72), seed=3)
    first, second = (run("adaln", named(args), [dy], out_dtype=dy.dtype) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("run", checks.KERNELS, indirect=True)
def test_a_sample_does_not_depend_on_its_batch(run):
    args, dy = inputs((2, 11, 72)), seeded((2, 11, 72), seed=3)
    batch = run("adaln", named(args), [dy])
    alone = run("adaln", named([v[1:2] for v in args]), [dy[1:2]])
    for of_batch, of_alone in zip(batch, alone):
        for a, b in zip(of_batch, of_alone):
            assert torch.equal(a[1:2], b)


@pytest.mark.parametrize("implementation", checks.EVERYWHERE)
def test_inputs_are_not_modified(request, implementation):
    call = checks.caller(request, implementation)
    dy = seeded((2, 3, 24), seed=3)
    assert call(checks.modified, "adaln", named(inputs((2, 3, 24))), [dy]) == []


@pytest.mark.parametrize("implementation", checks.EVERYWHERE)
def test_gradient_of_the_modulation_lies_in_its_chunks(request, implementation):
    call = checks.caller(request, implementation)
    x, dy = (seeded((2, 3, 24), seed=seed) for seed in (1, 3))
    modulation = seeded((2, 6 * 24), seed=2, std=0.5)
    chunks = {"shift": 1, "scale": 2}
    got = call(checks.modulation_gradient, "adaln", {"x": x}, modulation, chunks, [dy])
    vectors = modulation.chunk(6, dim=-1)[1:3]
    oracle, working = (
        torch.cat(gradient_formula(x, *vectors, dy, work=work)[1:], dim=-1)
        for work in (torch.float64, torch.float32)
    )
    assert not got[:, :24].any() and not got[:, 3 * 24 :].any()
    assert_within_budget("dmodulation", got[:, 24 : 3 * 24], oracle, working)


@pytest.mark.parametrize("run", checks.KERNELS, indirect=True)
@pytest.mark.parametrize("which", range(3))
def test_kernels_refuse_fp64_with_a_reason(run, which):
    args = list(inputs((2, 3, 24)))
    args[which] = args[which].double()
    with pytest.raises(ValueError, match=r"adaln: .*'triton'.*torch\.float64"):
        run("adaln", named(args))


def test_rows_of_vectors_may_lie_beyond_2_31_elements(interpreter):
    args = inputs((2, 2, 24), torch.bfloat16, torch.bfloat16)
    dy = seeded((2, 2, 24), seed=3, dtype=torch.bfloat16)
    results = interpreter(checks.far_vectors, "adaln", named(args), ("shift", "scale"), [dy])
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
    dsample = seeded((1, tokens, width), seed=3, dtype=torch.bfloat16)
    args = [v.to("cuda").repeat(batch, *[1] * (v.ndim - 1)).requires_grad_() for v in sample]
    assert args[0].numel() > 2**31
    y = ops.adaln(*args, implementation="triton")
    gradients = torch.autograd.grad(y, args, dsample.to("cuda").expand_as(y))

    def last(op, arguments, upstream, **options):
        return [y[-1:].cpu()], [v[-1:].cpu() for v in gradients]

    expect_budgets(last, sample, dsample)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_a_result_one_percent_wrong_exceeds_the_budget(dtype):
    args = inputs((2, 16, 72), dtype, dtype)
    oracle, working = formula(*args), formula(*args, work=torch.float32)
    wrong = (1.01 * working).to(dtype)
    with pytest.raises(AssertionError, match="y: "):
        assert_within_budget("y", wrong, oracle, working.to(dtype))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("which", range(3))
def test_a_gradient_one_percent_wrong_exceeds_the_budget(which, dtype):
    args = inputs((2, 16, 72), dtype, dtype)
    dy = seeded((2, 16, 72), seed=3, dtype=dtype)
    oracle = gradient_formula(*args, dy)[which]
    working = gradient_formula(*args, dy, work=torch.float32)[which]
    with pytest.raises(AssertionError, match="gradient: "):
        assert_within_budget("gradient", (1.01 * working).to(dtype), oracle, working.to(dtype))


@pytest.mark.parametrize("eps", (1e-6, 0.5))
def test_eps_is_added_to_the_variance(eps):
    args = inputs((2, 4, 72), mean=0.0, std=1e-3)  # variance near the default eps
    working = formula(*args, eps=eps, work=torch.float32)
    assert_within_budget("y", ops.adaln(*args, eps=eps), formula(*args, eps=eps), working)


def test_default_eps_is_1e_6():
    args = inputs((2, 4, 72), mean=0.0, std=1e-3)
    assert torch.equal(ops.adaln(*args), ops.adaln(*args, eps=1e-6))
    assert not torch.equal(ops.adaln(*args), ops.adaln(*args, eps=1e-5))


def test_a_single_column_gives_the_shift():
    x, shift, scale = inputs((2, 7, 1), torch.float64, torch.float64)
    # x - mean is 0 up to a rounding of x, which 1 / sqrt(eps) = 1000 magnifies
    bound = 1000 * torch.finfo(torch.float64).eps * (x.abs() * (1 + scale[:, None].abs())).max()
    error = (ops.adaln(x, shift, scale) - shift[:, None]).abs().max()
    assert error <= bound


def test_gradcheck():
    args = leaves(*inputs((2, 3, 5), torch.float64, torch.float64))
    assert torch.autograd.gradcheck(ops.adaln, args)


def test_gradient_reaches_its_own_chunk_of_a_strided_tensor():
    x = seeded((2, 3, 5), seed=1, dtype=torch.float64)
    (modulation,) = leaves(seeded((2, 30), seed=2, dtype=torch.float64))
    shift, scale = modulation.chunk(6, dim=-1)[1:3]
    assert not shift.is_contiguous()
    dy = seeded((2, 3, 5), seed=3, dtype=torch.float64)
    ops.adaln(x, shift, scale).backward(dy)
    _, dshift, dscale = gradient_formula(x, shift, scale, dy)
    expected = torch.zeros(2, 30, dtype=torch.float64)
    expected[:, 5:10], expected[:, 10:15] = dshift.detach(), dscale.detach()
    torch.testing.assert_close(modulation.grad, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("x_dtype, dtype", DTYPES)
def test_result_has_the_dtype_of_shift_unless_told(x_dtype, dtype):
    args = inputs((2, 3, 8), x_dtype, dtype)
    assert ops.adaln(*args).dtype == dtype
    for out_dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert ops.adaln(*args, out_dtype=out_dtype).dtype == out_dtype


def test_low_precision_inputs_are_computed_in_fp32():
    args = inputs((2, 16, 72), torch.bfloat16, torch.bfloat16)
    actual = ops.adaln(*args, out_dtype=torch.float32)
    assert_within_budget("y", actual, formula(*args), formula(*args, work=torch.float32))


def test_reference_computes_in_fp64():
    args = inputs((2, 5, 72), torch.float64, torch.float64)
    actual = adaln_reference(*args, eps=1e-6, out_dtype=torch.float64)
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, formula(*args), rtol=1e-12, atol=1e-12)


def test_compiles_into_one_graph_that_equals_eager():
    args = leaves(*inputs((2, 4, 8), torch.float32, torch.bfloat16))
    dy = seeded((2, 4, 8), seed=3, dtype=torch.bfloat16)
    compiled = torch.compile(ops.adaln, fullgraph=True, backend="aot_eager")
    actual, expected = compiled(*args), ops.adaln(*args)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    pairs = zip(torch.autograd.grad(actual, args, dy), torch.autograd.grad(expected, args, dy))
    for a, e in pairs:
        torch.testing.assert_close(a, e, rtol=0, atol=0)


@pytest.mark.parametrize(
    "argument, wrong, got, expected",
    (
        ("x", torch.ones(2, 8), "(2, 8)", "(B, N, D)"),
        ("x", torch.ones(2, 4, 8).long(), "torch.int64", "floating"),
        ("shift", torch.ones(2, 7), "(2, 7)", "(2, 8)"),
        ("shift", torch.ones(2, 8).long(), "torch.int64", "floating"),
        ("scale", torch.ones(3, 8), "(3, 8)", "(2, 8)"),
        ("scale", torch.ones(2, 1, 8), "(2, 1, 8)", "(2, 8)"),
        ("scale", torch.ones(2, 8).bool(), "torch.bool", "floating"),
    ),
)
def test_wrong_arguments_are_named_with_expected_and_got(argument, wrong, got, expected):
    args = dict(zip(("x", "shift", "scale"), inputs((2, 4, 8)))) | {argument: wrong}
    with pytest.raises(ValueError) as error:
        ops.adaln(**args)
    message = str(error.value).replace("expected a ", "expected ")
    for part in ("adaln: ", f"{argument} ", got, f"expected {expected}"):
        assert part in message
