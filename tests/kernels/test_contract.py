"""What all ops promise: one row of the table of ops (table.py) is one op."""

import functools
import itertools
import re

import pytest
import torch

from repa_fast import ops
from repa_fast.testing import assert_within_budget
from tests.kernels import checks
from tests.kernels.table import (
    ADALN,
    BF16,
    DIFFERENTIABLE,
    DTYPES,
    EVERYWHERE,
    F32,
    F64,
    KERNELS,
    OPS,
    PAIRS,
    STREAM,
    assert_same,
    on,
)
from tests.refusals import refused

# Eight chunks of tokens per sample in the backward pass: even, uneven, and fewer.
SHAPES = (
    (1, 8, 72), (3, 1, 72), (2, 5, 1000), (1, 9, 1152), (1, 11, 72), (1, 17, 72), (1, 33, 72),
    (8, 3, 1),
)  # fmt: skip


# Results, gradients and their dtypes.


@on(*STREAM)
@pytest.mark.parametrize("stream, dtype", PAIRS)
@pytest.mark.parametrize("shape", SHAPES)
def test_results_and_gradients_are_the_closed_forms_within_budget(op, run, shape, stream, dtype):
    arguments = op.arguments(shape, stream, dtype)
    op.expect_budgets(run, arguments, op.upstream(arguments))


@on()
@pytest.mark.parametrize("order", list(itertools.permutations(DTYPES)))
def test_every_argument_may_have_its_own_dtype(op, run, order):
    arguments, turn = op.arguments(), itertools.cycle(order)
    free = (*op.tokens, *op.vectors) if op.gradients else op.tokens[1:]  # a sampler's x is fp32
    arguments |= {name: arguments[name].to(next(turn)) for name in free}
    op.expect_budgets(run, arguments, op.upstream(arguments))


@on(*ADALN)
@pytest.mark.parametrize("stream", (F32, BF16))
@pytest.mark.parametrize("out_dtype", DTYPES)
def test_the_result_of_adaln_and_its_gradient_may_have_another_dtype(op, run, stream, out_dtype):
    arguments = op.arguments(stream=stream, dtype=BF16)
    op.expect_budgets(run, arguments, op.upstream(arguments, out_dtype), out_dtype)


@pytest.mark.parametrize("name", OPS)
def test_the_reference_computes_in_fp64(name):
    op = OPS[name]
    arguments = op.arguments(stream=F64, dtype=F64)
    upstream = op.upstream(arguments)
    found = checks.evaluate(name, arguments, upstream, {"implementation": "reference"})
    for actual, exact in zip(found, op.results(arguments, upstream, F64), strict=True):
        torch.testing.assert_close(list(actual), exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_one_percent_wrong_exceeds_the_budget(name, dtype):
    op = OPS[name]
    stream = dtype if op.gradients else F32
    batch = 64 if name == "align_loss" else 2
    arguments = op.arguments((batch, 16, 72), stream, dtype)
    exact, plain = (
        op.named(*op.results(arguments, op.upstream(arguments), work)) for work in (F64, F32)
    )
    for result, working in plain.items():
        if working is not None:
            wrong = (1.01 * working.float()).to(working.dtype)
            with pytest.raises(AssertionError, match=f"^{result}: .* expected at most"):
                assert_within_budget(result, wrong, exact[result], working)


# Layouts.


@on()
@pytest.mark.parametrize("layout", checks.TOKENS)
@pytest.mark.parametrize("which", (0, 1))
def test_tokens_and_their_upstream_gradients_may_lie_anyhow_in_memory(op, run, layout, which):
    """Every second of them, since the results of expanded ones alone cancel."""
    arguments = op.arguments(dtype=F32 if op.name == "align_loss" else BF16)
    upstream = dict(enumerate(op.upstream(arguments) or ()))
    laid = [*op.tokens, *(number for number, up in upstream.items() if up.ndim == 3)][which::2]
    for values in (arguments, upstream):
        values |= {k: checks.TOKENS[layout](v) for k, v in values.items() if k in laid}
    op.expect_budgets(run, arguments, list(upstream.values()) or None)


@on(*STREAM)
@pytest.mark.parametrize("layout", checks.VECTORS)
def test_vectors_may_lie_anyhow_in_memory(op, run, layout):
    arguments = op.arguments(dtype=BF16)
    arguments |= {name: checks.VECTORS[layout](arguments[name]) for name in op.vectors}
    op.expect_budgets(run, arguments, op.upstream(arguments))


@on(*STREAM, where=KERNELS[:1])
def test_rows_of_vectors_may_lie_beyond_2_31_elements(op, run):
    arguments = op.arguments((2, 2, 24), BF16, BF16)
    results = run.call(checks.far_vectors, op.name, arguments, op.vectors, op.upstream(arguments))
    if results is None:
        pytest.skip("no address space for 4 GiB")
    for far, near in zip(*results):
        assert torch.equal(far, near)


@pytest.mark.gpu
@pytest.mark.usefixtures("heavy")
@pytest.mark.parametrize("name", ADALN)
def test_a_sample_beyond_2_31_elements_is_within_budget(name):
    op, tokens, width = OPS[name], 256, 1152
    batch = 2**31 // (tokens * width) + 2
    sample = op.arguments((1, tokens, width), BF16, BF16)
    dsample = op.upstream(sample)
    large = {k: v.to("cuda").repeat(batch, *[1] * (v.ndim - 1)) for k, v in sample.items()}
    leaves = {k: v.requires_grad_() for k, v in large.items()}
    assert leaves["x"].numel() > 2**31
    outputs = getattr(ops, name)(**leaves, implementation="triton")
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    upstream = [v.to("cuda").expand(batch, -1, -1) for v in dsample]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), upstream)

    def last(*_, **__):
        return [v[-1:].detach().cpu() for v in outputs], [v[-1:].cpu() for v in gradients]

    op.expect_budgets(last, sample, dsample)


