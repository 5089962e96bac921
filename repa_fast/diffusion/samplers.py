"""Samplers: Euler (with Heun) and dopri5 on the probability-flow ODE, Euler-Maruyama on the SDE.

Time runs from t = 1 (noise) to t = 0 (data). The state is kept in fp64 or fp32; the model is called
in the dtype of the given latents and returns (prediction, ...). The defaults are REPA's released
samplers: a uniform grid for the ODE; for the SDE a uniform grid from 1 to 0.04 and one step
without noise from 0.04 to 0, with diffusion w_t = 2t on every path. The options are those of SiT
(arXiv 2401.08740). A step of the SDE evaluates the model once, for drift and score together.
"""

import functools
import itertools

import torch
from torch import Tensor

from repa_fast import ops
from repa_fast.contracts import expect_choice, expect_shape
from repa_fast.diffusion.forms import diffusion
from repa_fast.diffusion.guidance import Field, Outputs
from repa_fast.diffusion.prediction import clean_factors, sampling_interval

LAST_SDE_TIME = 0.04
LAST_STEPS = ("mean", "euler", "tweedie", "none")


def ode_times(num_steps: int, start: float = 1.0, stop: float = 0.0) -> Tensor:
    """Return (num_steps + 1) times from start to stop, fp64."""
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}, expected at least 1")
    return torch.linspace(start, stop, num_steps + 1, dtype=torch.float64)


def sde_times(num_steps: int, start: float = 1.0, stop: float = LAST_SDE_TIME) -> Tensor:
    """Return fp64 times: of num_steps - 1 stochastic steps from start to stop, and one to 0."""
    if num_steps < 2:
        raise ValueError(f"num_steps is {num_steps}, expected at least 2")
    grid = torch.linspace(start, stop, num_steps, dtype=torch.float64)
    return torch.cat([grid, torch.zeros(1, dtype=torch.float64)])


@torch.no_grad()
def euler(
    model: torch.nn.Module,
    latents: Tensor,
    labels: Tensor,
    *,
    num_steps: int = 50,
    heun: bool = False,
    **options,
) -> Tensor:
    """Integrate dx/dt = v(x, t) from noise to data.

    Options beside those below are the fields of `repa_fast.diffusion.guidance.Field`.

    Args:
        model: see `repa_fast.diffusion.guidance.Field`.
        latents: (B, C, h, w), standard normal noise.
        labels: (B), int64.
        num_steps: steps; Heun evaluates twice per step but the last.
        heun: second-order correction.

    Returns:
        (B, C, h, w) in the state's dtype.

    Raises:
        ValueError: as for Field; too few steps, or an option that is none of those named.
    """
    field = Field(model, latents, labels, **options)
    times = ode_times(num_steps, *sampling_interval(field.path, field.prediction)).tolist()
    x, copy = initial_state(latents, field.state_dtype), latents
    for number, (t, t_next) in enumerate(itertools.pairwise(times)):
        dt = t_next - t
        v = field.velocities(x, copy, t, t)
        if heun and number < num_steps - 1:
            end, end_copy = _advance(field, x, v, t, dt)
            half, _ = _advance(field, x, v, t, dt / 2)
            v = field.velocities(end, end_copy, t_next, t)
            x, copy = _advance(field, half, v, t_next, dt / 2)
        else:
            x, copy = _advance(field, x, v, t, dt)
    return x


@torch.no_grad()
def euler_maruyama(
    model: torch.nn.Module,
    latents: Tensor,
    labels: Tensor,
    *,
    num_steps: int = 250,
    diffusion_form: str = "linear",
    diffusion_norm: float = 1.0,
    last_step: str = "mean",
    last_step_size: float = LAST_SDE_TIME,
    noise: Tensor | None = None,
    seed: int = 0,
    index: Tensor | None = None,
    **options,
) -> Tensor:
    """Integrate the reverse SDE dx = (v - w_t s / 2) dt + sqrt(w_t) dW, s the score.

    num_steps - 1 stochastic steps lead to t = last_step_size, the last step to the data; each
    evaluates the model once. Result, errors and other arguments are those of `euler`.

    Args:
        diffusion_form: of w_t, see `repa_fast.diffusion.forms`; 2t by default. "SBDM" starts at
            0.999 on the linear and cosine paths.
        diffusion_norm: the norm in that formula.
        last_step: "mean" is the drift of the SDE, "euler" that of the ODE, "tweedie" the mean of
            the clean latents given the noisy ones; "none" goes with the stochastic steps to t = 0
            (to 0.001 on the VP path, for scores, for noise and for SBDM).
        last_step_size: length of that step, between 0 and 1.
        noise: (num_steps - 1, B, C, h, w), the standard normal increments; drawn if None.
        seed: for drawing them, together with the step and the sample's number.
        index: (B) int64, the samples' numbers; 0 to B - 1 if None.
    """
    expect_choice("last_step", last_step, LAST_STEPS)
    if not 0 < last_step_size < 1:
        raise ValueError(f"last_step_size is {last_step_size}, expected between 0 and 1")
    if noise is not None:
        expect_shape("euler_maruyama", "noise", noise, (num_steps - 1, *latents.shape))
    field = Field(model, latents, labels, **options)
    start, stop = sampling_interval(field.path, field.prediction, diffusion_form)
    times = sde_times(num_steps, start, stop if last_step == "none" else last_step_size).tolist()
    w = functools.partial(diffusion, diffusion_form, path=field.path, norm=diffusion_norm)
    x, copy = initial_state(latents, field.state_dtype), latents
    for number, (t, t_next) in enumerate(itertools.pairwise(times[:-1])):
        drawn = {"seed": seed, "step": number, "index": index}
        increments = drawn if noise is None else {"noise": noise[number]}
        v = field.velocities(x, copy, t, t)
        x, copy = _advance(field, x, v, t, t_next - t, diffusion=w(t), **increments)
    if last_step == "none":
        return x
    t = times[-2]
    v = field.velocities(x, copy, t, t)
    if last_step == "tweedie":
        of_x, of_v = clean_factors(t, field.path)
        return _advance(field, of_x * x, v, t, of_v)[0]
    return _advance(field, x, v, t, -t, diffusion=w(t) if last_step == "mean" else 0.0)[0]


