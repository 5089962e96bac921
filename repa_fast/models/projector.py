"""Projection heads from hidden states to an encoder's feature space."""

import torch
from torch import Tensor, nn

from repa_fast.contracts import expect_shape, expect_tokens


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

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N, hidden_size), any floating dtype, to (B, N, z_dim) in the compute dtype."""
        return super().forward(x.to(self[0].weight.dtype))


class SimpleHead(nn.Module):
    """SRA's two-layer MLP with SiLU from hidden states to hidden states (arXiv 2505.02831).

    Parameter names `linear1`, `linear2` are those of the official checkpoints, where the hidden
    width is that of input and output together. Xavier-uniform weights, zero biases.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(hidden_size, 2 * hidden_size)
        self.act = nn.SiLU()
        self.linear2 = nn.Linear(2 * hidden_size, hidden_size)
        for linear in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N, hidden_size), any floating dtype, to that shape in the compute dtype."""
        return self.linear2(self.act(self.linear1(x.to(self.linear1.weight.dtype))))


class ConvProjector(nn.Module):
    """iREPA's projector (arXiv 2512.10794): one 3x3 convolution over the grid of tokens.

    Zero padding keeps the grid. The parameter name `projection_layer` is that of the official
    checkpoints, and the initial values are nn.Conv2d's own, as there.

    Args:
        hidden_size: width of a token.
        z_dim: feature width of the encoder.
        grid: tokens along a side of the square grid; tokens are in row-major order.
    """

    def __init__(self, hidden_size: int, z_dim: int, grid: int) -> None:
        super().__init__()
        self.grid = grid
        self.projection_layer = nn.Conv2d(hidden_size, z_dim, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, grid^2, hidden_size), or ValueError, to (B, grid^2, z_dim), compute dtype."""
        convolution = self.projection_layer
        shape = (len(x), self.grid**2, convolution.in_channels)
        expect_shape("ConvProjector", "x", x, shape)
        image = x.to(convolution.weight.dtype).unflatten(1, (self.grid, self.grid))
        return convolution(image.permute(0, 3, 1, 2)).flatten(2).mT


def spatial_normalize(target: Tensor, *, gamma: float = 0.6) -> Tensor:
    """Normalise an encoder's patch tokens as iREPA, per sample and channel over the tokens.

    (z - gamma mean(z)) / (std(z) + 1e-6), the standard deviation with N - 1 degrees of freedom:
    what all tokens of an image share is reduced, so that what differs between them counts more.

    Args:
        target: (B, N, Z), any floating dtype, N at least 2.
        gamma: share of the mean that is removed; 0.6 in the released code (arXiv 2512.10794).

    Returns:
        (B, N, Z), fp32 (fp64 for fp64 targets).

    Raises:
        ValueError: a shape or dtype that does not fit.
    """
    _, tokens, _ = expect_tokens("spatial_normalize", "target", target)
    if tokens < 2:
        raise ValueError(f"spatial_normalize: target has {tokens} tokens, expected at least 2")
    target = target.to(torch.promote_types(target.dtype, torch.float32))
    std, mean = torch.std_mean(target, dim=1, keepdim=True)
    return (target - gamma * mean) / (std + 1e-6)
