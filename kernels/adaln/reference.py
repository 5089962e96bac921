"""Specification of adaln in plain torch."""

import torch
import torch.nn.functional as F


def adaln_reference(
    x: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    *,
    eps: float,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Compute LayerNorm(x) * (1 + scale) + shift in at least fp32.

    x (B, N, D), shift and scale (B, D); returns (B, N, D) in `out_dtype`.
    """
    work = torch.promote_types(x.dtype, torch.float32)
    normed = F.layer_norm(x.to(work), x.shape[-1:], eps=eps)
    modulated = normed * (1 + scale.to(work)[:, None]) + shift.to(work)[:, None]
    return modulated.to(out_dtype)
