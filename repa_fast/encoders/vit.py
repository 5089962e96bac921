"""Frozen ViTs of timm's architectures, each with the recipe it goes by."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repa_fast.encoders.files import Weights, differences, expect_real, measure, read
from repa_fast.failure import Failure
from repa_fast.models.flops import vit_flops
from repa_fast.words import some

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """What is known of an encoder before it is loaded.

    Attributes:
        name: as in `--enc-type`.
        width: feature width of its patch tokens.
        depth: number of blocks.
        patch_size: in pixels of its own input.
        prefix: class and register tokens.
        input_sizes: dataset resolution -> resolution of its own input, in pixels.
        mlp_ratio: hidden width of its MLPs over its width; for SwiGLU, of a plain MLP as large.
    """

    name: str
    width: int
    depth: int
    patch_size: int
    prefix: int
    input_sizes: dict[int, int]
    mlp_ratio: float = 4.0

    def build(self, input_size: int, weights: str = "", pretrained: bool = True) -> nn.Module:
        """Build the module for its input size; `weights` is a file, or "" for its own source."""
        raise NotImplementedError

    def input_size(self, resolution: int) -> int:
        """Return the pixels of its input for images of `resolution`; ValueError without one."""
        if resolution not in self.input_sizes:
            known = ", ".join(map(str, self.input_sizes))
            raise ValueError(
                f"encoder {self.name}: resolution is {resolution}, expected {known}: prepare "
                "images of that size"
            )
        return self.input_sizes[resolution]

    def num_tokens(self, resolution: int) -> int:
        """Return the number of patch tokens per image."""
        return (self.input_size(resolution) // self.patch_size) ** 2

    def flops(self, resolution: int) -> float:
        """Return the forward FLOPs per image."""
        return vit_flops(
            patches=self.num_tokens(resolution),
            prefix=self.prefix,
            width=self.width,
            depth=self.depth,
            patch_size=self.patch_size,
            mlp_ratio=self.mlp_ratio,
        )


@dataclass(frozen=True, kw_only=True)
class Recipe(EncoderSpec):
    """What sets a ViT of timm's apart from one with patches of 16 pixels and one class token.

    Attributes:
        model: timm's name, where `{size}` stands for the input size in pixels.
        file: the official file and who publishes it, for messages.
        convert: what `files.read` gives -> tensors of the encoder; ValueError if it is another's.
        adapt: (those, timm's module) -> tensors in timm's naming, where `convert` leaves that.
        resize: "none" takes images at the input size only; "before" and "after" normalising resize
            to it, bicubic without antialias.
        mean, std: of the channels, for pixels in [0, 1].
        final_norm: whether the tokens have been through the last LayerNorm.
        hub: whether timm knows where the weights are.
        flags: whether files may hold the flags of a training, an argparse.Namespace.
        options: further arguments of the architecture.
        siblings: what `measure` gives -> name, for encoders that differ in size alone.
    """

    patch_size: int = 16
    prefix: int = 1
    input_sizes: dict[int, int] = field(default_factory=lambda: {256: 256})
    model: str
    file: str
    convert: Callable[[dict], Weights]
    adapt: Callable[[Weights, nn.Module], Weights] | None = None
    resize: Literal["none", "before", "after"] = "none"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    final_norm: bool = True
    hub: bool = True
    flags: bool = True
    options: Mapping[str, object] = field(default_factory=dict)
    siblings: Mapping[tuple[int, ...], str] = field(default_factory=dict)

    def build(self, input_size: int, weights: str = "", pretrained: bool = True) -> "FrozenViT":
        return FrozenViT(self, input_size, weights, pretrained)


class FrozenViT(nn.Module):
    """Patch tokens of a ViT, without class and register tokens. Always frozen.

    Args:
        recipe: which encoder.
        input_size: height and width of its input, in pixels, a multiple of its patch size.
        weights: an official file, or timm's state dict; timm's hub if empty.
        pretrained: load weights; random otherwise.

    Raises:
        RuntimeError: the weights can be neither found nor fetched.
        ValueError: `weights` is not a file of this encoder, or is empty where only a file will do.
    """

    def __init__(
        self, recipe: Recipe, input_size: int, weights: str = "", pretrained: bool = True
    ) -> None:
        super().__init__()
        if pretrained and not weights and not recipe.hub:
            raise ValueError(
                f"encoder {recipe.name} has no weights on timm's hub: expected --enc-weights FILE, "
                f"where FILE is {recipe.file}, got none"
            )
        self.name, self.input_size, self.resize = recipe.name, input_size, recipe.resize
        self.vit = _build(recipe, input_size, from_hub=pretrained and not weights)
        if pretrained and weights:
            load_file(self.vit, weights, recipe)
        if not recipe.final_norm:
            self.vit.norm = nn.Identity()
        self.register_buffer("mean", torch.tensor(recipe.mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(recipe.std).view(1, 3, 1, 1))
        self.eval().requires_grad_(False)

    def preprocess(self, images: Tensor) -> Tensor:
        """Normalise uint8 (B, 3, R, R) to fp32 (B, 3, input_size, input_size).

        Raises:
            ValueError: the encoder does not resize, and R is not its input size.
        """
        size = (self.input_size, self.input_size)
        if self.resize == "none" and images.shape[-2:] != size:
            raise ValueError(
                f"encoder {self.name}: images are {tuple(images.shape)}, "
                f"expected (B, 3, {self.input_size}, {self.input_size})"
            )
        x = images.float() / 255
        if self.resize == "before":
            x = F.interpolate(x, size, mode="bicubic")
        x = (x - self.mean) / self.std
        if self.resize == "after":
            x = F.interpolate(x, size, mode="bicubic")
        return x

    def forward(self, images: Tensor) -> Tensor:
        """Map uint8 (B, 3, R, R) to floating point (B, N, width), tokens in row-major order."""
        tokens = self.vit.forward_features(self.preprocess(images))
        return tokens[:, self.vit.num_prefix_tokens :]


def _build(recipe: Recipe, input_size: int, from_hub: bool) -> nn.Module:
    import timm

    name = recipe.model.format(size=input_size)
    try:
        return timm.create_model(
            name, pretrained=from_hub, img_size=input_size, num_classes=0, **recipe.options
        )
    except (OSError, RuntimeError) as error:
        if not from_hub:
            raise
        config = timm.get_pretrained_cfg(name)
        repository, url = (getattr(config, key, None) for key in ("hf_hub_id", "url"))
        copy = f", or model.safetensors of {repository}" if repository else ""
        raise Failure(
            f"the weights of {recipe.name} are neither in the local cache nor can they be fetched "
            f"from {repository or url}; give them with --enc-weights FILE, where FILE is "
            f"{recipe.file}{copy}"
        ) from error


def load_file(vit: nn.Module, path: str | Path, recipe: Recipe) -> None:
    """Load weights into a timm ViT; its parameters keep their dtype.

    Raises:
        ValueError: no such file, not weights, or weights of another encoder; names what differs.
    """
    content, wanted = read(path, recipe.flags), vit.state_dict()
    try:
        state = recipe.convert(content)
    except ValueError as error:
        raise ValueError(f"--enc-weights: {path} {error}") from error
    stem = "patch_embed.proj.weight"
    if stem not in state or state[stem].ndim != 4:
        names = sorted(name for name in content if isinstance(name, str))
        raise ValueError(
            f"{path} is not a file of {recipe.name}: expected {recipe.file}, "
            f"got one with {some(names, 6) or 'nothing'}"
        )
    found, kind = _described(state, recipe)
    _, expected = _described(wanted, recipe)
    if kind != expected:
        raise ValueError(f"{path} holds {found}, expected {expected}")
    periods = state.pop("rope_embed.periods", None)
    if recipe.adapt is not None:
        state = recipe.adapt(state, vit)
    problems = differences(state, wanted)
    if problems:
        has = "" if found == recipe.name else f" as {recipe.name} has"
        raise ValueError(f"{path} holds {found}{has}, but {'; '.join(problems)}")
    try:
        expect_real(state if periods is None else {**state, "rope_embed.periods": periods})
    except ValueError as error:
        raise ValueError(f"{path} holds {found}, but {error}") from error
    vit.load_state_dict(state)
    if periods is None:
        return
    rope = vit.rope  # its periods are taken over, which official files have rounded to bf16
    if periods.shape != rope.periods.shape:
        raise ValueError(
            f"{path} has other shapes 1: rope_embed.periods {tuple(periods.shape)}, "
            f"expected {tuple(rope.periods.shape)}"
        )
    rope.periods.copy_(periods)
    rope.pos_embed_cached.copy_(rope.get_embed(shape=list(vit.patch_embed.grid_size)))


def _described(state: Weights, recipe: Recipe) -> tuple[str, str]:
    """Say which encoder a state dict is of, where it is found and where it is expected."""
    sizes = measure(state)
    if sizes in recipe.siblings:
        return recipe.siblings[sizes], recipe.siblings[sizes]
    text = "width {}, depth {}, patch size {}".format(*sizes)
    return f"a ViT of {text}", f"{text} of {recipe.name}"
