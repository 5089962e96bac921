"""ViTs in plain torch, and random weights for them in the layout of the official files.

A ViT is a dictionary of tensors with names of our own: patch, cls, registers, table, pre, norm and,
per block i, i.norm1, i.qkv, i.proj, i.scale1, i.norm2, i.fc1, i.gate, i.fc2, i.scale2.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from repa_fast.encoders import spec
from repa_fast.encoders.vit import Recipe

WIDTH, DEPTH, HEADS = 48, 2, 3
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))

Weights = dict[str, torch.Tensor]


def tanh_gelu(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)))


def gelu(x: torch.Tensor) -> torch.Tensor:
    return x * (1 + torch.erf(x / 2**0.5)) / 2


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)


@dataclass(frozen=True)
class Official:
    """What an encoder is in its authors' code, and how REPA calls it.

    `layout` turns our tensors into what the official file holds. `table` is the grid of its
    position table, 0 for rotary positions, which go with masked biases of the keys; `mlp` is the
    hidden width, `resized_to` is for images of 256 pixels.
    """

    layout: Callable[[Weights], object]
    patch: int = 16
    table: int = 14
    cls: bool = True
    registers: bool = False
    pre_norm: bool = False
    final_norm: bool = True
    scales: bool = False
    mlp: int = 4 * WIDTH
    swiglu: bool = False
    eps: float = 1e-6
    activation: Callable[[torch.Tensor], torch.Tensor] = gelu
    channels: tuple = IMAGENET
    resized_to: int = 0


def random_weights(kind: Official, depth: int = DEPTH) -> Weights:
    vector = (WIDTH,)
    shapes = {"patch.weight": (WIDTH, 3, kind.patch, kind.patch), "norm": vector}
    shapes["pre" if kind.pre_norm else "patch.bias"] = vector
    if kind.cls:
        shapes["cls"] = vector
    if kind.registers:
        shapes["registers"] = (4, WIDTH)
    if kind.table:
        shapes["table"] = (kind.table**2 + kind.cls, WIDTH)
    matrices = {"qkv": (3 * WIDTH, WIDTH), "proj": (WIDTH, WIDTH)}
    matrices |= {"fc1": (kind.mlp, WIDTH), "fc2": (WIDTH, kind.mlp)}
    if kind.swiglu:
        matrices["gate"] = (kind.mlp, WIDTH)
    for index in range(depth):
        shapes |= {f"{index}.{name}": vector for name in ("norm1", "norm2")}
        for name, shape in matrices.items():
            shapes |= {f"{index}.{name}.weight": shape, f"{index}.{name}.bias": shape[:1]}
        if kind.scales:
            shapes |= {f"{index}.{name}": vector for name in ("scale1", "scale2")}
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in shapes.items():
        last = name.rpartition(".")[2]
        if last in ("norm", "norm1", "norm2", "pre"):
            weights[f"{name}.weight"] = 1 + 0.2 * torch.randn(shape, generator=generator)
            weights[f"{name}.bias"] = 0.2 * torch.randn(shape, generator=generator)
            continue
        values = torch.randn(shape, generator=generator)
        fan = math.prod(shape[1:]) ** 0.5 if last == "weight" else 5.0
        stem = 1 if name[0].isdigit() else 0.05  # a small stream shows the epsilon of the norms
        weights[name] = stem * values / fan
    if not kind.table:  # the official files have the periods in bfloat16
        weights["periods"] = exact_periods().bfloat16()
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


def embedded(kind: Official, p: Weights, x: torch.Tensor) -> torch.Tensor:
    """Tokens before the first block, (B, prefix + N, D)."""
    x = F.conv2d(x, p["patch.weight"], p.get("patch.bias"), stride=kind.patch)
    grid = x.shape[-1]
    x = x.flatten(2).transpose(1, 2)
    lead = []
    if kind.cls:
        lead.append(p["cls"][None])
    if kind.table:
        own = p["table"][len(p["table"]) - kind.table**2 :]
        own = own.T.unflatten(1, (kind.table, kind.table))[None]
        if kind.table != grid:
            own = F.interpolate(own, (grid, grid), mode="bicubic", antialias=True)
        x = x + own[0].flatten(1).T
        lead = [token + p["table"][:1] for token in lead]
    if kind.registers:
        lead.append(p["registers"])
    x = torch.cat([*(token.expand(len(x), -1, -1) for token in lead), x], dim=1)
    return normed(x, p, "pre", kind.eps) if kind.pre_norm else x


def normed(x: torch.Tensor, p: Weights, name: str, eps: float) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return scaled * p[f"{name}.weight"] + p[f"{name}.bias"]


def rotated(x: torch.Tensor, periods: torch.Tensor, grid: int) -> torch.Tensor:
    """Rotary positions for patches (B, H, N, K): rows turn half of the pairs, columns the rest."""
    centres = 2 * (torch.arange(grid, dtype=x.dtype) + 0.5) / grid - 1
    turns = 2 * math.pi * centres[:, None] / periods
    rows = turns[:, None].expand(grid, grid, -1)
    columns = turns[None].expand(grid, grid, -1)
    angle = torch.cat([rows, columns], dim=-1).flatten(0, 1)  # (N, K / 2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat(
        [
            first * angle.cos() - second * angle.sin(),
            second * angle.cos() + first * angle.sin(),
        ],
        dim=-1,
    )


def attended(kind: Official, p: Weights, x: torch.Tensor, block: int, prefix: int) -> torch.Tensor:
    width = x.shape[-1]
    bias = p[f"{block}.qkv.bias"].clone()
    if "periods" in p:
        bias[width : 2 * width] = 0
    qkv = x @ p[f"{block}.qkv.weight"].T + bias
    q, k, v = qkv.unflatten(-1, (3, HEADS, width // HEADS)).permute(2, 0, 3, 1, 4)
    if "periods" in p:
        grid = math.isqrt(x.shape[1] - prefix)
        q, k = (
            torch.cat([y[:, :, :prefix], rotated(y[:, :, prefix:], p["periods"], grid)], dim=2)
            for y in (q, k)
        )
    weight = (q @ k.transpose(-1, -2) / (width // HEADS) ** 0.5).softmax(-1)
    mixed = (weight @ v).transpose(1, 2).flatten(2)
    return mixed @ p[f"{block}.proj.weight"].T + p[f"{block}.proj.bias"]


def official_tokens(
    kind: Official, weights: Weights, images: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """The patch tokens REPA aligns with, (B, N, D)."""
    p = {name: value.to(dtype) for name, value in weights.items()}
    x = embedded(kind, p, prepared(kind, images, dtype))
    prefix = kind.cls + 4 * kind.registers
    for block in range(sum(name.endswith("qkv.weight") for name in p)):
        branch = attended(kind, p, normed(x, p, f"{block}.norm1", kind.eps), block, prefix)
        x = x + p.get(f"{block}.scale1", 1) * branch
        y = normed(x, p, f"{block}.norm2", kind.eps)
        hidden = y @ p[f"{block}.fc1.weight"].T + p[f"{block}.fc1.bias"]
        if kind.swiglu:
            gate = y @ p[f"{block}.gate.weight"].T + p[f"{block}.gate.bias"]
            hidden = gate * torch.sigmoid(gate) * hidden
        else:
            hidden = kind.activation(hidden)
        branch = hidden @ p[f"{block}.fc2.weight"].T + p[f"{block}.fc2.bias"]
        x = x + p.get(f"{block}.scale2", 1) * branch
    if kind.final_norm:
        x = normed(x, p, "norm", kind.eps)
    return x[:, prefix:]


def facebook(weights: Weights) -> Weights:
    """The naming that DINO, MAE, MoCo v3 and I-JEPA share."""
    top = {"patch": "patch_embed.proj", "cls": "cls_token", "table": "pos_embed"}
    parts = {"qkv": "attn.qkv", "proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
    named = {}
    for name, value in weights.items():
        first, _, rest = name.partition(".")
        if first.isdigit():
            part, _, kind = rest.partition(".")
            named[f"blocks.{first}.{parts.get(part, part)}.{kind}"] = value
        else:
            named[".".join(filter(None, [top.get(first, first), rest]))] = value
    if "cls_token" in named:
        named["cls_token"] = named["cls_token"][None, None]
    if "pos_embed" in named:
        named["pos_embed"] = named["pos_embed"][None]
    return named


def prefixed(state: Weights, prefix: str) -> Weights:
    return {prefix + name: value for name, value in state.items()}


def dino_checkpoint(weights: Weights) -> dict:
    """A training checkpoint of DINO, with its flags."""
    head = {"head.mlp.0.weight": torch.zeros(2, 2)}
    teacher = prefixed(facebook(weights), "backbone.")
    student = {name: torch.zeros_like(value) for name, value in teacher.items()}
    return {
        "student": prefixed(student | head, "module."),
        "teacher": teacher | head,
        "epoch": 100,
        "args": argparse.Namespace(arch="vit_base", lr=1e-3),
    }


def moco_checkpoint(weights: Weights) -> dict:
    base = facebook(weights) | {"head.0.weight": torch.zeros(2, 2)}
    slips = {
        "blocks.13.norm1.": "blocks.13.norm13.",
        "blocks.13.mlp.fc1.": "blocks.13.mlp.fc13.",
        "blocks.14.norm2.": "blocks.14.norm14.",
        "blocks.14.mlp.fc2.": "blocks.14.mlp.fc14.",
    }
    for name in list(base):
        for right, wrong in slips.items():
            if name.startswith(right):
                base[name.replace(right, wrong)] = base.pop(name)
    momentum = {name: torch.zeros_like(value) for name, value in base.items()}
    return {
        "epoch": 300,
        "arch": "vit_base",
        "state_dict": prefixed(base, "module.base_encoder.")
        | prefixed(momentum, "module.momentum_encoder.")
        | {"module.predictor.0.weight": torch.zeros(2, 2)},
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
    }


def ijepa_checkpoint(weights: Weights) -> dict:
    encoder = prefixed(facebook(weights), "module.")
    return {
        "encoder": encoder,
        "target_encoder": {name: torch.zeros_like(value) for name, value in encoder.items()},
        "predictor": {"module.mask_token": torch.zeros(1, 1, 4)},
        "opt": {"state": {}},
        "epoch": 300,
    }


def clip_state(weights: Weights) -> Weights:
    """The state dict of openai/CLIP, in half precision."""
    blocks = {"norm1": "ln_1", "norm2": "ln_2", "proj": "attn.out_proj"}
    blocks |= {"fc1": "mlp.c_fc", "fc2": "mlp.c_proj"}
    top = {"patch": "conv1", "cls": "class_embedding", "table": "positional_embedding"}
    top |= {"pre": "ln_pre", "norm": "ln_post"}
    named = {"visual.proj": torch.zeros(WIDTH, 32)}
    for name, value in weights.items():
        first, _, rest = name.partition(".")
        if first.isdigit():
            part, _, kind = rest.partition(".")
            inner = f"attn.in_proj_{kind}" if part == "qkv" else f"{blocks[part]}.{kind}"
            name = f"transformer.resblocks.{first}.{inner}"
        else:
            name = ".".join(filter(None, [top[first], rest]))
        named[f"visual.{name}"] = value.half()
    text = {"positional_embedding": torch.zeros(77, 4), "logit_scale": torch.tensor(1.0)}
    text |= {"transformer.resblocks.0.ln_1.weight": torch.zeros(4)}
    return named | text | {"input_resolution": torch.tensor(224)}


def dinov2_state(weights: Weights) -> Weights:
    named = {"mask_token": torch.zeros(1, WIDTH)}
    for name, value in facebook(weights).items():
        if name == "registers":
            name, value = "register_tokens", value[None]
        if name.endswith(("scale1.", "scale2.")):
            name = name.replace("scale", "ls") + "gamma"
        named[name] = value
    for name in [name for name in named if ".gate." in name]:
        _, block, _, kind = name.split(".")
        packed = [named.pop(name), named.pop(f"blocks.{block}.mlp.fc1.{kind}")]
        named[f"blocks.{block}.mlp.w12.{kind}"] = torch.cat(packed)
        named[f"blocks.{block}.mlp.w3.{kind}"] = named.pop(f"blocks.{block}.mlp.fc2.{kind}")
    return named


def dinov3_state(weights: Weights) -> Weights:
    gated = any(name.endswith("gate.weight") for name in weights)
    parts = {"fc1": "w2", "gate": "w1", "fc2": "w3"} if gated else {}
    named = {"mask_token": torch.zeros(1, WIDTH), "rope_embed.periods": weights["periods"]}
    for name, value in facebook(weights).items():
        for ours, theirs in parts.items():
            name = name.replace(f".mlp.{ours}.", f".mlp.{theirs}.")
            name = name.replace(f".{ours}.", f".mlp.{theirs}.") if ours == "gate" else name
        if name.rstrip(".").endswith(("scale1", "scale2")):
            name = name.rstrip(".").replace("scale", "ls") + ".gamma"
        if name == "registers":
            name, value = "storage_tokens", value[None]
        if name != "periods":
            named[name] = value
        if name.endswith("qkv.bias"):
            mask = torch.ones_like(value)
            mask[WIDTH : 2 * WIDTH] = 0
            named[f"{name}_mask"] = mask
    return named


def siglip_state(weights: Weights) -> Weights:
    """google/siglip2-* in Hugging Face's naming."""
    top = {"patch": "embeddings.patch_embedding", "norm": "post_layernorm"}
    parts = {"norm1": "layer_norm1", "norm2": "layer_norm2", "proj": "self_attn.out_proj"}
    parts |= {"fc1": "mlp.fc1", "fc2": "mlp.fc2"}
    named = {"head.probe": torch.zeros(1, 1, 4)}
    for name, value in weights.items():
        first, _, rest = name.partition(".")
        part, _, kind = rest.partition(".")
        if name == "table":
            named["embeddings.position_embedding.weight"] = value
        elif not first.isdigit():
            named[f"{top[first]}.{rest}"] = value
        elif part == "qkv":
            for letter, third in zip("qkv", value.chunk(3)):
                named[f"encoder.layers.{first}.self_attn.{letter}_proj.{kind}"] = third.clone()
        else:
            named[f"encoder.layers.{first}.{parts[part]}.{kind}"] = value
    text = {"text_model.embeddings.token_embedding.weight": torch.zeros(3, 4)}
    return prefixed(named, "vision_model.") | text | {"logit_bias": torch.zeros(1)}


