"""Diffusion coefficients w_t of the reverse SDE dx = (v - w_t s / 2) dt + sqrt(w_t) dW.

Any w_t >= 0 leaves the distributions of the states as they are (SiT, arXiv 2401.08740, section 2),
so it is a choice of the sampler. The forms are SiT's. SiT writes x += (v + w s) dt + sqrt(2 w) dW
and lets time run from noise to data; w here is twice SiT's, and its t is 1 - t:

    constant               2 norm
    SBDM                   2 norm (sigma sigma' - alpha' / alpha sigma^2)
    sigma                  2 norm sigma
    linear                 2 norm t
    decreasing             (1 - norm cos(pi t))^2 / 2
    increasing-decreasing  2 norm sin^2(pi t)

SBDM with norm 1 is the squared noise rate of the forward process that the path stands for, as in
score-based diffusion models; it is infinite where alpha is 0. "linear" with norm 1 is what REPA's
released sampler takes on every path; "sigma" is what the paper states.
"""

import math

from repa_fast.contracts import expect_choice
from repa_fast.diffusion.path import Path

FORMS = {
    "constant": lambda norm, t, c: 2 * norm,
    "SBDM": lambda norm, t, c: 2 * norm * c.sigma * (c.d_sigma - c.d_alpha / c.alpha * c.sigma),
    "sigma": lambda norm, t, c: 2 * norm * c.sigma,
    "linear": lambda norm, t, c: 2 * norm * t,
    "decreasing": lambda norm, t, c: (1 - norm * math.cos(math.pi * t)) ** 2 / 2,
    "increasing-decreasing": lambda norm, t, c: 2 * norm * math.sin(math.pi * t) ** 2,
}


def diffusion(form: str, t: float, *, path: Path, norm: float = 1.0) -> float:
    """Return w_t.

    Args:
        form: one of FORMS.
        t: time; below 1 for SBDM on a path that ends in noise.
        path: its coefficients enter SBDM and sigma.
        norm: factor, at least 0; of the cosine in the decreasing form.

    Raises:
        ValueError: an unknown form, or a negative norm.
    """
    expect_choice("diffusion_form", form, tuple(FORMS))
    if norm < 0:
        raise ValueError(f"diffusion_norm is {norm}, expected at least 0")
    return FORMS[form](norm, t, path.at(t))
