"""Triton kernels of align_loss: one program takes consecutive patches, a row of D at a time."""

import torch
import triton
import triton.language as tl

from repa_fast.backend.launch import Launch
from repa_fast.backend.rows import FORWARD, load_row, store_row


@triton.jit
def align_loss_forward_kernel(
    prediction,  # (R, D)
    target,  # (R, D)
    patches,  # (R, 4) fp32: cosine, the same or 0, 1 / |prediction|, 1 / |target|
    rows,
    eps: tl.float32,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * ROWS
    cols = tl.arange(0, BLOCK)
    mask = cols < D
    for row in tl.range(first, tl.minimum(first + ROWS, rows), num_stages=STAGES):
        p = load_row(prediction, row, cols, mask, D)
        q = load_row(target, row, cols, mask, D)
        norm = tl.sqrt(tl.sum(p * p, axis=0))
        least = tl.cast(eps, tl.float32)  # fp64 from a graph of torch.compile
        p_inverse = 1 / tl.maximum(norm, least)
        q_inverse = 1 / tl.maximum(tl.sqrt(tl.sum(q * q, axis=0)), least)
        cosine = tl.sum((p * p_inverse) * (q * q_inverse), axis=0)
        tl.store(patches + 4 * row, cosine)
        # A norm clamped to eps is a constant: its direction has no part in the gradient.
        tl.store(patches + 4 * row + 1, tl.where(norm >= least, cosine, 0.0))
        tl.store(patches + 4 * row + 2, p_inverse)
        tl.store(patches + 4 * row + 3, q_inverse)


@triton.jit
def align_loss_backward_kernel(
    dloss,  # (B) fp32
    prediction,  # (R, D), R = B * tokens
    target,  # (R, D)
    patches,  # (R, 4) fp32
    dprediction,  # (R, D)
    rows,
    tokens,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * ROWS
    cols = tl.arange(0, BLOCK)
    mask = cols < D
    for row in tl.range(first, tl.minimum(first + ROWS, rows), num_stages=STAGES):
        cosine = tl.load(patches + 4 * row + 1)
        p_inverse = tl.load(patches + 4 * row + 2)
        q_inverse = tl.load(patches + 4 * row + 3)
        factor = tl.load(dloss + row // tokens) / tokens * p_inverse
        p = load_row(prediction, row, cols, mask, D) * p_inverse
        q = load_row(target, row, cols, mask, D) * q_inverse
        store_row(dprediction, row, factor * (cosine * p - q), cols, mask, D)


def empty_patches(prediction: torch.Tensor) -> torch.Tensor:
    """Return memory for what forward keeps of each patch of `prediction`: (B, N, 4) fp32."""
    return torch.empty(*prediction.shape[:2], 4, dtype=torch.float32, device=prediction.device)


def align_loss_forward_launch(prediction, target, patches, eps, tile=FORWARD) -> Launch:
    tensors = {"prediction": prediction, "target": target, "patches": patches}
    return _launch(align_loss_forward_kernel, tile, tensors, {"eps": eps})


def align_loss_backward_launch(
    dloss, prediction, target, patches, dprediction, tile=FORWARD
) -> Launch:
    tensors = {
        "dloss": dloss, "prediction": prediction, "target": target, "patches": patches,
        "dprediction": dprediction,
    }  # fmt: skip
    scalars = {"tokens": prediction.shape[1]}
    return _launch(align_loss_backward_kernel, tile, tensors, scalars)


def _launch(kernel, tile, tensors: dict, scalars: dict) -> Launch:
    batch, tokens, width = tensors["prediction"].shape
    rows = batch * tokens
    block = triton.next_power_of_2(width)
    return Launch(
        kernel,
        grid=triton.cdiv(rows, tile.rows),
        arguments={**tensors, "rows": rows, **scalars},
        constants={"D": width, "BLOCK": block, "ROWS": tile.rows, "STAGES": tile.stages},
        warps=tile.warps_for(block),
    )


def forward(prediction, target, eps):
    """Return the loss per sample (B), and four numbers of each patch, (B, N, 4); fp32."""
    patches = empty_patches(prediction)
    align_loss_forward_launch(prediction.contiguous(), target.contiguous(), patches, eps).run()
    return -patches[..., 0].mean(-1), patches


def backward(dloss, prediction, target, patches):
    """Return dprediction (B, N, D) in the dtype of prediction."""
    prediction = prediction.contiguous()
    dprediction = torch.empty_like(prediction)
    align_loss_backward_launch(
        dloss.contiguous(), prediction, target.contiguous(), patches, dprediction
    ).run()
    return dprediction
