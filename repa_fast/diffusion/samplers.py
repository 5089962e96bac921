"""Samplers of REPA: Euler (with Heun) on the probability-flow ODE, Euler-Maruyama on the SDE.

Time runs from t = 1 (noise) to t = 0 (data). The state is kept in fp64; the model is called in the
dtype of the given latents and returns (velocity, ...). The schedules are those of REPA's released
samplers: a uniform grid for the ODE; for the SDE a uniform grid from 1 to 0.04 and one step
without noise from 0.04 to 0, with diffusion w_t = 2t on every path.
"""

import functools
from collections.abc import Callable

import torch

from repa_fast import ops
from repa_fast.contracts import expect_choice, expect_shape
from repa_fast.diffusion.path import Path, linear

LAST_SDE_TIME = 0.04

Velocities = Callable[[torch.Tensor, float, float], tuple[torch.Tensor, torch.Tensor | None]]


def ode_times(num_steps: int) -> torch.Tensor:
    """(num_steps + 1) times from 1 to 0, fp64."""
    _expect_steps(num_steps, at_least=1)
    return torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)


def sde_times(num_steps: int) -> torch.Tensor:
    """(num_steps + 1) times: num_steps - 1 stochastic steps from 1 to 0.04, one step to 0; fp64."""
    _expect_steps(num_steps, at_least=2)
    grid = torch.linspace(1, LAST_SDE_TIME, num_steps, dtype=torch.float64)
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
    path: Path = linear,
    heun: bool = False,
) -> torch.Tensor:
    """Integrate dx/dt = v(x, t) from noise to data.

    Args:
        model: in eval mode; model(x, t, y) -> (velocity, ...); has `num_classes` for guidance.
        latents: (B, C, h, w), standard normal noise; its dtype is the model's.
        labels: (B), int64 classes.
        num_steps: steps; Heun evaluates twice per step but the last.
        cfg_scale: guidance scale, v_uncond + s (v_cond - v_uncond); 1 is none.
        guidance_interval: guidance acts while low <= t <= high (t at the start of the step).
        path: without effect on the ODE; accepted so that the samplers are interchangeable.
        heun: second-order correction.

    Returns:
        (B, C, h, w), fp64.

    Raises:
        ValueError: labels out of range or of another batch size, or too few steps.
    """
    velocities = _velocities(model, latents, labels, cfg_scale, guidance_interval)
    times = ode_times(num_steps).tolist()
    advance = functools.partial(ops.euler_maruyama_step, path=path, cfg_scale=cfg_scale)
    x, copy = latents.to(torch.float64), latents
    for number, (t, t_next) in enumerate(zip(times[:-1], times[1:], strict=True)):
        dt = t_next - t
        v = velocities(copy, t, t)
        if heun and number < num_steps - 1:
            _, end = advance(x, *v, t, dt)
            half, _ = advance(x, *v, t, dt / 2)
            x, copy = advance(half, *velocities(end, t_next, t), t_next, dt / 2)
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
    path: Path = linear,
    noise: torch.Tensor | None = None,
    seed: int = 0,
    index: torch.Tensor | None = None,
) -> torch.Tensor:
    """Integrate the reverse SDE dx = (v - w_t s / 2) dt + sqrt(w_t) dW, w_t = 2t.

    Arguments as for `euler`, and:
        path: gives the score s from the velocity.
        noise: (num_steps - 1, B, C, h, w), the standard normal increments; drawn if None.
        seed: for drawing them, together with the step and the sample's number.
        index: (B) int64, the samples' numbers; 0 to B - 1 if None.

    Returns:
        (B, C, h, w), fp64, after num_steps model evaluations (twice the batch under guidance).

    Raises:
        ValueError: as for `euler`, or noise of another shape.
    """
    times = sde_times(num_steps).tolist()
    if noise is not None:
        expect_shape("euler_maruyama", "noise", noise, (num_steps - 1, *latents.shape))
    velocities = _velocities(model, latents, labels, cfg_scale, guidance_interval)
    x, copy = latents.to(torch.float64), latents
    for number, (t, t_next) in enumerate(zip(times[:-1], times[1:], strict=True)):
        last = number == num_steps - 1
        x, copy = ops.euler_maruyama_step(
            x,
            *velocities(copy, t, t),
            t,
            t_next - t,
            path=path,
            diffusion=2 * t,
            cfg_scale=cfg_scale,
            noise=None if last or noise is None else noise[number],
            seed=None if last or noise is not None else seed,
            step=number,
            index=index,
        )
    return x


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
    """`euler` for mode "ode", `euler_maruyama` for "sde"; `seed` and `index` serve the latter."""
    expect_choice("mode", mode, ("ode", "sde"))
    if mode == "ode":
        return euler(model, latents, labels, **options)
    return euler_maruyama(model, latents, labels, seed=seed, index=index, **options)


def _velocities(
    model: torch.nn.Module,
    latents: torch.Tensor,
    labels: torch.Tensor,
    cfg_scale: float,
    guidance_interval: tuple[float, float],
) -> Velocities:
    """velocities(x, t, t_guidance) -> conditional, and inside the interval unconditional ones."""
    expect_shape("sampler", "labels", labels, latents.shape[:1])
    num_classes = getattr(model, "num_classes", None)
    if num_classes is not None and labels.numel():
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high > num_classes:
            raise ValueError(f"labels lie in [{low}, {high}], expected [0, {num_classes}]")
    if cfg_scale != 1.0 and num_classes is None:
        raise ValueError("guidance needs the null label: the model has no attribute num_classes")
    low_t, high_t = guidance_interval

    def evaluate(x: torch.Tensor, t: float, y: torch.Tensor) -> torch.Tensor:
        return model(x, torch.full((len(x),), t, dtype=x.dtype, device=x.device), y)[0]

    def velocities(
        x: torch.Tensor, t: float, t_guidance: float
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if cfg_scale == 1.0 or not low_t <= t_guidance <= high_t:
            return evaluate(x, t, labels), None
        y = torch.cat([labels, torch.full_like(labels, num_classes)])
        return evaluate(torch.cat([x, x]), t, y).chunk(2)

    return velocities


def _expect_steps(num_steps: int, at_least: int) -> None:
    if num_steps < at_least:
        raise ValueError(f"num_steps is {num_steps}, expected at least {at_least}")
