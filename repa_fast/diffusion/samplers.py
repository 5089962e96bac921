"""Samplers: Euler (with Heun) and dopri5 on the probability-flow ODE, Euler-Maruyama on the SDE.

Time runs from t = 1 (noise) to t = 0 (data). The state is kept in fp64 or fp32; the model is called
in the dtype of the given latents and returns (prediction, ...). The defaults are REPA's released
samplers: a uniform grid for the ODE; for the SDE a uniform grid from 1 to 0.04 and one step
without noise from 0.04 to 0, with diffusion w_t = 2t on every path. The options are those of SiT
(arXiv 2401.08740). A step of the SDE evaluates the model once, for drift and score together.
"""

import functools
from collections.abc import Callable

import torch

from repa_fast import ops
from repa_fast.contracts import expect_choice, expect_shape
from repa_fast.diffusion.forms import diffusion
from repa_fast.diffusion.guidance import guided_velocities, mix
from repa_fast.diffusion.path import Path, linear
from repa_fast.diffusion.prediction import clean_factors, sampling_interval

LAST_SDE_TIME = 0.04
LAST_STEPS = ("mean", "euler", "tweedie", "none")


def ode_times(num_steps: int, start: float = 1.0, stop: float = 0.0) -> torch.Tensor:
    """Return (num_steps + 1) times from start to stop, fp64."""
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}, expected at least 1")
    return torch.linspace(start, stop, num_steps + 1, dtype=torch.float64)


def sde_times(num_steps: int, start: float = 1.0, stop: float = LAST_SDE_TIME) -> torch.Tensor:
    """Return fp64 times: of num_steps - 1 stochastic steps from start to stop, and one to 0."""
    if num_steps < 2:
        raise ValueError(f"num_steps is {num_steps}, expected at least 2")
    grid = torch.linspace(start, stop, num_steps, dtype=torch.float64)
    return torch.cat([grid, torch.zeros(1, dtype=torch.float64)])


@torch.no_grad()
def euler(
    model: torch.nn.Module,
    latents: torch.Tensor,
    labels: torch.Tensor,
    *,
    num_steps: int = 50,
    cfg_scale: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    guidance_channels: int | None = None,
    path: Path = linear,
    prediction: str = "v",
    state_dtype: torch.dtype = torch.float64,
    heun: bool = False,
) -> torch.Tensor:
    """Integrate dx/dt = v(x, t) from noise to data.

    Args:
        model: in eval mode; model(x, t, y) -> (prediction, ...); has `num_classes` for guidance.
        latents: (B, C, h, w), standard normal noise; its dtype is the model's.
        labels: (B), int64 classes.
        num_steps: steps; Heun evaluates twice per step but the last.
        cfg_scale: guidance scale, v_uncond + s (v_cond - v_uncond); 1 is none.
        guidance_interval: guidance acts while low <= t <= high (t at the start of the step).
        guidance_channels: guide this many leading channels, the others follow v_cond; None for
            all. SiT and DiT guide 3.
        path: turns a score or noise into a velocity, and says where the ODE stops: t = 0, on the
            VP path 0.001.
        prediction: of the model: "v", or "score" or "noise", which are integrated from 0.999 (on
            the VP path from 1) to 0.001.
        state_dtype: fp64 or fp32, in which x is kept and advanced.
        heun: second-order correction.

    Returns:
        (B, C, h, w) in the state's dtype.

    Raises:
        ValueError: labels out of range or of another batch size, too few steps, or an option that
            is none of those named here.
    """
    velocities = guided_velocities(
        model, latents, labels, cfg_scale, guidance_interval, guidance_channels, path, prediction
    )
    times = ode_times(num_steps, *sampling_interval(path, prediction)).tolist()
    advance = _stepper(latents.dtype, path, cfg_scale)
    x, copy = initial_state(latents, state_dtype), latents
    for number, (t, t_next) in enumerate(zip(times[:-1], times[1:], strict=True)):
        dt = t_next - t
        v = velocities(x, copy, t, t)
        if heun and number < num_steps - 1:
            end, end_copy = advance(x, *v, t, dt)
            half, _ = advance(x, *v, t, dt / 2)
            x, copy = advance(half, *velocities(end, end_copy, t_next, t), t_next, dt / 2)
        else:
            x, copy = advance(x, *v, t, dt)
    return x


