"""The losses of flow models: of the velocity (REPA eq. 4), and of score or noise (SiT)."""

import torch
from torch import Tensor

from repa_fast.contracts import expect_choice, expect_shape
from repa_fast.diffusion.path import Path
from repa_fast.diffusion.prediction import PREDICTIONS

LOSS_WEIGHTS = ("none", "velocity", "likelihood")


def velocity_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Return each sample's mean squared error: two (B, C, h, w) tensors -> (B), at least fp32."""
    expect_shape("velocity_loss", "target", target, prediction.shape)
    work = torch.promote_types(prediction.dtype, torch.float32)
    return (prediction.to(work) - target.to(work)).square().flatten(1).mean(1)


def noise_loss(
    prediction: str, output: Tensor, noise: Tensor, t: Tensor, path: Path, loss_weight: str = "none"
) -> Tensor:
    """Return the weighted mean squared error of the noise that a score or noise stands for.

    The weights are SiT's (arXiv 2401.08740, its released code): none is 1; with the factor
    r = sigma' - sigma alpha' / alpha of the noise in the velocity, velocity is r^2, which makes it
    the error of the velocity, and likelihood is r / sigma, with which the integral over all times,
    summed over the latents, bounds the divergence from the data (arXiv 2101.09258).

    Args:
        prediction: "score" (eps = -sigma s) or "noise".
        output, noise: (B, C, h, w), the prediction and the noise in x_t.
        t: (B), times inside the interval of `repa_fast.diffusion.prediction.training_interval`.

    Returns:
        (B), fp32 at least.

    Raises:
        ValueError: another prediction, an unknown weight, or shapes that do not fit.
    """
    expect_choice("prediction", prediction, PREDICTIONS[1:])
    expect_choice("loss_weight", loss_weight, LOSS_WEIGHTS)
    expect_shape("noise_loss", "noise", noise, output.shape)
    expect_shape("noise_loss", "t", t, output.shape[:1])
    alpha, sigma, d_alpha, d_sigma = path.coefficients(t)
    if prediction == "score":
        output = -sigma.view(-1, *[1] * (output.ndim - 1)) * output
    losses = velocity_loss(output, noise)
    if loss_weight == "none":
        return losses
    factor = d_sigma - sigma * d_alpha / alpha
    return losses * (factor.square() if loss_weight == "velocity" else factor / sigma)
