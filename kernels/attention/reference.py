"""Specification of attention in plain torch."""

import torch


def attention_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> torch.Tensor:
    """Compute softmax(scale * q k^T) v in at least fp32.

    q, k and v (B, H, N, K); returns (B, H, N, K) in the dtype of v.
    """
    work = torch.promote_types(v.dtype, torch.float32)
    scores = scale * (q.to(work) @ k.to(work).transpose(-2, -1))  # (B, H, N, N)
    return (scores.softmax(dim=-1) @ v.to(work)).to(v.dtype)
