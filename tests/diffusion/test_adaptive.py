import builtins

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from repa_fast.diffusion import path as paths
from repa_fast.diffusion.samplers import dopri5
from tests.diffusion import gaussians
from tests.diffusion.gaussians import LABELS, NULL, PATHS, Model, latents

EPS = 1e-3


def interval(path, prediction):
    """SiT's first and last time of the ODE, in SiT's time."""
    start = EPS if prediction != "v" and path != "VP" else 0.0
    return start, 1 - EPS if prediction != "v" or path == "VP" else 1.0


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prediction", ("v", "score", "noise"))
def test_it_follows_the_exact_flow_of_gaussian_data(path, prediction):
    """A hundred steps, each within the tolerance, by a flow that contracts on the whole."""
    rtol = atol = 1e-8
    model = Model(path, prediction)
    options = {"path": paths.get(path), "prediction": prediction}
    result, _ = dopri5(model, latents(), LABELS, rtol=rtol, atol=atol, **options)
    expected = gaussians.flow(path, latents(), *interval(path, prediction))
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
    result, _ = dopri5(
        Model("GVP"),
        latents(),
        LABELS,
        rtol=1e-8,
        atol=1e-8,
        path=paths.cosine,
        cfg_scale=scale,
        guidance_interval=(low, high),
        guidance_channels=channels,
    )
    assert np.abs(result.flatten().numpy() - x).max() < 100 * 1e-8


@pytest.mark.parametrize("scale", (1.0, 1.5))
def test_evaluations_are_counted_and_doubled_in_the_batch_alone(scale):
    model = Model("linear")
    _, evaluations = dopri5(model, latents(), LABELS, cfg_scale=scale)
    assert evaluations == len(model.calls)
    expected = LABELS.tolist() + ([NULL] * 3 if scale > 1 else [])
    assert all(y.tolist() == expected for _, _, y in model.calls)


def test_the_jumps_of_the_interval_cost_no_rejected_steps():
    """Two more stretches, each with two evaluations at its start and a cut step at either end."""
    options = {"rtol": 1e-5, "atol": 1e-8, "cfg_scale": 2.0}
    (_, whole), (_, parts) = (
        dopri5(Model("linear"), latents(), LABELS, guidance_interval=interval, **options)
        for interval in ((0.0, 1.0), (0.3, 0.7))
    )
    assert parts <= whole + 2 * (2 + 6 * 2)


def test_an_interval_without_guidance_changes_nothing():
    runs = [
        dopri5(Model("linear"), latents(), LABELS, guidance_interval=interval)
        for interval in ((0.0, 1.0), (0.3, 0.7))
    ]
    assert torch.equal(runs[0][0], runs[1][0]) and runs[0][1] == runs[1][1]


def test_a_tighter_tolerance_takes_more_evaluations_and_errs_less():
    exact = gaussians.flow("linear", latents(), 0.0, 1.0)
    runs = [
        dopri5(Model("linear"), latents(), LABELS, rtol=rtol, atol=rtol / 1000)
        for rtol in (1e-3, 1e-5, 1e-7)
    ]
    counts = [evaluations for _, evaluations in runs]
    errors = [(result - exact).abs().max().item() for result, _ in runs]
    assert counts == sorted(set(counts)) and errors == sorted(set(errors), reverse=True)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("speed", (1.0, 1e-3, 0.0))
def test_the_model_is_never_asked_beyond_the_ends_of_time(path, speed):
    """At low speed the probe for the first step would lie far beyond the data."""
    model = Model(path)

    def slow(x, t, y):
        return speed * model(x, t, y)[0], []

    dopri5(slow, latents(), LABELS, path=paths.get(path))
    first, last = interval(path, "v")
    assert max(model.times) == 1 - first and min(model.times) == pytest.approx(1 - last, abs=1e-15)


@pytest.mark.parametrize("path", PATHS)
def test_the_last_step_ends_where_the_ode_does(path):
    """The last two stages of a step lie at its end, the one before at 8/9 of it."""
    model = Model(path)
    dopri5(model, latents(), LABELS, path=paths.get(path))
    end = EPS if path == "VP" else 0.0
    assert model.times[-2:] == pytest.approx([end, end], abs=1e-15)
    assert model.times[-3] > end + 1e-3


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("state_dtype", (torch.float32, torch.float64))
def test_model_and_state_have_the_asked_dtypes(dtype, state_dtype):
    model = Model("linear")
    result, _ = dopri5(model, latents(dtype), LABELS, rtol=1e-2, atol=1e-2, state_dtype=state_dtype)
    assert result.dtype == state_dtype
    assert {x.dtype for x, _, _ in model.calls} == {dtype}
    assert {t.dtype for _, t, _ in model.calls} == {torch.float32}


def test_a_missing_package_is_named(monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name == "torchdiffeq":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match="pip install torchdiffeq"):
        dopri5(Model("linear"), latents(), LABELS)