@torch.no_grad()
def euler_maruyama(
    model: torch.nn.Module,
    latents: torch.Tensor,
    labels: torch.Tensor,
    *,
    num_steps: int = 250,
    cfg_scale: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    guidance_channels: int | None = None,
    path: Path = linear,
    prediction: str = "v",
    state_dtype: torch.dtype = torch.float64,
    diffusion_form: str = "linear",
    diffusion_norm: float = 1.0,
    last_step: str = "mean",
    last_step_size: float = LAST_SDE_TIME,
    noise: torch.Tensor | None = None,
    seed: int = 0,
    index: torch.Tensor | None = None,
) -> torch.Tensor:
    """Integrate the reverse SDE dx = (v - w_t s / 2) dt + sqrt(w_t) dW.

    num_steps - 1 stochastic steps lead to t = last_step_size, the last step to the data; each
    evaluates the model once.

    Arguments, result and errors as for `euler`, and:
        path: also gives the score s from the velocity.
        diffusion_form, diffusion_norm: w_t, see `repa_fast.diffusion.forms`; 2t by default. "SBDM"
            starts at 0.999 on the linear and cosine paths.
        last_step: "mean" is the drift of the SDE, "euler" that of the ODE, "tweedie" the mean of
            the clean latents given the noisy ones; "none" goes with the stochastic steps to t = 0
            (to 0.001 on the VP path, for scores, for noise and for SBDM).
        last_step_size: length of that step, between 0 and 1.
        noise: (num_steps - 1, B, C, h, w), the standard normal increments; drawn if None.
        seed: for drawing them, together with the step and the sample's number.
        index: (B) int64, the samples' numbers; 0 to B - 1 if None.
    """
    grid = _sde_grid(num_steps, path, prediction, diffusion_form, last_step, last_step_size)
    if noise is not None:
        expect_shape("euler_maruyama", "noise", noise, (num_steps - 1, *latents.shape))
    velocities = guided_velocities(
        model, latents, labels, cfg_scale, guidance_interval, guidance_channels, path, prediction
    )
    w = functools.partial(diffusion, diffusion_form, path=path, norm=diffusion_norm)
    advance = _stepper(latents.dtype, path, cfg_scale)
    x, copy = initial_state(latents, state_dtype), latents
    for number, (t, t_next) in enumerate(zip(grid[:-1], grid[1:], strict=True)):
        drawn = {"seed": seed, "step": number, "index": index}
        increments = drawn if noise is None else {"noise": noise[number]}
        v = velocities(x, copy, t, t)
        x, copy = advance(x, *v, t, t_next - t, diffusion=w(t), **increments)
    if last_step == "none":
        return x
    t = grid[-1]
    v = velocities(x, copy, t, t)
    if last_step == "tweedie":
        of_x, of_v = clean_factors(t, path)
        return advance(of_x * x, *v, t, of_v)[0]
    return advance(x, *v, t, -t, diffusion=w(t) if last_step == "mean" else 0.0)[0]


