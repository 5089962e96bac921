"""Projection heads from hidden states to an encoder's feature space."""

import torch
from torch import nn


class Projector(nn.Sequential):
    """REPA's three-layer MLP with SiLU (arXiv 2410.06940, section 3.2), applied to each token.

    Parameter names `0`, `2`, `4` are those of the official checkpoints.
    """

    def __init__(self, hidden_size: int, projector_dim: int, z_dim: int) -> None:
        super().__init__(
            nn.Linear(hidden_size, projector_dim),
            nn.SiLU(),
            nn.Linear(projector_dim, projector_dim),
            nn.SiLU(),
            nn.Linear(projector_dim, z_dim),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, N, hidden_size), any floating dtype -> (B, N, z_dim) in the compute dtype."""
        return super().forward(x.to(self[0].weight.dtype))
