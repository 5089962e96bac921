import sys

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from repa_fast.diffusion import path as paths
from repa_fast.diffusion.samplers import dopri5
from tests.diffusion import gaussians
from tests.diffusion.gaussians import EPS, LABELS, NULL, PATHS, Model, bounds, latents
from tests.refusals import refused


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prediction", ("v", "score", "noise"))
def test_it_follows_the_exact_flow_of_gaussian_data(path, prediction):
    """A hundred steps, each within the tolerance, by a flow that contracts on the whole."""
    rtol = atol = 1e-8
    model = Model(path, prediction)
    options = {"path": paths.get(path), "prediction": prediction}
    result, evaluations = dopri5(model, latents(), LABELS, rtol=rtol, atol=atol, **options)
    assert evaluations == len(model.calls)
    by_default = dopri5(Model(path, prediction), latents(), LABELS, **options)[1]
    assert by_default < evaluations / 2  # a looser tolerance, fewer steps
    expected = gaussians.flow(path, latents(), *bounds(path, singular=prediction != "v"))
    torch.testing.assert_close(result, expected, rtol=100 * rtol, atol=100 * atol)


@pytest.mark.parametrize("channels", (None, 3))
def test_guidance_is_that_of_the_guided_field(channels):
    """Against scipy's Runge-Kutta method of order 8 on the three stretches of the field."""
    scale, (low, high) = 2.0, (0.3, 0.8)

    def velocity(tau, flat, guided):
        x = torch.from_numpy(flat).view(latents().shape)
        v = gaussians.predictions("GVP", x, tau, LABELS)["v"]
        if guided:
            null = gaussians.predictions("GVP", x, tau, torch.full_like(LABELS, NULL))["v"]
            v[:, :channels] = (null + scale * (v - null))[:, :channels]
        return v.flatten().numpy()

    x = latents().flatten().numpy()
    for start, stop, guided in ((0, 1 - high, 0), (1 - high, 1 - low, 1), (1 - low, 1, 0)):
        options = {"method": "DOP853", "args": (guided,), "rtol": 1e-10, "atol": 1e-10}
        x = solve_ivp(velocity, (start, stop), x, **options).y[:, -1]
    options = {"cfg_scale": scale, "guidance_interval": (low, high), "guidance_channels": channels}
    options |= {"path": paths.cosine, "rtol": 1e-8, "atol": 1e-8}
    result, _ = dopri5(Model("GVP"), latents(), LABELS, **options)
    assert np.abs(result.flatten().numpy() - x).max() < 100 * 1e-8


def test_the_jumps_of_the_interval_cost_no_rejected_steps():
    """Two more stretches, each with two evaluations at its start and a cut step at either end.

    Without guidance the interval changes nothing.
    """

    def run(interval, scale):
        model, options = Model(), {"guidance_interval": interval, "cfg_scale": scale}
        found = dopri5(model, latents(), LABELS, rtol=1e-5, atol=1e-8, **options)
        assert found[1] == len(model.calls)
        return found

    whole, parts, plain, same = (
        run(interval, scale) for scale in (2.0, 1.0) for interval in ((0.0, 1.0), (0.3, 0.7))
    )
    assert parts[1] <= whole[1] + 2 * (2 + 6 * 2)
    assert torch.equal(plain[0], same[0]) and plain[1] == same[1]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("speed", (1.0, 1e-3, 0.0))
def test_the_model_is_never_asked_beyond_the_ends_of_time(path, speed):
    """At low speed the probe for the first step would lie far beyond the data.

    The last two stages of the last step lie at its end, the one before at 8/9 of it.
    """
    model = Model(path)

    def slow(x, t, y):
        return speed * model(x, t, y)[0], []

    dopri5(slow, latents(), LABELS, path=paths.get(path))
    end = EPS if path == "VP" else 0.0
    assert max(model.times) == 1 and min(model.times) == pytest.approx(end, abs=1e-15)
    assert model.times[-2:] == pytest.approx([end, end], abs=1e-15)
    assert model.times[-3] > end + 1e-3


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)  # imports of it fail
    refused(lambda: dopri5(Model(), latents(), LABELS), "pip install 'repa-fast")
