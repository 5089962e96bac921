import pytest
import torch

from repa_fast.diffusion import path as paths
from repa_fast.diffusion.flow import LOSS_WEIGHTS, noise_loss, velocity_loss
from repa_fast.diffusion.prediction import to_velocity, training_interval
from repa_fast.testing import assert_within_budget, seeded
from tests.diffusion import gaussians


def pair(shape, dtype):
    return seeded(shape, seed=1, dtype=dtype), seeded(shape, seed=2, dtype=dtype)


def test_it_equals_a_loop_over_samples_and_values():
    prediction, target = pair((3, 2, 4, 5), torch.float64)
    for sample, loss in enumerate(velocity_loss(prediction, target).tolist()):
        values = zip(prediction[sample].flatten().tolist(), target[sample].flatten().tolist())
        assert loss == pytest.approx(sum((p - v) ** 2 for p, v in values) / 40, rel=1e-12)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_it_is_computed_in_fp32(dtype):
    prediction, target = pair((256, 4, 8, 8), dtype)
    oracle = (prediction.double() - target.double()).square().mean((1, 2, 3))
    working = (prediction.float() - target.float()).square().mean((1, 2, 3))
    assert_within_budget("loss", velocity_loss(prediction, target), oracle, working)


def test_a_bf16_prediction_of_an_fp32_target_is_compared_in_fp32():
    prediction, target = pair((256, 4, 8, 8), torch.float32)
    prediction = prediction.bfloat16()
    oracle = (prediction.double() - target.double()).square().mean((1, 2, 3))
    working = (prediction.float() - target).square().mean((1, 2, 3))
    assert_within_budget("loss", velocity_loss(prediction, target), oracle, working)


