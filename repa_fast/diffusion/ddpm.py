"""Denoising diffusion with learned variances, DiT's objective: a chain of 1000 noising steps.

q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I) (DDPM, arXiv 2006.11239). Times are
integers: 0 is the first step, after which the data has the least noise, 999 the last. With
abar_t = prod_{s <= t} (1 - beta_s),

    x_t = sqrt(abar_t) x + sqrt(1 - abar_t) eps.

The model predicts eps in the first half of its channels and, in the second, v in [-1, 1], which
interpolates the logarithm of the variance of p(x_{t-1} | x_t) between those of
beta~_t = beta_t (1 - abar_{t-1}) / (1 - abar_t) and beta_t (improved DDPM, arXiv 2102.09672,
eq. 15). `repa_fast.diffusion.ddpm_samplers` draws from it.
"""

import functools
import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from repa_fast.contracts import expect_shape
from repa_fast.diffusion.path import Coefficients, Path

NUM_STEPS = 1000
HALF_BIN = 1 / 255  # half the distance of two of the 256 values that lie evenly in [-1, 1]
OUTERMOST = 0.999  # beyond this, on either side, lie the last of them


class Diffusion(NamedTuple):
    """A chain of T noising steps: tables (T), indexed by step; fp64, computed on the CPU.

    Attributes:
        times: int64, what the model is told at each step: its index in the original chain.
        betas: beta_t.
        alphas_cumprod: abar_t.
        alphas_cumprod_prev: abar_{t-1}, 1 at the first step.
        posterior_clean, posterior_noisy: factors of x and x_t in the mean of q(x_{t-1} | x_t, x).
        posterior_log_variance: log beta~_t; at the first step, where beta~ is 0, that of the
            second.
    """

    times: Tensor
    betas: Tensor
    alphas_cumprod: Tensor
    alphas_cumprod_prev: Tensor
    posterior_clean: Tensor
    posterior_noisy: Tensor
    posterior_log_variance: Tensor

    @classmethod
    def linear(cls) -> "Diffusion":
        """Return DDPM's and DiT's chain: 1000 betas, evenly from 0.0001 to 0.02."""
        betas = torch.linspace(1e-4, 0.02, NUM_STEPS, dtype=torch.float64)
        return cls.from_betas(betas, torch.arange(NUM_STEPS))

    @classmethod
    def from_betas(cls, betas: Tensor, times: Tensor) -> "Diffusion":
        """Return the chain of betas, (T) fp64 with T at least 2, at these times, (T) int64."""
        cumprod = (1 - betas).cumprod(0)
        previous = torch.cat([torch.ones_like(cumprod[:1]), cumprod[:-1]])
        variance = betas * (1 - previous) / (1 - cumprod)
        return cls(
            times=times,
            betas=betas,
            alphas_cumprod=cumprod,
            alphas_cumprod_prev=previous,
            posterior_clean=betas * previous.sqrt() / (1 - cumprod),
            posterior_noisy=(1 - previous) * (1 - betas).sqrt() / (1 - cumprod),
            posterior_log_variance=torch.cat([variance[1:2], variance[1:]]).log(),
        )

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.betas)

    def to(self, device: torch.device | str) -> "Diffusion":
        """Return the same tables on that device."""
        return Diffusion(*(table.to(device) for table in self))

    def respaced(self, num_steps: int) -> "Diffusion":
        """Return the chain that visits only num_steps of these steps, the first and last included.

        They are the multiples of (T - 1) / (num_steps - 1), rounded: the spacing that improved
        DDPM's released code makes of one number. abar is the original one at the steps visited, so
        that a trained model applies.

        Raises:
            ValueError: fewer than 2 steps, or more than there are.
        """
        if not 2 <= num_steps <= self.num_steps:
            raise ValueError(f"num_steps is {num_steps}, expected 2 to {self.num_steps}")
        stride = (self.num_steps - 1) / (num_steps - 1)
        # A running sum, as released: its rounding errors decide where a multiple ends in .5.
        multiples = itertools.accumulate(itertools.repeat(stride, num_steps - 1), initial=0.0)
        steps = torch.tensor([round(multiple) for multiple in multiples])
        cumprod = self.alphas_cumprod[steps]
        ratios = torch.cat([cumprod[:1], cumprod[1:] / cumprod[:-1]])
        return Diffusion.from_betas(1 - ratios, self.times[steps])

    def q_sample(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return noisy latents x_t, in fp32 at least.

        Args:
            x, noise: (B, ...), latents and standard normal noise.
            t: (B) int64, steps of this chain, on the device of the tables.
        """
        expect_shape("q_sample", "noise", noise, x.shape)
        expect_shape("q_sample", "t", t, x.shape[:1])
        cumprod = self.alphas_cumprod.index_select(0, t)
        return _broadcast(cumprod.sqrt(), x) * x + _broadcast((1 - cumprod).sqrt(), x) * noise


@functools.cache
def chain(device: torch.device) -> Diffusion:
    """Return DiT's chain on a device, copied there once."""
    return Diffusion.linear().to(device)


def _coefficients(t: Tensor) -> Coefficients:
    """Return the factors of x and of the noise at integer steps, fp32, with zero derivatives."""
    of_chain = chain(t.device).alphas_cumprod
    cumprod = of_chain.index_select(0, t.flatten()).view(t.shape)
    zero = torch.zeros((), device=t.device)
    return Coefficients(cumprod.sqrt().float(), (1 - cumprod).sqrt().float(), zero, zero)


def _time_of_ratio(ratio: Tensor) -> Tensor:
    """Return the middle of the first step with sigma / alpha at least `ratio`, or of the last."""
    cumprod = chain(ratio.device).alphas_cumprod
    steps = torch.searchsorted((1 / cumprod - 1).sqrt().to(ratio.dtype), ratio)
    return (steps.clamp(max=NUM_STEPS - 1) + 0.5) / NUM_STEPS


path = Path(
    "ddpm",
    _coefficients,
    _time_of_ratio,
    model_times=lambda t: (t * NUM_STEPS).long().clamp(max=NUM_STEPS - 1),
)
"""The chain as a path: noisy latents at steps; it has no velocity and no flow sampler."""


class DDPMLosses(NamedTuple):
    """Two losses, each (B), whose sum trains the model; fp32 at least.

    simple is the mean squared error of the noise; variational is one term of the variational
    bound, in bits per dimension.
    """

    simple: Tensor
    variational: Tensor


def ddpm_losses(
    diffusion: Diffusion, output: Tensor, x: Tensor, noise: Tensor, t: Tensor
) -> DDPMLosses:
    """Compute the losses of a model's output at `diffusion.q_sample(x, noise, t)`.

    The term of the bound is KL(q(x_{t-1} | x_t, x) || p(x_{t-1} | x_t)), at t = 0 the negative log
    likelihood of x: p integrated over the bin of width 2 / 255 around x, open outwards where
    |x| > 0.999 (DDPM, eq. 13). That is meant for pixels of 8 bits in [-1, 1]; DiT's objective
    applies it to latents as it stands, of which about a third lie outside. The mean is detached,
    so that the term trains the variance alone (improved DDPM, section 3.1). With weight 1 and one
    drawn t it is 1 / 1000 of the whole bound.

    q and p differ in their mean by what they take for x, which is sqrt(1 / abar - 1) times the
    error of the noise. The losses are computed from that error: x_t is not needed, and the
    difference of two means close to each other is not taken.

    Args:
        diffusion: on the device of t.
        output: (B, 2 C, ...), the predicted noise and v.
        x, noise: (B, C, ...), clean latents and the noise that was added.
        t: (B) int64 steps in [0, diffusion.num_steps); not checked here.

    Raises:
        ValueError: shapes that do not fit.
    """
    expect_shape("ddpm_losses", "noise", noise, x.shape)
    expect_shape("ddpm_losses", "t", t, x.shape[:1])
    predicted, v = split_output(output, x.shape)
    work = torch.promote_types(torch.promote_types(output.dtype, x.dtype), torch.float32)
    error = predicted.to(work) - noise.to(work)
    simple = error.square().flatten(1).mean(1)
    error = error.detach()
    names = ("betas", "alphas_cumprod", "posterior_clean", "posterior_log_variance")
    betas, cumprod, of_clean, low = (getattr(diffusion, name).index_select(0, t) for name in names)
    to_clean = (1 / cumprod - 1).sqrt()
    # Log variance of p less that of q, and the difference of their means in deviations of q;
    # KL(N(0, 1) || N(shift, exp(excess))), in nats.
    excess = (v.to(work) + 1) / 2 * _broadcast(betas.log() - low, error)
    shift = _broadcast(of_clean * to_clean / (low / 2).exp(), error) * error
    kl = (excess + torch.expm1(-excess) + shift.square() * (-excess).exp()) / 2
    first = (t == 0).view(-1, *[1] * (x.ndim - 1))
    # Elsewhere the likelihood is not used: a difference of 0 keeps its gradient finite there.
    difference = torch.where(first, _broadcast(to_clean, error) * error, 0)
    likelihood = log_likelihood(x.to(work), difference, _broadcast(low, error) + excess)
    nats = torch.where(first, -likelihood, kl)
    return DDPMLosses(simple, nats.flatten(1).mean(1) / math.log(2))


def split_output(output: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Split a model's output (B, 2 C, ...) into noise and v, each of the latents' shape."""
    expect_shape("ddpm", "the model's output", output, (shape[0], 2 * shape[1], *shape[2:]))
    return output.chunk(2, dim=1)


def log_likelihood(x: Tensor, difference: Tensor, log_variance: Tensor) -> Tensor:
    """Return the log probability of the bin around x under N(x - difference, exp(log_variance)).

    In nats; all of one shape, as is the result. With the normal distribution function itself; the
    released code approximates it.
    """
    inverse = (-log_variance / 2).exp()
    # By symmetry the distance may be taken below the mean, where the logarithms are exact.
    far = difference.abs()
    upper = torch.special.log_ndtr((HALF_BIN - far) * inverse)
    lower = torch.special.log_ndtr((-HALF_BIN - far) * inverse)
    inside = upper + torch.log1p(-(lower - upper).exp())
    to_minus_infinity = torch.special.log_ndtr((difference + HALF_BIN) * inverse)
    to_infinity = torch.special.log_ndtr((HALF_BIN - difference) * inverse)
    return torch.where(
        x < -OUTERMOST, to_minus_infinity, torch.where(x > OUTERMOST, to_infinity, inside)
    )


def _broadcast(values: Tensor, like: Tensor) -> Tensor:
    """Return (B) fp64 values broadcastable to `like` (B, ...), in its dtype, fp32 at least."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return values.to(dtype).view(-1, *[1] * (like.ndim - 1))
