"""Interpolants between data and noise: x_t = alpha_t x + sigma_t eps, t = 0 data, t = 1 noise.

Stochastic interpolants as in SiT (arXiv 2401.08740), in REPA's direction of time.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from repa_fast.contracts import expect_choice


class Coefficients(NamedTuple):
    """alpha, sigma and their time derivatives, each of the shape and dtype of t."""

    alpha: torch.Tensor
    sigma: torch.Tensor
    d_alpha: torch.Tensor
    d_sigma: torch.Tensor


@dataclass(frozen=True)
class Path:
    """An interpolant.

    Attributes:
        name: as on the command line.
        coefficients: t -> Coefficients.
        time_of_ratio: the t at which sigma / alpha equals a given ratio (log-normal times).
    """

    name: str
    coefficients: Callable[[torch.Tensor], Coefficients]
    time_of_ratio: Callable[[torch.Tensor], torch.Tensor]

    def interpolate(
        self, x: torch.Tensor, noise: torch.Tensor, t: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Noisy latents and their velocity (REPA eq. 2 to 4), both of the shape of x.

        x and noise are (B, ...), t is (B).
        """
        alpha, sigma, d_alpha, d_sigma = self.coefficients(t.view(-1, *[1] * (x.ndim - 1)))
        return alpha * x + sigma * noise, d_alpha * x + d_sigma * noise

    def score(self, velocity: torch.Tensor, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Score from velocity (REPA eq. 7), in the form that does not divide by d_alpha.

        t must be positive: at t = 0 there is no noise and the score is not defined.
        """
        alpha, sigma, d_alpha, d_sigma = self.coefficients(t)
        return (alpha * velocity - d_alpha * x) / (sigma * (d_alpha * sigma - alpha * d_sigma))


def _linear(t: torch.Tensor) -> Coefficients:
    one = torch.ones_like(t)
    return Coefficients(1 - t, t, -one, one)


def _cosine(t: torch.Tensor) -> Coefficients:
    angle = t * (math.pi / 2)
    alpha, sigma = angle.cos(), angle.sin()
    return Coefficients(alpha, sigma, -math.pi / 2 * sigma, math.pi / 2 * alpha)


linear = Path("linear", _linear, lambda ratio: ratio / (1 + ratio))
cosine = Path("cosine", _cosine, lambda ratio: ratio.atan() * (2 / math.pi))

PATHS = {"linear": linear, "cosine": cosine, "GVP": cosine}


def get(name: str) -> Path:
    """The path of that name; ValueError for an unknown one."""
    expect_choice("path type", name, tuple(PATHS))
    return PATHS[name]