@on()
@pytest.mark.parametrize("shape", ((0, 4, 24), (2, 0, 24), (0, 0, 24)))
def test_nothing_gives_nothing_and_vectors_without_tokens_have_gradient_zero(op, run, shape):
    """The mean of align_loss over no patches is not a number."""
    arguments = op.arguments(shape)
    upstream = op.upstream(arguments)
    found = run(op.name, arguments, upstream)
    exact, gradients = op.results(arguments, upstream, F32)
    assert_same(found, (exact, gradients if upstream else ()))
    assert not any(v.any() for v in found[1] if v is not None)


# The same call.


@on()
def test_two_evaluations_agree_in_every_bit_and_modify_no_input(op, run):
    arguments = op.arguments((1, 9, 24), dtype=BF16)
    upstream = op.upstream(arguments)
    first, second = (run(op.name, arguments, upstream) for _ in range(2))
    assert_same(first, second)
    assert run.inside(checks.modified, op.name, arguments, upstream) == []


@on(where=KERNELS)
def test_a_sample_does_not_depend_on_its_batch(op, run):
    def only(values):
        return [v[1:2] if isinstance(v, torch.Tensor) else v for v in values or ()]

    arguments = op.arguments((2, 11, 24))
    upstream = op.upstream(arguments)
    batch = run(op.name, arguments, upstream)
    sample = dict(zip(arguments, only(arguments.values())))
    alone = run(op.name, sample, only(upstream) or None)
    assert_same([only(values) for values in batch], alone)


# As an operator, and compiled.


@on(where=KERNELS[:1])
def test_operators_pass_opcheck(op, run):
    arguments = op.arguments((2, 3, 8), dtype=BF16)
    upstream = op.upstream(arguments)
    cases = [(arguments, upstream)]
    if op.name == "gate_residual_adaln":
        cases.append((arguments, [None, upstream[1]]))
    if not op.gradients:
        drawn = {"seed": 2**40, "step": 3, "index": torch.arange(2) + 2**33}
        drawn |= {"v_uncond": None, "noise": None, "v_cond": arguments["v_cond"].float()}
        cases.append((arguments | drawn, None))
    found = run.call(checks.opchecked, op.name, cases)
    assert len(found) == (3 if op.name == "gate_residual_adaln" else 2)
    assert all(len(tests) >= 4 and set(tests.values()) == {"SUCCESS"} for tests in found)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("run", EVERYWHERE[:2], indirect=True)
@pytest.mark.parametrize("dtype", (F32, BF16))
@pytest.mark.parametrize("shapes", ("static", "dynamic"))
def test_it_compiles_into_one_graph_that_equals_eager(name, run, dtype, shapes):
    op = OPS[name]
    arguments = op.arguments((2, 5, 24), F32, dtype)
    upstream = op.upstream(arguments)
    compiled = run(op.name, arguments, upstream, compiled=shapes)
    assert_same(compiled, run(op.name, arguments, upstream))


@on(*DIFFERENTIABLE, where=KERNELS[:1])
@pytest.mark.parametrize("linear", (False, True))
def test_differentiating_the_kernels_twice_raises(op, run, linear):
    message = run.call(checks.second_derivative, op.name, op.arguments((2, 5, 24)), linear)
    assert "cannot be differentiated twice" in message


# Refusals.


@on(*DIFFERENTIABLE, where=KERNELS)
def test_kernels_refuse_fp64_in_any_argument_with_the_reason(op, run):
    arguments = op.arguments()
    for name, value in arguments.items():
        call = functools.partial(run, op.name, arguments | {name: value.double()})
        refused(call, rf"^{op.name}: .*'triton'.*torch\.float64")


@pytest.mark.parametrize(
    "op, name",
    [(OPS[name], n) for name in DIFFERENTIABLE for n in (*OPS[name].tokens, *OPS[name].vectors)],
    ids=lambda value: getattr(value, "name", value),
)
def test_wrong_arguments_are_named_with_expected_and_got(op, name):
    arguments = op.arguments((2, 4, 8))
    right = arguments[name]
    wrong = {"floating": [right.long(), right.bool()]}
    if name == op.tokens[0]:
        wrong["(B, N, D)"] = [right[0], right[..., None]]
    else:
        wrong[str(tuple(right.shape))] = [right[:1], right[..., :-1], right[:, None]]
    for expected, values in wrong.items():
        for value in values:
            got = re.escape(str(value.dtype if expected == "floating" else tuple(value.shape)))
            call = functools.partial(getattr(ops, op.name), **arguments | {name: value})
            refused(call, rf"^{op.name}: {name} ", got, f"expected (a )?{re.escape(expected)}")