def test_gradient_is_twice_the_mean_difference():
    prediction, target = pair((3, 2, 4, 5), torch.float64)
    prediction.requires_grad_()
    velocity_loss(prediction, target).sum().backward()
    expected = 2 * (prediction.detach() - target) / 40
    torch.testing.assert_close(prediction.grad, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", ((3, 2, 4, 4), (2, 2, 4, 5), (3, 40)))
def test_a_target_of_another_shape_is_named(shape):
    with pytest.raises(ValueError) as error:
        velocity_loss(torch.zeros(3, 2, 4, 5), torch.zeros(shape))
    parts = ("velocity_loss", "target", str(shape), "expected (3, 2, 4, 5)")
    assert all(part in str(error.value) for part in parts)


def sit_weight(path, tau, loss_weight):
    """Of SiT's training losses: its drift's variance over its noise, in its time."""
    alpha, sigma, d_alpha, d_sigma = gaussians.coefficients(path, tau)
    variance = d_alpha / alpha * sigma**2 - sigma * d_sigma
    return {
        "none": 1.0,
        "velocity": (variance / sigma) ** 2,
        "likelihood": variance / sigma**2,
    }[loss_weight]


def times(path, prediction):
    """fp64 times over the whole interval of training, its ends among them."""
    first, last = training_interval(paths.get(path), prediction)
    return torch.tensor([first, 0.04, 0.3, 0.5, 0.7, 0.9, last], dtype=torch.float64)


@pytest.mark.parametrize("path", gaussians.PATHS)
@pytest.mark.parametrize("prediction", ("score", "noise"))
@pytest.mark.parametrize("loss_weight", LOSS_WEIGHTS)
def test_noise_loss_is_sits_in_sits_time(path, prediction, loss_weight):
    """SiT's w |sigma s + eps|^2 of scores and w |eps' - eps|^2 of noise, by a loop over values."""
    t = times(path, prediction)
    output, noise = (seeded((len(t), 2, 3, 2), seed=i, dtype=torch.float64) for i in (1, 2))
    actual = noise_loss(prediction, output, noise, t, paths.get(path), loss_weight)
    assert actual.shape == t.shape and actual.dtype == torch.float64
    for i, time in enumerate(t.tolist()):
        sigma = gaussians.coefficients(path, 1 - time)[1]
        values = zip(output[i].flatten().tolist(), noise[i].flatten().tolist())
        if prediction == "score":
            squares = [(sigma * s + eps) ** 2 for s, eps in values]
        else:
            squares = [(predicted - eps) ** 2 for predicted, eps in values]
        expected = sit_weight(path, 1 - time, loss_weight) * sum(squares) / 12
        # 1 - time loses up to 5 digits of 16 at 1e-5 from an end, where the weights divide by it.
        assert actual[i].item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("path", gaussians.PATHS)
@pytest.mark.parametrize("prediction", ("score", "noise"))
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


@pytest.mark.parametrize("path", gaussians.PATHS)
@pytest.mark.parametrize("prediction", ("score", "noise"))
@pytest.mark.parametrize("loss_weight", LOSS_WEIGHTS)
def test_the_noise_itself_has_no_loss(path, prediction, loss_weight):
    t = times(path, prediction)
    noise = seeded((len(t), 2, 3, 2), seed=1, dtype=torch.float64)
    sigma = paths.get(path).coefficients(t.view(-1, 1, 1, 1)).sigma
    exact = noise if prediction == "noise" else -noise / sigma
    losses = noise_loss(prediction, exact, noise, t, paths.get(path), loss_weight)
    # Squares of fp64 roundings, weighted by up to 1 / 0.001^2.
    torch.testing.assert_close(losses, torch.zeros_like(t), rtol=0, atol=1e-24)
    assert noise_loss(prediction, -exact, noise, t, paths.get(path), loss_weight).min() > 1e-3


def gaussian_losses(path, prediction, loss_weight, gain, count):
    """Losses (count) of gain x the exact prediction for Gaussian data, at t = 0.4."""
    t = torch.full((count,), 0.4, dtype=torch.float64)
    labels = torch.arange(count) % gaussians.NULL
    data, noise = (seeded((count, 4, 2, 2), seed=i, dtype=torch.float64) for i in (1, 2))
    data = gaussians.means(labels, 4) + gaussians.STD * data
    noisy, _ = paths.get(path).interpolate(data, noise, t)
    exact = gaussians.predictions(path, noisy, 0.6, labels)[prediction]
    return noise_loss(prediction, gain * exact, noise, t, paths.get(path), loss_weight)


@pytest.mark.parametrize("path", gaussians.PATHS)
@pytest.mark.parametrize("prediction", ("score", "noise"))
@pytest.mark.parametrize("loss_weight", LOSS_WEIGHTS)
def test_gaussian_datas_prediction_has_the_least_loss_which_is_a_variance(
    path, prediction, loss_weight
):
    losses = gaussian_losses(path, prediction, loss_weight, 1, 4096)
    alpha, sigma, *_ = gaussians.coefficients(path, 0.6)
    share = (alpha * gaussians.STD) ** 2
    variance = sit_weight(path, 0.6, loss_weight) * share / (share + sigma**2)
    # The mean of 65536 squares of normal numbers of that variance, in standard errors.
    assert abs(losses.mean().item() / variance - 1) < 5 * (2 / 65536) ** 0.5
    for gain in (-1, 0.9, 1.1):
        assert gaussian_losses(path, prediction, loss_weight, gain, 4096).mean() > losses.mean()


@pytest.mark.parametrize("path", gaussians.PATHS)
@pytest.mark.parametrize("loss_weight", LOSS_WEIGHTS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("prediction", ("score", "noise"))
def test_noise_losses_are_fp32_and_finite_with_their_gradients(
    path, loss_weight, dtype, prediction
):
    t = times(path, prediction).float()
    exact = seeded((len(t), 4, 8, 8), seed=1)
    output = seeded((len(t), 4, 8, 8), seed=2, dtype=dtype).requires_grad_()
    losses = noise_loss(prediction, output, exact, t, paths.get(path), loss_weight)
    oracle = noise_loss(
        prediction, output.double(), exact.double(), t.double(), paths.get(path), loss_weight
    )
    assert losses.dtype == torch.float32
    # cos(pi t / 2) of the cosine path at 0.999 is 1e-4 off in fp32, and is divided by, squared.
    torch.testing.assert_close(losses.double(), oracle, rtol=5e-4, atol=0)
    (losses / losses.detach()).sum().backward()
    assert output.grad.isfinite().all() and output.grad.abs().amax((1, 2, 3)).min() > 0


def arguments(**changed):
    shape = (3, 2, 4, 5)
    values = {"prediction": "noise", "output": torch.zeros(shape), "noise": torch.zeros(shape)}
    return values | {"t": torch.full((3,), 0.5), "path": paths.linear} | changed


@pytest.mark.parametrize("prediction", ("v", "eps", ""))
def test_other_predictions_are_named_with_those_that_it_is_for(prediction):
    with pytest.raises(ValueError) as error:
        noise_loss(**arguments(prediction=prediction))
    assert f"prediction is {prediction!r}, expected one of score, noise" in str(error.value)


@pytest.mark.parametrize("loss_weight", ("uniform", "Velocity", ""))
def test_an_unknown_weight_is_named_with_the_known_ones(loss_weight):
    with pytest.raises(ValueError) as error:
        noise_loss(**arguments(loss_weight=loss_weight))
    assert all(part in str(error.value) for part in (repr(loss_weight), *LOSS_WEIGHTS))


@pytest.mark.parametrize(
    "name, shape, expected",
    (
        ("t", (), (3,)),
        ("t", (1,), (3,)),
        ("t", (3, 1, 1, 1), (3,)),
        ("noise", (3, 2, 4, 4), (3, 2, 4, 5)),
        ("noise", (1, 2, 4, 5), (3, 2, 4, 5)),
    ),
)
def test_shapes_that_do_not_fit_are_named(name, shape, expected):
    with pytest.raises(ValueError) as error:
        noise_loss(**arguments(**{name: torch.full(shape, 0.5)}))
    assert f"noise_loss: {name} has shape {shape}, expected {expected}" in str(error.value)
