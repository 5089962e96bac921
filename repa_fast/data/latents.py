"""Latents from moments, and pixels from latents."""

import torch

from repa_fast.data.dataset import Metadata


def sample(moments: torch.Tensor, noise: torch.Tensor, metadata: Metadata) -> torch.Tensor:
    """(mean + std * noise) * scale + bias: a fresh posterior sample (B, C, h, w).

    moments is (B, 2C, h, w), mean then standard deviation; noise (B, C, h, w), standard normal.
    """
    mean, std = moments.chunk(2, dim=1)
    return (mean + std * noise) * metadata.scale + metadata.bias


def can_decode(metadata: Metadata) -> bool:
    """Whether `to_pixels` works for this dataset: pixel latents need no autoencoder."""
    return metadata.vae == "none"


def to_pixels(latents: torch.Tensor, metadata: Metadata) -> torch.Tensor:
    """Pixel latents (B, C, h, w) -> uint8 (B, C, h, w), rounded.

    Raises:
        ValueError: the latents are an autoencoder's.
    """
    if not can_decode(metadata):
        raise ValueError(f"latents of {metadata.vae!r} need its decoder, expected pixel latents")
    pixels = (latents.double() - metadata.bias) / metadata.scale * 127.5 + 127.5
    return pixels.round().clamp(0, 255).to(torch.uint8)
