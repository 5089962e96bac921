"""Memory and compute of a run: estimates before it starts, and the micro-batch that fits."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from repa_fast import encoders
from repa_fast.configs.config import TrainConfig
from repa_fast.configs.model import model_arguments, model_class
from repa_fast.data.dataset import Metadata
from repa_fast.distributed import World
from repa_fast.models.flops import projector_flops, sit_flops, transformer_flops
from repa_fast.train.parallel import empty_model, parallelize
from repa_fast.train.state import TrainState

# fp32 weights, gradients and two AdamW moments; each moving average
BYTES_PER_PARAMETER, BYTES_PER_AVERAGE = 4 + 4 + 8, 4
# saved activations of one block, in bytes per token and width, bf16 with an fp32 residual stream,
# by activation checkpointing. none: two residual states 8, two norms' outputs 4, qkv 6, attention
# output 2, two branches 4, MLP 16; selective: a residual state 4, qkv 6, attention output 2, two
# branches 4, fc1's output 8; full: a residual state 4, the pending branch 2
ACTIVATION_BYTES = {"none": 40, "selective": 24, "full": 6}
CPU_MEMORY_SHARE = 0.5

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bf16 FLOP/s by a part of the device's name, from the vendor's datasheets."""


@dataclass(frozen=True)
class Budget:
    """What a run will take.

    Attributes:
        parameters: of the model without and with its projectors.
        train_flops: per image: 3x the forward pass of model and heads, 1x the encoders, or SRA's
            teacher.
        state_bytes: weights, gradients, optimizer and average of one process; where they are
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


def budget(config: TrainConfig, metadata: Metadata, shards: int = 1) -> Budget:
    """Counted from the config alone; no weights are allocated.

    `shards` processes share one copy of weights, gradients, optimizer and averages.
    """
    arguments = model_arguments(config, metadata)
    with torch.device("meta"):
        model = model_class(config.objective)(**arguments)
    total = sum(p.numel() for p in model.parameters())
    modules = [*model.projectors, *([] if model.ap_head is None else [model.ap_head])]
    heads = sum(p.numel() for module in modules for p in module.parameters())
    tokens, width, depth = model.num_tokens, arguments["hidden_size"], arguments["depth"]
    forward = sit_flops(
        tokens=tokens,
        width=width,
        depth=depth,
        mlp_ratio=4.0,
        patch_values=model.patch_size**2 * model.in_channels,
    ) + sum(
        projector_flops(tokens=tokens, width=width, projector_dim=config.projector_dim, z_dim=z_dim)
        for z_dim in arguments["z_dims"]
    )
    if config.align == "sra":
        forward += 8 * tokens * width**2  # its head
    specs = encoders.specs("none" if config.features else config.enc_type)
    encoder = sum(spec.flops(config.resolution) for spec in specs)
    if config.align == "sra":  # the teacher
        encoder = transformer_flops(tokens=tokens, width=width, depth=config.block_out_t)
    state_bytes = total * (BYTES_PER_PARAMETER + BYTES_PER_AVERAGE * len(config.ema_decays))
    gathered = 0
    if shards > 1 and not config.reshard_after_forward:
        gathered = total * (4 if config.mixed_precision == "no" else 2)
    return Budget(
        parameters=total - heads,
        parameters_with_projectors=total,
        train_flops=3 * forward + encoder,
        encoder_flops=encoder,
        state_bytes=state_bytes / shards + gathered,
        activation_bytes=ACTIVATION_BYTES[config.activation_checkpointing] * tokens * width * depth,
    )


def peak_flops(device_name: str) -> float | None:
    """Peak dense bf16 FLOP/s of a device, None where it is not known."""
    return next((peak for part, peak in PEAK_FLOPS.items() if part in device_name), None)


def choose_micro_batch(state: TrainState) -> int:
    """Images per forward pass of one process, the same on all.

    As configured; or the local batch over the accumulation steps, halved until it fits: on CUDA
    until a forward and backward pass of that size runs without an out-of-memory error, on CPU until
    the estimate is at most half of the machine's memory.
    """
    if state.config.micro_batch != "auto":
        return min(state.config.micro_batch, state.local_batch)
    size = -(-state.local_batch // state.config.gradient_accumulation_steps)
    largest = size
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
    return needed * state.world.size <= CPU_MEMORY_SHARE * memory


def _fits_cuda(state: TrainState, size: int) -> bool:
    """Whether a forward and backward pass of `size` images runs; the moments are there already."""
    try:
        try_pass(state if state.mesh is None else stand_in(state), size)
        fits = True
    except torch.OutOfMemoryError:
        fits = False
    state.optimizer.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    return fits


def try_pass(state: TrainState, size: int) -> None:
    """A forward and backward pass of `size` random images; leaves gradients."""
    from repa_fast.train.step import losses, synthetic_batch

    batch, draws = synthetic_batch(state, size)
    denoise, align = losses(state, state.model, batch, draws)
    (denoise.sum() + sum(part.sum() for part in align)).backward()


def stand_in(state: TrainState) -> TrainState:
    """The state with whole weights in the compute dtype in place of sharded ones.

    Its passes communicate nothing: a process that runs out of memory in the middle of one keeps no
    other waiting. It takes more than the run will: whole gradients, where FSDP shards those of a
    block after the other.
    """
    config = state.config
    model = empty_model(config, state.metadata, state.world.device)
    model.to(state.autocast_dtype or torch.float32)
    parallelize(model, [model], config, None, state.autocast_dtype)
    frozen = dict(state.encoders)
    if config.shard_encoder:
        frozen = {name: _zeros_of(encoders.spec(name), config.resolution) for name in frozen}
    world = World(0, 1, state.world.device)
    return replace(state, model=model, wrapped=model, ema=model, encoders=frozen, world=world)


def _zeros_of(spec: encoders.EncoderSpec, resolution: int) -> Callable:
    shape = (spec.num_tokens(resolution), spec.width)
    return lambda images: torch.zeros((len(images), *shape), device=images.device)
