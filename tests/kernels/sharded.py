"""Gradients of a tiny model, plain or sharded by FSDP2 over processes that interpret kernels."""

import functools
import os

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from repa_fast.backend import dispatch
from repa_fast.testing import seeded
from tests.kernels.training import tiny_model


def gradients(kernels, rank=0, size=1, *, compiled=False, dtype=torch.bfloat16):
    """{name: gradient} of the mean loss over two samples, one of them per rank if there are two."""
    dispatch.use_kernels(kernels)
    model = tiny_model()
    if compiled:
        for block in model.blocks:
            block.compile(fullgraph=True, backend="aot_eager")
    if size > 1:
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        shard = functools.partial(fully_shard, mp_policy=policy)
        for block in model.blocks:
            shard(block.adaLN_modulation)  # the model calls it, outside the block
            shard(block)
        shard(model)
    x, t = seeded((2, 4, 4, 4), seed=1), torch.tensor([0.3, 0.8])
    mine = slice(rank * 2 // size, (rank + 1) * 2 // size)
    with torch.autocast("cpu", dtype=dtype, enabled=size == 1 and dtype != torch.float32):
        velocity, projections = model(x[mine], t[mine], torch.tensor([1, 2])[mine])
    (velocity.float().square().mean() + projections[0].float().square().mean()).backward()
    return {
        name: whole(parameter.grad)
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).float()


def main():
    """Under torchrun: every rank computes, the first saves."""
    dist.init_process_group("gloo")
    compiled = os.environ["COMPILED"] == "1"
    found = gradients("triton", dist.get_rank(), dist.get_world_size(), compiled=compiled)
    if dist.get_rank() == 0:
        torch.save(found, os.environ["OUT"])
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
