"""Rows of D columns in Triton: how kernels load, normalise and sum them, and how they are launched.

A program takes consecutive tokens of one sample, a row at a time, so that the sample's vectors, and
in a backward pass its sums over tokens, stay in registers. This module imports Triton; only the
triton_kernels.py of the ops import it.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from repa_fast.backend.launch import Launch

CHUNKS = 8  # programs per sample in a backward pass; a sample's sums do not depend on its batch
COLUMNS = 256  # per program of the second stage


@dataclass(frozen=True)
class Tile:
    """Parameters of a launch.

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
    """Load row `row` (int64) of a contiguous (rows, D) tensor in fp32, zero beyond D."""
    return tl.load(pointer + row * D + cols, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_row(pointer, row, values, cols, mask, D: tl.constexpr):
    tl.store(pointer + row * D + cols, values.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def load_vector(pointer, sample, stride, cols, mask):
    """Load row `sample` (int64) of a (B, D) tensor with unit column stride, in fp32."""
    return tl.load(pointer + sample * stride + cols, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def normalise(x, mask, eps, D: tl.constexpr):
    """Return (xhat, mean, rstd) of one row whose masked columns are zero, all in fp32.

    Launched from a graph of torch.compile, eps is fp64 whatever its annotation says, and would take
    the whole row with it.
    """
    mean = tl.sum(x, axis=0) / D
    centred = tl.where(mask, x - mean, 0.0)
    rstd = 1 / tl.sqrt(tl.sum(centred * centred, axis=0) / D + tl.cast(eps, tl.float32))
    return centred * rstd, mean, rstd


@triton.jit
def normalise_backward(g, xhat, rstd, D: tl.constexpr):
    """Return the gradient of x from the gradient g of xhat, zero in masked columns."""
    return rstd * (g - tl.sum(g, axis=0) / D - xhat * (tl.sum(g * xhat, axis=0) / D))


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


def vector_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return a (B, D) tensor as the kernels address it: any row stride, unit column stride."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def backward_chunks(tokens: int) -> tuple[int, int]:
    """Return (programs per sample, tokens per program) of a backward pass, none without work."""
    rows = triton.cdiv(max(tokens, 1), CHUNKS)
    return triton.cdiv(tokens, rows), rows


def empty_partials(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Return (B, chunks, count, D) fp32, for sums over the tokens of `rows` (B, N, D)."""
    batch, tokens, width = rows.shape
    shape = (batch, backward_chunks(tokens)[0], count, width)
    return torch.empty(shape, dtype=torch.float32, device=rows.device)


def launch_rows(kernel: Any, tile: Tile, tensors: dict, **scalars: float) -> Launch:
    """Return the launch of `kernel` over the tokens of `tensors`, the first of which is (B, N, D).

    The row stride of every (B, D) tensor is added to its arguments.
    """
    batch, tokens, width = next(iter(tensors.values())).shape
    block = triton.next_power_of_2(width)
    constants = {"D": width, "BLOCK": block, "STAGES": tile.stages}
    if tile.rows is None:
        chunks, scalars["rows"] = backward_chunks(tokens)
    else:
        chunks, constants["ROWS"] = triton.cdiv(tokens, tile.rows), tile.rows
    strides = {
        f"{name}_stride": tensor.stride(0)
        for name, tensor in tensors.items()
        if tensor is not None and tensor.ndim == 2
    }
    return Launch(
        kernel,
        grid=batch * chunks,
        arguments={**tensors, **strides, "tokens": tokens, "chunks": chunks, **scalars},
        constants=constants,
        warps=tile.warps_for(block),
    )


def sum_chunks_launch(partials, out) -> Launch:
    batch, chunks, count, width = partials.shape
    columns = min(COLUMNS, triton.next_power_of_2(width))
    return Launch(
        sum_chunks_kernel,
        grid=batch * count * triton.cdiv(width, columns),
        arguments={"partials": partials, "out": out, "batch": batch, "chunks": chunks},
        constants={"K": count, "D": width, "COLS": columns},
        warps=max(1, columns // 64),
    )


def sum_chunks(partials: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Sum (B, chunks, K, D) fp32 -> (K, B, D) in `dtype`, always in the same order."""
    batch, _, count, width = partials.shape
    out = torch.empty(count, batch, width, dtype=dtype, device=partials.device)
    sum_chunks_launch(partials, out).run()
    return out
