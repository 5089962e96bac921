"""The velocity objective (REPA eq. 4)."""

import torch

from repa_fast.contracts import expect_shape


def velocity_loss(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error over each sample: two (B, C, h, w) tensors -> (B), at least fp32."""
    expect_shape("velocity_loss", "target", target, prediction.shape)
    work = torch.promote_types(prediction.dtype, torch.float32)
    return (prediction.to(work) - target.to(work)).square().flatten(1).mean(1)
