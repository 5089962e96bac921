"""The probability-flow ODE with adaptive steps: torchdiffeq's dopri5, SiT's default."""

import torch

from repa_fast.diffusion.guidance import guided_velocities
from repa_fast.diffusion.path import Path, linear
from repa_fast.diffusion.prediction import sampling_interval
from repa_fast.diffusion.samplers import initial_state


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
    """Integrate dx/dt = v(x, t) from noise to data by Dormand and Prince's method.

    Where guidance begins and ends the field jumps; the stretches between are integrated one after
    the other. The error is estimated over the whole batch, so a sample depends on its batch within
    the tolerances. Every step synchronises with the device.

    Arguments as for `repa_fast.diffusion.samplers.euler`, and:
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
            return _mixed(*velocities(x, x.to(latents.dtype), t, (first + last) / 2), x, cfg_scale)

        times = torch.tensor([first, last], dtype=torch.float64, device=x.device)
        options = {"step_t": times[1:]}  # end there, not beyond it with interpolation back
        x = odeint(velocity, x, times, rtol=rtol, atol=atol, method="dopri5", options=options)[-1]
    return x, evaluations


def _mixed(
    conditional: torch.Tensor, null: torch.Tensor | None, x: torch.Tensor, cfg_scale: float
) -> torch.Tensor:
    """The guided velocity in the dtype of x."""
    conditional = conditional.to(x.dtype)
    if null is None:
        return conditional
    null = null.to(x.dtype)
    return null + cfg_scale * (conditional - null)
