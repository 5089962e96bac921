"""Contract of adaln."""

import torch

from repa_fast.contracts import expect_floating, expect_shape, expect_tokens

from .reference import adaln_reference


def adaln(
    x: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    *,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """LayerNorm(x) * (1 + scale) + shift (DiT, arXiv 2212.09748, section 3.2, adaLN).

    Args:
        x: (B, N, D), any floating dtype; the residual stream.
        shift: (B, D), may be a strided chunk of a wider tensor.
        scale: (B, D), likewise.
        eps: added to the variance.
        out_dtype: dtype of the result; the dtype of `shift` if None, which is the compute dtype
            under autocast and under FSDP's mixed precision alike.

    Returns:
        (B, N, D). Statistics and modulation are computed in fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: a shape or dtype that does not fit, with expected and got.
    """
    batch, _, width = expect_tokens("adaln", "x", x)
    for name, tensor in (("shift", shift), ("scale", scale)):
        expect_shape("adaln", name, tensor, (batch, width))
        expect_floating("adaln", name, tensor)
    return adaln_reference(x, shift, scale, eps=eps, out_dtype=out_dtype or shift.dtype)
