"""Contracts of gate_residual and gate_residual_adaln."""

import torch

from repa_fast.contracts import expect_floating, expect_shape, expect_tokens

from .reference import gate_residual_adaln_reference, gate_residual_reference


def gate_residual(x: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """x + gate * branch, the gated residual of adaLN-zero (DiT, arXiv 2212.09748, section 3.2).

    Args:
        x: (B, N, D), the residual stream; its dtype is kept.
        branch: (B, N, D), output of attention or MLP, any floating dtype.
        gate: (B, D), may be a strided chunk.

    Returns:
        (B, N, D) in the dtype of x, computed in at least fp32.

    Raises:
        ValueError: a shape or dtype that does not fit, with expected and got.
    """
    _check("gate_residual", x, branch, gate=gate)
    return gate_residual_reference(x, branch, gate)


def gate_residual_adaln(
    x: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    *,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gated residual, then LayerNorm * (1 + scale) + shift of the sum.

    Args:
        x: (B, N, D), the residual stream; its dtype is kept.
        branch: (B, N, D), the pending branch output.
        gate, shift, scale: (B, D), may be strided chunks.
        eps: added to the variance.
        out_dtype: dtype of the modulated tensor; the dtype of `shift` if None.

    Returns:
        (x + gate * branch in the dtype of x, its adaLN in `out_dtype`), both (B, N, D).

    Raises:
        ValueError: a shape or dtype that does not fit, with expected and got.
    """
    _check("gate_residual_adaln", x, branch, gate=gate, shift=shift, scale=scale)
    return gate_residual_adaln_reference(
        x, branch, gate, shift, scale, eps=eps, out_dtype=out_dtype or shift.dtype
    )


def _check(op: str, x: torch.Tensor, branch: torch.Tensor, **vectors: torch.Tensor) -> None:
    batch, tokens, width = expect_tokens(op, "x", x)
    expect_shape(op, "branch", branch, (batch, tokens, width))
    expect_floating(op, "branch", branch)
    for name, tensor in vectors.items():
        expect_shape(op, name, tensor, (batch, width))
        expect_floating(op, name, tensor)
