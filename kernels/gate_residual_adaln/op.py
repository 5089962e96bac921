"""Contracts of gate_residual and gate_residual_adaln, their implementations and gradients."""

import functools

import torch

from repa_fast.backend.dispatch import runs_triton
from repa_fast.backend.registration import define, first_derivative_only
from repa_fast.contracts import expect_floating, expect_out_dtype, expect_shape, expect_tokens

from .reference import gate_residual_adaln_reference, gate_residual_reference


def gate_residual(
    x: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor,
    *,
    implementation: str | None = None,
) -> torch.Tensor:
    """Compute x + gate * branch, adaLN-zero's gated residual (DiT, arXiv 2212.09748, section 3.2).

    Args:
        x: (B, N, D), the residual stream; its dtype is kept.
        branch: (B, N, D), output of attention or MLP, any floating dtype.
        gate: (B, D), may be a strided chunk.
        implementation: "auto", "triton" or "reference"; what the process asks for if None.

    Returns:
        (B, N, D) in the dtype of x, computed in at least fp32.

    Raises:
        ValueError: a shape, dtype or device that does not fit, with expected and got; or an
            implementation that cannot run, with the reason.
    """
    _check("gate_residual", x, branch, gate=gate)
    if runs_triton("gate_residual", implementation, x, branch, gate):
        return GateResidual.apply(x, branch, gate)
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
    implementation: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the gated residual, then LayerNorm * (1 + scale) + shift of the sum.

    Args:
        x: (B, N, D), the residual stream; its dtype is kept.
        branch: (B, N, D), the pending branch output.
        gate: (B, D), may be a strided chunk, as shift and scale may.
        shift: (B, D).
        scale: (B, D).
        eps: added to the variance.
        out_dtype: dtype of the modulated tensor; the dtype of `shift` if None.
        implementation: "auto", "triton" or "reference"; what the process asks for if None.

    Returns:
        (x + gate * branch in the dtype of x, its adaLN in `out_dtype`), both (B, N, D).

    Raises:
        ValueError: a shape, dtype or device that does not fit, with expected and got; or an
            implementation that cannot run, with the reason.
    """
    _check("gate_residual_adaln", x, branch, gate=gate, shift=shift, scale=scale)
    out_dtype = out_dtype or shift.dtype
    expect_out_dtype("gate_residual_adaln", out_dtype)
    tensors = (x, branch, gate, shift, scale)
    if runs_triton("gate_residual_adaln", implementation, *tensors):
        return GateResidualAdaLN.apply(*tensors, eps, out_dtype)
    return gate_residual_adaln_reference(*tensors, eps=eps, out_dtype=out_dtype)


def _check(op: str, x: torch.Tensor, branch: torch.Tensor, **vectors: torch.Tensor) -> None:
    batch, tokens, width = expect_tokens(op, "x", x)
    expect_shape(op, "branch", branch, (batch, tokens, width))
    expect_floating(op, "branch", branch)
    for name, tensor in vectors.items():
        expect_shape(op, name, tensor, (batch, width))
        expect_floating(op, name, tensor)


class GateResidual(torch.autograd.Function):
    """gate_residual by its kernels; the gradient of x is the upstream gradient itself."""

    @staticmethod
    def forward(ctx, x, branch, gate):
        ctx.save_for_backward(branch, gate)
        return gate_residual_forward(x, branch, gate)

    @staticmethod
    @first_derivative_only
    def backward(ctx, dout):
        dbranch, dgate = gate_residual_backward(dout, *ctx.saved_tensors)
        return dout, dbranch, dgate


class GateResidualAdaLN(torch.autograd.Function):
    """gate_residual_adaln by its kernels."""

    @staticmethod
    def forward(ctx, x, branch, gate, shift, scale, eps, out_dtype):
        out, y, statistics = gate_residual_adaln_forward(
            x, branch, gate, shift, scale, eps, out_dtype
        )
        ctx.save_for_backward(out, branch, gate, scale, statistics)
        ctx.shift_dtype, ctx.y_dtype = shift.dtype, out_dtype
        ctx.set_materialize_grads(False)
        return out, y

    @staticmethod
    @first_derivative_only
    def backward(ctx, dout, dy):
        out, branch, gate, scale, statistics = ctx.saved_tensors
        if dy is None:
            dy = torch.zeros_like(out, dtype=ctx.y_dtype)
        dtypes = (gate.dtype, ctx.shift_dtype, scale.dtype)
        common = functools.reduce(torch.promote_types, dtypes)
        dx, dbranch, dvectors = gate_residual_adaln_backward(
            dy, dout, out, branch, gate, scale, statistics, common
        )
        dvectors = (dvector.to(dtype) for dvector, dtype in zip(dvectors.unbind(0), dtypes))
        return dx, dbranch, *dvectors, None, None


def _adaln_forward_fake(x, branch, gate, shift, scale, eps, out_dtype):
    statistics = x.new_empty((*x.shape[:2], 2), dtype=torch.float32)
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=out_dtype), statistics


def _adaln_backward_fake(dy, dout, out, branch, gate, scale, statistics, vector_dtype):
    batch, _, width = out.shape
    dvectors = out.new_empty((3, batch, width), dtype=vector_dtype)
    return out.new_empty(out.shape), branch.new_empty(branch.shape), dvectors


gate_residual_forward = define(
    "gate_residual_forward(Tensor x, Tensor branch, Tensor gate) -> Tensor",
    __package__,
    "gate_residual_forward",
    lambda x, branch, gate: x.new_empty(x.shape),
)
gate_residual_backward = define(
    "gate_residual_backward(Tensor dout, Tensor branch, Tensor gate) -> (Tensor, Tensor)",
    __package__,
    "gate_residual_backward",
    lambda dout, branch, gate: (branch.new_empty(branch.shape), gate.new_empty(gate.shape)),
)
gate_residual_adaln_forward = define(
    "gate_residual_adaln_forward(Tensor x, Tensor branch, Tensor gate, Tensor shift, Tensor scale,"
    " float eps, ScalarType out_dtype) -> (Tensor, Tensor, Tensor)",
    __package__,
    "gate_residual_adaln_forward",
    _adaln_forward_fake,
)
gate_residual_adaln_backward = define(
    "gate_residual_adaln_backward(Tensor dy, Tensor? dout, Tensor out, Tensor branch, Tensor gate,"
    " Tensor scale, Tensor statistics, ScalarType vector_dtype) -> (Tensor, Tensor, Tensor)",
    __package__,
    "gate_residual_adaln_backward",
    _adaln_backward_fake,
)
