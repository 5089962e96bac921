"""Predictions of a model, and the velocity that each stands for.

With x_t = alpha x + sigma eps, primes for time derivatives and conditional means for x, eps and

    v = alpha' x + sigma' eps,    s = -eps / sigma,    x_t = alpha x + sigma eps,

each of velocity v, score s and noise eps gives the others:

    v   = alpha' / alpha x_t + (sigma' - sigma alpha' / alpha) eps,  eps = -sigma s
    eps = (alpha v - alpha' x_t) / D
    x   = (sigma' x_t - sigma v) / D,                                D = alpha sigma' - alpha' sigma

The first divides by alpha, which is 0 at t = 1 on the linear and cosine paths. There samplers of
noise and score start at 1 - 0.001; on every path they stop at 0.001, as SiT's do.
"""

from torch import Tensor

from repa_fast.contracts import expect_choice
from repa_fast.diffusion.path import Path

PREDICTIONS = ("v", "score", "noise")
SAMPLE_EPS = 1e-3
"""Distance that samplers keep from an end of time where something would be divided by zero."""
TRAIN_EPS = 1e-3
"""Distance that scores and noise keep in training from both ends of paths that end in noise."""


def to_velocity(prediction: str, output: Tensor, x: Tensor, t: Tensor, path: Path) -> Tensor:
    """Return the velocity of a model's output.

    Args:
        prediction: "v", "score" or "noise".
        output, x: (B, ...), the prediction and the noisy latents x_t.
        t: broadcastable to x; alpha must not be 0 unless the prediction is a velocity.

    Raises:
        ValueError: an unknown prediction.
    """
    expect_choice("prediction", prediction, PREDICTIONS)
    if prediction == "v":
        return output
    alpha, sigma, d_alpha, d_sigma = path.coefficients(t)
    noise = -sigma * output if prediction == "score" else output
    rate = d_alpha / alpha
    return rate * x + (d_sigma - sigma * rate) * noise


def clean_factors(t: float, path: Path) -> tuple[float, float]:
    """Return (a, b) of the clean latents a x_t + b v, Tweedie's (x_t + sigma^2 s) / alpha."""
    alpha, sigma, d_alpha, d_sigma = path.at(t)
    determinant = alpha * d_sigma - d_alpha * sigma
    return d_sigma / determinant, -sigma / determinant


def training_interval(path: Path, prediction: str) -> tuple[float, float]:
    """Return the least and greatest time of training, SiT's.

    The whole [0, 1] for velocities, all but 1e-5 of it on the VP path; scores and noise keep away
    from both ends where alpha is 0 at the last.
    """
    expect_choice("prediction", prediction, PREDICTIONS)
    if prediction == "v" or not path.ends_in_noise:
        return path.train_eps, 1.0
    return TRAIN_EPS, 1 - TRAIN_EPS


def sampling_interval(
    path: Path, prediction: str, diffusion_form: str | None = None
) -> tuple[float, float]:
    """Return the first and last time of a sampler; diffusion_form is None for the ODE.

    The whole [0, 1], but for scores, noise and SBDM diffusion, where alpha or sigma is divided by,
    SAMPLE_EPS away from t = 0 and, if alpha is 0 there, from t = 1; a velocity on the VP path stays
    away from t = 0 as well. The SDE's last step, if it has one, starts at a time of its own.
    """
    expect_choice("prediction", prediction, PREDICTIONS)
    divides = prediction != "v" or diffusion_form == "SBDM"
    start = 1 - SAMPLE_EPS if divides and path.ends_in_noise else 1.0
    return start, SAMPLE_EPS if divides else path.sample_eps
