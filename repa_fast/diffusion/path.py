"""Interpolants between data and noise: x_t = alpha_t x + sigma_t eps, t = 0 data, t = 1 noise.

Stochastic interpolants as in SiT (arXiv 2401.08740), in REPA's direction of time.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from repa_fast.contracts import expect_choice

BETA_MIN, BETA_MAX = 0.1, 20.0
"""Noise rate of the VP path at t = 0 and at t = 1."""


class Coefficients(NamedTuple):
    """alpha, sigma and their time derivatives: of the shape and dtype of t, or Python floats."""

    alpha: Tensor | float
    sigma: Tensor | float
    d_alpha: Tensor | float
    d_sigma: Tensor | float


@dataclass(frozen=True)
class Path:
    """An interpolant.

    Attributes:
        name: as on the command line.
        coefficients: t -> Coefficients.
        time_of_ratio: the t at which sigma / alpha equals a given ratio (log-normal times).
        train_eps: SiT trains on times from here on; d_sigma of VP is infinite at t = 0.
        sample_eps: SiT's ODE stops here, for the same reason.
        model_times: t in [0, 1] -> what the model and `coefficients` take.
        ends_in_noise: alpha is 0 at t = 1, so that nothing may be divided by it there.
    """

    name: str
    coefficients: Callable[[Tensor], Coefficients]
    time_of_ratio: Callable[[Tensor], Tensor]
    train_eps: float = 0.0
    sample_eps: float = 0.0
    ends_in_noise: bool = True
    model_times: Callable[[Tensor], Tensor] = lambda t: t

    def at(self, t: float) -> Coefficients:
        """Return the coefficients at t as Python floats, computed in fp64."""
        values = self.coefficients(torch.tensor(t, dtype=torch.float64))
        return Coefficients(*(value.item() for value in values))

    def interpolate(self, x: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return noisy latents and their velocity (REPA eq. 2 to 4), both of the shape of x.

        x and noise are (B, ...), t is (B).
        """
        alpha, sigma, d_alpha, d_sigma = self.coefficients(t.view(-1, *[1] * (x.ndim - 1)))
        return alpha * x + sigma * noise, d_alpha * x + d_sigma * noise


def _linear(t: Tensor) -> Coefficients:
    one = torch.ones_like(t)
    return Coefficients(1 - t, t, -one, one)


def _cosine(t: Tensor) -> Coefficients:
    angle = t * (math.pi / 2)
    alpha, sigma = angle.cos(), angle.sin()
    return Coefficients(alpha, sigma, -math.pi / 2 * sigma, math.pi / 2 * alpha)


def _vp(t: Tensor) -> Coefficients:
    """Return the coefficients of VP (arXiv 2011.13456): alpha = exp(l), sigma^2 = 1 - alpha^2.

    l = -(max - min) t^2 / 4 - min t / 2, with the noise rates BETA_MIN and BETA_MAX.
    """
    log_alpha = -(BETA_MAX - BETA_MIN) / 4 * t**2 - BETA_MIN / 2 * t
    d_log_alpha = -(BETA_MAX - BETA_MIN) / 2 * t - BETA_MIN / 2
    alpha, sigma = log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()
    return Coefficients(alpha, sigma, d_log_alpha * alpha, -d_log_alpha * alpha**2 / sigma)


def _vp_time_of_ratio(ratio: Tensor) -> Tensor:
    """Return the positive root of -l(t) = log(1 + ratio^2) / 2, at most 1."""
    a, b, c = (BETA_MAX - BETA_MIN) / 4, BETA_MIN / 2, ratio.square().log1p() / 2
    return (2 * c / (b + (b**2 + 4 * a * c).sqrt())).clamp(max=1)


linear = Path("linear", _linear, lambda ratio: ratio / (1 + ratio))
cosine = Path("cosine", _cosine, lambda ratio: ratio.atan() * (2 / math.pi))
vp = Path("VP", _vp, _vp_time_of_ratio, train_eps=1e-5, sample_eps=1e-3, ends_in_noise=False)

PATHS = {"linear": linear, "cosine": cosine, "GVP": cosine, "VP": vp}


def get(name: str) -> Path:
    """Return the path of that name; raise ValueError for an unknown one."""
    expect_choice("path type", name, tuple(PATHS))
    return PATHS[name]
