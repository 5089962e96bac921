"""Latents from moments, and pixels from latents."""

import torch

from repa_fast.data.dataset import Metadata
from repa_fast.data.vae import VAE


def sample(moments: torch.Tensor, noise: torch.Tensor, metadata: Metadata) -> torch.Tensor:
    """(mean + std * noise) * scale + bias: a fresh posterior sample (B, C, h, w).

    moments is (B, 2C, h, w), mean then standard deviation; noise (B, C, h, w), standard normal.
    """
    mean, std = moments.chunk(2, dim=1)
    return (mean + std * noise) * metadata.scale + metadata.bias


def can_decode(metadata: Metadata) -> bool:
    """Whether `to_pixels` works without an autoencoder: the dataset's latents are pixels."""
    return metadata.vae == "none"


def to_pixels(
    latents: torch.Tensor, metadata: Metadata, vae: VAE | None = None, *, rounding: bool = True
) -> torch.Tensor:
    """Latents (B, C, h, w) -> uint8 images (B, 3, R, R), rounded or cut off.

    Pixel latents need no `vae`.

    Raises:
        ValueError: the latents are an autoencoder's, and there is none or one that does not fit.
        RuntimeError: the autoencoder cannot be loaded.
    """
    if can_decode(metadata):
        pixels = (latents.double() - metadata.bias) / metadata.scale * 127.5 + 127.5
        return (pixels.round() if rounding else pixels).clamp(0, 255).to(torch.uint8)
    if vae is None:
        raise ValueError(f"latents of {metadata.vae!r} need its decoder, expected pixel latents")
    return vae.decode(latents, metadata, rounding=rounding)
