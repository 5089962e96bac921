"""Specification of gate_residual and gate_residual_adaln in plain torch."""

import torch
import torch.nn.functional as F


def gate_residual_reference(
    x: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor
) -> torch.Tensor:
    """Return x + gate * branch, computed in at least fp32, rounded to the dtype of x.

    x and branch (B, N, D), gate (B, D); returns (B, N, D).
    """
    work = torch.promote_types(x.dtype, torch.float32)
    return (x.to(work) + gate.to(work)[:, None] * branch.to(work)).to(x.dtype)


def gate_residual_adaln_reference(
    x: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    *,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the residual stream after the addition, and its adaLN: two (B, N, D) tensors."""
    x = gate_residual_reference(x, branch, gate)
    work = torch.promote_types(x.dtype, torch.float32)
    normed = F.layer_norm(x.to(work), x.shape[-1:], eps=eps)
    modulated = normed * (1 + scale.to(work)[:, None]) + shift.to(work)[:, None]
    return x, modulated.to(out_dtype)
