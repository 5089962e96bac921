import pytest
import torch

from tests.kernels.training import losses

STEPS = 50


def difference(curve, other):
    """Mean relative difference of two loss curves."""
    return ((curve - other).abs() / other.abs()).mean().item()


@pytest.mark.usefixtures("heavy")
def test_training_with_kernels_stays_as_close_as_bf16_to_fp32(interpreter):
    exact, rounded = (
        losses("reference", dtype, STEPS) for dtype in (torch.float32, torch.bfloat16)
    )
    kernels = interpreter(losses, "triton", torch.bfloat16, STEPS)
    assert exact[-10:].mean() < 0.8 * exact[:10].mean()
    assert 0 < difference(kernels, rounded) <= 2 * difference(rounded, exact)
    one_step_late = exact.roll(1)  # other weights are further away
    assert difference(one_step_late, exact) > 2 * difference(rounded, exact)
