"""Specification of align_loss in plain torch."""

import torch
import torch.nn.functional as F


def align_loss_reference(
    prediction: torch.Tensor, target: torch.Tensor, *, eps: float
) -> torch.Tensor:
    """Return each sample's mean over patches of -cos(prediction, target): (B, N, D) x 2 -> (B)."""
    work = torch.promote_types(prediction.dtype, torch.float32)
    prediction = F.normalize(prediction.to(work), dim=-1, eps=eps)
    target = F.normalize(target.detach().to(work), dim=-1, eps=eps)
    return -(prediction * target).sum(-1).mean(-1)
