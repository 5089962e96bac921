"""The names of the official weight files, turned into timm's.

Each function takes what a file holds (`files.read`) and returns the tensors of the vision encoder
under timm's names, without heads. What has timm's names already comes out as it is; not so for
MoCo v3, which timm has no weights of: another method's ViT would pass for it. What is missing or
too much is for the caller to find.
"""

import re

import torch

from repa_fast.encoders.files import Weights, unwrap

Renames = tuple[tuple[str, str], ...]

CLIP: Renames = (
    (r"^class_embedding$", "cls_token"),
    (r"^positional_embedding$", "pos_embed"),
    (r"^conv1\.", "patch_embed.proj."),
    (r"^ln_pre\.", "norm_pre."),
    (r"^ln_post\.", "norm."),
    (r"^transformer\.resblocks\.", "blocks."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.attn\.in_proj_", ".attn.qkv."),
    (r"\.attn\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)
DINOV3: Renames = (
    (r"^storage_tokens$", "reg_token"),
    (r"\.ls([12])\.gamma$", r".gamma_\1"),
    (r"\.mlp\.w1\.", ".mlp.fc1_g."),
    (r"\.mlp\.w2\.", ".mlp.fc1_x."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
)
SIGLIP: Renames = (
    (r"^embeddings\.position_embedding\.weight$", "pos_embed"),
    (r"^embeddings\.patch_embedding\.", "patch_embed.proj."),
    (r"^post_layernorm\.", "norm."),
    (r"^encoder\.layers\.", "blocks."),
    (r"\.layer_norm([12])\.", r".norm\1."),
    (r"\.self_attn\.out_proj\.", ".attn.proj."),
    (r"\.self_attn\.([qkv])_proj\.", r".attn.\1."),
)
MOCO: Renames = (  # slips in the ViT-L file
    (r"^blocks\.13\.norm13\.", "blocks.13.norm1."),
    (r"^blocks\.13\.mlp\.fc13\.", "blocks.13.mlp.fc1."),
    (r"^blocks\.14\.norm14\.", "blocks.14.norm2."),
    (r"^blocks\.14\.mlp\.fc14\.", "blocks.14.mlp.fc2."),
)
ROPE_PERIODS = "rope.periods"


def dino(content: dict) -> Weights:
    """facebookresearch/dino: the bare backbone, or the teacher of a training checkpoint."""
    return _within(unwrap(content, "teacher"), "backbone.")


def mocov3(content: dict) -> Weights:
    """facebookresearch/moco-v3 and LTH14/rcg: the base encoder without its projection head."""
    state = _below(unwrap(content, "state_dict"), "base_encoder.")
    return _rename(_without(state, "head.", "fc."), MOCO)


def mae(content: dict) -> Weights:
    """facebookresearch/mae: the encoder of `mae_pretrain_vit_*.pth`."""
    return unwrap(content, "model")


def ijepa(content: dict) -> Weights:
    """facebookresearch/ijepa: the context encoder, as REPA takes it; else the target encoder."""
    return unwrap(content, "encoder", "target_encoder")


def clip(content: dict) -> Weights:
    """openai/CLIP's state dict: the image tower without its projection."""
    state = _without(_within(unwrap(content, "state_dict"), "visual."), "head.")
    state.pop("proj", None)
    state = _rename(state, CLIP)
    if "cls_token" in state:
        state["cls_token"] = state["cls_token"].reshape(1, 1, -1)
    if "pos_embed" in state and state["pos_embed"].ndim == 2:
        state["pos_embed"] = state["pos_embed"][None]
    return state


def dinov3(content: dict) -> Weights:
    """facebookresearch/dinov3, with `rope.periods` where the file has them.

    The biases of queries and values are zero where the file has none; that of the keys is masked
    with zeros in the official code and left out here.
    """
    state = unwrap(content, "teacher", "model")
    periods = state.pop("rope_embed.periods", None)
    state.pop("mask_token", None)
    state = {k: value for k, value in state.items() if not k.endswith(".bias_mask")}
    state = _rename(state, DINOV3)
    for name in [name for name in state if name.endswith(".attn.qkv.weight")]:
        block = name.removesuffix("qkv.weight")
        bias = state.pop(f"{block}qkv.bias", state[name].new_zeros(len(state[name])))
        query, _, value = bias.chunk(3)
        state.setdefault(f"{block}q_bias", query)
        state.setdefault(f"{block}v_bias", value)
    if periods is not None:
        state[ROPE_PERIODS] = periods
    return state


def siglip(content: dict) -> Weights:
    """google/siglip2-* in Hugging Face's naming: the image tower without its pooling head."""
    state = _without(_within(unwrap(content), "vision_model."), "head.", "attn_pool.")
    state = _rename(state, SIGLIP)
    if "pos_embed" in state and state["pos_embed"].ndim == 2:
        state["pos_embed"] = state["pos_embed"][None]
    for name in [name for name in state if ".attn.q." in name]:
        parts = [name.replace(".attn.q.", f".attn.{part}.") for part in "qkv"]
        if all(part in state for part in parts):
            fused = torch.cat([state.pop(part) for part in parts])
            state[name.replace(".attn.q.", ".attn.qkv.")] = fused
    return state


def _below(state: Weights, prefix: str) -> Weights:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def _within(state: Weights, prefix: str) -> Weights:
    """What stands below `prefix`, without it; all of `state` where nothing does."""
    return _below(state, prefix) or state


def _without(state: Weights, *prefixes: str) -> Weights:
    return {name: value for name, value in state.items() if not name.startswith(prefixes)}


def _rename(state: Weights, renames: Renames) -> Weights:
    renamed = {}
    for name, value in state.items():
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    return renamed
