import pytest
import torch

from repa_fast.diffusion import ddpm
from repa_fast.diffusion import path as paths
from repa_fast.diffusion.prediction import (
    PREDICTIONS,
    clean_factors,
    sampling_interval,
    to_velocity,
    training_interval,
)
from tests.diffusion import gaussians
from tests.diffusion.gaussians import LABELS, PATHS, latents

TIMES = (0.001, 0.04, 0.3, 0.7, 0.999)
# A time of 1 - 0.999 in fp64 is 1e3 roundings from the exact one, and is divided by.
CLOSE = {"rtol": 1e-11, "atol": 1e-11}


def exact(path, t):
    """Velocity in our time, score and noise."""
    values = gaussians.predictions(path, latents(), 1 - t, LABELS)
    return {**values, "v": -values["v"]}


def at(t):
    return torch.tensor(t, dtype=torch.float64)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("t", TIMES)
def test_each_prediction_of_gaussian_data_gives_its_velocity(path, prediction, t):
    values = exact(path, t)
    arguments = latents(), at(t), paths.get(path)
    velocity = to_velocity(prediction, values[prediction], *arguments)
    torch.testing.assert_close(velocity, values["v"], **CLOSE)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_each_sample_has_its_own_time(path, prediction):
    x, output = latents(), latents().flip(0)
    t = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    together = to_velocity(prediction, output, x, t.view(-1, 1, 1, 1), paths.get(path))
    for i in range(3):
        alone = to_velocity(prediction, output[i], x[i], t[i], paths.get(path))
        torch.testing.assert_close(together[i], alone, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("t", TIMES)
def test_clean_latents_of_gaussian_data_are_their_posterior_mean(path, t):
    of_x, of_v = clean_factors(t, paths.get(path))
    actual = of_x * latents() + of_v * exact(path, t)["v"]
    expected = gaussians.clean_mean(path, latents(), 1 - t, LABELS)
    torch.testing.assert_close(actual, expected, **CLOSE)


@pytest.mark.parametrize(
    "path, prediction, form, interval",
    (
        ("linear", "v", None, (1.0, 0.0)),
        ("linear", "v", "linear", (1.0, 0.0)),
        ("GVP", "v", "sigma", (1.0, 0.0)),
        ("linear", "v", "SBDM", (0.999, 0.001)),
        ("GVP", "score", None, (0.999, 0.001)),
        ("linear", "noise", "constant", (0.999, 0.001)),
        ("VP", "v", None, (1.0, 0.001)),
        ("VP", "v", "SBDM", (1.0, 0.001)),
        ("VP", "noise", None, (1.0, 0.001)),
    ),
)
def test_samplers_keep_away_from_the_ends_where_sits_do(path, prediction, form, interval):
    assert sampling_interval(paths.get(path), prediction, form) == interval


def sits_training_interval(path, prediction):
    """What SiT's released code trains on by default, turned around: it is at the noise at 0."""
    eps = 1e-5 if path == "VP" else 0.0 if prediction == "v" else 1e-3
    first, last = (0.0 if path == "VP" else eps), 1 - eps
    return 1 - last, 1 - first


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_training_keeps_away_from_the_ends_where_sits_does(path, prediction):
    interval = training_interval(paths.get(path), prediction)
    assert interval == pytest.approx(sits_training_interval(path, prediction), abs=1e-16)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_targets_and_their_velocity_are_finite_all_over_the_training_interval(path, prediction):
    """In fp32, ends included."""
    first, last = training_interval(paths.get(path), prediction)
    t = torch.linspace(first, last, 1001).view(-1, 1)
    x, noise = torch.ones(1001, 1), torch.full((1001, 1), 2.0)
    noisy, velocity = paths.get(path).interpolate(x, noise, t.flatten())
    sigma = paths.get(path).coefficients(t).sigma
    target = {"v": velocity, "score": -noise / sigma, "noise": noise}[prediction]
    assert target.isfinite().all()
    assert to_velocity(prediction, target, noisy, t, paths.get(path)).isfinite().all()


def test_the_chain_is_trained_at_all_its_times():
    assert training_interval(ddpm.path, "v") == (0.0, 1.0)


@pytest.mark.parametrize("prediction", ("velocity", "eps", ""))
def test_an_unknown_prediction_is_named_with_the_known_ones(prediction):
    arguments = latents(), latents(), at(0.5), paths.linear
    for call in (
        lambda: to_velocity(prediction, *arguments),
        lambda: sampling_interval(paths.linear, prediction),
        lambda: training_interval(paths.linear, prediction),
    ):
        with pytest.raises(ValueError) as error:
            call()
        assert all(part in str(error.value) for part in (repr(prediction), *PREDICTIONS))
