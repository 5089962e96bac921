import pytest
import torch

from repa_fast import ops
from repa_fast.kernels.align_loss.reference import align_loss_reference
from repa_fast.testing import assert_within_budget, seeded

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Enough samples that the largest of the formula's errors is typical; a loss is one number each.
SHAPES = ((256, 16, 72), (256, 1, 72), (256, 4, 1000))


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_is_within_the_fp32_budget(shape, dtype):
    args = inputs(shape, dtype)
    assert_within_budget(
        "loss", ops.align_loss(*args), formula(*args), formula(*args, work=torch.float32)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_is_the_closed_form_within_budget(shape, dtype):
    prediction, target = inputs(shape, dtype)
    prediction.requires_grad_()
    upstream = seeded(shape[:1], seed=3, mean=1.0)
    if dtype == torch.float16:
        upstream = upstream * 1024  # loss scaling: without it the gradient is subnormal
    (got,) = torch.autograd.grad(ops.align_loss(prediction, target), prediction, upstream)
    working = gradient_formula(prediction, target, upstream, work=torch.float32).to(dtype)
    oracle = gradient_formula(prediction, target, upstream)
    assert_within_budget("dprediction", got, oracle, working)


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


def test_dtypes_of_prediction_and_target_may_differ():
    prediction, target = inputs((64, 16, 72))
    prediction = prediction.bfloat16()
    working = formula(prediction, target, work=torch.float32)
    actual = ops.align_loss(prediction, target)
    assert_within_budget("loss", actual, formula(prediction, target), working)


def test_strided_inputs_give_what_contiguous_ones_give():
    prediction, target = inputs((4, 6, 8))
    cls_and_patches = torch.cat([target[:, :1], target], dim=1)
    strided = cls_and_patches[:, 1:]
    assert not strided.is_contiguous()
    expected = ops.align_loss(prediction, target)
    torch.testing.assert_close(ops.align_loss(prediction, strided), expected, rtol=0, atol=0)


def test_empty_batch_runs_forward_and_backward():
    prediction = torch.ones(0, 4, 8, requires_grad=True)
    loss = ops.align_loss(prediction, torch.ones(0, 4, 8))
    loss.sum().backward()
    assert loss.shape == (0,) and prediction.grad.shape == (0, 4, 8)


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
