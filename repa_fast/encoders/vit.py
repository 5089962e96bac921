"""Frozen ViTs of timm's architectures, each with the recipe it goes by."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from repa_fast.encoders import naming
from repa_fast.encoders.files import Weights, differences, measure, read, some

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
RESIZES = ("none", "before", "after")


@dataclass(frozen=True)
class Recipe:
    """What sets an encoder apart.

    Attributes:
        name: as in `--enc-type`.
        model: timm's name, where `{size}` stands for the input size in pixels.
        file: the official file and who publishes it, for messages.
        width: feature width of its patch tokens.
        depth: number of blocks.
        patch_size: in pixels of its own input.
        prefix: class and register tokens.
        input_sizes: dataset resolution -> resolution of its own input, in pixels.
        convert: what `files.read` gives -> tensors in timm's naming.
        resize: "none" takes images at the input size only; "before" and "after" normalising resize
            to it, bicubic without antialias.
        mean, std: of the channels, for pixels in [0, 1].
        final_norm: whether the tokens have been through the last LayerNorm.
        resample_table: whether a position table of another grid is resampled.
        hub: whether timm knows where the weights are.
        options: further arguments of the architecture.
        mlp_ratio: hidden width of its MLPs over its width; for SwiGLU, of a plain MLP as large.
    """

    name: str
    model: str
    file: str
    width: int
    depth: int
    patch_size: int
    prefix: int
    input_sizes: dict[int, int]
    convert: Callable[[dict], Weights]
    resize: str = "none"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    final_norm: bool = True
    resample_table: bool = False
    hub: bool = True
    options: Mapping[str, object] = field(default_factory=dict)
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        assert self.resize in RESIZES


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

    def preprocess(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (B, 3, R, R) -> fp32 (B, 3, input_size, input_size), normalised.

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

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (B, 3, R, R) -> floating point (B, N, width), tokens in row-major order."""
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
        raise RuntimeError(
            f"the weights of {recipe.name} are neither in the local cache nor can they be fetched "
            f"from {repository or url}; give them with --enc-weights FILE, where FILE is "
            f"{recipe.file}{copy}"
        ) from error


def load_file(vit: nn.Module, path: str | Path, recipe: Recipe) -> None:
    """Load weights into a timm ViT; its parameters keep their dtype.

    Raises:
        ValueError: no such file, not weights, or weights of another encoder; names what differs.
    """
    content = read(path, allow_namespace=True)
    state, wanted = recipe.convert(content), vit.state_dict()
    stem = "patch_embed.proj.weight"
    if stem not in state or state[stem].ndim != 4:
        names = sorted(name for name in content if isinstance(name, str))
        raise ValueError(
            f"{path} is not a file of {recipe.name}: expected {recipe.file}, "
            f"got one with {some(names) or 'nothing'}"
        )
    got, expected = (
        "width {}, depth {}, patch size {}".format(*measure(weights)) for weights in (state, wanted)
    )
    if got != expected:
        raise ValueError(f"{path} holds a ViT of {got}, expected {expected} of {recipe.name}")
    if recipe.resample_table and "pos_embed" in state:
        state["pos_embed"] = _resample(state["pos_embed"], vit)
    periods = state.pop(naming.ROPE_PERIODS, None)
    problems = differences(state, wanted)
    if problems:
        raise ValueError(
            f"{path} holds a ViT of {got} as {recipe.name} has, but {'; '.join(problems)}"
        )
    vit.load_state_dict(state)
    if periods is not None:
        _set_periods(vit, periods, path)


def _resample(table: torch.Tensor, vit: nn.Module) -> torch.Tensor:
    """The position table (1, prefix + N, width) for the grid of `vit`: bicubic with antialias."""
    from timm.layers import resample_abs_pos_embed

    prefix, grid = vit.num_prefix_tokens, vit.patch_embed.grid_size
    patches = table.shape[1] - prefix if table.ndim == 3 else 0
    if patches < 1 or math.isqrt(patches) ** 2 != patches:
        return table  # whose shape is then refused
    return resample_abs_pos_embed(table, grid, num_prefix_tokens=prefix)


def _set_periods(vit: nn.Module, periods: torch.Tensor, path: str | Path) -> None:
    """Take over the periods of the rotary embedding, which official files have rounded to bf16."""
    rope = vit.rope
    if periods.shape != rope.periods.shape:
        raise ValueError(
            f"{path} has other shapes 1: rope_embed.periods {tuple(periods.shape)}, "
            f"expected {tuple(rope.periods.shape)}"
        )
    rope.periods.copy_(periods)
    rope.pos_embed_cached.copy_(rope.get_embed(shape=list(vit.patch_embed.grid_size)))
