"""Gradients of a tiny model, plain or sharded by FSDP2 over processes that interpret kernels."""

import functools

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from repa_fast.backend import dispatch
from repa_fast.distributed import World
from repa_fast.testing import seeded
from tests.kernels.training import tiny_model
from tests.train.parallel_ranks import gradients


def mean_loss_gradients(
    world: World, kernels: str, *, compiled: bool = False, dtype: torch.dtype = torch.bfloat16
) -> dict[str, torch.Tensor]:
    """{name: gradient} of the mean loss over two samples, shared out among the processes."""
    dispatch.use_kernels(kernels)
    model = tiny_model()
    if compiled:
        for block in model.blocks:
            block.compile(fullgraph=True, backend="aot_eager")
    if world.size > 1:
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        shard = functools.partial(fully_shard, mp_policy=policy)
        for block in model.blocks:
            shard(block.adaLN_modulation)  # the model calls it, outside the block
            shard(block)
        shard(model)
    x, t = seeded((2, 4, 4, 4), seed=1), torch.tensor([0.3, 0.8])
    mine = slice(world.rank * 2 // world.size, (world.rank + 1) * 2 // world.size)
    autocast = world.size == 1 and dtype != torch.float32
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        velocity, projections = model(x[mine], t[mine], torch.tensor([1, 2])[mine])
    (velocity.float().square().mean() + projections[0].float().square().mean()).backward()
    dispatch.use_kernels(None)
    return {name: gradient.float() for name, gradient in gradients(model).items()}


def sharded(world: World, compiled: bool) -> dict[str, torch.Tensor]:
    return mean_loss_gradients(world, "triton", compiled=compiled)
