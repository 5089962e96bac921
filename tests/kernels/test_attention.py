import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from repa_fast.kernels.attention import (
    BACKENDS,
    Backend,
    attention,
    current_backend,
    set_backend,
    use_backend,
)
from repa_fast.kernels.attention.backends import apply
from repa_fast.kernels.attention.reference import attention_reference
from repa_fast.kernels.attention.selection import closed_form, error_and_bound
from repa_fast.testing import seeded
from tests.kernels.attention import (
    DTYPES,
    ON_CPU,
    SHAPES,
    assert_in_budget,
    inputs,
    measured,
    oracle,
    working,
)


@pytest.fixture(autouse=True)
def default_backend():
    yield
    set_backend("sdpa")


@pytest.fixture(params=ON_CPU)
def op(request):
    return partial(attention, backend=request.param)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_result_and_gradients_are_within_budget(shape, dtype, op):
    args = inputs(shape, dtype)
    assert_in_budget(measured(op, *args), args)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_single_token_attends_to_itself(dtype, op):
    q, k, v, dout = inputs((2, 3, 1, 72), dtype)
    out, dq, dk, dv = measured(op, q, k, v, dout)
    assert torch.equal(out, v) and torch.equal(dv, dout)
    # ds = dout v^T - rowsum(dout * out) is 0 up to the order of two sums of 72 terms
    terms = (dout.double() * v.double()).abs().sum(-1, keepdim=True)
    bound = 72 * torch.finfo(torch.float32).eps * terms.max() * 72**-0.5
    for gradient, other in ((dq, k), (dk, q)):
        assert gradient.abs().max() <= bound * other.abs().max()


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_one_percent_wrong_exceeds_the_budget(dtype, which):
    args = inputs((2, 4, 64, 72), dtype)
    right = measured(attention, *args)[which]
    exact, formula = oracle(*args)[which], working(*args)[which]
    wrong = (1.01 * right.float()).to(dtype)
    for actual, passes in ((right, True), (wrong, False)):
        error, bound = error_and_bound(actual, exact, formula)
        assert (error <= bound) is passes


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_wrong_token_of_256_exceeds_the_budget(dtype):
    args = inputs((2, 2, 256, 72), dtype)
    dq = measured(attention, *args)[1]
    dq[:, :, -1] *= 1.5
    error, bound = error_and_bound(dq, oracle(*args)[1], working(*args)[1])
    assert error > bound


