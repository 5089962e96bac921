from itertools import permutations

import pytest
import torch

from repa_fast import ops
from repa_fast.kernels.align_loss.reference import align_loss_reference
from repa_fast.testing import assert_within_budget, seeded
from tests.kernels import checks
from tests.kernels.evaluate import evaluate

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Enough samples that the largest of the formula's errors is typical; a loss is one number each.
SHAPES = ((256, 16, 72), (256, 1, 72), (256, 4, 1000), (256, 5, 1152))
# Few rows, since they are slow under the interpreter; programs take four, samples as they come.
KERNEL_SHAPES = ((12, 1, 72), (3, 5, 1000), (1, 9, 1152), (2, 11, 72), (1, 17, 72), (1, 33, 1152))


def inputs(shape, dtype=torch.float32):
    target = seeded(shape, seed=1, dtype=dtype, mean=0.2)
    prediction = target + seeded(shape, seed=2, dtype=dtype)  # cosine near 0.7
    return prediction, target


def units(prediction, target, work):
    prediction, target = prediction.to(work), target.to(work)
    norms = [v.square().sum(-1, keepdim=True).sqrt().clamp_min(1e-12) for v in (prediction, target)]
    return prediction / norms[0], target / norms[1], norms[0]


def formula(prediction, target, *, work=torch.float64):
    p, q, _ = units(prediction, target, work)
    return -(p * q).sum(-1).mean(-1)


def gradient_formula(prediction, target, upstream, *, work=torch.float64):
    p, q, norm = units(prediction, target, work)
    c = (p * q).sum(-1, keepdim=True)
    return (upstream.to(work) / p.shape[1])[:, None, None] * (c * p - q) / norm


def upstream_of(batch, dtype=torch.float32):
    """Gradients of the losses; loss scaling in fp16, without which dprediction is subnormal."""
    return seeded((batch,), seed=3, mean=1.0) * (1024 if dtype == torch.float16 else 1)


def named(args):
    return dict(zip(("prediction", "target"), args))


def evaluated(run, args, upstream, **options):
    """(loss, dprediction); the target has no gradient."""
    (loss,), (dprediction, dtarget) = run("align_loss", named(args), [upstream], **options)
    assert dtarget is None
    return loss, dprediction


