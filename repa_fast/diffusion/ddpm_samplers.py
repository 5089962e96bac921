"""Samplers of denoising diffusion: DDPM's ancestral steps and DDIM, over a respaced chain.

The chain is `Diffusion.linear()` respaced to num_steps, and the model is told the original times.
As in `repa_fast.diffusion.samplers`, the state is kept in fp64 or fp32 and the model is called in
the dtype of the given latents. It is model(x, t, y) -> output or (output, ...), with t (B) int64
and output (B, 2 C, h, w): the predicted noise and the v of its variance, as in
`repa_fast.diffusion.ddpm`. The defaults are DiT's sampler without guidance; DiT guides 3 channels.
"""

import math
from collections.abc import Callable

import torch

from repa_fast import ops
from repa_fast.contracts import expect_choice, expect_shape
from repa_fast.diffusion.ddpm import Diffusion, split_output
from repa_fast.diffusion.guidance import guided_outputs, mix
from repa_fast.diffusion.samplers import initial_state

Noise = Callable[[int], torch.Tensor]
"""number of the step -> (B, C, h, w), standard normal, in the state's dtype."""


@torch.no_grad()
def ancestral(
    model: torch.nn.Module,
    latents: torch.Tensor,
    labels: torch.Tensor,
    *,
    num_steps: int = 250,
    cfg_scale: float = 1.0,
    guidance_channels: int | None = None,
    state_dtype: torch.dtype = torch.float64,
    clip_denoised: bool = False,
    noise: torch.Tensor | None = None,
    seed: int = 0,
    index: torch.Tensor | None = None,
) -> torch.Tensor:
    """Draw from p(x_{t-1} | x_t) from the last time to the first (DDPM, algorithm 2).

    The variances are the model's. The last step returns the mean.

    Args:
        model: in eval mode; has `num_classes` for guidance.
        latents: (B, C, h, w), standard normal noise; its dtype is the model's.
        labels: (B), int64 classes.
        num_steps: steps, 2 to 1000, each one evaluation of the model.
        cfg_scale: guidance scale, eps_uncond + s (eps_cond - eps_uncond); 1 is none.
        guidance_channels: guide this many leading channels of eps; None for all. The others, and
            the variances always, follow the conditional output.
        state_dtype: fp64 or fp32, in which x is kept and advanced.
        clip_denoised: clamp what is predicted for the clean latents to [-1, 1]; for pixels.
        noise: (num_steps - 1, B, C, h, w), standard normal; drawn if None.
        seed: for drawing it, together with the step and the sample's number.
        index: (B) int64, the samples' numbers; 0 to B - 1 if None.

    Returns:
        (B, C, h, w) in the state's dtype, after num_steps model evaluations (twice the batch under
        guidance).

    Raises:
        ValueError: labels out of range or of another batch size, a number of steps or channels
            that cannot be, guidance of a model without null label, or a shape or dtype that does
            not fit.
    """
    chain = Diffusion.linear().respaced(num_steps)
    predict = _predictor(model, latents, labels, chain, cfg_scale, guidance_channels, clip_denoised)
    x = initial_state(latents, state_dtype)
    normal = _normal("ancestral", x, num_steps, noise, seed, index)
    of_clean, of_noisy = chain.posterior_clean.tolist(), chain.posterior_noisy.tolist()
    lows, highs = chain.posterior_log_variance.tolist(), chain.betas.log().tolist()
    for step in reversed(range(num_steps)):
        clean, _, v = predict(x, step)
        x = of_clean[step] * clean + of_noisy[step] * x
        if step > 0:
            log_variance = lows[step] + (v + 1) / 2 * (highs[step] - lows[step])
            x = x + (log_variance / 2).exp() * normal(num_steps - 1 - step)
    return x


