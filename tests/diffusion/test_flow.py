import re

import numpy as np
import pytest
import torch

from repa_fast.diffusion import path as paths
from repa_fast.diffusion.flow import LOSS_WEIGHTS, noise_loss, velocity_loss
from repa_fast.diffusion.prediction import to_velocity, training_interval
from repa_fast.testing import assert_within_budget, seeded
from tests.diffusion import gaussians
from tests.refusals import refused

every_path = pytest.mark.parametrize("path", gaussians.PATHS)
every_prediction = pytest.mark.parametrize("prediction", ("score", "noise"))
every_weight = pytest.mark.parametrize("loss_weight", LOSS_WEIGHTS)


def pair(shape=(3, 2, 4, 5), dtype=torch.float64):
    return seeded(shape, seed=1, dtype=dtype), seeded(shape, seed=2, dtype=dtype)


def test_the_velocity_loss_is_the_mean_square_of_each_sample():
    prediction, target = pair()
    losses = velocity_loss(prediction.requires_grad_(), target)
    losses.sum().backward()
    for loss, p, v in zip(losses.tolist(), prediction.tolist(), target.tolist()):
        assert loss == pytest.approx(np.square(np.subtract(p, v)).mean(), rel=1e-12)
    expected = 2 * (prediction.detach() - target) / 40
    torch.testing.assert_close(prediction.grad, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("of_target", (None, torch.float32))
def test_the_velocity_loss_is_computed_in_fp32(dtype, of_target):
    prediction, target = pair((256, 4, 8, 8), of_target or dtype)
    prediction = prediction.to(dtype)
    oracle, working = (
        (prediction.to(work) - target.to(work)).square().mean((1, 2, 3))
        for work in (torch.float64, torch.float32)
    )
    assert_within_budget("loss", velocity_loss(prediction, target), oracle, working)


def sit_weight(path, tau, loss_weight):
    """Of SiT's training losses: its drift's variance over its noise, in its time."""
    alpha, sigma, d_alpha, d_sigma = gaussians.coefficients(path, tau)
    variance = d_alpha / alpha * sigma**2 - sigma * d_sigma
    weights = {"none": 1.0, "velocity": (variance / sigma) ** 2}
    return (weights | {"likelihood": variance / sigma**2})[loss_weight]


def times(path, prediction):
    """fp64 times over the whole interval of training, its ends among them."""
    first, last = training_interval(paths.get(path), prediction)
    return torch.tensor([first, 0.04, 0.3, 0.5, 0.7, 0.9, last], dtype=torch.float64)


@every_path
@every_prediction
@every_weight
def test_noise_loss_is_sits_in_sits_time(path, prediction, loss_weight):
    """SiT's w |sigma s + eps|^2 of scores and w |eps' - eps|^2 of noise; of the noise itself 0."""
    t = times(path, prediction)
    output, noise = pair((len(t), 2, 3, 2))
    arguments = noise, t, paths.get(path), loss_weight
    actual = noise_loss(prediction, output, *arguments)
    assert actual.shape == t.shape and actual.dtype == torch.float64
    for i, time in enumerate(t.tolist()):
        sigma = gaussians.coefficients(path, 1 - time)[1]
        error = sigma * output[i] + noise[i] if prediction == "score" else output[i] - noise[i]
        expected = sit_weight(path, 1 - time, loss_weight) * error.square().mean().item()
        # 1 - time loses up to 5 digits of 16 at 1e-5 from an end, where the weights divide by it.
        assert actual[i].item() == pytest.approx(expected, rel=1e-10)
    sigma = paths.get(path).coefficients(t.view(-1, 1, 1, 1)).sigma
    exact = noise if prediction == "noise" else -noise / sigma
    # Squares of fp64 roundings, weighted by up to 1 / 0.001^2.
    assert noise_loss(prediction, exact, *arguments).abs().max() <= 1e-24
    assert noise_loss(prediction, -exact, *arguments).min() > 1e-3


@every_path
@every_prediction
def test_weighted_by_velocity_it_is_the_error_of_the_velocity(path, prediction):
    t = times(path, prediction)
    clean, noise, output = (
        seeded((len(t), 2, 3, 2), seed=i, dtype=torch.float64) for i in range(3)
    )
    column = t.view(-1, 1, 1, 1)
    noisy, velocity = paths.get(path).interpolate(clean, noise, t)
    stands_for = to_velocity(prediction, output, noisy, column, paths.get(path))
    expected = velocity_loss(stands_for, velocity)
    actual = noise_loss(prediction, output, noise, t, paths.get(path), "velocity")
    # The velocities are up to 1e3 times their difference.
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=0)


@every_path
@every_weight
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@every_prediction
def test_noise_losses_are_fp32_and_finite_with_their_gradients(
    path, loss_weight, dtype, prediction
):
    t = times(path, prediction).float()
    exact = seeded((len(t), 4, 8, 8), seed=1)
    output = seeded((len(t), 4, 8, 8), seed=2, dtype=dtype).requires_grad_()
    losses, oracle = (
        noise_loss(prediction, *tensors, paths.get(path), loss_weight)
        for tensors in ((output, exact, t), (output.double(), exact.double(), t.double()))
    )
    assert losses.dtype == torch.float32
    # cos(pi t / 2) of the cosine path at 0.999 is 1e-4 off in fp32, and is divided by, squared.
    torch.testing.assert_close(losses.double(), oracle, rtol=5e-4, atol=0)
    (losses / losses.detach()).sum().backward()
    assert output.grad.isfinite().all() and output.grad.abs().amax((1, 2, 3)).min() > 0


@pytest.mark.parametrize(
    "changed, words",
    (
        ({"prediction": "v"}, ("prediction is 'v', expected one of score, noise",)),
        ({"prediction": ""}, ("prediction is '', expected one of score, noise",)),
        ({"loss_weight": "Velocity"}, ("'Velocity'", *LOSS_WEIGHTS)),
        ({"t": torch.tensor(0.5)}, (r"noise_loss: t has shape \(\), expected \(3,\)",)),
        ({"t": torch.ones(1)}, (r"t has shape \(1,\), expected \(3,\)",)),
        ({"t": torch.ones(3, 1, 1, 1)}, (r"t has shape \(3, 1, 1, 1\), expected \(3,\)",)),
        ({"noise": torch.ones(3, 2, 4, 4)}, (r"noise_loss: noise has shape \(3, 2, 4, 4\), exp",)),
        ({"noise": torch.ones(1, 2, 4, 5)}, (r"noise has shape \(1, 2, 4, 5\), expected \(3, 2",)),
    ),
)
def test_wrong_arguments_of_noise_loss_are_named(changed, words):
    output, noise = pair()
    arguments = {"prediction": "noise", "output": output, "noise": noise, "path": paths.linear}
    arguments |= {"t": torch.full((3,), 0.5)} | changed
    refused(lambda: noise_loss(**arguments), *words)


@pytest.mark.parametrize("shape", ((3, 2, 4, 4), (2, 2, 4, 5), (3, 40)))
def test_a_target_of_another_shape_is_named(shape):
    words = re.escape(f"velocity_loss: target has shape {shape}, expected (3, 2, 4, 5)")
    refused(lambda: velocity_loss(torch.zeros(3, 2, 4, 5), torch.zeros(shape)), words)
