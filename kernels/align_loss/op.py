"""Contract of align_loss."""

import torch

from repa_fast.contracts import expect_floating, expect_shape, expect_tokens

from .reference import align_loss_reference


def align_loss(
    prediction: torch.Tensor, target: torch.Tensor, *, eps: float = 1e-12
) -> torch.Tensor:
    """Mean over patches of the negative cosine similarity (REPA, arXiv 2410.06940, eq. 8).

    Args:
        prediction: (B, N, D), projected hidden states, any floating dtype.
        target: (B, N, D), the frozen encoder's patch tokens; receives no gradient.
        eps: lower bound of the norms, as in torch.nn.functional.normalize.

    Returns:
        (B), one loss per sample in [-1, 1], fp32 (fp64 for fp64 predictions).

    Raises:
        ValueError: a shape or dtype that does not fit, with expected and got.
    """
    expect_tokens("align_loss", "prediction", prediction)
    expect_shape("align_loss", "target", target, prediction.shape)
    expect_floating("align_loss", "target", target)
    return align_loss_reference(prediction, target, eps=eps)
