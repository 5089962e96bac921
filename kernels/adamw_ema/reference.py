"""Specification of adamw_ema and sum_of_squares in plain torch."""

from collections.abc import Sequence

import torch

Tensors = Sequence[torch.Tensor]
Copies = Sequence[torch.Tensor | None]


def adamw_ema_reference(
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
    """Take one step of every tensor, in place, in its own dtype; none where `skip` is not 0.

    Lists of equal length, those that are not wanted empty, and None for a copy that is not; lr,
    grad_scale, skip and ema_rate (with emas) are 0-d.
    """
    keep = skip != 0
    beta1, beta2 = betas

    def write(target: torch.Tensor, value: torch.Tensor) -> None:
        target.copy_(torch.where(keep, target, value.to(target.dtype)))

    for i, (param, grad, m, v, step) in enumerate(
        zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True)
    ):
        g = grad.to(param.dtype) * grad_scale.to(param.dtype)
        count = step + 1
        unbias1, unbias2 = ((1 - beta ** count.double()).to(param.dtype) for beta in betas)
        rate = lr.to(param.dtype)
        first = m + (1 - beta1) * (g - m)
        second = beta2 * v + (1 - beta2) * g * g
        root = (second / unbias2).sqrt() + eps
        new = param - rate * weight_decay * param
        new = new - rate / unbias1 * first / root
        if emas:
            write(emas[i], emas[i] + ema_rate.to(param.dtype) * (new - emas[i]))
        if param_copies and param_copies[i] is not None:
            write(param_copies[i], new)
        for target, value in ((param, new), (m, first), (v, second), (step, count)):
            write(target, value)


def sum_of_squares_reference(tensors: Tensors, device: torch.device) -> torch.Tensor:
    """Sum the squares of all tensors, 0-d fp64 on `device`; over one tensor, in at least fp32."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    for tensor in tensors:
        work = torch.promote_types(tensor.dtype, torch.float32)
        total = total + tensor.to(work).square().sum()
    return total
