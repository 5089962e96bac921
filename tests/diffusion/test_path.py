import math

import pytest
import torch

from repa_fast.diffusion import path as paths
from repa_fast.testing import seeded
from tests.diffusion import gaussians
from tests.refusals import refused

TIMES = torch.linspace(0.02, 0.98, 49, dtype=torch.float64)
EXACT = {"rtol": 1e-12, "atol": 1e-12}
every_path = pytest.mark.parametrize("name", gaussians.PATHS)


def coefficients(name, t):
    """(alpha, sigma, d_alpha, d_sigma) of the papers' table, in Python floats."""
    alpha, sigma, d_alpha, d_sigma = gaussians.coefficients(name, 1 - t)
    return alpha, sigma, -d_alpha, -d_sigma


@every_path
def test_coefficients_are_those_of_the_table(name):
    path = paths.get(name)
    expected = torch.tensor([coefficients(name, t) for t in TIMES.tolist()], dtype=torch.float64)
    torch.testing.assert_close(torch.stack(path.coefficients(TIMES), dim=1), expected, **EXACT)
    assert path.at(0.3) == pytest.approx(coefficients(name, 0.3), rel=1e-14)
    for dtype in (torch.float32, torch.float64):
        t = TIMES.to(dtype).view(7, 7)
        assert {(v.shape, v.dtype) for v in path.coefficients(t)} == {(t.shape, dtype)}


@every_path
def test_path_runs_from_data_to_noise(name):
    """VP almost: the integral of its noise rate 0.1 + 19.9 t is 10.05 = -2 log alpha."""
    last = math.exp(-5.025) if name == "VP" else 0.0
    expected = torch.tensor([[1, last], [0, math.sqrt(1 - last**2)]], dtype=torch.float64)
    ends = torch.stack(paths.get(name).coefficients(torch.tensor([0.0, 1.0]).double())[:2])
    rtol, atol = (1e-14, 0) if name == "VP" else (0, torch.finfo(torch.float64).eps)
    torch.testing.assert_close(ends, expected, rtol=rtol, atol=atol)


def test_only_the_vp_path_keeps_away_from_data_and_it_as_far_as_sits():
    found = [(path.train_eps, path.sample_eps) for path in (paths.vp, paths.linear, paths.cosine)]
    assert found == [(1e-5, 1e-3), (0, 0), (0, 0)]


def test_vp_path_is_exact_in_fp32_at_the_first_training_time():
    t = paths.vp.train_eps
    exact = torch.tensor(coefficients("VP", t))
    actual = torch.stack(paths.vp.coefficients(torch.tensor(t)))
    torch.testing.assert_close(actual, exact, rtol=8 * torch.finfo(torch.float32).eps, atol=0)


def test_gvp_is_the_cosine_path():
    assert paths.get("GVP") is paths.get("cosine") is paths.cosine
    assert paths.get("linear") is paths.linear and paths.get("VP") is paths.vp


@pytest.mark.parametrize("name", ("gvp", "vp", "", "Linear"))
def test_an_unknown_path_is_named_with_the_known_ones(name):
    refused(lambda: paths.get(name), repr(name), "linear", "cosine", "GVP", "VP")


@every_path
def test_interpolate_gives_each_sample_its_own_time_and_the_derivative_in_it(name):
    x, noise = (seeded((49, 2, 3), seed=seed, dtype=torch.float64) for seed in (1, 2))
    t = TIMES.clone().requires_grad_()
    noisy, velocity = paths.get(name).interpolate(x, noise, t)
    for i, time in enumerate(TIMES.tolist()):
        alpha, sigma, d_alpha, d_sigma = coefficients(name, time)
        torch.testing.assert_close(noisy[i], alpha * x[i] + sigma * noise[i], **EXACT)
        torch.testing.assert_close(velocity[i], d_alpha * x[i] + d_sigma * noise[i], **EXACT)
    (derivative,) = torch.autograd.grad(noisy.sum(), t)
    torch.testing.assert_close(velocity.sum((1, 2)), derivative, **EXACT)


@every_path
def test_time_of_ratio_inverts_sigma_over_alpha(name):
    ratio = torch.logspace(-3, 2, 25, dtype=torch.float64)
    values = [coefficients(name, t) for t in paths.get(name).time_of_ratio(ratio).tolist()]
    actual = torch.tensor([sigma / alpha for alpha, sigma, *_ in values], dtype=torch.float64)
    torch.testing.assert_close(actual, ratio, rtol=1e-11, atol=0)


def test_ratios_beyond_the_end_of_the_vp_path_are_its_end():
    end = math.sqrt(math.expm1(2 * 5.025))
    ratio = torch.tensor([0.0, end * (1 - 1e-9), end * 2, 1e9], dtype=torch.float64)
    t = paths.vp.time_of_ratio(ratio)
    assert t[0] == 0 and t[1] == pytest.approx(1, abs=1e-9) and t[1] < 1
    assert t[2:].tolist() == [1, 1]
