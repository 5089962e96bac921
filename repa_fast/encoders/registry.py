"""The registry: what each encoder is, without loading it, and how to load it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from repa_fast.contracts import expect_choice
from repa_fast.encoders import dinov2
from repa_fast.encoders.recipes import RECIPES
from repa_fast.encoders.vit import FrozenViT
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
        build: (input size in pixels, weights="", pretrained=True) -> module; `weights` is a file,
            or "" for its own source.
        mlp_ratio: hidden width of its MLPs over its width.
    """

    name: str
    width: int
    depth: int
    patch_size: int
    prefix: int
    input_sizes: dict[int, int]
    build: Callable[..., torch.nn.Module]
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


def _digits_vit(_: int, weights: str = "", pretrained: bool = True) -> torch.nn.Module:
    from repa_fast.encoders.digits import DigitsViT

    if weights:
        raise ValueError(f"encoder digits-vit brings its weights, expected no file, got {weights}")
    return DigitsViT(pretrained)


def _dinov2_specs() -> list[EncoderSpec]:
    return [
        EncoderSpec(
            name=dinov2.encoder_name(letter, registers),
            width=width,
            depth=depth,
            patch_size=14,
            prefix=5 if registers else 1,
            input_sizes={256: 224, 512: 448},
            build=partial(dinov2.DINOv2, letter, registers),
        )
        for registers in (False, True)
        for letter, (_, width, depth) in dinov2.SIZES.items()
    ]


def _recipe_specs() -> list[EncoderSpec]:
    return [
        EncoderSpec(
            name=recipe.name,
            width=recipe.width,
            depth=recipe.depth,
            patch_size=recipe.patch_size,
            prefix=recipe.prefix,
            input_sizes=recipe.input_sizes,
            build=partial(FrozenViT, recipe),
            mlp_ratio=recipe.mlp_ratio,
        )
        for recipe in RECIPES
    ]


REGISTRY = {
    encoder.name: encoder
    for encoder in (
        EncoderSpec("digits-vit", 96, 4, 4, 0, {16: 16}, _digits_vit, mlp_ratio=3.0),
        *_dinov2_specs(),
        *_recipe_specs(),
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
    names = [name.strip() for name in enc_type.split(",")]
    if len(set(names)) != len(names):
        raise ValueError(f"enc_type is {enc_type!r}, expected each encoder once")
    return [spec(name) for name in names]


def weight_files(enc_type: str, enc_weights: str) -> list[str]:
    """The weights file of each encoder of `enc_type`, "" where it has its own source.

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


def load(
    name: str, resolution: int, device: torch.device | str, weights: str = ""
) -> torch.nn.Module:
    """The encoder with its weights, in eval mode, without gradients, on `device`.

    `weights` is a file to read them from; empty is the encoder's own source.

    Raises:
        ValueError: unknown name, a resolution it has no input size for, or a wrong file.
        RuntimeError: its weights can be neither found nor fetched.
    """
    encoder = spec(name)
    module = encoder.build(encoder.input_size(resolution), weights).to(device)
    return module.eval().requires_grad_(False)
