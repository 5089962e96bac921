"""Contract of align_loss, its implementations and its gradient."""

import torch

from repa_fast.backend.dispatch import runs_triton
from repa_fast.backend.registration import define, first_derivative_only
from repa_fast.contracts import expect_floating, expect_shape, expect_tokens

from .reference import align_loss_reference


def align_loss(
    prediction: torch.Tensor,
    target: torch.Tensor,
    *,
    eps: float = 1e-12,
    implementation: str | None = None,
) -> torch.Tensor:
    """Return the negative cosine similarity, mean over patches (REPA, arXiv 2410.06940, eq. 8).

    Args:
        prediction: (B, N, D), projected hidden states, any floating dtype.
        target: (B, N, D), the frozen encoder's patch tokens; receives no gradient.
        eps: lower bound of the norms, as in torch.nn.functional.normalize.
        implementation: "auto", "triton" or "reference"; what the process asks for if None.

    Returns:
        (B), one loss per sample in [-1, 1], fp32 (fp64 for fp64 predictions).

    Raises:
        ValueError: a shape, dtype or device that does not fit, with expected and got; or an
            implementation that cannot run, with the reason.
    """
    expect_tokens("align_loss", "prediction", prediction)
    expect_shape("align_loss", "target", target, prediction.shape)
    expect_floating("align_loss", "target", target)
    if runs_triton("align_loss", implementation, prediction, target):
        return AlignLoss.apply(prediction, target, eps)
    return align_loss_reference(prediction, target, eps=eps)


class AlignLoss(torch.autograd.Function):
    """align_loss by its kernels."""

    @staticmethod
    def forward(ctx, prediction, target, eps):
        loss, patches = align_loss_forward(prediction, target, eps)
        ctx.save_for_backward(prediction, target, patches)
        return loss

    @staticmethod
    @first_derivative_only
    def backward(ctx, dloss):
        return align_loss_backward(dloss, *ctx.saved_tensors), None, None


def _forward_fake(prediction, target, eps):
    batch, tokens, _ = prediction.shape
    losses = prediction.new_empty((batch,), dtype=torch.float32)
    return losses, prediction.new_empty((batch, tokens, 4), dtype=torch.float32)


align_loss_forward = define(
    "align_loss_forward(Tensor prediction, Tensor target, float eps) -> (Tensor, Tensor)",
    __package__,
    "forward",
    _forward_fake,
)
align_loss_backward = define(
    "align_loss_backward(Tensor dloss, Tensor prediction, Tensor target, Tensor patches) -> Tensor",
    __package__,
    "backward",
    lambda dloss, prediction, target, patches: prediction.new_empty(prediction.shape),
)
