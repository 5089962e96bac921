"""csrc/adamw_ema, called through its operators."""

from collections.abc import Sequence

import torch

CHUNK = 8192
"""Elements per block of the kernels; kChunk in csrc/adamw_ema/kernels.cuh."""

Tensors = Sequence[torch.Tensor]
Copies = Sequence[torch.Tensor | None]


def adamw_ema_cuda(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    steps: Tensors,
    emas: Tensors,
    param_copies: Copies,
    *,
    lr: torch.Tensor,
    grad_scale: torch.Tensor,
    skip: torch.Tensor,
    ema_rate: torch.Tensor | None,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Do what `adamw_ema_reference` does, to contiguous tensors: fp32, gradients fp32 or bf16.

    Copies are bf16, or None.

    Raises:
        RuntimeError: a tensor of another device, dtype, size or layout, by list and position.
    """
    if not params:
        return
    factors = torch.empty(2 * len(params), dtype=torch.float32, device=params[0].device)
    written = (params, exp_avgs, exp_avg_sqs, steps, emas, param_copies)
    torch.ops.repa_fast.adamw_ema(
        params, grads, exp_avgs, exp_avg_sqs, steps, emas, param_copies,
        lr, grad_scale, skip, ema_rate, factors, *betas, eps, weight_decay,
    )  # fmt: skip
    # An operator of the stable ABI does not note that it wrote; autograd would use stale values.
    torch.autograd.graph.increment_version([t for group in written for t in group if t is not None])


def sum_of_squares_cuda(tensors: Tensors, device: torch.device) -> torch.Tensor:
    """Do what `sum_of_squares_reference` does, on contiguous fp32 or bf16 tensors.

    Raises:
        RuntimeError: a tensor of another device, dtype or layout, by position.
    """
    chunks = sum(-(-tensor.numel() // CHUNK) for tensor in tensors)
    partials = torch.empty(chunks, dtype=torch.float64, device=device)
    out = torch.empty((), dtype=torch.float64, device=device)
    torch.ops.repa_fast.sum_of_squares(tensors, partials, out)
    return out
