"""How a model is spread over processes: a copy on each, or FSDP2 on a mesh of one or two axes.

The order is torchtitan's: activation checkpointing, torch.compile of blocks, fully_shard of each
block, the root last. None of them changes a parameter's name.
"""

import math
import os
import warnings
from collections.abc import Sequence
from functools import partial

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from repa_fast.configs.config import TrainConfig
from repa_fast.distributed import World
from repa_fast.models.sit import SiT, run_blocks
from repa_fast.train.gradients import Gradients
from repa_fast.train.torch_private import set_group_timeout

KEPT = [
    torch.ops.aten.addmm.default,
    torch.ops.aten.mm.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.repa_fast.attention_packed.default,
]
"""What selective checkpointing does not compute again: linear layers and attention, but for that of
FlashAttention and xformers."""

REDUCE = {"fp32": torch.float32, "bf16": torch.bfloat16}

MOST_BLOCKS = 4
"""Blocks that are compiled as one: what surrounds a call of compiled code costs the host as much as
a block in it, and each further block takes seconds to compile."""


def shard_count(config: TrainConfig, processes: int) -> int:
    """Return how many processes share a copy of weights and optimizer state; 1 is no sharding.

    ValueError if the processes do not divide into groups of that size.
    """
    if config.parallel != "hsdp":
        return 1 if config.parallel == "ddp" else processes
    size = config.shard_size or int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    if processes % size:
        source = "shard_size" if config.shard_size else "a node's processes"
        raise ValueError(
            f"parallel is hsdp with {processes} processes in shard groups of {size} ({source}), "
            "expected a size that divides the number of processes"
        )
    return size


def device_mesh(config: TrainConfig, world: World) -> DeviceMesh | None:
    """Return where a copy is sharded and where it is replicated; None for ddp or one process.

    One axis "shard" where one copy spans all processes; else ("replicate", "shard"), consecutive
    ranks, which torchrun puts on one node, sharing a copy. All processes call it.
    """
    size = shard_count(config, world.size)
    if world.size == 1 or config.parallel == "ddp":
        return None
    kind = world.device.type
    if size == world.size:
        return init_device_mesh(kind, (size,), mesh_dim_names=("shard",))
    shape, names = (world.size // size, size), ("replicate", "shard")
    mesh = init_device_mesh(kind, shape, mesh_dim_names=names)
    for name in names:  # which have torch's own timeout otherwise
        set_group_timeout(world.timeout, mesh.get_group(name))
    return mesh


def parallelize(
    model: SiT,
    averages: Sequence[SiT],
    config: TrainConfig,
    mesh: DeviceMesh | None,
    dtype: torch.dtype | None,
    teacher_depth: int = 0,
) -> None:
    """Checkpoint activations, compile blocks and shard, in place, as far as the config asks for it.

    Weights of the model and of `averages`, its EMAs, are whole and the same on all processes. The
    first `teacher_depth` blocks of the first EMA run in every step. `mesh` is what to shard on,
    None for nothing; `dtype` that of the compute, None for fp32.
    """
    checkpoint_activations(model.blocks, config.activation_checkpointing)
    if config.compile:
        alone = list(averages[0].blocks[:teacher_depth])
        if mesh is None and config.activation_checkpointing == "none":
            model.region = region_size(len(model.blocks), model.encoder_depth)
            model.run_region = torch.compile(run_blocks, fullgraph=True)
        else:  # they are sharded, and computed again, one by one
            alone += model.blocks
        for block in alone:
            block.compile(fullgraph=True)
    if mesh is None:
        return
    # What it warns of would need an operation in place on a unit's output; there is none.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    options = {"mesh": mesh, "mp_policy": policy(config, dtype)}
    shard(model, options, reshard=config.reshard_after_forward, reshard_last=False)
    for average in averages:
        # Without a backward pass nothing else would drop weights gathered before the next update.
        shard(average, options, reshard=True, reshard_last=True)
        register_fsdp_forward_method(average, "hidden")


def region_size(depth: int, encoder_depth: int) -> int:
    """Return how many blocks are compiled as one: a divisor of both, so that regions are alike."""
    common = math.gcd(depth, encoder_depth)
    return max(size for size in range(1, MOST_BLOCKS + 1) if common % size == 0)


def shard(model: SiT, options: dict, *, reshard: bool, reshard_last: bool) -> None:
    """Shard a model: blocks, heads and the final layer are units, the root has the rest.

    `adaLN_modulation` is a unit of its own, as the model calls it outside its block. The position
    table is frozen and added to the fp32 residual stream: it stays whole and fp32. `reshard` drops
    a unit's gathered weights between its forward and its backward pass; `reshard_last` does so for
    the final layer and the root, which backward needs first.
    """
    units = [unit for block in model.blocks for unit in (block.adaLN_modulation, block)]
    for unit in (*units, *heads_of(model)):
        fully_shard(unit, **options, reshard_after_forward=reshard)
    options = options | {"reshard_after_forward": reshard_last}
    fully_shard(model.final_layer, **options)
    fully_shard(model, **options, ignored_params={model.pos_embed})


def heads_of(model: SiT) -> list[nn.Module]:
    """Return the heads whose outputs are aligned: projectors, or SRA's."""
    return [*model.projectors, *([] if model.ap_head is None else [model.ap_head])]


def policy(config: TrainConfig, dtype: torch.dtype | None) -> MixedPrecisionPolicy:
    """Return the policy: weights are gathered in `dtype`, inputs are left alone.

    FSDP's default would cast what enters a unit: the residual stream, and t at the root.
    """
    reduce = REDUCE[config.reduce_dtype]
    return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=reduce, cast_forward_inputs=False)


