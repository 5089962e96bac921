"""Samplers of REPA: Euler (with Heun) on the probability-flow ODE, Euler-Maruyama on the SDE.

Time runs from t = 1 (noise) to t = 0 (data). The state is kept in fp64; the model is called in the
dtype of the given latents and returns (velocity, ...). The schedules are those of REPA's released
samplers: a uniform grid for the ODE; for the SDE a uniform grid from 1 to 0.04 and one step
without noise from 0.04 to 0, with diffusion w_t = 2t on every path.
"""

from collections.abc import Callable

import torch

from repa_fast.contracts import expect_choice, expect_shape
from repa_fast.diffusion.path import Path, linear

LAST_SDE_TIME = 0.04

Velocity = Callable[[torch.Tensor, float, float], torch.Tensor]


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
    velocity = _guided_velocity(model, latents, labels, cfg_scale, guidance_interval)
    times = ode_times(num_steps).tolist()
    x = latents.to(torch.float64)
    for step, (t, t_next) in enumerate(zip(times[:-1], times[1:], strict=True)):
        v = velocity(x, t, t)
        x_next = x + (t_next - t) * v
        if heun and step < num_steps - 1:
            x_next = x + (t_next - t) * 0.5 * (v + velocity(x_next, t_next, t))
        x = x_next
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
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Integrate the reverse SDE dx = (v - w_t s / 2) dt + sqrt(w_t) dW, w_t = 2t.

    Arguments as for `euler`, and:
        path: gives the score s from the velocity.
        noise: (num_steps - 1, B, C, h, w), the standard normal increments; drawn if None.
        generator: for drawing them, on the device of `latents`.

    Returns:
        (B, C, h, w), fp64, after num_steps model evaluations (twice the batch under guidance).

    Raises:
        ValueError: as for `euler`, or noise of another shape.
    """
    times = sde_times(num_steps)
    if noise is not None:
        expect_shape("euler_maruyama", "noise", noise, (num_steps - 1, *latents.shape))
    velocity = _guided_velocity(model, latents, labels, cfg_scale, guidance_interval)
    x = latents.to(torch.float64)
    for step in range(num_steps):
        t, dt = times[step], times[step + 1] - times[step]
        v = velocity(x, t.item(), t.item())
        drift = v - t * path.score(v, x, t)  # w_t / 2 = t
        x = x + drift * dt
        if step < num_steps - 1:
            if noise is None:
                increment = torch.randn(
                    x.shape, dtype=x.dtype, device=x.device, generator=generator
                )
            else:
                increment = noise[step].to(x)
            x = x + (2 * t * dt.abs()).sqrt() * increment
    return x


def sample(
    model: torch.nn.Module,
    latents: torch.Tensor,
    labels: torch.Tensor,
    *,
    mode: str,
    generator: torch.Generator | None = None,
    **options,
) -> torch.Tensor:
    """`euler` for mode "ode", `euler_maruyama` for mode "sde"; `generator` serves the latter."""
    expect_choice("mode", mode, ("ode", "sde"))
    if mode == "ode":
        return euler(model, latents, labels, **options)
    return euler_maruyama(model, latents, labels, generator=generator, **options)


def _guided_velocity(
    model: torch.nn.Module,
    latents: torch.Tensor,
    labels: torch.Tensor,
    cfg_scale: float,
    guidance_interval: tuple[float, float],
) -> Velocity:
    """velocity(x, t, t_guidance) -> fp64; outside the interval only the conditional half runs."""
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
        x = x.to(latents.dtype)
        return model(x, torch.full((len(x),), t, dtype=x.dtype, device=x.device), y)[0].double()

    def velocity(x: torch.Tensor, t: float, t_guidance: float) -> torch.Tensor:
        if cfg_scale == 1.0 or not low_t <= t_guidance <= high_t:
            return evaluate(x, t, labels)
        y = torch.cat([labels, torch.full_like(labels, num_classes)])
        conditional, null = evaluate(torch.cat([x, x]), t, y).chunk(2)
        return null + cfg_scale * (conditional - null)

    return velocity


def _expect_steps(num_steps: int, at_least: int) -> None:
    if num_steps < at_least:
        raise ValueError(f"num_steps is {num_steps}, expected at least {at_least}")
