"""Alignment of hidden states with a frozen encoder (REPA eq. 8)."""

from collections.abc import Sequence

import torch

from repa_fast import ops


def cosine_losses(
    projections: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Negative patch-wise cosine similarity of each encoder, per sample.

    Args:
        projections: (B, N, Z_k) for encoder k, from the model's projectors.
        targets: (B, N, Z_k) for encoder k, patch tokens of the clean images.

    Returns:
        One (B) tensor per encoder; REPA's loss is their mean.

    Raises:
        ValueError: as many projections as targets were expected, or shapes differ.
    """
    if len(projections) != len(targets):
        raise ValueError(
            f"alignment: {len(projections)} projections for {len(targets)} encoders; "
            "the model needs one projector per encoder"
        )
    return [ops.align_loss(p, z) for p, z in zip(projections, targets, strict=True)]
