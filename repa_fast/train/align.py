"""The alignment losses and weight that a config asks for."""

from collections.abc import Sequence

import torch

from repa_fast.configs.config import TrainConfig
from repa_fast.diffusion.alignment import cosine_losses
from repa_fast.diffusion.contrastive import nt_xent
from repa_fast.diffusion.sra import align_weight, sra_loss
from repa_fast.distributed import World
from repa_fast.models.projector import spatial_normalize


def alignment_losses(
    projections: Sequence[torch.Tensor],
    targets: Sequence[torch.Tensor],
    config: TrainConfig,
    world: World,
) -> list[torch.Tensor]:
    """(B) of each head's output (B, N, Z) and its target (B, N, Z), in fp32.

    Raises:
        ValueError: as many outputs as targets were expected, or shapes differ.
    """
    if config.align == "sra":
        pairs = zip(projections, targets, strict=True)
        return [sra_loss(student, teacher, config.loss_type) for student, teacher in pairs]
    if config.spatial_norm:
        targets = [spatial_normalize(target) for target in targets]
    if config.loss_type == "cos":
        return cosine_losses(projections, targets)
    return [
        nt_xent(
            projection,
            target,
            temperature=config.nt_xent_temperature,
            negatives=config.nt_xent_negatives,
            world=world,
        )
        for projection, target in zip(projections, targets, strict=True)
    ]


def alignment_weight(config: TrainConfig, step: int) -> float:
    """Of the step after `step` steps."""
    if config.align_decay == "constant":
        return config.proj_coeff
    if config.align_decay == "linear":
        return config.proj_coeff * max(0.0, 1 - step / config.align_until)
    images = step * config.images_per_step
    return align_weight(config.loss_type, images, config.resolution, config.objective)
