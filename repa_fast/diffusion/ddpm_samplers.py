"""Samplers of denoising diffusion: DDPM's ancestral steps and DDIM, over a respaced chain.

The chain is `Diffusion.linear()` respaced to num_steps, and the model is told the original times.
As in `repa_fast.diffusion.samplers`, the state is kept in fp64 or fp32 and the model is called in
the dtype of the given latents. Its output is (B, 2 C, h, w): the predicted noise and the v of its
variance, as in `repa_fast.diffusion.ddpm`. The defaults are DiT's sampler without guidance.
"""

import math
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from repa_fast import ops
from repa_fast.contracts import expect_choice, expect_shape
from repa_fast.diffusion.ddpm import Diffusion, split_output
from repa_fast.diffusion.guidance import Guided
from repa_fast.diffusion.samplers import initial_state


@dataclass(eq=False)
class Walk(Guided):
    """A guided model along the chain; its arguments are those of both samplers.

    Guidance is of the noise alone; the variances follow the conditional output.

    Args:
        num_steps: steps, 2 to 1000, each one evaluation of the model.
        clip_denoised: clamp what is predicted for the clean latents to [-1, 1]; for pixels.
        noise: (num_steps - 1, B, C, h, w), standard normal; drawn if None.
        seed: for drawing it, together with the step and the sample's number.
        index: (B) int64, the samples' numbers; 0 to B - 1 if None.

    Raises:
        ValueError: as for Guided; a number of steps that cannot be, or a shape or dtype that does
            not fit.
    """

    _: KW_ONLY
    num_steps: int = 250
    clip_denoised: bool = False
    noise: Tensor | None = None
    seed: int = 0
    index: Tensor | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.chain = Diffusion.linear().respaced(self.num_steps)
        self.times, self.cumprod = self.chain.times.tolist(), self.chain.alphas_cumprod.tolist()
        self.start = initial_state(self.latents, self.state_dtype)
        if self.noise is not None:
            shape = (self.num_steps - 1, *self.latents.shape)
            expect_shape("sampler", "noise", self.noise, shape)
            return
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"sampler: seed is {self.seed}, expected 0 <= seed < 2^63")
        if self.index is None:
            self.index = torch.arange(len(self.latents), device=self.latents.device)
        expect_shape("sampler", "index", self.index, self.latents.shape[:1])
        if self.index.dtype != torch.int64:
            raise ValueError(f"sampler: index is {self.index.dtype}, expected torch.int64")

    def predict(self, state: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return (clean latents, noise, v), as the state, at a step of the chain."""
        alpha, sigma = math.sqrt(self.cumprod[step]), math.sqrt(1 - self.cumprod[step])
        conditional, null = self.outputs(state.to(self.latents.dtype), self.times[step])
        eps, v = split_output(conditional.to(state.dtype), state.shape)
        if null is not None:
            eps = self.mix(eps, split_output(null, state.shape)[0])
        clean = (state - sigma * eps) / alpha
        if self.clip_denoised:
            clean = clean.clamp(-1, 1)
            eps = (state - alpha * clean) / sigma
        return clean, eps, v

    def normal(self, step: int) -> Tensor:
        """Return the noise of a step, given or drawn by (seed, step, sample's number, position)."""
        number = self.num_steps - 1 - step
        if self.noise is not None:
            return self.noise[number].to(self.state_dtype)
        drawn = ops.standard_normal(self.latents.shape, self.seed, number, self.index)
        return drawn.to(self.state_dtype)


@torch.no_grad()
def ancestral(model: torch.nn.Module, latents: Tensor, labels: Tensor, **options) -> Tensor:
    """Draw from p(x_{t-1} | x_t) from the last time to the first (DDPM, algorithm 2).

    The variances are the model's. The last step returns the mean. Arguments and errors are those
    of `Walk`.

    Returns:
        (B, C, h, w) in the state's dtype, after num_steps model evaluations (twice the batch under
        guidance).
    """
    walk = Walk(model, latents, labels, **options)
    x, chain = walk.start, walk.chain
    of_clean, of_noisy = chain.posterior_clean.tolist(), chain.posterior_noisy.tolist()
    lows, highs = chain.posterior_log_variance.tolist(), chain.betas.log().tolist()
    for step in reversed(range(walk.num_steps)):
        clean, _, v = walk.predict(x, step)
        x = of_clean[step] * clean + of_noisy[step] * x
        if step > 0:
            log_variance = lows[step] + (v + 1) / 2 * (highs[step] - lows[step])
            x = x + (log_variance / 2).exp() * walk.normal(step)
    return x


@torch.no_grad()
def ddim(
    model: torch.nn.Module, latents: Tensor, labels: Tensor, *, eta: float = 0.0, **options
) -> Tensor:
    """Draw by DDIM (arXiv 2010.02502, eq. 12), on the steps that `ancestral` visits.

    Arguments, result and errors as for `ancestral`, and:
        eta: 0, without noise, to 1: the ancestral step with the variance of the posterior
            (eq. 16). The model's variances are not used.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}, expected 0 to 1")
    walk = Walk(model, latents, labels, **options)
    x, chain = walk.start, walk.chain
    previous = chain.alphas_cumprod_prev
    variance = eta**2 * chain.betas * (1 - previous) / (1 - chain.alphas_cumprod)
    of_clean, of_eps = previous.sqrt().tolist(), (1 - previous - variance).sqrt().tolist()
    deviations = variance.sqrt().tolist()
    for step in reversed(range(walk.num_steps)):
        clean, eps, _ = walk.predict(x, step)
        x = of_clean[step] * clean + of_eps[step] * eps
        if deviations[step] > 0:
            x = x + deviations[step] * walk.normal(step)
    return x


def sample(
    model: torch.nn.Module, latents: Tensor, labels: Tensor, *, mode: str, **options
) -> Tensor:
    """Draw by `ddim` for mode "ode", by `ancestral` for "sde", as `samplers.sample`."""
    expect_choice("mode", mode, ("ode", "sde"))
    draw = ddim if mode == "ode" else ancestral
    return draw(model, latents, labels, **options)
