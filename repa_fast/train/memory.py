"""Memory and compute of a run: estimates before it starts, and the micro-batch that fits."""

import json
import os
from dataclasses import dataclass, replace

import torch

from repa_fast.configs.build import empty_model, expected_metadata, fit_to_data
from repa_fast.configs.config import TrainConfig
from repa_fast.data.dataset import Metadata
from repa_fast.distributed import World, rank_and_size
from repa_fast.models.flops import sit_flops
from repa_fast.objective import build_alignment
from repa_fast.train.optim import ema_warnings
from repa_fast.train.parallel import heads_of, parallelize, shard_count
from repa_fast.train.state import TrainState
from repa_fast.train.step import losses, synthetic_batch

# saved activations of one block, in bytes per token and width, bf16 with an fp32 residual stream,
# by activation checkpointing. none: two residual states 8, two norms' outputs 4, qkv 6, attention
# output 2, two branches 4, MLP 16; selective: a residual state 4, qkv 6, attention output 2, two
# branches 4, fc1's output 8; full: a residual state 4, the pending branch 2
ACTIVATION_BYTES = {"none": 40, "selective": 24, "full": 6}


@dataclass(frozen=True)
class Budget:
    """What a run will take.

    Attributes:
        parameters: of the model without and with its projectors.
        train_flops: per image: 3x the forward pass of model and heads, 1x what is frozen (the
            encoders, or SRA's teacher), which is encoder_flops.
        state_bytes: weights, gradients, optimizer and EMA of one process; where they are
            sharded, also the weights gathered for the compute, unless they are dropped at once.
        activation_bytes: saved for backward, per image, in half precision (an estimate); fp32
            takes twice as much.
    """

    parameters: int
    parameters_with_projectors: int
    train_flops: float
    encoder_flops: float
    state_bytes: float
    activation_bytes: float


def budget(config: TrainConfig, metadata: Metadata, shards: int = 1, processes: int = 1) -> Budget:
    """Count from the config alone; no weights are allocated.

    `shards` processes share one copy of weights, gradients, optimizer and EMAs. Gradients of a step
    in one pass are counted; where several processes have a copy each, also their sums in fp32.
    """
    config = fit_to_data(config, metadata)
    model = empty_model(config, metadata, "meta")
    total = sum(p.numel() for p in model.parameters())
    heads = sum(p.numel() for head in heads_of(model) for p in head.parameters())
    tokens, width, depth = model.num_tokens, model.pos_embed.shape[-1], len(model.blocks)
    of_heads, frozen = build_alignment(config).flops(tokens, width)
    sizes = {"patch_values": model.patch_size**2 * model.in_channels, "mlp_ratio": 4.0}
    forward = of_heads + sit_flops(tokens=tokens, width=width, depth=depth, **sizes)
    # weights and gradients in fp32, or with bf16 leaves and in bf16; two AdamW moments, every EMA
    state_bytes = total * (4 + 4 + 8 + 4 * len(config.ema_decays))
    gathered = 4 * total if processes > 1 and config.parallel == "ddp" else 0
    if shards > 1 and not config.reshard_after_forward:
        gathered = total * (4 if config.mixed_precision == "no" else 2)
    return Budget(
        parameters=total - heads,
        parameters_with_projectors=total,
        train_flops=3 * forward + frozen,
        encoder_flops=frozen,
        state_bytes=state_bytes / shards + gathered,
        activation_bytes=ACTIVATION_BYTES[config.activation_checkpointing] * tokens * width * depth,
    )


def choose_micro_batch(state: TrainState) -> int:
    """Return the images per forward pass of one process, the same on all.

    As configured; or the local batch over the accumulation steps, halved until it fits: on CUDA
    until a forward and backward pass of that size runs without an out-of-memory error, on CPU until
    the estimate is at most half of the machine's memory.
    """
    if state.config.micro_batch != "auto":
        return min(state.config.micro_batch, state.local_batch)
    size = largest = -(-state.local_batch // state.config.gradient_accumulation_steps)
    fits = _fits_cuda if state.world.device.type == "cuda" else _fits_cpu
    while size > 1 and state.world.any(not fits(state, size)):
        size = -(-size // 2)
    if state.config.compile and (size < largest or state.mesh is not None):
        # What was tried was compiled, too: a second size would be compiled as any size, and
        # variants of code are limited.
        torch._dynamo.reset()
    return size


def _fits_cpu(state: TrainState, size: int) -> bool:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    width = 2 if state.autocast_dtype is None else 1
    needed = budget(state.config, state.metadata).activation_bytes * width * size
    return needed * state.world.size <= memory / 2


def _fits_cuda(state: TrainState, size: int) -> bool:
    """Return whether a forward and backward pass of `size` images runs, the moments being there."""
    room = None
    try:
        room = state.gradients.room(passes=-(-state.local_batch // size))
        try_pass(state if state.mesh is None else stand_in(state), size)
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        del room
        state.optimizer.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()


def try_pass(state: TrainState, size: int) -> None:
    """Run a forward and backward pass of `size` random images; leave gradients."""
    batch, draws = synthetic_batch(state, size)
    denoise, align = losses(state, state.model, batch, draws)
    (denoise.sum() + sum(part.sum() for part in align)).backward()


def stand_in(state: TrainState) -> TrainState:
    """Return the state with whole weights in the compute dtype in place of sharded ones.

    Its passes communicate nothing: a process that runs out of memory in the middle of one keeps no
    other waiting. It takes more than the run will: whole gradients, where FSDP shards those of a
    block after the other.
    """
    config = state.config
    model = empty_model(config, state.metadata, state.world.device)
    model.to(state.autocast_dtype or torch.float32)
    parallelize(model, [model], config, None, state.autocast_dtype)
    alignment = state.alignment.hollow() if config.shard_encoder else state.alignment
    world = World(0, 1, state.world.device)
    return replace(state, model=model, ema=model, alignment=alignment, world=world)


def describe(config: TrainConfig) -> str:
    """Return the resolved config, parameters, FLOPs per image, estimated memory and warnings."""
    processes, metadata = rank_and_size()[1], expected_metadata(config)
    shards = shard_count(config, processes)
    config = fit_to_data(config, metadata)
    found, batch = budget(config, metadata, shards, processes), config.batch_size
    shared = f" in each of {shards} processes" if shards > 1 else ""
    mebibytes = found.activation_bytes * (2 if config.mixed_precision == "no" else 1) / 2**20
    lines = (
        json.dumps(config.to_dict(), indent=2),
        f"parameters: {found.parameters / 1e6:.0f} M, "
        f"with projectors {found.parameters_with_projectors / 1e6:.0f} M",
        f"training FLOPs per image: {found.train_flops / 1e9:.1f} GFLOP "
        f"({found.encoder_flops / 1e9:.1f} of them {build_alignment(config).title})",
        f"memory, estimated: {found.state_bytes / 2**30:.1f} GiB of weights, gradients, optimizer "
        f"and EMA{shared}; {mebibytes:.0f} MiB of activations per image ("
        f"{batch * mebibytes / 2**10:.1f} GiB at batch {batch} in one pass)",
        *ema_warnings(config, config.max_train_steps),
    )
    return "\n".join(lines)
