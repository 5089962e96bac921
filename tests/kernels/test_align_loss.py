import pytest
import torch

from repa_fast import ops
from repa_fast.kernels.align_loss.reference import align_loss_reference
from repa_fast.testing import assert_within_budget
from tests.kernels.table import BF16, DTYPES, F32, F64, KERNELS, OPS

OP = OPS["align_loss"]
# Enough samples that the largest of the formula's errors is typical; a loss is one number each.
SHAPES = ((256, 16, 72), (256, 1, 72), (256, 4, 1000), (256, 5, 1152))
# Few rows, since the interpreter is slow; programs take four, samples as they come.
KERNEL_SHAPES = ((12, 1, 72), (3, 5, 1000), (1, 9, 1152), (2, 11, 72), (1, 17, 72), (1, 33, 1152))
UPSTREAM = {
    "expanded": lambda v: v[:1].expand_as(v),
    "strided": lambda v: v.repeat_interleave(2)[::2],
    "sliced": lambda v: v.repeat(2)[len(v) :],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("run", ("reference",), indirect=True)
def test_reference_and_its_gradient_are_the_closed_forms_within_budget(run, shape, dtype):
    arguments = OP.arguments(shape, dtype=dtype)
    OP.expect_budgets(run, arguments, OP.upstream(arguments))


@pytest.mark.parametrize("run", KERNELS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
def test_losses_and_gradients_of_kernels_are_the_closed_forms_within_budget(run, dtype):
    """Losses of all cases are judged together, since each is only one number."""
    losses = []
    for shape in KERNEL_SHAPES:
        arguments = OP.arguments(shape, dtype=dtype)
        upstream = OP.upstream(arguments)
        (loss,), (gradient, none) = run(OP.name, arguments, upstream)
        exact, plain = (OP.results(arguments, upstream, work) for work in (F64, F32))
        assert_within_budget("dprediction", gradient, exact[1][0], plain[1][0])
        assert none is None
        losses.append((loss, exact[0][0], plain[0][0]))
    assert_within_budget("loss", *map(torch.cat, zip(*losses)))


@pytest.mark.parametrize("layout", UPSTREAM)
def test_the_upstream_gradient_may_lie_anyhow_in_memory(run, layout):
    arguments = OP.arguments()
    OP.expect_budgets(run, arguments, [*map(UPSTREAM[layout], OP.upstream(arguments))])


# 1 / eps * eps is 1 in fp32 for the first and below 1 for the second.
@pytest.mark.parametrize("eps", (4.0, 41.0))
def test_a_norm_below_eps_is_a_constant_in_the_gradient(run, eps):
    arguments = OP.arguments()
    (upstream,) = OP.upstream(arguments)
    assert (arguments["prediction"].norm(dim=-1) < 41).all()
    _, (got, _) = run(OP.name, arguments, [upstream], eps=eps)
    results = []
    for work in (F64, F32):
        leaf = arguments["prediction"].to(work).requires_grad_()
        loss = align_loss_reference(leaf, arguments["target"].to(work), eps=eps)
        results += torch.autograd.grad(loss, leaf, upstream.to(work))
    assert_within_budget("dprediction", got, *results)


@pytest.mark.parametrize(
    "prediction, target, expected",
    (
        ([[[0.5, 0.0]], [[-7.0, 0.0]], [[0.0, 2.0]]], [[[3.0, 0.0]]] * 3, [-1.0, 1.0, 0.0]),
        ([[[2.0], [-3.0]], [[0.5], [1.0]]], [[[5.0], [0.1]], [[-2.0], [-1.0]]], [0.0, 1.0]),
    ),
)
def test_parallel_opposite_and_orthogonal_vectors_and_single_columns_are_exact(
    prediction, target, expected
):
    assert ops.align_loss(torch.tensor(prediction), torch.tensor(target)).tolist() == expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zeros", (["prediction"], ["target"], ["prediction", "target"]))
def test_zero_vectors_count_as_cosine_zero(zeros, dtype):
    arguments = OP.arguments((64, 4, 8), dtype=dtype)
    for name in zeros:
        arguments[name][:, 0] = 0
    rest = {name: value[:, 1:] for name, value in arguments.items()}
    upstream = OP.upstream(rest)
    oracle, working = (OP.results(rest, upstream, work)[0][0] * 3 / 4 for work in (F64, F32))
    assert_within_budget("loss", ops.align_loss(**arguments), oracle, working)


# Not fp16: the gradient at a zero prediction is the target's direction over N * eps.
@pytest.mark.parametrize("dtype", (F32, BF16))
def test_gradients_at_zero_vectors_are_finite(dtype):
    prediction, target = OP.arguments((2, 4, 8), dtype=dtype).values()
    prediction[0, 0], target[0, 1], prediction[1, 2], target[1, 2] = 0, 0, 0, 0
    prediction.requires_grad_()
    ops.align_loss(prediction, target).sum().backward()
    assert prediction.grad.isfinite().all()
    assert not prediction.grad[0, 1].any() and not prediction.grad[1, 2].any()


def test_eps_bounds_the_norms_from_below():
    prediction = torch.full((1, 1, 4), 0.5, dtype=F64)  # norm 1
    target = torch.full((1, 1, 4), 1.0, dtype=F64)  # norm 2
    assert ops.align_loss(prediction, target, eps=4.0).item() == pytest.approx(-2 / 16)
