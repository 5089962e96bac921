"""What training takes from inside torch, in one place; tests/train/test_torch_private.py holds it.

None of these names is public. Each but the compiler's and the allocator's has a public twin that
waits for the device, reads every gradient once more, or leaves a process group with another
timeout.
"""

from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.optim.adamw import adamw


def fused_adamw(*tensors: list[torch.Tensor], skip: torch.Tensor, **options) -> None:
    """Do torch's fused AdamW step on lists of weights, gradients, both moments and step counts.

    Args:
        skip: 0-d fp32; where it is 1, nothing changes.
        options: lr, beta1, beta2, eps, weight_decay, grad_scale (which divides the gradients).
    """
    *rest, steps = tensors
    adamw(*rest, [], steps, fused=True, found_inf=skip, amsgrad=False, maximize=False, **options)


def scale_of(scaler: torch.amp.GradScaler) -> torch.Tensor:
    """Return the scale, 0-d on the device; `get_scale` would read it."""
    return scaler._get_scale_async()


def record_overflow(
    scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer, bad: torch.Tensor
) -> None:
    """Tell the scaler what its unscale_ would have found; it reads every gradient for that."""
    states = scaler._per_optimizer_states[id(optimizer)]
    states["found_inf_per_device"] = {bad.device: bad}


def drop_capture(graph: torch.cuda.CUDAGraph, pool: tuple[int, int], device: torch.device) -> None:
    """End a capture into `pool` that failed; for torch 2.11 it would go on.

    Its memory would never be free again, nor that of tensors which a second stream has used, and
    torch.randn would raise.
    """
    graph.reset()
    with suppress(RuntimeError):  # torch 2.15 has done it by now
        torch._C._cuda_endAllocateToPool(device.index, pool)
        torch._C._cuda_releasePool(device.index, pool)
    generator, like = torch.cuda.default_generators[device.index], torch.Generator(device)
    like.manual_seed(generator.initial_seed())
    generator.graphsafe_set_state(like.graphsafe_get_state())


def cpp_compiler() -> str:
    """Return the C++ compiler that torch.compile takes on a CPU; RuntimeError if there is none."""
    from torch._inductor.cpp_builder import get_cpp_compiler  # imports the compiler: a second

    return get_cpp_compiler()


def set_group_timeout(timeout: timedelta, group: dist.ProcessGroup) -> None:
    """Give a mesh's group the run's timeout in the place of torch's own."""
    _set_pg_timeout(timeout, group)
