"""Contract of euler_maruyama_step and its implementations."""

from typing import Protocol

import torch

from repa_fast.backend.dispatch import DTYPES, runs_triton
from repa_fast.backend.registration import define
from repa_fast.contracts import expect_floating, expect_shape

from .reference import euler_maruyama_step_reference, standard_normal

OP = "euler_maruyama_step"
STATES = (torch.float32, torch.float64)


class Path(Protocol):
    """An interpolant, as in repa_fast.diffusion.path."""

    def at(self, t: float) -> tuple[float, float, float, float]:
        """Return alpha, sigma and their time derivatives at t, computed in fp64."""


def euler_maruyama_step(
    x: torch.Tensor,
    v_cond: torch.Tensor,
    v_uncond: torch.Tensor | None,
    t: float,
    dt: float,
    *,
    path: Path,
    diffusion: float = 0.0,
    cfg_scale: float = 1.0,
    noise: torch.Tensor | None = None,
    seed: int | None = None,
    step: int = 0,
    index: torch.Tensor | None = None,
    implementation: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Step dx = (v - w s / 2) dt + sqrt(w) dW once (REPA, arXiv 2410.06940, eq. 6 and 7).

    v = v_uncond + cfg_scale (v_cond - v_uncond), s is the score that v and the path imply, and the
    noise z adds sqrt(w |dt|) z. Without diffusion this is Euler's step of the ODE.

    Args:
        x: (B, ...), the state, fp32 or fp64; everything is computed in its dtype.
        v_cond: (B, ...), the model's velocity, any floating dtype.
        v_uncond: the velocity for the null label, or None without guidance.
        t: time of x in (0, 1]; dt: to the next time, negative towards the data.
        path: gives the score; only used with diffusion.
        diffusion: w.
        noise: (B, ...), z; or
        seed: draws z as a function of (seed, step, number of the sample, position in it), the same
            on every device and for every batch. Neither: no noise.
        step: number of this step, at least 0 and below 2^31.
        index: (B) int64, numbers of the samples; 0 to B - 1 if None.
        implementation: "auto", "triton" or "reference"; what the process asks for if None.

    Returns:
        (next state in the dtype of x, the same in the dtype of v_cond for the next evaluation).

    Raises:
        ValueError: a shape, dtype or device that does not fit; noise and seed both given; tensors
            that require a gradient while one is recorded: the step has none.
    """
    _check_tensors(x, v_cond, v_uncond, noise)
    index = _numbers(x, noise, seed, step, index)
    coefficients = path.at(t) if diffusion else (1.0, 0.0, 0.0, 0.0)
    state = [x, *(tensor for tensor in (v_cond, v_uncond, noise) if tensor is not None)]
    if runs_triton(OP, implementation, *state, dtypes=(*DTYPES, torch.float64)):
        factors = _factors(coefficients, diffusion, dt)
        out, copy = euler_maruyama_step_kernel(
            x, v_cond, v_uncond, noise, index, factors, cfg_scale, seed or 0, step, v_cond.dtype
        )
        return out, out if v_cond.dtype == x.dtype else copy
    noise = noise if index is None else standard_normal(x.shape, seed, step, index)
    out = euler_maruyama_step_reference(
        x, v_cond, v_uncond, dt, coefficients, diffusion, cfg_scale, noise
    )
    return out, out.to(v_cond.dtype)


def _check_tensors(x, v_cond, v_uncond, noise) -> None:
    if x.dtype not in STATES or x.ndim < 1:
        raise ValueError(f"{OP}: x is {x.dtype} {tuple(x.shape)}, expected (B, ...) fp32 or fp64")
    for name, tensor in (("v_cond", v_cond), ("v_uncond", v_uncond), ("noise", noise)):
        if tensor is not None:
            expect_shape(OP, name, tensor, x.shape)
            expect_floating(OP, name, tensor)
            if torch.is_grad_enabled() and tensor.requires_grad:
                raise ValueError(f"{OP}: {name} requires a gradient, expected torch.no_grad()")
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError(f"{OP}: x requires a gradient, expected torch.no_grad()")


def _numbers(x, noise, seed, step, index) -> torch.Tensor | None:
    """Return the numbers of the samples, (B) int64, where noise is drawn by them, or None."""
    if index is not None:
        expect_shape(OP, "index", index, x.shape[:1])
        if index.dtype != torch.int64 or index.device != x.device:
            raise ValueError(
                f"{OP}: index is {index.dtype} on {index.device}, expected torch.int64 "
                f"on {x.device}"
            )
    if seed is None:
        return None
    if noise is not None:
        raise ValueError(f"{OP}: noise and seed are both given, expected one of them at most")
    if not (0 <= seed < 2**63 and 0 <= step < 2**31):
        raise ValueError(f"{OP}: seed {seed}, step {step}, expected 0 <= seed < 2^63, step < 2^31")
    return torch.arange(len(x), device=x.device) if index is None else index


def _factors(coefficients: tuple[float, ...], diffusion: float, dt: float) -> list[float]:
    """Return the factors of x, v and z in the next state, which is linear in them."""
    if not diffusion:
        return [1.0, dt, 0.0]
    alpha, sigma, d_alpha, d_sigma = coefficients
    strength = diffusion / 2 / (sigma * (d_alpha * sigma - alpha * d_sigma))
    return [
        1 + dt * strength * d_alpha,
        dt * (1 - strength * alpha),
        (diffusion * abs(dt)) ** 0.5,
    ]


def _step_fake(x, v_cond, v_uncond, noise, index, factors, cfg_scale, seed, step, copy_dtype):
    shape = x.shape if copy_dtype != x.dtype else (0,)
    return x.new_empty(x.shape), x.new_empty(shape, dtype=copy_dtype)


euler_maruyama_step_kernel = define(
    "euler_maruyama_step(Tensor x, Tensor v_cond, Tensor? v_uncond, Tensor? noise, Tensor? index,"
    " float[] factors, float cfg_scale, int seed, int step, ScalarType copy_dtype)"
    " -> (Tensor, Tensor)",
    __package__,
    "step_",
    _step_fake,
)
