"""Contract of adaln, its implementations and its gradient."""

import torch

from repa_fast.backend.dispatch import runs_triton
from repa_fast.backend.registration import define, first_derivative_only
from repa_fast.contracts import expect_floating, expect_out_dtype, expect_shape, expect_tokens

from .reference import adaln_reference


def adaln(
    x: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    *,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
    implementation: str | None = None,
) -> torch.Tensor:
    """Compute LayerNorm(x) * (1 + scale) + shift (DiT, arXiv 2212.09748, section 3.2, adaLN).

    Args:
        x: (B, N, D), any floating dtype; the residual stream.
        shift: (B, D), may be a strided chunk of a wider tensor.
        scale: (B, D), likewise.
        eps: added to the variance.
        out_dtype: dtype of the result; the dtype of `shift` if None, which is the compute dtype
            under autocast and under FSDP's mixed precision alike.
        implementation: "auto", "triton" or "reference"; what the process asks for if None.

    Returns:
        (B, N, D). Statistics and modulation are computed in fp32 (fp64 for fp64 inputs, by the
        reference only).

    Raises:
        ValueError: a shape, dtype or device that does not fit, with expected and got; or an
            implementation that cannot run, with the reason.
    """
    batch, _, width = expect_tokens("adaln", "x", x)
    for name, tensor in (("shift", shift), ("scale", scale)):
        expect_shape("adaln", name, tensor, (batch, width))
        expect_floating("adaln", name, tensor)
    out_dtype = out_dtype or shift.dtype
    expect_out_dtype("adaln", out_dtype)
    if runs_triton("adaln", implementation, x, shift, scale):
        return AdaLN.apply(x, shift, scale, eps, out_dtype)
    return adaln_reference(x, shift, scale, eps=eps, out_dtype=out_dtype)


class AdaLN(torch.autograd.Function):
    """adaln by its kernels."""

    @staticmethod
    def forward(ctx, x, shift, scale, eps, out_dtype):
        y, statistics = adaln_forward(x, shift, scale, eps, out_dtype)
        ctx.save_for_backward(x, scale, statistics)
        ctx.shift_dtype = shift.dtype
        return y

    @staticmethod
    @first_derivative_only
    def backward(ctx, dy):
        x, scale, statistics = ctx.saved_tensors
        common = torch.promote_types(ctx.shift_dtype, scale.dtype)
        dx, dvectors = adaln_backward(dy, x, scale, statistics, common)
        dshift, dscale = dvectors.unbind(0)
        return dx, dshift.to(ctx.shift_dtype), dscale.to(scale.dtype), None, None


def _forward_fake(x, shift, scale, eps, out_dtype):
    return x.new_empty(x.shape, dtype=out_dtype), x.new_empty(
        (*x.shape[:2], 2), dtype=torch.float32
    )


def _backward_fake(dy, x, scale, statistics, vector_dtype):
    batch, _, width = x.shape
    return x.new_empty(x.shape), x.new_empty((2, batch, width), dtype=vector_dtype)


adaln_forward = define(
    "adaln_forward(Tensor x, Tensor shift, Tensor scale, float eps, ScalarType out_dtype)"
    " -> (Tensor, Tensor)",
    __package__,
    "forward",
    _forward_fake,
)
adaln_backward = define(
    "adaln_backward(Tensor dy, Tensor x, Tensor scale, Tensor statistics, ScalarType vector_dtype)"
    " -> (Tensor, Tensor)",
    __package__,
    "backward",
    _backward_fake,
)
