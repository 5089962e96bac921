"""Triton kernels of gate_residual and gate_residual_adaln.

Every (B, N, D) tensor is read once and written once.
"""

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
def gate_residual_forward_kernel(
    x,  # (B, N, D)
    branch,  # (B, N, D)
    gate,  # (B, D), rows gate_stride apart
    out,  # (B, N, D)
    gate_stride,
    tokens,
    chunks,  # programs per sample
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
    b_gate = load_vector(gate, sample, gate_stride, cols, mask)
    for token in tl.range(first, tl.minimum(first + ROWS, tokens), num_stages=STAGES):
        row = sample * tokens + token
        b_branch = load_row(branch, row, cols, mask, D)
        store_row(out, row, load_row(x, row, cols, mask, D) + b_gate * b_branch, cols, mask, D)


@triton.jit
def gate_residual_backward_kernel(
    dout,  # (B, N, D); also the gradient of x
    branch,  # (B, N, D)
    gate,  # (B, D), rows gate_stride apart
    dbranch,  # (B, N, D)
    partials,  # (B, chunks, 1, D) fp32: dgate
    gate_stride,
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
    b_gate = load_vector(gate, sample, gate_stride, cols, mask)
    b_dgate = tl.zeros([BLOCK], tl.float32)
    for token in tl.range(first, tl.minimum(first + rows, tokens), num_stages=STAGES):
        row = sample * tokens + token
        b_dout = load_row(dout, row, cols, mask, D)
        b_dgate += b_dout * load_row(branch, row, cols, mask, D)
        store_row(dbranch, row, b_gate * b_dout, cols, mask, D)
    store_row(partials, program, b_dgate, cols, mask, D)


@triton.jit
def gate_residual_adaln_forward_kernel(
    x,  # (B, N, D)
    branch,  # (B, N, D)
    gate,  # (B, D), rows gate_stride apart
    shift,  # (B, D), rows shift_stride apart
    scale,  # (B, D), rows scale_stride apart
    out,  # (B, N, D), x + gate * branch
    y,  # (B, N, D)
    statistics,  # (B, N, 2) fp32: mean, rstd of out
    gate_stride,
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
    b_gate = load_vector(gate, sample, gate_stride, cols, mask)
    b_shift = load_vector(shift, sample, shift_stride, cols, mask)
    b_scale = 1 + load_vector(scale, sample, scale_stride, cols, mask)
    for token in tl.range(first, tl.minimum(first + ROWS, tokens), num_stages=STAGES):
        row = sample * tokens + token
        b_branch = load_row(branch, row, cols, mask, D)
        b_out = load_row(x, row, cols, mask, D) + b_gate * b_branch
        b_out = b_out.to(out.dtype.element_ty)  # the adaLN is that of the stored stream
        tl.store(out + row * D + cols, b_out, mask=mask)
        xhat, mean, rstd = normalise(b_out.to(tl.float32), mask, eps, D)
        store_row(y, row, xhat * b_scale + b_shift, cols, mask, D)
        tl.store(statistics + 2 * row, mean)
        tl.store(statistics + 2 * row + 1, rstd)


@triton.jit
def gate_residual_adaln_backward_kernel(
    dy,  # (B, N, D)
    dout,  # (B, N, D), or None where only y was used
    out,  # (B, N, D)
    branch,  # (B, N, D)
    gate,  # (B, D), rows gate_stride apart
    scale,  # (B, D), rows scale_stride apart
    statistics,  # (B, N, 2) fp32
    dx,  # (B, N, D)
    dbranch,  # (B, N, D)
    partials,  # (B, chunks, 3, D) fp32: dgate, dshift, dscale
    gate_stride,
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
    b_gate = load_vector(gate, sample, gate_stride, cols, mask)
    b_scale = 1 + load_vector(scale, sample, scale_stride, cols, mask)
    b_dgate = tl.zeros([BLOCK], tl.float32)
    b_dshift = tl.zeros([BLOCK], tl.float32)
    b_dscale = tl.zeros([BLOCK], tl.float32)
    for token in tl.range(first, tl.minimum(first + rows, tokens), num_stages=STAGES):
        row = sample * tokens + token
        mean = tl.load(statistics + 2 * row)
        rstd = tl.load(statistics + 2 * row + 1)
        b_dy = load_row(dy, row, cols, mask, D)
        xhat = tl.where(mask, (load_row(out, row, cols, mask, D) - mean) * rstd, 0.0)
        b_dshift += b_dy
        b_dscale += b_dy * xhat
        b_dx = normalise_backward(b_dy * b_scale, xhat, rstd, D)
        if dout is not None:
            b_dx += load_row(dout, row, cols, mask, D)
        store_row(dx, row, b_dx, cols, mask, D)
        b_dgate += b_dx * load_row(branch, row, cols, mask, D)
        store_row(dbranch, row, b_gate * b_dx, cols, mask, D)
    store_row(partials, 3 * program, b_dgate, cols, mask, D)
    store_row(partials, 3 * program + 1, b_dshift, cols, mask, D)
    store_row(partials, 3 * program + 2, b_dscale, cols, mask, D)


def gate_residual_forward_launch(x, branch, gate, out, tile=FORWARD) -> Launch:
    tensors = {"x": x, "branch": branch, "gate": gate, "out": out}
    return launch_rows(gate_residual_forward_kernel, tile, tensors)


def gate_residual_backward_launch(dout, branch, gate, dbranch, partials, tile=BACKWARD) -> Launch:
    tensors = {
        "dout": dout, "branch": branch, "gate": gate, "dbranch": dbranch, "partials": partials,
    }  # fmt: skip
    return launch_rows(gate_residual_backward_kernel, tile, tensors)


def gate_residual_adaln_forward_launch(
    x, branch, gate, shift, scale, out, y, statistics, eps, tile=FORWARD
) -> Launch:
    tensors = {
        "x": x, "branch": branch, "gate": gate, "shift": shift, "scale": scale,
        "out": out, "y": y, "statistics": statistics,
    }  # fmt: skip
    return launch_rows(gate_residual_adaln_forward_kernel, tile, tensors, eps=eps)


def gate_residual_adaln_backward_launch(
    dy, dout, out, branch, gate, scale, statistics, dx, dbranch, partials, tile=BACKWARD
) -> Launch:
    tensors = {
        "dy": dy, "dout": dout, "out": out, "branch": branch, "gate": gate, "scale": scale,
        "statistics": statistics, "dx": dx, "dbranch": dbranch, "partials": partials,
    }  # fmt: skip
    return launch_rows(gate_residual_adaln_backward_kernel, tile, tensors)


def gate_residual_forward(x, branch, gate):
    """Return x + gate * branch, (B, N, D) in the dtype of x."""
    x = x.contiguous()
    out = torch.empty_like(x)
    gate_residual_forward_launch(x, branch.contiguous(), vector_of(gate), out).run()
    return out


def gate_residual_backward(dout, branch, gate):
    """Return dbranch in the dtype of branch, dgate (B, D) in that of gate."""
    branch = branch.contiguous()
    dbranch = torch.empty_like(branch)
    partials = empty_partials(branch, 1)
    gate_residual_backward_launch(
        dout.contiguous(), branch, vector_of(gate), dbranch, partials
    ).run()
    return dbranch, sum_chunks(partials, gate.dtype)[0]


def gate_residual_adaln_forward(x, branch, gate, shift, scale, eps, out_dtype):
    """Return the stream in the dtype of x, its adaLN in `out_dtype`, (B, N, 2) mean and rstd."""
    x, branch = x.contiguous(), branch.contiguous()
    out = torch.empty_like(x)
    y = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    statistics = torch.empty(*x.shape[:2], 2, dtype=torch.float32, device=x.device)
    vectors = [vector_of(vector) for vector in (gate, shift, scale)]
    gate_residual_adaln_forward_launch(x, branch, *vectors, out, y, statistics, eps).run()
    return out, y, statistics


def gate_residual_adaln_backward(dy, dout, out, branch, gate, scale, statistics, vector_dtype):
    """Return dx, dbranch, and (dgate, dshift, dscale) as one (3, B, D) in `vector_dtype`."""
    branch = branch.contiguous()
    dx, dbranch = torch.empty_like(out), torch.empty_like(branch)
    partials = empty_partials(branch, 3)
    gate_residual_adaln_backward_launch(
        dy.contiguous(),
        None if dout is None else dout.contiguous(),
        out,
        branch,
        vector_of(gate),
        vector_of(scale),
        statistics,
        dx,
        dbranch,
        partials,
    ).run()
    return dx, dbranch, sum_chunks(partials, vector_dtype)