@torch.no_grad()
def dopri5(
    model: torch.nn.Module,
    latents: Tensor,
    labels: Tensor,
    *,
    rtol: float = 1e-3,
    atol: float = 1e-6,
    **options,
) -> tuple[Tensor, int]:
    """Integrate dx/dt = v(x, t) from noise to data by Dormand and Prince's method (SiT's default).

    Where guidance begins and ends the field jumps; the stretches between are integrated one after
    the other. The error is estimated over the whole batch, so a sample depends on its batch within
    the tolerances. Every step synchronises with the device.

    Other arguments and errors as for `euler`; ValueError also without the package torchdiffeq.

    Args:
        rtol: relative bound of a step's root-mean-square error.
        atol: its absolute bound.

    Returns:
        ((B, C, h, w) in the state's dtype, number of model evaluations).
    """
    if reason := why_not_adaptive():
        raise ValueError(f"dopri5 {reason}")
    from torchdiffeq import odeint

    field = Field(model, latents, labels, **options)
    start, stop = sampling_interval(field.path, field.prediction)
    jumps = {t for t in field.guidance_interval if stop < t < start and field.cfg_scale != 1.0}
    x = initial_state(latents, field.state_dtype)
    evaluations = 0
    for first, last in itertools.pairwise([start, *sorted(jumps, reverse=True), stop]):

        def velocity(time: Tensor, x: Tensor, first=first, last=last) -> Tensor:
            nonlocal evaluations
            evaluations += 1
            t = min(max(time.item(), last), first)  # the probe for the first step may lie outside
            return field.mix(*field.velocities(x, x.to(latents.dtype), t, (first + last) / 2))

        times = torch.tensor([first, last], dtype=torch.float64, device=x.device)
        end = {"step_t": times[1:]}  # not beyond it with interpolation back
        x = odeint(velocity, x, times, rtol=rtol, atol=atol, method="dopri5", options=end)[-1]
    return x, evaluations


def why_not_adaptive() -> str:
    """Return why adaptive steps cannot be taken, with the package to install; "" if they can."""
    try:
        import torchdiffeq  # noqa: F401
    except ImportError as error:
        return f"needs the package torchdiffeq ({error}): pip install 'repa-fast[eval]'"
    return ""


def sample(
    model: torch.nn.Module,
    latents: Tensor,
    labels: Tensor,
    *,
    mode: str,
    seed: int = 0,
    index: Tensor | None = None,
    **options,
) -> Tensor:
    """Draw by `euler` for mode "ode", by `euler_maruyama`, with seed and index, for "sde"."""
    expect_choice("mode", mode, ("ode", "sde"))
    if mode == "ode":
        return euler(model, latents, labels, **options)
    return euler_maruyama(model, latents, labels, seed=seed, index=index, **options)


def initial_state(latents: Tensor, state_dtype: torch.dtype) -> Tensor:
    """Return the latents in `state_dtype`; raise ValueError unless it is fp64 or fp32."""
    if state_dtype not in (torch.float64, torch.float32):
        raise ValueError(f"state_dtype is {state_dtype}, expected torch.float64 or torch.float32")
    return latents.to(state_dtype)


def _advance(
    field: Field, x: Tensor, v: Outputs, t: float, dt: float, **options
) -> tuple[Tensor, Tensor]:
    """Return the next state, and the same in the latents' dtype."""
    x, copy = ops.euler_maruyama_step(
        x, *v, t, dt, path=field.path, cfg_scale=field.cfg_scale, **options
    )
    return x, copy if copy.dtype == field.latents.dtype else x.to(field.latents.dtype)
