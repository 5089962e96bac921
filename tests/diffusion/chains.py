"""Denoising diffusion by brute force in fp64, and Gaussian data whose prediction is known.

The chain is the 1000 betas, one after the other; nothing here uses a closed form of it.
"""

import functools
import math

import torch

from tests.diffusion.gaussians import STD, Recorder, means

BETAS = [1e-4 + (0.02 - 1e-4) * step / 999 for step in range(1000)]


@functools.cache
def forward(start, stop):
    """(a, variance): x_stop = a x_start + sqrt(variance) z; start -1 is the data."""
    factor, variance = 1.0, 0.0
    for beta in BETAS[start + 1 : stop + 1]:
        factor *= math.sqrt(1 - beta)
        variance = (1 - beta) * variance + beta
    return factor, variance


def posterior(previous, time):
    """(factor of x, factor of x_time, variance) of x_previous given both, by Bayes' rule."""
    prior_factor, prior_variance = forward(-1, previous)
    factor, variance = forward(previous, time)
    precision = 1 / prior_variance + factor**2 / variance
    return (
        prior_factor / prior_variance / precision,
        factor / variance / precision,
        1 / precision,
    )


def exact_noise(x, time, labels):
    """E[noise | x_time] of data N(mean, STD^2), fp64."""
    factor, variance = forward(-1, time)
    deviation = x.double() - factor * means(labels, x.shape[1])
    return math.sqrt(variance) / (factor**2 * STD**2 + variance) * deviation


def exact_v(previous, time):
    """The v at which the ancestral step from time to previous has the true variance."""
    of_clean, _, low = posterior(previous, time)
    factor, variance = forward(-1, time)
    clean_variance = STD**2 * variance / (factor**2 * STD**2 + variance)
    high = forward(previous, time)[1]
    return 2 * math.log((low + of_clean**2 * clean_variance) / low) / math.log(high / low) - 1


class Model(Recorder):
    """The exact noise, and v as a function of the time."""

    def __init__(self, v=lambda time: 0.0):
        super().__init__()
        self.v = v

    def answer(self, x, time, y):
        assert self.calls[-1][1].dtype == torch.int64
        noise = exact_noise(x, time, y)
        return torch.cat([noise, torch.full_like(noise, self.v(time))], dim=1)
