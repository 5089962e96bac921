"""Triton kernels of adaln."""

import torch
import triton
import triton.language as tl

from repa_fast.backend.launch import Launch
from repa_fast.backend.rows import (
    BACKWARD,
    FORWARD,
    empty_partials,
    launch_rows,
    load_row,
    load_vector,
    normalise,
    normalise_backward,
    store_row,
    sum_chunks,
    vector_of,
)


@triton.jit
def adaln_forward_kernel(
    x,  # (B, N, D)
    shift,  # (B, D), rows shift_stride apart
    scale,  # (B, D), rows scale_stride apart
    y,  # (B, N, D)
    statistics,  # (B, N, 2) fp32: mean, rstd
    shift_stride,
    scale_stride,
    tokens,
    chunks,  # programs per sample
    eps: tl.float32,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(0)
    sample = (program // chunks).to(tl.int64)
    first = (program % chunks) * ROWS
    cols = tl.arange(0, BLOCK)
    mask = cols < D
    b_shift = load_vector(shift, sample, shift_stride, cols, mask)
    b_scale = 1 + load_vector(scale, sample, scale_stride, cols, mask)
    for token in tl.range(first, tl.minimum(first + ROWS, tokens), num_stages=STAGES):
        row = sample * tokens + token
        xhat, mean, rstd = normalise(load_row(x, row, cols, mask, D), mask, eps, D)
        store_row(y, row, xhat * b_scale + b_shift, cols, mask, D)
        tl.store(statistics + 2 * row, mean)
        tl.store(statistics + 2 * row + 1, rstd)


@triton.jit
def adaln_backward_kernel(
    dy,  # (B, N, D)
    x,  # (B, N, D)
    scale,  # (B, D), rows scale_stride apart
    statistics,  # (B, N, 2) fp32
    dx,  # (B, N, D)
    partials,  # (B, chunks, 2, D) fp32: dshift, dscale
    scale_stride,
    tokens,
    chunks,
    rows,  # tokens per program
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    sample = program // chunks
    first = (program % chunks).to(tl.int32) * rows
    cols = tl.arange(0, BLOCK)
    mask = cols < D
    b_scale = 1 + load_vector(scale, sample, scale_stride, cols, mask)
    b_dshift = tl.zeros([BLOCK], tl.float32)
    b_dscale = tl.zeros([BLOCK], tl.float32)
    for token in tl.range(first, tl.minimum(first + rows, tokens), num_stages=STAGES):
        row = sample * tokens + token
        mean = tl.load(statistics + 2 * row)
        rstd = tl.load(statistics + 2 * row + 1)
        b_dy = load_row(dy, row, cols, mask, D)
        xhat = tl.where(mask, (load_row(x, row, cols, mask, D) - mean) * rstd, 0.0)
        b_dshift += b_dy
        b_dscale += b_dy * xhat
        store_row(dx, row, normalise_backward(b_dy * b_scale, xhat, rstd, D), cols, mask, D)
    store_row(partials, 2 * program, b_dshift, cols, mask, D)
    store_row(partials, 2 * program + 1, b_dscale, cols, mask, D)


def adaln_forward_launch(x, shift, scale, y, statistics, eps, tile=FORWARD) -> Launch:
    tensors = {"x": x, "shift": shift, "scale": scale, "y": y, "statistics": statistics}
    return launch_rows(adaln_forward_kernel, tile, tensors, eps=eps)


def adaln_backward_launch(dy, x, scale, statistics, dx, partials, tile=BACKWARD) -> Launch:
    tensors = {
        "dy": dy, "x": x, "scale": scale, "statistics": statistics, "dx": dx, "partials": partials,
    }  # fmt: skip
    return launch_rows(adaln_backward_kernel, tile, tensors)


def forward(x, shift, scale, eps, out_dtype):
    """Return y (B, N, D) in `out_dtype`, and mean and rstd of each row, (B, N, 2) fp32."""
    x = x.contiguous()
    y = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    statistics = torch.empty(*x.shape[:2], 2, dtype=torch.float32, device=x.device)
    adaln_forward_launch(x, vector_of(shift), vector_of(scale), y, statistics, eps).run()
    return y, statistics


def backward(dy, x, scale, statistics, vector_dtype):
    """Return dx in the dtype of x, and (dshift, dscale), (2, B, D) in `vector_dtype`."""
    x = x.contiguous()
    dx = torch.empty_like(x)
    partials = empty_partials(x, 2)
    adaln_backward_launch(dy.contiguous(), x, vector_of(scale), statistics, dx, partials).run()
    return dx, sum_chunks(partials, vector_dtype)
