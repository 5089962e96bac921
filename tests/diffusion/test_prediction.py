from functools import partial

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
from tests.refusals import refused

# A time of 1 - 0.999 in fp64 is 1e3 roundings from the exact one, and is divided by.
CLOSE = {"rtol": 1e-11, "atol": 1e-11}
every_path = pytest.mark.parametrize("path", PATHS)
every_prediction = pytest.mark.parametrize("prediction", PREDICTIONS)


@every_path
@pytest.mark.parametrize("t", (0.001, 0.04, 0.3, 0.7, 0.999))
def test_what_is_known_of_gaussian_data_follows_from_each_prediction(path, t):
    """Its velocity, and its clean latents, which are their posterior mean."""
    exact = gaussians.predictions(path, latents(), 1 - t, LABELS)
    exact["v"] = -exact["v"]  # in our time
    time = torch.tensor(t, dtype=torch.float64)
    for prediction in PREDICTIONS:
        found = to_velocity(prediction, exact[prediction], latents(), time, paths.get(path))
        torch.testing.assert_close(found, exact["v"], **CLOSE)
    of_x, of_v = clean_factors(t, paths.get(path))
    found = of_x * latents() + of_v * exact["v"]
    torch.testing.assert_close(found, exact["clean"], **CLOSE)


@every_path
@every_prediction
def test_each_sample_has_its_own_time(path, prediction):
    x, output = latents(), latents().flip(0)
    t = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    together = to_velocity(prediction, output, x, t.view(-1, 1, 1, 1), paths.get(path))
    for i in range(3):
        alone = to_velocity(prediction, output[i], x[i], t[i], paths.get(path))
        torch.testing.assert_close(together[i], alone, rtol=1e-14, atol=1e-14)


@every_path
@every_prediction
def test_training_keeps_away_from_the_ends_where_sits_does(path, prediction):
    """As SiT's released code by default, turned around: it is at the noise at 0.

    All over the interval targets and their velocity are finite in fp32, ends included. A chain is
    trained at all its times.
    """
    assert training_interval(ddpm.path, "v") == (0.0, 1.0)
    eps = 1e-5 if path == "VP" else 0.0 if prediction == "v" else 1e-3
    first, last = training_interval(paths.get(path), prediction)
    sits = (1 - (1 - eps), 1 - (0.0 if path == "VP" else eps))
    assert (first, last) == pytest.approx(sits, abs=1e-16)
    t = torch.linspace(first, last, 1001).view(-1, 1)
    x, noise = torch.ones(1001, 1), torch.full((1001, 1), 2.0)
    noisy, velocity = paths.get(path).interpolate(x, noise, t.flatten())
    sigma = paths.get(path).coefficients(t).sigma
    target = {"v": velocity, "score": -noise / sigma, "noise": noise}[prediction]
    assert target.isfinite().all()
    assert to_velocity(prediction, target, noisy, t, paths.get(path)).isfinite().all()


@pytest.mark.parametrize("prediction", ("velocity", "eps", ""))
def test_an_unknown_prediction_is_named_with_the_known_ones(prediction):
    tensors = latents(), latents(), torch.tensor(0.5)
    for call in (
        partial(to_velocity, prediction, *tensors, paths.linear),
        partial(sampling_interval, paths.linear, prediction),
        partial(training_interval, paths.linear, prediction),
    ):
        refused(call, repr(prediction), *PREDICTIONS)
