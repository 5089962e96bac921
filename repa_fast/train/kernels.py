"""Choice of the kernels of a run, for its ops and for attention."""

import json

import torch

from repa_fast import ops
from repa_fast.backend import dispatch
from repa_fast.configs.config import TrainConfig
from repa_fast.distributed import World
from repa_fast.models.sit import SiT

TIMED_BATCH = 64
"""Images at most for which attention backends are timed."""


def choose_kernels(config: TrainConfig, model: SiT, dtype: torch.dtype, world: World) -> list[str]:
    """Set the kernels of this process; return a line about each choice.

    Args:
        dtype: of the compute, autocast's or fp32.

    Raises:
        ValueError: an implementation or a backend that cannot run here, with the reason.
        RuntimeError: an attention backend that fails its self-test, with the error measured.
    """
    dispatch.use_kernels(None if config.kernels == "auto" else config.kernels)
    lines = [f"kernels: {dispatch.describe(world.device.type)}"]
    if config.fused_attn:
        lines.append(f"attention: {_choose_attention(config, model, dtype, world)}")
    return lines


def _choose_attention(config: TrainConfig, model: SiT, dtype: torch.dtype, world: World) -> str:
    """Set attention's backend: timings differ, so the first process chooses for all."""
    heads = model.blocks[0].attn.num_heads
    shape = {
        "heads": heads,
        "tokens": model.num_tokens,
        "head_dim": model.pos_embed.shape[-1] // heads,
        "batch": min(config.images_per_step // world.size, TIMED_BATCH),
        "dtype": dtype,
        "device": world.device,
    }
    asked = config.attention
    told = ""
    if world.is_main:
        selection = ops.select_attention(asked, **shape)
        told = json.dumps([selection.backend, selection.reason])
    backend, reason = json.loads(world.broadcast(told))
    ops.set_attention_backend(backend)
    return f"{backend} ({reason})"
