"""Contracts of adamw_ema and sum_of_squares, and their implementations."""

import functools
from collections.abc import Sequence

import torch

from repa_fast.backend import extension
from repa_fast.backend.dispatch import choose, runs
from repa_fast.contracts import expect_shape

from .cuda import adamw_ema_cuda, sum_of_squares_cuda
from .reference import adamw_ema_reference, sum_of_squares_reference

Tensors = Sequence[torch.Tensor]
Copies = Sequence[torch.Tensor | None]


@torch.no_grad()
def adamw_ema(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    steps: Tensors,
    *,
    lr: torch.Tensor,
    grad_scale: torch.Tensor,
    skip: torch.Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    emas: Tensors = (),
    ema_rate: torch.Tensor | None = None,
    param_copies: Copies = (),
    implementation: str = "auto",
) -> None:
    """Do AdamW (arXiv 1711.05101) and ema += ema_rate (param - ema), in place.

    Args:
        params: contiguous tensors of any shape, fp32 (fp64 by the reference).
        grads: their gradients, fp32 or bf16; not changed.
        exp_avgs: first moments, like params; exp_avg_sqs are the second ones.
        steps: 0-d fp32 tensors, steps done so far; advanced by one.
        lr: 0-d fp32 tensor on their device.
        grad_scale: 0-d fp32; the gradients are multiplied by it (clipping, inverse loss scale).
        skip: 0-d fp32; where it is not 0, nothing changes at all.
        betas: AdamW's, as eps and weight_decay, which is decoupled.
        emas: EMAs, like params; empty for none.
        ema_rate: 0-d fp32, 1 - decay of the EMA; needed with emas.
        param_copies: bf16 tensors that receive params, None for those without; empty for none.
        implementation: "auto", "cuda" or "reference".

    Raises:
        ValueError: lists of different length, shapes that differ, or "cuda" where it cannot run.
        RuntimeError: a tensor the kernel does not take, by list and position.
    """
    lists = {
        "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "emas": emas,
        "param_copies": param_copies,
    }  # fmt: skip
    _check_lengths(len(params), **lists, steps=steps)
    if emas and ema_rate is None:
        raise ValueError("adamw_ema: emas are given without ema_rate, expected both")
    device = params[0].device if params else lr.device
    run = adamw_ema_cuda  # which checks every tensor itself
    if not _runs_cuda("adamw_ema", implementation, device):
        run = adamw_ema_reference
        for name, tensors in lists.items():
            for param, tensor in zip(params, tensors):
                if tensor is not None:
                    expect_shape("adamw_ema", name, tensor, param.shape)
    run(
        params, grads, exp_avgs, exp_avg_sqs, steps, emas, param_copies,
        lr=lr, grad_scale=grad_scale, skip=skip, ema_rate=ema_rate, betas=betas, eps=eps,
        weight_decay=weight_decay,
    )  # fmt: skip


def _check_lengths(expected: int, **lists: Copies) -> None:
    for name, tensors in lists.items():
        optional = name in ("emas", "param_copies")
        if len(tensors) != expected and not (optional and not tensors):
            raise ValueError(
                f"adamw_ema: {name} has {len(tensors)} tensors, expected {expected} as params"
            )


@torch.no_grad()
def sum_of_squares(
    tensors: Tensors, device: torch.device, *, implementation: str = "auto"
) -> torch.Tensor:
    """Sum the squares of all elements of all tensors, always in the same order.

    Args:
        tensors: any shapes, fp32 or bf16; may be empty.
        device: where they are.
        implementation: "auto", "cuda" or "reference".

    Returns:
        0-d fp64 on `device`.

    Raises:
        ValueError: "cuda" where it cannot run.
        RuntimeError: a tensor the kernel does not take, by position.
    """
    if _runs_cuda("sum_of_squares", implementation, device):
        return sum_of_squares_cuda(tensors, device)
    return sum_of_squares_reference(tensors, device)


def why_not_cuda(device: torch.device) -> str:
    """Return why the kernels cannot run on `device`, "" if they can."""
    if device.type != "cuda":
        return f"the tensors are on {device.type}"
    return extension.why_not()


def _runs_cuda(op: str, implementation: str, device: torch.device) -> bool:
    candidates = {"cuda": functools.partial(why_not_cuda, device), "reference": runs}
    return choose(f"{op}: implementation", implementation, candidates)[0] == "cuda"