def shard_encoder(encoder: nn.Module, mesh: DeviceMesh, *, compiled: bool) -> None:
    """Shard a frozen encoder, every one of its blocks a unit, and `compiled` one by one.

    Weights are gathered in fp32: its features are those of a whole encoder, bit for bit.
    """
    as_it_is = MixedPrecisionPolicy(cast_forward_inputs=False)
    options = {"mesh": mesh, "mp_policy": as_it_is, "reshard_after_forward": True}
    for name, module in encoder.named_modules():
        if name.rpartition(".")[2] == "blocks":
            for block in module:
                if compiled:
                    block.compile()
                fully_shard(block, **options)
    fully_shard(encoder, **options)


def sum_gradients(model: SiT, config: TrainConfig, world: World) -> Gradients:
    """Return what sums a model's gradients; FSDP does so itself where it shards the model."""
    if isinstance(model, FSDPModule):
        return Gradients([], World(0, 1, world.device), torch.float32)
    return Gradients(model.parameters(), world, REDUCE[config.reduce_dtype])


def expect_pass(model: nn.Module, config: TrainConfig, *, last: bool) -> None:
    """Let a sharded model reduce gradients in the `last` micro-batch's backward pass alone.

    Between micro-batches weights stay gathered, unless RESHARD_AFTER_FORWARD saves memory.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        model.set_reshard_after_backward(last or config.reshard_after_forward)


def checkpoint_activations(blocks: Sequence[nn.Module], kind: str) -> None:
    """Keep less of each block's forward pass and compute the rest again in its backward pass.

    Args:
        kind: "none"; "selective", which keeps the results of linear layers and attention, so that
            what is computed again is cheap; "full", which keeps a block's inputs alone.
    """
    if kind == "none":
        return
    options: dict = {"use_reentrant": False, "preserve_rng_state": False}  # blocks draw nothing
    if kind == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, KEPT)
    for block in blocks:  # a function of ours, as torch.compile begins at none of torch's
        block.forward = lambda *x, forward=block.forward: checkpoint(forward, *x, **options)
