import pytest
import torch

from repa_fast.diffusion.flow import velocity_loss
from repa_fast.testing import assert_within_budget, seeded


def pair(shape, dtype):
    return seeded(shape, seed=1, dtype=dtype), seeded(shape, seed=2, dtype=dtype)


def test_it_equals_a_loop_over_samples_and_values():
    prediction, target = pair((3, 2, 4, 5), torch.float64)
    for sample, loss in enumerate(velocity_loss(prediction, target).tolist()):
        values = zip(prediction[sample].flatten().tolist(), target[sample].flatten().tolist())
        assert loss == pytest.approx(sum((p - v) ** 2 for p, v in values) / 40, rel=1e-12)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_it_is_computed_in_fp32(dtype):
    prediction, target = pair((256, 4, 8, 8), dtype)
    oracle = (prediction.double() - target.double()).square().mean((1, 2, 3))
    working = (prediction.float() - target.float()).square().mean((1, 2, 3))
    assert_within_budget("loss", velocity_loss(prediction, target), oracle, working)


def test_a_bf16_prediction_of_an_fp32_target_is_compared_in_fp32():
    prediction, target = pair((256, 4, 8, 8), torch.float32)
    prediction = prediction.bfloat16()
    oracle = (prediction.double() - target.double()).square().mean((1, 2, 3))
    working = (prediction.float() - target).square().mean((1, 2, 3))
    assert_within_budget("loss", velocity_loss(prediction, target), oracle, working)


def test_gradient_is_twice_the_mean_difference():
    prediction, target = pair((3, 2, 4, 5), torch.float64)
    prediction.requires_grad_()
    velocity_loss(prediction, target).sum().backward()
    expected = 2 * (prediction.detach() - target) / 40
    torch.testing.assert_close(prediction.grad, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", ((3, 2, 4, 4), (2, 2, 4, 5), (3, 40)))
def test_a_target_of_another_shape_is_named(shape):
    with pytest.raises(ValueError) as error:
        velocity_loss(torch.zeros(3, 2, 4, 5), torch.zeros(shape))
    parts = ("velocity_loss", "target", str(shape), "expected (3, 2, 4, 5)")
    assert all(part in str(error.value) for part in parts)
