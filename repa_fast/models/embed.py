"""Input of a SiT's blocks: patches with their positions, and the condition of time and class.

Shapes: B batch, N tokens, D width, C latent channels.
"""

import math

import torch
from torch import Tensor, nn

T_FREQUENCIES = 256


def sincos_position_embedding(hidden_size: int, grid: int) -> Tensor:
    """Return a fixed 2-D sine-cosine table (1, grid * grid, hidden_size), fp32, made in fp64.

    The first half of the width encodes the column, the second the row; each is [sin | cos].
    """
    frequencies = hidden_size // 4
    omega = 10000.0 ** (-torch.arange(frequencies, dtype=torch.float64) / frequencies)
    row, column = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    angles = [axis.reshape(-1, 1) * omega for axis in (column, row)]  # (N, D/4) each
    table = torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1)
    return table.float()[None]


class PatchEmbed(nn.Module):
    """(B, C, h, w) -> (B, N, D) by a strided convolution."""

    def __init__(self, in_channels: int, hidden_size: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x.to(self.proj.weight.dtype)).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """t (B) -> (B, D): sinusoidal features, then a two-layer MLP with SiLU."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(T_FREQUENCIES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, t: Tensor) -> Tensor:
        t = t.to(torch.promote_types(t.dtype, torch.float32))
        half = T_FREQUENCIES // 2
        exponents = torch.arange(half, dtype=t.dtype, device=t.device) / half
        angles = t[:, None] * torch.exp(-math.log(10000.0) * exponents)
        features = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.mlp(features.to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """Class labels (B) -> (B, D); the last row is the null label of classifier-free guidance."""

    def __init__(self, num_classes: int, hidden_size: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, y: Tensor, drop: Tensor | None = None) -> Tensor:
        self._check(y)
        if drop is not None:
            y = torch.where(drop, self.num_classes, y)
        return self.embedding_table(y)

    def _check(self, y: Tensor) -> None:
        # On a GPU reading the labels would stall the step; there the dataset has checked them.
        if type(y) is Tensor and y.device.type == "cpu" and y.numel():
            low, high = int(y.min()), int(y.max())
            if low < 0 or high > self.num_classes:
                raise ValueError(
                    f"labels lie in [{low}, {high}], expected [0, {self.num_classes}] "
                    f"({self.num_classes} is the null label)"
                )
