"""ViTs in plain torch, and random weights for them in the layout of the official files.

A ViT is a dictionary of tensors under the names that DINO, MAE and I-JEPA share, here with
norm_pre, register_tokens, ls1.gamma, ls2.gamma, mlp.gate and rope_embed.periods where it has them.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F

from repa_fast.encoders import spec
from repa_fast.encoders.vit import Recipe

WIDTH, DEPTH, HEADS = 48, 2, 3
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
PERIODS = "rope_embed.periods"

Weights = dict[str, torch.Tensor]

tanh_gelu = partial(F.gelu, approximate="tanh")


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)


@dataclass(frozen=True)
class Official:
    """What an encoder is in its authors' code, and how REPA calls it.

    `layout` turns our tensors into what the official file holds. `table` is the grid of its
    position table, 0 for rotary positions, which go with masked biases of the keys; `mlp` is the
    hidden width, `resized_to` is for images of 256 pixels.
    """

    layout: Callable[[Weights], dict]
    patch: int = 16
    table: int = 14
    antialias: bool = True
    cls: bool = True
    registers: bool = False
    pre_norm: bool = False
    final_norm: bool = True
    scales: bool = False
    mlp: int = 4 * WIDTH
    swiglu: bool = False
    eps: float = 1e-6
    activation: Callable[[torch.Tensor], torch.Tensor] = F.gelu
    channels: tuple = IMAGENET
    resized_to: int = 0


def random_weights(kind: Official, depth: int = DEPTH) -> Weights:
    shapes = {"patch_embed.proj.weight": (WIDTH, 3, kind.patch, kind.patch)}
    norms = ["norm", "norm_pre"] if kind.pre_norm else ["norm"]
    if not kind.pre_norm:
        shapes["patch_embed.proj.bias"] = (WIDTH,)
    if kind.cls:
        shapes["cls_token"] = (1, 1, WIDTH)
    if kind.registers:
        shapes["register_tokens"] = (1, 4, WIDTH)
    if kind.table:
        shapes["pos_embed"] = (1, kind.table**2 + kind.cls, WIDTH)
    layers = {"attn.qkv": (3 * WIDTH, WIDTH), "attn.proj": (WIDTH, WIDTH)}
    layers |= {"mlp.fc1": (kind.mlp, WIDTH), "mlp.fc2": (WIDTH, kind.mlp)}
    if kind.swiglu:
        layers["mlp.gate"] = (kind.mlp, WIDTH)
    for block in (f"blocks.{index}" for index in range(depth)):
        norms += [f"{block}.norm1", f"{block}.norm2"]
        for name, shape in layers.items():
            shapes |= {f"{block}.{name}.weight": shape, f"{block}.{name}.bias": shape[:1]}
        if kind.scales:
            shapes |= {f"{block}.ls{number}.gamma": (WIDTH,) for number in (1, 2)}
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    weights = {}
    for name, shape in shapes.items():
        fan = math.prod(shape[1:]) ** 0.5 if name.endswith(".weight") else 5.0
        stem = 1 if name.startswith("blocks.") else 0.05  # a small stream shows the norms' epsilon
        weights[name] = stem * draw(shape) / fan
    for name in norms:
        weights |= {f"{name}.weight": 1 + 0.2 * draw(WIDTH), f"{name}.bias": 0.2 * draw(WIDTH)}
    if not kind.table:  # the official files have the periods in bfloat16
        weights[PERIODS] = exact_periods().bfloat16()
    return weights


def exact_periods() -> torch.Tensor:
    quarter = WIDTH // HEADS // 4
    return 100 ** (torch.arange(quarter, dtype=torch.float64) / quarter)


def prepared(kind: Official, images: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The images as the network gets them, (B, 3, side, side)."""
    mean, std = (torch.tensor(values, dtype=dtype).view(3, 1, 1) for values in kind.channels)
    x = images.to(dtype) / 255
    if kind.channels is OPENAI:
        return (F.interpolate(x, (224, 224), mode="bicubic") - mean) / std
    x = (x - mean) / std
    if kind.resized_to:
        side = images.shape[-1] * kind.resized_to // 256
        x = F.interpolate(x, (side, side), mode="bicubic")
    return x