MOCO = Official(moco_checkpoint)
DINOV2 = Official(dinov2_state, patch=14, table=37, scales=True, resized_to=224)
DINOV3 = Official(dinov3_state, table=0, registers=True, scales=True, eps=1e-5)
SIGLIP2 = Official(
    siglip_state, table=16, cls=False, activation=tanh_gelu, channels=((0.5,) * 3, (0.5,) * 3)
)
OFFICIAL = {
    "dinov2-vit-s": DINOV2,
    "dinov2reg-vit-s": replace(DINOV2, registers=True),
    "dinov2reg-vit-g": replace(DINOV2, registers=True, swiglu=True, mlp=128),
    "dinov1-vit-b": Official(facebook),
    "mocov3-vit-b": MOCO,
    "mocov3-vit-l": MOCO,
    "mae-vit-l": Official(lambda weights: {"model": facebook(weights)}, final_norm=False),
    "clip-vit-L": Official(
        clip_state,
        patch=14,
        table=16,
        pre_norm=True,
        final_norm=False,
        eps=1e-5,
        activation=quick_gelu,
        channels=OPENAI,
    ),
    "jepa-vit-h": Official(ijepa_checkpoint, patch=14, table=16, cls=False, resized_to=224),
    "dinov3-vit-b": DINOV3,
    "dinov3-vit-splus": replace(DINOV3, swiglu=True),
    "siglip2-vit-b": SIGLIP2,
}


def small(name: str, depth: int = DEPTH) -> Recipe:
    """The recipe of that name with a narrow, shallow network."""
    recipe = spec(name)
    narrow = {"embed_dim": WIDTH, "depth": depth, "num_heads": HEADS}
    return replace(recipe, width=WIDTH, depth=depth, options={**recipe.options, **narrow})


def pictures(resolution: int) -> torch.Tensor:
    """Blocks of noise, so that a resize has edges to smooth."""
    generator = torch.Generator().manual_seed(1)
    shape = (2, 3, resolution // 4, resolution // 4)
    coarse = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return coarse.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