def expect_budgets(results, args, upstream):
    """Losses and gradients against the closed forms; `args` and so on may be lists of cases.

    Losses of several cases are judged together: each is one number, and the largest of the
    formula's errors is typical only among many.
    """
    losses, oracles, workings = [], [], []
    for (loss, got), case, up in zip(results, args, upstream):
        losses.append(loss)
        oracles.append(formula(*case))
        workings.append(formula(*case, work=torch.float32))
        working = gradient_formula(*case, up, work=torch.float32).to(case[0].dtype)
        assert_within_budget("dprediction", got, gradient_formula(*case, up), working)
    assert_within_budget("loss", *(torch.cat(v) for v in (losses, oracles, workings)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_reference_and_its_gradient_are_the_closed_forms_within_budget(shape, dtype):
    args, upstream = inputs(shape, dtype), upstream_of(shape[0], dtype)
    options = {"implementation": "reference"}
    (loss,), (got, _) = evaluate("align_loss", named(args), [upstream], options)
    expect_budgets([(loss, got)], [args], [upstream])


@pytest.mark.parametrize("run", checks.KERNELS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
def test_losses_and_gradients_of_kernels_are_the_closed_forms_within_budget(run, dtype):
    args = [inputs(shape, dtype) for shape in KERNEL_SHAPES]
    upstream = [upstream_of(shape[0], dtype) for shape in KERNEL_SHAPES]
    results = [evaluated(run, case, up) for case, up in zip(args, upstream)]
    expect_budgets(results, args, upstream)


@pytest.mark.parametrize("dtypes", [*permutations(DTYPES, 2)])
def test_prediction_and_target_may_have_their_own_dtypes(run, dtypes):
    args = [v.to(dtype) for v, dtype in zip(inputs((16, 3, 24)), dtypes)]
    upstream = upstream_of(16, dtypes[0])
    expect_budgets([evaluated(run, args, upstream)], [args], [upstream])


@pytest.mark.parametrize("which", range(2))
@pytest.mark.parametrize("layout", checks.TOKENS)
def test_tokens_may_lie_anyhow_in_memory(run, layout, which):
    args, upstream = list(inputs((16, 3, 24))), upstream_of(16)
    args[which] = checks.TOKENS[layout](args[which])
    expect_budgets([evaluated(run, args, upstream)], [args], [upstream])


@pytest.mark.parametrize(
    "lay",
    (
        lambda v: v[:1].expand_as(v),
        lambda v: v.repeat_interleave(2)[::2],
        lambda v: v.repeat(2)[len(v) :],
    ),
    ids=("expanded", "strided", "sliced"),
)
def test_the_upstream_gradient_may_lie_anyhow_in_memory(run, lay):
    args, upstream = inputs((16, 3, 24)), lay(upstream_of(16))
    expect_budgets([evaluated(run, args, upstream)], [args], [upstream])


@pytest.mark.parametrize("shape", ((0, 4, 24), (0, 0, 24)))
def test_no_samples_give_no_losses(run, shape):
    loss, gradient = evaluated(run, inputs(shape), torch.ones(0))
    assert loss.shape == (0,) and gradient.shape == shape


def test_the_mean_over_no_patches_is_not_a_number(run):
    loss, gradient = evaluated(run, inputs((2, 0, 24)), torch.ones(2))
    assert loss.shape == (2,) and loss.isnan().all() and gradient.shape == (2, 0, 24)


def test_two_evaluations_agree_in_every_bit(run):
    args, upstream = inputs((3, 17, 72), torch.bfloat16), upstream_of(3)
    first, second = (evaluated(run, args, upstream) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("run", checks.KERNELS, indirect=True)
def test_a_sample_does_not_depend_on_its_batch(run):
    args, upstream = inputs((5, 11, 72)), upstream_of(5)
    batch = evaluated(run, args, upstream)
    alone = evaluated(run, [v[1:2] for v in args], upstream[1:2])
    for of_batch, of_alone in zip(batch, alone):
        assert torch.equal(of_batch[1:2], of_alone)


@pytest.mark.parametrize("implementation", checks.EVERYWHERE)
def test_inputs_are_not_modified(request, implementation):
    call = checks.caller(request, implementation)
    args = named(inputs((2, 5, 24)))
    assert call(checks.modified, "align_loss", args, [upstream_of(2)]) == []


@pytest.mark.parametrize("run", checks.KERNELS, indirect=True)
@pytest.mark.parametrize("which", range(2))
def test_kernels_refuse_fp64_with_a_reason(run, which):
    args = list(inputs((2, 5, 24)))
    args[which] = args[which].double()
    with pytest.raises(ValueError, match=r"align_loss: .*'triton'.*torch\.float64"):
        run("align_loss", named(args))


# 1 / eps * eps is 1 in fp32 for the first and below 1 for the second.
@pytest.mark.parametrize("eps", (4.0, 41.0))
def test_a_norm_below_eps_is_a_constant_in_the_gradient(run, eps):
    args, upstream = inputs((16, 3, 24)), upstream_of(16)
    assert (args[0].norm(dim=-1) < 41).all()
    got = evaluated(run, args, upstream, eps=eps)[1]
    results = []
    for work in (torch.float64, torch.float32):
        leaf = args[0].to(work).requires_grad_()
        loss = align_loss_reference(leaf, args[1].to(work), eps=eps)
        results += torch.autograd.grad(loss, leaf, upstream.to(work))
    assert_within_budget("dprediction", got, *results)


def test_a_loss_one_percent_wrong_exceeds_the_budget():
    args = inputs((64, 16, 72), torch.bfloat16)
    working = formula(*args, work=torch.float32)
    with pytest.raises(AssertionError, match="loss: "):
        assert_within_budget("loss", 1.01 * working, formula(*args), working)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gradient_one_percent_wrong_exceeds_the_budget(dtype):
    args = *inputs((64, 16, 72), dtype), torch.full((64,), 1024.0)
    working = gradient_formula(*args, work=torch.float32)
    with pytest.raises(AssertionError, match="dprediction: "):
        assert_within_budget(
            "dprediction", (1.01 * working).to(dtype), gradient_formula(*args), working.to(dtype)
        )


def test_it_equals_the_official_double_loop():
    prediction, target = inputs((3, 5, 8), torch.float64)
    for sample, loss in enumerate(ops.align_loss(prediction, target).tolist()):
        total = 0.0
        for p, q in zip(prediction[sample], target[sample]):
            total += -float(p @ q) / (float(p @ p) ** 0.5 * float(q @ q) ** 0.5)
        assert loss == pytest.approx(total / 5, rel=1e-12)


def test_parallel_opposite_and_orthogonal_vectors_give_the_extremes():
    target = torch.tensor([[3.0, 0.0]]).expand(3, 4, 2)
    prediction = torch.tensor([[0.5, 0.0], [-7.0, 0.0], [0.0, 2.0]])[:, None].expand(3, 4, 2)
    assert ops.align_loss(prediction, target).tolist() == [-1.0, 1.0, 0.0]


def test_a_single_column_gives_minus_the_product_of_signs():
    prediction = torch.tensor([2.0, -3.0, 0.5, 1.0]).view(2, 2, 1)
    target = torch.tensor([5.0, 0.1, -2.0, -1.0]).view(2, 2, 1)
    assert ops.align_loss(prediction, target).tolist() == [0.0, 1.0]


def test_gradcheck_of_the_prediction():
    prediction, target = inputs((2, 3, 5), torch.float64)
    prediction.requires_grad_()
    assert torch.autograd.gradcheck(lambda p: ops.align_loss(p, target), prediction)


def test_target_receives_no_gradient():
    prediction, target = (v.requires_grad_() for v in inputs((2, 3, 5), torch.float64))
    ops.align_loss(prediction, target).sum().backward()
    assert target.grad is None and prediction.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zeros", ("prediction", "target", "both"))
def test_zero_vectors_count_as_cosine_zero(zeros, dtype):
    prediction, target = inputs((64, 4, 8), dtype)
    prediction[:, 0] *= 0 if zeros != "target" else 1
    target[:, 0] *= 0 if zeros != "prediction" else 1
    rest = prediction[:, 1:], target[:, 1:]
    working = formula(*rest, work=torch.float32) * 3 / 4
    assert_within_budget(
        "loss", ops.align_loss(prediction, target), formula(*rest) * 3 / 4, working
    )


# Not fp16: the gradient at a zero prediction is the target's direction over N * eps.
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_gradients_at_zero_vectors_are_finite(dtype):
    prediction, target = inputs((2, 4, 8), dtype)
    prediction[0, 0], target[0, 1], prediction[1, 2], target[1, 2] = 0, 0, 0, 0
    prediction.requires_grad_()
    ops.align_loss(prediction, target).sum().backward()
    assert prediction.grad.isfinite().all()
    assert not prediction.grad[0, 1].any() and not prediction.grad[1, 2].any()


def test_eps_bounds_the_norms_from_below():
    prediction = torch.full((1, 1, 4), 0.5, dtype=torch.float64)  # norm 1
    target = torch.full((1, 1, 4), 1.0, dtype=torch.float64)  # norm 2
    assert ops.align_loss(prediction, target, eps=4.0).item() == pytest.approx(-2 / 16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_is_fp32_and_the_gradient_has_the_dtype_of_the_prediction(dtype):
    prediction, target = inputs((2, 3, 8), dtype)
    loss = ops.align_loss(prediction.requires_grad_(), target)
    loss.sum().backward()
    assert loss.dtype == torch.float32 and loss.shape == (2,)
    assert prediction.grad.dtype == dtype


def test_reference_computes_in_fp64():
    args = inputs((3, 5, 72), torch.float64)
    actual = align_loss_reference(*args, eps=1e-12)
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, formula(*args), rtol=1e-12, atol=1e-12)


def test_compiles_into_one_graph_that_equals_eager():
    prediction, target = inputs((4, 3, 8), torch.bfloat16)
    prediction.requires_grad_()
    compiled = torch.compile(ops.align_loss, fullgraph=True, backend="aot_eager")
    losses = [op(prediction, target) for op in (compiled, ops.align_loss)]
    grads = [torch.autograd.grad(loss.sum(), prediction) for loss in losses]
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=0)
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=0)


@pytest.mark.parametrize(
    "argument, wrong, got, expected",
    (
        ("prediction", torch.ones(2, 8), "(2, 8)", "(B, N, D)"),
        ("prediction", torch.ones(2, 4, 8).long(), "torch.int64", "floating"),
        ("target", torch.ones(2, 5, 8), "(2, 5, 8)", "(2, 4, 8)"),
        ("target", torch.ones(1, 4, 8), "(1, 4, 8)", "(2, 4, 8)"),
        ("target", torch.ones(2, 4, 8).long(), "torch.int64", "floating"),
    ),
)
def test_wrong_arguments_are_named_with_expected_and_got(argument, wrong, got, expected):
    args = dict(zip(("prediction", "target"), inputs((2, 4, 8)))) | {argument: wrong}
    with pytest.raises(ValueError) as error:
        ops.align_loss(**args)
    message = str(error.value).replace("expected a ", "expected ")
    for part in ("align_loss: ", f"{argument} ", got, f"expected {expected}"):
        assert part in message
