"""Triton kernels of adaln, and the row helpers it shares with gate_residual_adaln.

One program takes consecutive tokens of one sample, a row of D columns at a time, so that the
sample's shift and scale, and in the backward pass its sums over tokens, stay in registers.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from repa_fast.backend.launch import Launch

CHUNKS = 8  # programs per sample in a backward pass; a sample's sums do not depend on its batch
COLUMNS = 256  # per program of the second stage


@dataclass(frozen=True)
class Tile:
    """How a kernel is launched.

    Attributes:
        warps: per program, at 2,048 columns; narrower rows take fewer.
        stages: rows in flight, the loads of the next ones running while one is computed.
        rows: tokens per program; None divides a sample among CHUNKS programs.
        columns: of a warp at least; 0 is its share of 2,048.
    """

    warps: int
    stages: int
    rows: int | None = None
    columns: int = 0

    def warps_for(self, block: int) -> int:
        return max(1, min(self.warps, block // (self.columns or 2048 // self.warps)))


FORWARD = Tile(warps=4, stages=3, rows=8)
BACKWARD = Tile(warps=4, stages=3, columns=256)


@triton.jit
def load_row(pointer, row, cols, mask, D: tl.constexpr):
    """Row `row` (int64) of a contiguous (rows, D) tensor in fp32, zero beyond D."""
    return tl.load(pointer + row * D + cols, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_row(pointer, row, values, cols, mask, D: tl.constexpr):
    tl.store(pointer + row * D + cols, values.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def load_vector(pointer, sample, stride, cols, mask):
    """Row `sample` (int64) of a (B, D) tensor with unit column stride, in fp32."""
    return tl.load(pointer + sample * stride + cols, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def normalise(x, mask, eps, D: tl.constexpr):
    """(xhat, mean, rstd) of one row whose masked columns are zero, all in fp32.

    Launched from a graph of torch.compile, eps is fp64 whatever its annotation says, and would take
    the whole row with it.
    """
    mean = tl.sum(x, axis=0) / D
    centred = tl.where(mask, x - mean, 0.0)
    rstd = 1 / tl.sqrt(tl.sum(centred * centred, axis=0) / D + tl.cast(eps, tl.float32))
    return centred * rstd, mean, rstd


@triton.jit
def normalise_backward(g, xhat, rstd, D: tl.constexpr):
    """Gradient of x from the gradient g of xhat, zero in masked columns."""
    return rstd * (g - tl.sum(g, axis=0) / D - xhat * (tl.sum(g * xhat, axis=0) / D))


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


@triton.jit
def sum_chunks_kernel(
    partials,  # (B, chunks, K, D) fp32
    out,  # (K, B, D)
    batch,
    chunks,
    K: tl.constexpr,
    D: tl.constexpr,
    COLS: tl.constexpr,
):
    blocks: tl.constexpr = (D + COLS - 1) // COLS
    program = tl.program_id(0)
    k = program // blocks % K
    sample = (program // (blocks * K)).to(tl.int64)
    cols = program % blocks * COLS + tl.arange(0, COLS)
    mask = cols < D
    total = tl.zeros([COLS], tl.float32)
    for chunk in range(chunks):
        total += load_row(partials, (sample * chunks + chunk) * K + k, cols, mask, D)
    store_row(out, k * batch + sample, total, cols, mask, D)


def rows_of(tensor: torch.Tensor) -> torch.Tensor:
    """A (B, N, D) tensor as the kernels address it: contiguous."""
    return tensor.contiguous()


def vector_of(tensor: torch.Tensor) -> torch.Tensor:
    """A (B, D) tensor as the kernels address it: any row stride, unit column stride."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def block_of(width: int) -> int:
    """Columns of a program: the width rounded up to a power of two."""
    return triton.next_power_of_2(width)


def backward_chunks(tokens: int) -> tuple[int, int]:
    """(programs per sample, tokens per program) of a backward pass, none of them without work."""
    rows = triton.cdiv(max(tokens, 1), CHUNKS)
    return triton.cdiv(tokens, rows), rows


def empty_partials(rows: torch.Tensor, count: int) -> torch.Tensor:
    """(B, chunks, count, D) fp32, for sums over the tokens of `rows` (B, N, D)."""
    batch, tokens, width = rows.shape
    shape = (batch, backward_chunks(tokens)[0], count, width)
    return torch.empty(shape, dtype=torch.float32, device=rows.device)


def adaln_forward_launch(x, shift, scale, y, statistics, eps, tile=FORWARD) -> Launch:
    batch, tokens, width = x.shape
    chunks = triton.cdiv(tokens, tile.rows)
    block = block_of(width)
    return Launch(
        adaln_forward_kernel,
        grid=batch * chunks,
        arguments={
            "x": x,
            "shift": shift,
            "scale": scale,
            "y": y,
            "statistics": statistics,
            "shift_stride": shift.stride(0),
            "scale_stride": scale.stride(0),
            "tokens": tokens,
            "chunks": chunks,
            "eps": eps,
        },
        constants={"D": width, "BLOCK": block, "ROWS": tile.rows, "STAGES": tile.stages},
        warps=tile.warps_for(block),
    )


def adaln_backward_launch(dy, x, scale, statistics, dx, partials, tile=BACKWARD) -> Launch:
    batch, tokens, width = x.shape
    chunks, rows = backward_chunks(tokens)
    block = block_of(width)
    return Launch(
        adaln_backward_kernel,
        grid=batch * chunks,
        arguments={
            "dy": dy,
            "x": x,
            "scale": scale,
            "statistics": statistics,
            "dx": dx,
            "partials": partials,
            "scale_stride": scale.stride(0),
            "tokens": tokens,
            "chunks": chunks,
            "rows": rows,
        },
        constants={"D": width, "BLOCK": block, "STAGES": tile.stages},
        warps=tile.warps_for(block),
    )


def sum_chunks_launch(partials, out) -> Launch:
    batch, chunks, count, width = partials.shape
    columns = min(COLUMNS, block_of(width))
    return Launch(
        sum_chunks_kernel,
        grid=batch * count * triton.cdiv(width, columns),
        arguments={"partials": partials, "out": out, "batch": batch, "chunks": chunks},
        constants={"K": count, "D": width, "COLS": columns},
        warps=max(1, columns // 64),
    )


def sum_chunks(partials: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(B, chunks, K, D) fp32 -> (K, B, D) in `dtype`, always in the same order."""
    batch, _, count, width = partials.shape
    out = torch.empty(count, batch, width, dtype=dtype, device=partials.device)
    sum_chunks_launch(partials, out).run()
    return out


def forward(
    x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """y (B, N, D) in `out_dtype`, and mean and rstd of each row, (B, N, 2) fp32."""
    x = rows_of(x)
    y = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    statistics = torch.empty(*x.shape[:2], 2, dtype=torch.float32, device=x.device)
    adaln_forward_launch(x, vector_of(shift), vector_of(scale), y, statistics, eps).run()
    return y, statistics


def backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    scale: torch.Tensor,
    statistics: torch.Tensor,
    vector_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dx in the dtype of x, and (dshift, dscale) as one (2, B, D) tensor in `vector_dtype`."""
    x = rows_of(x)
    dx = torch.empty_like(x)
    partials = empty_partials(x, 2)
    adaln_backward_launch(rows_of(dy), x, vector_of(scale), statistics, dx, partials).run()
    return dx, sum_chunks(partials, vector_dtype)
