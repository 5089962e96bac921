"""The registry: what each encoder is, without loading it, and how to load it."""

from typing import Protocol

import torch
from torch import Tensor, nn

from repa_fast.contracts import expect_choice
from repa_fast.encoders.recipes import DINOV2, RECIPES
from repa_fast.encoders.vit import EncoderSpec


class Encoder(Protocol):
    """A frozen encoder: uint8 images (B, 3, R, R) on its device -> patch tokens (B, N, width).

    It does its own resize and normalisation, in its official order.
    """

    def __call__(self, images: Tensor) -> Tensor: ...


class _Digits(EncoderSpec):
    def build(self, input_size: int, weights: str = "", pretrained: bool = True) -> nn.Module:
        from repa_fast.encoders.digits import DigitsViT

        if weights:
            raise ValueError(
                f"encoder {self.name} brings its weights, expected no file, got {weights}"
            )
        return DigitsViT(pretrained)


DIGITS = _Digits(
    name="digits-vit",
    width=96,
    depth=4,
    patch_size=4,
    prefix=0,
    input_sizes={16: 16},
    mlp_ratio=3.0,
)
REGISTRY: dict[str, EncoderSpec] = {one.name: one for one in (DIGITS, *DINOV2, *RECIPES)}


def spec(name: str) -> EncoderSpec:
    """Return the encoder of that name; ValueError for an unknown one."""
    expect_choice("encoder", name, tuple(REGISTRY))
    return REGISTRY[name]


def specs(enc_type: str) -> list[EncoderSpec]:
    """Return the encoders of a comma-separated list; "none" (any case) is the empty list."""
    if enc_type.lower() == "none":
        return []
    names = [name.strip() for name in enc_type.split(",")]
    if len(set(names)) != len(names):
        raise ValueError(f"enc_type is {enc_type!r}, expected each encoder once")
    return [spec(name) for name in names]


def weight_files(enc_type: str, enc_weights: str) -> list[str]:
    """Return the weights file of each encoder of `enc_type`, "" where it has its own source.

    Raises:
        ValueError: `enc_weights` names some, but not as many as there are encoders.
    """
    encoders = specs(enc_type)
    if not enc_weights:
        return [""] * len(encoders)
    files = [file.strip() for file in enc_weights.split(",")]
    if len(files) != len(encoders):
        raise ValueError(
            f"enc_weights has {len(files)} entries ({enc_weights}), expected {len(encoders)}, "
            f"one for each encoder of {enc_type}; an empty entry means the encoder's own source"
        )
    return files


def load(name: str, resolution: int, device: torch.device | str, weights: str = "") -> nn.Module:
    """Load an encoder, frozen, on `device`; `weights` is a file, or "" for its own source.

    Raises:
        ValueError: unknown name, a resolution it has no input size for, or a wrong file.
        RuntimeError: its weights can be neither found nor fetched.
    """
    encoder = spec(name)
    return encoder.build(encoder.input_size(resolution), weights).to(device)
