import pytest
import torch

from tests.kernels.training import losses

STEPS = 50


def difference(curve, other):
    """Mean relative difference of two loss curves."""
    return ((curve - other).abs() / other.abs()).mean().item()


@pytest.fixture(scope="module")
def curves():
    return {dtype: losses("reference", dtype, STEPS) for dtype in (torch.float32, torch.bfloat16)}


def test_training_with_kernels_stays_as_close_as_bf16_to_fp32(interpreter, curves):
    exact, rounded = curves[torch.float32], curves[torch.bfloat16]
    kernels = interpreter(losses, "triton", torch.bfloat16, STEPS)
    assert exact[-10:].mean() < 0.8 * exact[:10].mean()
    assert 0 < difference(kernels, rounded) <= 2 * difference(rounded, exact)


def test_other_weights_are_further_away(curves):
    moved = curves[torch.float32].roll(1)
    assert difference(moved, curves[torch.float32]) > 2 * difference(
        curves[torch.bfloat16], curves[torch.float32]
    )