def linear(p: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])


def normed(kind: Official, p: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], kind.eps)


def embedded(kind: Official, p: Weights, x: torch.Tensor) -> torch.Tensor:
    """Tokens before the first block, (B, prefix + N, D)."""
    kernel, bias = p["patch_embed.proj.weight"], p.get("patch_embed.proj.bias")
    x = F.conv2d(x, kernel, bias, stride=kind.patch)
    grid = x.shape[-2:]
    x, at_cls = x.flatten(2).mT, 0
    if kind.table:
        at_cls, table = p["pos_embed"].split([int(kind.cls), kind.table**2], dim=1)
        if kind.table != grid[0]:
            table = table.mT.unflatten(2, (kind.table, kind.table))
            table = F.interpolate(table, grid, mode="bicubic", antialias=kind.antialias)
            table = table.flatten(2).mT
        x = x + table
    tokens = [p["cls_token"] + at_cls] if kind.cls else []
    tokens += [p["register_tokens"]] if kind.registers else []
    x = torch.cat([*(token.expand(len(x), -1, -1) for token in tokens), x], dim=1)
    return normed(kind, p, "norm_pre", x) if kind.pre_norm else x


def rotated(x: torch.Tensor, periods: torch.Tensor, prefix: int) -> torch.Tensor:
    """(B, H, prefix + N, K) after rotary positions: rows turn half of the pairs, columns the rest.

    The tokens of the prefix have no position.
    """
    first, second = x[:, :, prefix:].chunk(2, dim=-1)
    grid = math.isqrt(first.shape[2])
    centres = 2 * (torch.arange(grid, dtype=x.dtype) + 0.5) / grid - 1
    turns = 2 * math.pi * centres[:, None] / periods
    rows, columns = turns[:, None].expand(grid, grid, -1), turns.expand(grid, grid, -1)
    angle = torch.cat([rows, columns], dim=-1).flatten(0, 1)  # (N, K / 2)
    cos, sin = angle.cos(), angle.sin()
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return torch.cat([x[:, :, :prefix], turned], dim=2)


