"""The registry: what each encoder is, without loading it, and how to load it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from repa_fast.contracts import expect_choice
from repa_fast.models.flops import vit_flops


class Encoder(Protocol):
    """A frozen encoder: uint8 images (B, 3, R, R) on its device -> patch tokens (B, N, width).

    It does its own resize and normalisation, in its official order.
    """

    def __call__(self, images: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True)
class EncoderSpec:
    """What is known of an encoder before it is loaded.

    Attributes:
        name: as in `--enc-type`.
        width: feature width of its patch tokens.
        depth: number of blocks.
        patch_size: in pixels of its own input.
        prefix: class and register tokens.
        input_sizes: dataset resolution -> resolution of its own input, in pixels.
        build: (input size in pixels) -> module.
        mlp_ratio: hidden width of its MLPs over its width.
    """

    name: str
    width: int
    depth: int
    patch_size: int
    prefix: int
    input_sizes: dict[int, int]
    build: Callable[[int], torch.nn.Module]
    mlp_ratio: float = 4.0

    def input_size(self, resolution: int) -> int:
        """Pixels of its input for images of `resolution`; ValueError where it has none."""
        if resolution not in self.input_sizes:
            known = ", ".join(map(str, self.input_sizes))
            raise ValueError(f"encoder {self.name}: resolution is {resolution}, expected {known}")
        return self.input_sizes[resolution]

    def num_tokens(self, resolution: int) -> int:
        """Patch tokens per image."""
        return (self.input_size(resolution) // self.patch_size) ** 2

    def flops(self, resolution: int) -> float:
        """Forward FLOPs per image."""
        return vit_flops(
            patches=self.num_tokens(resolution),
            prefix=self.prefix,
            width=self.width,
            depth=self.depth,
            patch_size=self.patch_size,
            mlp_ratio=self.mlp_ratio,
        )


def _digits_vit(_: int) -> torch.nn.Module:
    from repa_fast.encoders.digits import DigitsViT

    return DigitsViT()


def _dinov2(timm_name: str, input_size: int) -> torch.nn.Module:
    from repa_fast.encoders.dinov2 import DINOv2

    return DINOv2(timm_name, input_size)


def _dinov2_specs() -> list[EncoderSpec]:
    sizes = {"s": ("small", 384, 12), "b": ("base", 768, 12),
             "l": ("large", 1024, 24), "g": ("giant", 1536, 40)}  # fmt: skip
    return [
        EncoderSpec(
            name=f"dinov2{suffix}-vit-{letter}",
            width=width,
            depth=depth,
            patch_size=14,
            prefix=prefix,
            input_sizes={256: 224, 512: 448},
            build=partial(_dinov2, f"vit_{size}_patch14_{timm_suffix}.lvd142m"),
        )
        for suffix, timm_suffix, prefix in (("", "dinov2", 1), ("reg", "reg4_dinov2", 5))
        for letter, (size, width, depth) in sizes.items()
    ]


REGISTRY = {
    encoder.name: encoder
    for encoder in (
        EncoderSpec("digits-vit", 96, 4, 4, 0, {16: 16}, _digits_vit, mlp_ratio=3.0),
        *_dinov2_specs(),
    )
}


def spec(name: str) -> EncoderSpec:
    """The encoder of that name; ValueError for an unknown one."""
    expect_choice("encoder", name, tuple(REGISTRY))
    return REGISTRY[name]


def specs(enc_type: str) -> list[EncoderSpec]:
    """The encoders of a comma-separated list; "none" (any case) is the empty list."""
    if enc_type.lower() == "none":
        return []
    return [spec(name.strip()) for name in enc_type.split(",")]


def load(name: str, resolution: int, device: torch.device | str) -> torch.nn.Module:
    """The encoder with its weights, in eval mode, without gradients, on `device`."""
    encoder = spec(name)
    module = encoder.build(encoder.input_size(resolution)).to(device)
    return module.eval().requires_grad_(False)