def test_closed_form_is_the_derivative_of_the_reference():
    args = inputs((2, 3, 5, 7), torch.float64)
    got = measured(lambda q, k, v: attention_reference(q, k, v, scale=7**-0.5), *args)
    formula = closed_form(*args, work=torch.float64, stored=torch.float64)
    for actual, closed, exact in zip(got, formula, oracle(*args)):
        torch.testing.assert_close(actual, exact, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(closed, exact, rtol=1e-12, atol=1e-12)


def test_gradcheck(op):
    leaves = [x.clone().requires_grad_() for x in inputs((1, 2, 3, 4), torch.float64)[:3]]
    assert torch.autograd.gradcheck(op, leaves)


def test_gradients_reach_their_own_third_of_a_fused_qkv(op):
    fused = seeded((2, 5, 3, 2, 8), seed=1, dtype=torch.float64).requires_grad_()
    q, k, v = fused.permute(2, 0, 3, 1, 4).unbind(0)
    dout = seeded((2, 2, 5, 8), seed=2, dtype=torch.float64)
    op(q, k, v).backward(dout)
    expected = torch.stack(oracle(q, k, v, dout)[1:]).permute(1, 3, 0, 2, 4)
    torch.testing.assert_close(fused.grad, expected, rtol=1e-12, atol=1e-12)


def test_a_strided_last_axis_gives_what_a_contiguous_one_gives(op):
    args = inputs((2, 3, 6, 8))[:3]
    strided = [x.mT.contiguous().mT for x in args]
    assert all(x.stride(-1) != 1 for x in strided)
    expected = op(*(x.contiguous() for x in args))
    torch.testing.assert_close(op(*strided), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", ((0, 2, 5, 8), (2, 2, 0, 8)))
def test_nothing_to_attend_to_runs_forward_and_backward(shape, op):
    args = inputs(shape, torch.bfloat16)
    got = measured(op, *args)
    assert all(x.shape == shape and x.dtype == torch.bfloat16 for x in got)


@pytest.mark.parametrize("head_dim, multiple", ((72, 32), (7, 8), (64, 32), (72, 1)))
def test_padding_changes_nothing_but_roundings(head_dim, multiple):
    seen = []

    def run(q, k, v, scale):
        seen.append(q.shape[-1])
        return BACKENDS["math"].run(q, k, v, scale)

    args = inputs((2, 2, 17, head_dim), torch.float64)
    padded = Backend("padded", run, multiple=multiple)
    got = measured(lambda *qkv: apply(padded, *qkv), *args)
    assert seen == [-(-head_dim // multiple) * multiple]
    for actual, expected in zip(got, oracle(*args)):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_fa4_is_padded_to_multiples_of_32():
    assert BACKENDS["fa4"].multiple == 32  # its dq is wrong at 72 and 80 on Hopper


@pytest.mark.parametrize(
    "backend, compiler", [(name, "aot_eager") for name in ON_CPU] + [("sdpa-flash", "inductor")]
)
def test_compiles_into_one_graph_that_equals_eager(backend, compiler):
    if compiler == "inductor" and not shutil.which("g++"):
        pytest.skip("Inductor needs a C++ compiler on the CPU")
    torch.compiler.reset()
    args, op = inputs((2, 2, 8, 16)), partial(attention, backend=backend)
    compiled = torch.compile(op, fullgraph=True, backend=compiler)
    for actual, expected in zip(measured(compiled, *args), measured(op, *args)):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_compiled_code_follows_set_backend():
    torch.compiler.reset()
    args = inputs((2, 2, 8, 16), torch.bfloat16)[:3]
    compiled = torch.compile(attention, fullgraph=True, backend="eager")
    for name in ("sdpa", "reference", "sdpa"):
        set_backend(name)
        assert current_backend() == name
        assert torch.equal(compiled(*args), attention(*args, backend=name))
    assert not torch.equal(attention(*args), attention(*args, backend="reference"))


def test_checkpointing_gives_the_same_gradients(op):
    args = inputs((2, 2, 9, 16))

    def recomputed(q, k, v):
        return checkpoint(op, q, k, v, use_reentrant=False)

    expected = measured(op, *args)
    for actual, exact in zip(measured(recomputed, *args), expected):
        assert torch.equal(actual, exact)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_autocast_does_not_reach_inside(dtype, op):
    args = inputs((2, 2, 9, 16), dtype)

    def in_autocast(*qkv):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return op(*qkv)

    got = measured(in_autocast, *args)
    expected = measured(op, *args)
    for actual, exact in zip(got, expected):
        assert actual.dtype == dtype and torch.equal(actual, exact)


def test_runs_on_devices_without_autocast():
    q = torch.empty(2, 2, 4, 8, device="meta")
    assert attention(q, q, q).shape == (2, 2, 4, 8)


@pytest.mark.parametrize(
    "argument, wrong, got, expected",
    (
        ("q", torch.ones(2, 4, 8), "(2, 4, 8)", "(B, H, N, K)"),
        ("q", torch.ones(2, 4, 8, 0), "(2, 4, 8, 0)", "(B, H, N, K)"),
        ("q", torch.ones(2, 2, 4, 8).long(), "torch.int64", "floating"),
        ("k", torch.ones(2, 2, 5, 8), "(2, 2, 5, 8)", "(2, 2, 4, 8)"),
        ("k", torch.ones(2, 2, 4, 8).bfloat16(), "torch.bfloat16", "torch.float32"),
        ("k", torch.ones(2, 2, 4, 8, device="meta"), "meta", "cpu"),
        ("v", torch.ones(2, 1, 4, 8), "(2, 1, 4, 8)", "(2, 2, 4, 8)"),
        ("v", torch.ones(2, 2, 4, 8).double(), "torch.float64", "torch.float32"),
        ("backend", "flash", "'flash'", "one of sdpa, sdpa-cudnn"),
        ("backend", "sdpa-cudnn", "cpu", "runs on cuda"),
    ),
)
def test_wrong_arguments_are_named_with_expected_and_got(argument, wrong, got, expected):
    args = dict(zip("qkv", inputs((2, 2, 4, 8)))) | {argument: wrong}
    with pytest.raises(ValueError) as error:
        attention(**args)
    message = str(error.value)
    for part in ("attention: ", argument, got, expected):
        assert part in message


def test_a_dtype_that_a_backend_does_not_take_is_an_error(monkeypatch):
    half = {"cpu": (torch.bfloat16,)}
    monkeypatch.setitem(BACKENDS, "math", replace(BACKENDS["math"], takes=half))
    with pytest.raises(ValueError, match=r"'math'.*takes torch.bfloat16, got torch.float32"):
        attention(*inputs((2, 2, 4, 8))[:3], backend="math")


def test_a_backend_is_used_for_a_while_where_the_one_set_takes_no_such_dtype(monkeypatch):
    half = {"cpu": (torch.bfloat16,)}
    monkeypatch.setitem(BACKENDS, "math", replace(BACKENDS["math"], takes=half))
    set_backend("math")
    args = inputs((2, 2, 4, 8))[:3]
    with use_backend("sdpa"):
        assert torch.equal(attention(*args), attention(*args, backend="sdpa"))
    assert current_backend() == "math"
    with pytest.raises(ValueError, match=r"'math'.*takes torch.bfloat16, got torch.float32"):
        attention(*args)


def test_set_backend_rejects_what_it_does_not_know():
    with pytest.raises(ValueError, match=r"'auto', expected one of sdpa"):
        set_backend("auto")
    assert current_backend() == "sdpa"


def test_flash_that_torch_replaced_is_not_called_flash(monkeypatch):
    active = ("FA4", object())
    monkeypatch.setattr(torch.nn.attention._registry, "_FLASH_ATTENTION_ACTIVE", active)
    with pytest.raises(RuntimeError, match="'sdpa-flash' cannot run: torch runs FA4 in its place"):
        attention(*inputs((2, 2, 4, 8))[:3], backend="sdpa-flash")
