import re
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
    attention_packed,
    current_backend,
    set_backend,
    use_backend,
)
from repa_fast.kernels.attention.backends import apply
from repa_fast.kernels.attention.reference import attention_reference
from repa_fast.kernels.attention.selection import closed_form, error_and_bound
from tests.kernels.attention import ON_CPU, SHAPES, expect_budget, inputs, measured, oracle, plain
from tests.kernels.table import BF16, DTYPES, F32, F64
from tests.refusals import refused


@pytest.fixture(params=ON_CPU)
def op(request):
    return partial(attention, backend=request.param)


@pytest.fixture
def half_only(monkeypatch):
    """The backend "math" takes nothing but bf16."""
    takes = {"cpu": (BF16,)}
    monkeypatch.setitem(BACKENDS, "math", replace(BACKENDS["math"], takes=takes))


def assert_close(actual, expected, tolerance=0.0):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", (*DTYPES, F64))
@pytest.mark.parametrize("shape", SHAPES)
def test_result_and_gradients_are_within_budget(shape, dtype, op):
    args = inputs(shape, dtype)
    expect_budget(measured(op, *args), args)


@pytest.mark.parametrize("backend", ON_CPU)
def test_packed_is_the_same_attention_bit_for_bit(backend):
    q, k, v, dout = inputs(SHAPES[0])
    qkv = torch.stack([x.transpose(1, 2) for x in (q, k, v)], dim=2).requires_grad_()
    out = attention_packed(qkv, backend=backend)
    (dqkv,) = torch.autograd.grad(out, qkv, dout.transpose(1, 2))
    got = [x.transpose(1, 2) for x in (out.detach(), *dqkv.unbind(2))]
    assert_close(got, measured(partial(attention, backend=backend), q, k, v, dout))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_single_token_attends_to_itself(dtype, op):
    q, k, v, dout = inputs((2, 3, 1, 72), dtype)
    out, dq, dk, dv = measured(op, q, k, v, dout)
    assert torch.equal(out, v) and torch.equal(dv, dout)
    # ds = dout v^T - rowsum(dout * out) is 0 up to the order of two sums of 72 terms
    terms = (dout.double() * v.double()).abs().sum(-1, keepdim=True)
    bound = 72 * torch.finfo(F32).eps * terms.max() * 72**-0.5
    for gradient, other in ((dq, k), (dk, q)):
        assert gradient.abs().max() <= bound * other.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_budget_sees_one_percent_and_one_wrong_token_of_256(dtype):
    args = inputs((2, 2, 256, 72), dtype)
    one_token = torch.ones(256, 1)
    one_token[-1] = 1.5
    for right, exact, formula in zip(measured(attention, *args), oracle(*args), plain(*args)):
        for factor in (1.01, one_token):
            error, bound = error_and_bound((factor * right.float()).to(dtype), exact, formula)
            assert error > bound


def test_closed_form_is_the_derivative_of_the_reference():
    args = inputs((2, 3, 5, 7), F64)
    got = measured(lambda q, k, v: attention_reference(q, k, v, scale=7**-0.5), *args)
    assert_close(got, oracle(*args), 1e-12)
    assert_close(closed_form(*args, work=F64, stored=F64), oracle(*args), 1e-12)


def test_a_strided_last_axis_gives_what_a_contiguous_one_gives(op):
    args = inputs((2, 3, 6, 8))[:3]
    strided = [x.mT.contiguous().mT for x in args]
    assert all(x.stride(-1) != 1 for x in strided)
    assert_close([op(*strided)], [op(*(x.contiguous() for x in args))], 1e-6)


def test_nothing_to_attend_to_runs_forward_and_backward(op):
    for shape in ((0, 2, 5, 8), (2, 2, 0, 8)):
        got = measured(op, *inputs(shape, BF16))
        assert all(x.shape == shape and x.dtype == BF16 for x in got)


@pytest.mark.parametrize("head_dim, multiple, seen", ((72, 32, 96), (7, 8, 8), (64, 32, 64)))
def test_padding_changes_nothing_but_roundings(head_dim, multiple, seen):
    def run(q, k, v, scale):
        assert q.shape[-1] == seen
        return BACKENDS["math"].run(q, k, v, scale)

    def packed(qkv, scale):
        return run(*(x.transpose(1, 2) for x in qkv.unbind(2)), scale).transpose(1, 2)

    args = inputs((2, 2, 17, head_dim), F64)
    for backend in (Backend("padded", run), Backend("packed", packed, packs=True)):
        padded = partial(apply, replace(backend, multiple=multiple))
        assert_close(measured(padded, *args), oracle(*args), 1e-12)


