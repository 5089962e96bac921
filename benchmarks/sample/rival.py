"""Sampling as REPA's released generator does it: the rival of benchmarks/sample/sample.py.

Its measured properties, in code of our own: a Python loop over time, an fp64 state, the model in
fp32 without autocast or compilation, guidance by doubling the batch with the null label, drift and
score of both halves in fp64 (arXiv 2410.06940, eq. 6 and 7), new tensors in every step.
"""

import torch

LAST_TIME = 0.04


def score(velocity: torch.Tensor, x: torch.Tensor, t: float) -> torch.Tensor:
    """Return the score that a velocity (B, ...) at x and t implies on the linear path."""
    alpha, sigma, d_alpha, d_sigma = 1 - t, t, -1.0, 1.0
    ratio = alpha / d_alpha
    return (ratio * velocity - x) / (sigma**2 - ratio * d_sigma * sigma)


@torch.no_grad()
def sample(
    model: torch.nn.Module,
    latents: torch.Tensor,
    labels: torch.Tensor,
    *,
    num_steps: int,
    cfg_scale: float,
    guidance_low: float = 0.0,
    guidance_high: float = 1.0,
    increments: torch.Tensor | None = None,
) -> torch.Tensor:
    """Integrate the reverse SDE with diffusion 2t from t = 1 to 0.04, and to 0 without noise.

    Args:
        model: (x, t, y) -> (velocity, ...), in the dtype of the latents; num_classes is null.
        latents, labels: (B, C, h, w), standard normal noise; (B), int64.
        num_steps: model evaluations.
        cfg_scale: guidance scale; 1 is none. It acts from guidance_low to guidance_high.
        increments: (num_steps - 1, B, C, h, w), standard normal; drawn in fp64 if None.

    Returns (B, C, h, w), fp64.
    """
    null = torch.full_like(labels, model.num_classes)
    times = torch.linspace(1.0, LAST_TIME, num_steps, dtype=torch.float64).tolist()
    x = latents.to(torch.float64)
    for number, t in enumerate(times):
        guided = cfg_scale > 1 and guidance_low <= t <= guidance_high
        doubled = torch.cat([x, x]) if guided else x
        y = torch.cat([labels, null]) if guided else labels
        time = torch.ones(len(doubled), dtype=torch.float64, device=x.device) * t
        velocity = model(doubled.to(latents.dtype), time.to(latents.dtype), y)[0].double()
        diffusion = 2 * t
        drift = velocity - 0.5 * diffusion * score(velocity, doubled, t)
        if guided:
            conditional, unconditional = drift.chunk(2)
            drift = unconditional + cfg_scale * (conditional - unconditional)
        if number == num_steps - 1:
            return x - t * drift
        dt = times[number + 1] - t
        z = torch.randn_like(x) if increments is None else increments[number].to(x.dtype)
        x = x + drift * dt + (diffusion * abs(dt)) ** 0.5 * z
    raise ValueError(f"num_steps is {num_steps}, expected at least 2")