@torch.no_grad()
def dopri5(
    model: torch.nn.Module,
    latents: torch.Tensor,
    labels: torch.Tensor,
    *,
    rtol: float = 1e-3,
    atol: float = 1e-6,
    cfg_scale: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    guidance_channels: int | None = None,
    path: Path = linear,
    prediction: str = "v",
    state_dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, int]:
    """Integrate dx/dt = v(x, t) from noise to data by Dormand and Prince's method (SiT's default).

    Where guidance begins and ends the field jumps; the stretches between are integrated one after
    the other. The error is estimated over the whole batch, so a sample depends on its batch within
    the tolerances. Every step synchronises with the device.

    Arguments as for `euler`, and:
        rtol, atol: bounds of a step's root-mean-square error, relative and absolute.

    Returns:
        ((B, C, h, w) in the state's dtype, number of model evaluations).

    Raises:
        ValueError: as for `euler`, or the package torchdiffeq is not installed.
    """
    try:
        from torchdiffeq import odeint
    except ImportError as error:
        raise ValueError(
            "dopri5 needs the package torchdiffeq, which is not installed: pip install torchdiffeq"
        ) from error

    velocities = guided_velocities(
        model, latents, labels, cfg_scale, guidance_interval, guidance_channels, path, prediction
    )
    start, stop = sampling_interval(path, prediction)
    jumps = {t for t in guidance_interval if stop < t < start and cfg_scale != 1.0}
    borders = [start, *sorted(jumps, reverse=True), stop]
    x = initial_state(latents, state_dtype)
    evaluations = 0
    for first, last in zip(borders[:-1], borders[1:], strict=True):

        def velocity(time: torch.Tensor, x: torch.Tensor, first=first, last=last) -> torch.Tensor:
            nonlocal evaluations
            evaluations += 1
            t = min(max(time.item(), last), first)  # the probe for the first step may lie outside
            both = velocities(x, x.to(latents.dtype), t, (first + last) / 2)
            return mix(*both, cfg_scale, x.dtype)

        times = torch.tensor([first, last], dtype=torch.float64, device=x.device)
        options = {"step_t": times[1:]}  # end there, not beyond it with interpolation back
        x = odeint(velocity, x, times, rtol=rtol, atol=atol, method="dopri5", options=options)[-1]
    return x, evaluations


def sample(
    model: torch.nn.Module,
    latents: torch.Tensor,
    labels: torch.Tensor,
    *,
    mode: str,
    seed: int = 0,
    index: torch.Tensor | None = None,
    **options,
) -> torch.Tensor:
    """Draw by `euler` for mode "ode", by `euler_maruyama`, with seed and index, for "sde"."""
    expect_choice("mode", mode, ("ode", "sde"))
    if mode == "ode":
        return euler(model, latents, labels, **options)
    return euler_maruyama(model, latents, labels, seed=seed, index=index, **options)


def initial_state(latents: torch.Tensor, state_dtype: torch.dtype) -> torch.Tensor:
    """Return the latents in `state_dtype`; raise ValueError unless it is fp64 or fp32."""
    if state_dtype not in (torch.float64, torch.float32):
        raise ValueError(f"state_dtype is {state_dtype}, expected torch.float64 or torch.float32")
    return latents.to(state_dtype)


def _sde_grid(
    num_steps: int,
    path: Path,
    prediction: str,
    diffusion_form: str,
    last_step: str,
    last_step_size: float,
) -> list[float]:
    """Return the times at which the stochastic steps begin, and the one at which they end."""
    expect_choice("last_step", last_step, LAST_STEPS)
    if not 0 < last_step_size < 1:
        raise ValueError(f"last_step_size is {last_step_size}, expected between 0 and 1")
    start, stop = sampling_interval(path, prediction, diffusion_form)
    return sde_times(num_steps, start, stop if last_step == "none" else last_step_size)[
        :-1
    ].tolist()


def _stepper(dtype: torch.dtype, path: Path, cfg_scale: float) -> Callable:
    """Return ops.euler_maruyama_step with the next state in `dtype` as its second result."""

    def advance(*arguments, **options) -> tuple[torch.Tensor, torch.Tensor]:
        x, copy = ops.euler_maruyama_step(*arguments, path=path, cfg_scale=cfg_scale, **options)
        return x, copy if copy.dtype == dtype else x.to(dtype)

    return advance