def compiles(op, compiler):
    torch.compiler.reset()
    args = inputs((2, 2, 8, 16))
    compiled = torch.compile(op, fullgraph=True, backend=compiler)
    assert_close(measured(compiled, *args), measured(op, *args), 1e-6)


def test_it_compiles_into_one_graph_that_equals_eager(op):
    compiles(op, "aot_eager")


def test_it_compiles_with_inductor(heavy, inductor):
    if not shutil.which("g++"):
        pytest.skip("Inductor needs a C++ compiler on the CPU")
    compiles(partial(attention, backend="sdpa-flash"), "inductor")


def test_compiled_code_follows_set_backend():
    torch.compiler.reset()
    args = inputs((2, 2, 8, 16), BF16)[:3]
    compiled = torch.compile(attention, fullgraph=True, backend="eager")
    for name in ("sdpa", "reference", "sdpa"):
        set_backend(name)
        assert current_backend() == name
        assert torch.equal(compiled(*args), attention(*args, backend=name))
    assert not torch.equal(attention(*args), attention(*args, backend="reference"))


def test_checkpointing_gives_the_same_gradients(op):
    args = inputs((2, 2, 9, 16))
    recomputed = partial(checkpoint, op, use_reentrant=False)
    assert_close(measured(recomputed, *args), measured(op, *args))


@pytest.mark.parametrize("dtype", (F32, BF16))
def test_autocast_does_not_reach_inside(dtype, op):
    args = inputs((2, 2, 9, 16), dtype)
    got = measured(torch.autocast("cpu", dtype=BF16)(op), *args)
    assert_close(got, measured(op, *args))
    assert {x.dtype for x in got} == {dtype}


def test_runs_on_devices_without_autocast():
    q = torch.empty(2, 2, 4, 8, device="meta")
    assert attention(q, q, q).shape == (2, 2, 4, 8)


ONES = torch.ones(2, 2, 4, 8)


@pytest.mark.parametrize(
    "argument, wrong, words",
    (
        ("q", ONES[0], (r"\(2, 4, 8\)", r"\(B, H, N, K\)")),
        ("q", ONES[..., :0], (r"\(2, 2, 4, 0\)", r"\(B, H, N, K\)")),
        ("q", ONES.long(), ("torch.int64", "floating")),
        ("k", torch.ones(2, 2, 5, 8), (r"\(2, 2, 5, 8\)", r"\(2, 2, 4, 8\)")),
        ("k", ONES.bfloat16(), ("torch.bfloat16", "torch.float32")),
        ("k", ONES.to("meta"), ("meta", "cpu")),
        ("v", ONES[:, :1], (r"\(2, 1, 4, 8\)", r"\(2, 2, 4, 8\)")),
        ("v", ONES.double(), ("torch.float64", "torch.float32")),
        ("backend", "flash", ("'flash'", "one of sdpa, sdpa-cudnn")),
        ("backend", "sdpa-cudnn", ("cpu", "runs on cuda")),
        ("backend", "math", ("'math'", "takes torch.bfloat16, got torch.float32")),
    ),
)
@pytest.mark.usefixtures("half_only")
def test_wrong_arguments_are_named_with_expected_and_got(argument, wrong, words):
    args = dict.fromkeys("qkv", ONES) | {argument: wrong}
    refused(lambda: attention(**args), f"^attention: {argument}", *words)


@pytest.mark.parametrize("shape", ((2, 4, 2, 3, 8), (2, 4, 3, 8), (2, 4, 3, 2, 0)))
def test_a_wrong_qkv_is_named_with_expected_and_got(shape):
    words = (f"^attention: qkv has shape {re.escape(str(shape))}", re.escape("(B, N, 3, H, K)"))
    refused(lambda: attention_packed(torch.ones(shape)), *words)
    refused(lambda: attention_packed(torch.ones(2, 4, 3, 2, 8).long()), "^attention: qkv", "int64")


@pytest.mark.usefixtures("half_only")
def test_a_backend_is_used_for_a_while_where_the_one_set_takes_no_such_dtype():
    set_backend("math")
    args = inputs((2, 2, 4, 8))[:3]
    with use_backend("sdpa"):
        assert torch.equal(attention(*args), attention(*args, backend="sdpa"))
    refused(lambda: attention(*args), "'math'.*takes torch.bfloat16, got torch.float32")
    refused(lambda: set_backend("auto"), "'auto', expected one of sdpa")
    assert current_backend() == "math"


def test_flash_that_torch_replaced_is_not_called_flash(monkeypatch):
    active = ("FA4", object())
    monkeypatch.setattr(torch.nn.attention._registry, "_FLASH_ATTENTION_ACTIVE", active)
    call = partial(attention, ONES, ONES, ONES, backend="sdpa-flash")
    refused(call, "'sdpa-flash' cannot run: torch runs FA4 in its place", error=RuntimeError)
