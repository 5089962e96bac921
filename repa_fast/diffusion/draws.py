"""All randomness of a training step: a pure function of seed, step and place in the global batch.

The size of the global batch is fixed in a run. Every process draws for the whole global batch and
takes its slice, so that one process equals many, micro-batches equal the whole, and resuming needs
the step alone.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from repa_fast.contracts import expect_choice
from repa_fast.diffusion.path import Path
from repa_fast.diffusion.prediction import training_interval

WEIGHTINGS = ("uniform", "lognormal")


class Draws(NamedTuple):
    """What one step draws; the first axis is the position in the batch.

    t (B) in [0, 1]; noise and posterior_noise (B, C, h, w), standard normal; drop (B), bool; offset
    (B), uniform on [0, 1), by which SRA's teacher is ahead of the student.
    """

    t: torch.Tensor
    noise: torch.Tensor
    posterior_noise: torch.Tensor
    drop: torch.Tensor
    offset: torch.Tensor

    def part(self, start: int, stop: int) -> "Draws":
        """Return the draws of batch positions start..stop - 1."""
        return Draws(*(field[start:stop] for field in self))


def stream(seed: int, *keys: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator whose state is a pure function of (seed, *keys); all are non-negative."""
    sequence = np.random.SeedSequence(seed, spawn_key=keys)  # (0,) and (0, 0) differ here
    state = sequence.generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state))


def draw(
    seed: int,
    step: int,
    batch: int,
    latent_shape: Sequence[int],
    *,
    path: Path,
    prediction: str = "v",
    weighting: str = "uniform",
    drop_prob: float = 0.0,
    device: torch.device | str = "cpu",
) -> Draws:
    """Draw for the global batch of `step`.

    Args:
        seed, step: non-negative; with the batch size and the position in it they determine every
            value.
        batch: size of the global batch.
        latent_shape: (C, h, w).
        path: turns log-normal noise-to-signal ratios into times.
        prediction: of the model; it decides how close times come to 0 and 1.
        weighting: "uniform" times, or "lognormal" ratios sigma / alpha = exp(N(0, 1)), which on the
            linear path is the logit-normal distribution of times.
        drop_prob: probability of the null label.
        device: where the values are drawn; devices differ in their random numbers.

    Raises:
        ValueError: unknown weighting or prediction.
    """
    expect_choice("weighting", weighting, WEIGHTINGS)
    times, noise, posterior, drops, offsets = (
        stream(seed, step, key, device=device) for key in range(5)
    )
    first, last = training_interval(path, prediction)
    if weighting == "uniform":
        t = first + (last - first) * torch.rand(batch, generator=times, device=device)
    else:
        ratio = torch.randn(batch, generator=times, device=device).exp()
        t = path.time_of_ratio(ratio).clamp(first, last)
    shape = (batch, *latent_shape)
    return Draws(
        t=t,
        noise=torch.randn(shape, generator=noise, device=device),
        posterior_noise=torch.randn(shape, generator=posterior, device=device),
        drop=torch.rand(batch, generator=drops, device=device) < drop_prob,
        offset=torch.rand(batch, generator=offsets, device=device),
    )
