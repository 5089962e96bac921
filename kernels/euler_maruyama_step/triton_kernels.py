"""Triton kernel of euler_maruyama_step: one program takes a block of one sample's elements."""

import math

import torch
import triton
import triton.language as tl

from repa_fast.backend.launch import Launch

BLOCK = 1024  # elements per program
TWO_PI = tl.constexpr(2 * math.pi)


@triton.jit
def standard_normal(seed, step, sample, position):
    """Draw as reference.standard_normal does; `sample` is int64, `position` an int32 block."""
    zero = position * 0
    first, second, _, _ = tl.philox(
        seed,
        position,
        zero + sample.to(tl.int32),
        zero + step,
        zero + (sample >> 32).to(tl.int32),
    )
    radius = tl.sqrt(-2 * tl.log((first.to(tl.float32) + 0.5) * 2.0**-32))
    return radius * tl.cos(second.to(tl.float32) * (TWO_PI * 2.0**-32))


@triton.jit(do_not_specialize=["seed", "step"])
def euler_maruyama_step_kernel(
    x,  # (B, E) fp32 or fp64
    v_cond,  # (B, E)
    v_uncond,  # (B, E), or None without guidance
    noise,  # (B, E), or None
    index,  # (B) int64, or None where no noise is drawn
    out,  # (B, E), the dtype of x
    copy,  # (B, E), or None
    of_x: tl.float64,  # out = of_x x + of_v v + of_noise z
    of_v: tl.float64,
    of_noise: tl.float64,
    cfg_scale: tl.float64,
    seed: tl.int64,
    step: tl.int32,
    elements,
    blocks,  # programs per sample
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    sample = (program // blocks).to(tl.int64)
    position = program % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = position < elements
    at = sample * elements + position
    work: tl.constexpr = x.dtype.element_ty
    v = tl.load(v_cond + at, mask=mask).to(work)
    if v_uncond is not None:
        null = tl.load(v_uncond + at, mask=mask).to(work)
        v = null + tl.full([BLOCK], cfg_scale, work) * (v - null)
    value = tl.full([BLOCK], of_x, work) * tl.load(x + at, mask=mask)
    value += tl.full([BLOCK], of_v, work) * v
    if noise is not None:
        value += tl.full([BLOCK], of_noise, work) * tl.load(noise + at, mask=mask).to(work)
    if index is not None:
        z = standard_normal(seed, step, tl.load(index + sample), position)
        value += tl.full([BLOCK], of_noise, work) * z.to(work)
    tl.store(out + at, value, mask=mask)
    if copy is not None:
        tl.store(copy + at, value.to(tl.float32).to(copy.dtype.element_ty), mask=mask)


def euler_maruyama_step_launch(
    x, v_cond, v_uncond, noise, index, out, copy, factors, cfg_scale, seed, step
) -> Launch:
    of_x, of_v, of_noise = factors
    elements = math.prod(x.shape[1:])
    blocks = triton.cdiv(elements, BLOCK)
    return Launch(
        euler_maruyama_step_kernel,
        grid=len(x) * blocks,
        arguments={
            "x": x, "v_cond": v_cond, "v_uncond": v_uncond, "noise": noise, "index": index,
            "out": out, "copy": copy,
            "of_x": of_x, "of_v": of_v, "of_noise": of_noise, "cfg_scale": cfg_scale,
            "seed": seed, "step": step, "elements": elements, "blocks": blocks,
        },
        constants={"BLOCK": BLOCK},
        warps=4,
    )  # fmt: skip


def step_(x, v_cond, v_uncond, noise, index, factors, cfg_scale, seed, step, copy_dtype):
    """Return the next state, and its copy in `copy_dtype` (empty if that is the dtype of x)."""
    x, v_cond, v_uncond, noise, index = (
        None if tensor is None else tensor.contiguous()
        for tensor in (x, v_cond, v_uncond, noise, index)
    )
    out = torch.empty_like(x)
    wanted = copy_dtype != x.dtype
    copy = torch.empty(x.shape if wanted else (0,), dtype=copy_dtype, device=x.device)
    target = copy if wanted else None
    euler_maruyama_step_launch(
        x, v_cond, v_uncond, noise, index, out, target, factors, cfg_scale, seed, step
    ).run()
    return out, copy