def attended(kind: Official, p: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    qkv = linear(p, f"{name}.qkv", x).unflatten(-1, (3, HEADS, WIDTH // HEADS))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    if PERIODS in p:
        q, k = (rotated(y, p[PERIODS], kind.cls + 4 * kind.registers) for y in (q, k))
    weight = (q @ k.mT / (WIDTH // HEADS) ** 0.5).softmax(-1)
    return linear(p, f"{name}.proj", (weight @ v).transpose(1, 2).flatten(2))


def official_tokens(
    kind: Official, weights: Weights, images: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """The patch tokens REPA aligns with, (B, N, D)."""
    p = {name: value.to(dtype, copy=True) for name, value in weights.items()}
    x = embedded(kind, p, prepared(kind, images, dtype))
    for block in [name.removesuffix(".norm1.weight") for name in p if ".norm1.w" in name]:
        if PERIODS in p:
            p[f"{block}.attn.qkv.bias"][WIDTH : 2 * WIDTH] = 0
        branch = attended(kind, p, f"{block}.attn", normed(kind, p, f"{block}.norm1", x))
        x = x + p.get(f"{block}.ls1.gamma", 1) * branch
        y = normed(kind, p, f"{block}.norm2", x)
        hidden = linear(p, f"{block}.mlp.fc1", y)
        if kind.swiglu:
            hidden = F.silu(linear(p, f"{block}.mlp.gate", y)) * hidden
        else:
            hidden = kind.activation(hidden)
        x = x + p.get(f"{block}.ls2.gamma", 1) * linear(p, f"{block}.mlp.fc2", hidden)
    if kind.final_norm:
        x = normed(kind, p, "norm", x)
    return x[:, kind.cls + 4 * kind.registers :]


# What the official files hold.


def renamed(state: Weights, names: dict[str, str]) -> Weights:
    """Each of `names` replaced by its value, wherever it stands."""
    found = {}
    for name, value in state.items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        found[name] = value
    return found


def prefixed(state: Weights, prefix: str) -> Weights:
    return {prefix + name: value for name, value in state.items()}


def zeros(state: Weights) -> Weights:
    """In the place of the network that is not taken."""
    return {name: torch.zeros_like(value) for name, value in state.items()}


def dino_checkpoint(weights: Weights) -> dict:
    """A training checkpoint of DINO, with its flags."""
    head = {"head.mlp.0.weight": torch.zeros(2, 2)}
    teacher = prefixed(weights, "backbone.") | head
    student = prefixed(zeros(teacher), "module.")
    flags = argparse.Namespace(arch="vit_base", lr=1e-3)
    return {"student": student, "teacher": teacher, "epoch": 100, "args": flags}


def moco_checkpoint(weights: Weights) -> dict:
    slips = {
        "blocks.13.norm1.": "blocks.13.norm13.",
        "blocks.13.mlp.fc1.": "blocks.13.mlp.fc13.",
        "blocks.14.norm2.": "blocks.14.norm14.",
        "blocks.14.mlp.fc2.": "blocks.14.mlp.fc14.",
    }
    base = renamed(weights, slips) | {"head.0.weight": torch.zeros(2, 2)}
    state = prefixed(base, "module.base_encoder.")
    state |= prefixed(zeros(base), "module.momentum_encoder.")
    state |= {"module.predictor.0.weight": torch.zeros(2, 2)}
    optimizer = {"state": {}, "param_groups": [{"lr": 0.1}]}
    return {"epoch": 300, "arch": "vit_base", "state_dict": state, "optimizer": optimizer}


def mae_checkpoint(weights: Weights) -> dict:
    return {"model": dict(weights)}


def ijepa_checkpoint(weights: Weights) -> dict:
    encoder = prefixed(weights, "module.")
    predictor = {"module.mask_token": torch.zeros(1, 1, 4)}
    others = {"predictor": predictor, "opt": {"state": {}}, "epoch": 300}
    return {"encoder": encoder, "target_encoder": zeros(encoder)} | others


def clip_state(weights: Weights) -> Weights:
    """The state dict of openai/CLIP, in half precision."""
    names = {"patch_embed.proj": "conv1", "norm_pre": "ln_pre", "norm.": "ln_post."}
    names |= {"blocks": "transformer.resblocks", "norm1": "ln_1", "norm2": "ln_2"}
    names |= {"attn.qkv.": "attn.in_proj_", "attn.proj": "attn.out_proj"}
    names |= {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    names |= {"cls_token": "class_embedding", "pos_embed": "positional_embedding"}
    image = renamed(weights, names) | {"proj": torch.zeros(WIDTH, 32)}
    image["class_embedding"] = weights["cls_token"][0, 0]
    image["positional_embedding"] = weights["pos_embed"][0]
    text = {"positional_embedding": torch.zeros(77, 4), "logit_scale": torch.tensor(1.0)}
    text |= {"transformer.resblocks.0.ln_1.weight": torch.zeros(4)}
    text |= {"input_resolution": torch.tensor(224)}
    return {f"visual.{name}": value.half() for name, value in image.items()} | text


def dinov2_state(weights: Weights) -> Weights:
    named = {"mask_token": torch.zeros(1, WIDTH), **weights}
    for name in [name for name in named if ".mlp.gate." in name]:
        block, _, kind = name.rpartition(".gate.")
        named[f"{block}.w12.{kind}"] = torch.cat(
            [named.pop(name), named.pop(f"{block}.fc1.{kind}")]
        )
        named[f"{block}.w3.{kind}"] = named.pop(f"{block}.fc2.{kind}")
    return named


def dinov3_state(weights: Weights) -> Weights:
    names = {"register_tokens": "storage_tokens"}
    if any(".mlp.gate." in name for name in weights):
        names |= {"mlp.gate": "mlp.w1", "mlp.fc1": "mlp.w2", "mlp.fc2": "mlp.w3"}
    mask = torch.ones(3 * WIDTH)
    mask[WIDTH : 2 * WIDTH] = 0
    masks = {f"{name}_mask": mask for name in weights if name.endswith("qkv.bias")}
    return {"mask_token": torch.zeros(1, WIDTH)} | renamed(weights, names) | masks


def siglip_state(weights: Weights) -> Weights:
    """google/siglip2-* in Hugging Face's naming."""
    names = {"patch_embed.proj": "embeddings.patch_embedding", "norm.": "post_layernorm."}
    names |= {"pos_embed": "embeddings.position_embedding.weight", "blocks": "encoder.layers"}
    names |= {"norm1": "layer_norm1", "norm2": "layer_norm2", "attn": "self_attn"}
    named = renamed(weights, names | {"self_attn.proj": "self_attn.out_proj"})
    named |= {"embeddings.position_embedding.weight": weights["pos_embed"][0]}
    for name in [name for name in named if ".qkv." in name]:
        for letter, third in zip("qkv", named.pop(name).chunk(3)):
            named[name.replace("qkv", f"{letter}_proj")] = third.clone()
    text = {"text_model.embeddings.token_embedding.weight": torch.zeros(3, 4)}
    head = {"head.probe": torch.zeros(1, 1, 4)}
    return prefixed(named | head, "vision_model.") | text | {"logit_bias": torch.zeros(1)}


DINOV2 = Official(dinov2_state, patch=14, table=37, scales=True, resized_to=224)
DINOV3 = Official(dinov3_state, table=0, registers=True, scales=True, eps=1e-5)
CLIP = {"pre_norm": True, "eps": 1e-5, "activation": quick_gelu, "channels": OPENAI}
HALVES = ((0.5,) * 3, (0.5,) * 3)
SIGLIP2 = {"activation": tanh_gelu, "channels": HALVES}
OFFICIAL = {
    "dinov2-vit-s": DINOV2,
    "dinov2reg-vit-s": replace(DINOV2, registers=True),
    "dinov2reg-vit-g": replace(DINOV2, registers=True, swiglu=True, mlp=128),
    "dinov1-vit-b": Official(dict),
    "mocov3-vit-b": Official(moco_checkpoint),
    "mae-vit-l": Official(mae_checkpoint, final_norm=False),
    "clip-vit-L": Official(clip_state, patch=14, table=16, final_norm=False, **CLIP),
    "jepa-vit-h": Official(ijepa_checkpoint, patch=14, table=16, cls=False, resized_to=224),
    "dinov3-vit-b": DINOV3,
    "dinov3-vit-splus": replace(DINOV3, swiglu=True),
    "siglip2-vit-b": Official(siglip_state, table=16, cls=False, **SIGLIP2),
}


def small(name: str, depth: int = DEPTH) -> Recipe:
    """The recipe of that name with a narrow, shallow network."""
    recipe = spec(name)
    narrow = {"embed_dim": WIDTH, "depth": depth, "num_heads": HEADS}
    return replace(recipe, width=WIDTH, depth=depth, options={**recipe.options, **narrow})


def pictures(resolution: int = 256) -> torch.Tensor:
    """Blocks of noise, so that a resize has edges to smooth."""
    generator = torch.Generator().manual_seed(1)
    shape = (2, 3, resolution // 4, resolution // 4)
    coarse = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return coarse.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