@torch.no_grad()
def ddim(
    model: torch.nn.Module,
    latents: torch.Tensor,
    labels: torch.Tensor,
    *,
    num_steps: int = 250,
    eta: float = 0.0,
    cfg_scale: float = 1.0,
    guidance_channels: int | None = None,
    state_dtype: torch.dtype = torch.float64,
    clip_denoised: bool = False,
    noise: torch.Tensor | None = None,
    seed: int = 0,
    index: torch.Tensor | None = None,
) -> torch.Tensor:
    """Draw by DDIM (arXiv 2010.02502, eq. 12), on the steps that `ancestral` visits.

    Arguments, result and errors as for `ancestral`, and:
        eta: 0, without noise, to 1: the ancestral step with the variance of the posterior
            (eq. 16). The model's variances are not used.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}, expected 0 to 1")
    chain = Diffusion.linear().respaced(num_steps)
    predict = _predictor(model, latents, labels, chain, cfg_scale, guidance_channels, clip_denoised)
    x = initial_state(latents, state_dtype)
    normal = _normal("ddim", x, num_steps, noise, seed, index)
    previous = chain.alphas_cumprod_prev
    variance = eta**2 * chain.betas * (1 - previous) / (1 - chain.alphas_cumprod)
    of_clean, of_eps = previous.sqrt().tolist(), (1 - previous - variance).sqrt().tolist()
    deviations = variance.sqrt().tolist()
    for step in reversed(range(num_steps)):
        clean, eps, _ = predict(x, step)
        x = of_clean[step] * clean + of_eps[step] * eps
        if deviations[step] > 0:
            x = x + deviations[step] * normal(num_steps - 1 - step)
    return x


def sample(
    model: torch.nn.Module, latents: torch.Tensor, labels: torch.Tensor, *, mode: str, **options
) -> torch.Tensor:
    """Draw by `ddim` for mode "ode", by `ancestral` for "sde", as `samplers.sample`."""
    expect_choice("mode", mode, ("ode", "sde"))
    draw = ddim if mode == "ode" else ancestral
    return draw(model, latents, labels, **options)


def _predictor(
    model: torch.nn.Module,
    latents: torch.Tensor,
    labels: torch.Tensor,
    chain: Diffusion,
    cfg_scale: float,
    guidance_channels: int | None,
    clip_denoised: bool,
) -> Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Return (state, step of the chain) -> (clean latents, noise, v), as the state."""
    outputs = guided_outputs(model, latents, labels, cfg_scale, guidance_channels)
    times, cumprod = chain.times.tolist(), chain.alphas_cumprod.tolist()

    def predict(state: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        alpha, sigma = math.sqrt(cumprod[step]), math.sqrt(1 - cumprod[step])
        conditional, null = outputs(state.to(latents.dtype), times[step])
        eps, v = split_output(conditional.to(state.dtype), state.shape)
        if null is not None:
            eps = mix(eps, split_output(null, state.shape)[0], cfg_scale, state.dtype)
        clean = (state - sigma * eps) / alpha
        if clip_denoised:
            clean = clean.clamp(-1, 1)
            eps = (state - alpha * clean) / sigma
        return clean, eps, v

    return predict


def _normal(
    sampler: str,
    x: torch.Tensor,
    num_steps: int,
    noise: torch.Tensor | None,
    seed: int,
    index: torch.Tensor | None,
) -> Noise:
    """Return the given noise, or noise drawn by (seed, step, sample's number, position)."""
    if noise is not None:
        expect_shape(sampler, "noise", noise, (num_steps - 1, *x.shape))
        return lambda number: noise[number].to(x.dtype)
    if not 0 <= seed < 2**63:
        raise ValueError(f"{sampler}: seed is {seed}, expected 0 <= seed < 2^63")
    if index is None:
        index = torch.arange(len(x), device=x.device)
    expect_shape(sampler, "index", index, x.shape[:1])
    if index.dtype != torch.int64:
        raise ValueError(f"{sampler}: index is {index.dtype}, expected torch.int64")
    return lambda number: ops.standard_normal(x.shape, seed, number, index).to(x.dtype)
