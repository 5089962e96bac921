import pytest
import torch

from repa_fast.diffusion import path as paths
from repa_fast.diffusion.forms import FORMS, diffusion
from tests.diffusion import gaussians
from tests.refusals import refused

TIMES = torch.linspace(0.001, 0.999, 41, dtype=torch.float64).tolist()


def values(form, path, **options):
    return [diffusion(form, t, path=paths.get(path), **options) for t in TIMES]


@pytest.mark.parametrize("path", gaussians.PATHS)
@pytest.mark.parametrize("form", gaussians.FORMS)
@pytest.mark.parametrize("norm", (1.0, 0.3))
def test_every_form_is_twice_sits_at_the_mirrored_time_and_not_negative(path, form, norm):
    actual = values(form, path, norm=norm)
    expected = [2 * gaussians.diffusion(form, norm, path, 1 - t) for t in TIMES]
    # 1 - t has an absolute error of eps / 2, which weighs up to 1 / 0.001 at the ends of time.
    assert actual == pytest.approx(expected, rel=1e-12, abs=1e-15)
    assert min(actual) >= 0


@pytest.mark.parametrize("path", gaussians.PATHS)
def test_sbdm_is_the_noise_rate_of_the_forward_process(path):
    """d(sigma^2)/dt = 2 alpha'/alpha sigma^2 + w, the variance equation of dx = f x dt + g dW."""
    t = torch.tensor(TIMES, dtype=torch.float64, requires_grad=True)
    alpha, sigma, *_ = paths.get(path).coefficients(t)
    (rate,) = torch.autograd.grad(alpha.log().sum(), t, retain_graph=True)
    (growth,) = torch.autograd.grad(sigma.square().sum(), t)
    expected = (growth - 2 * rate * sigma**2).tolist()
    assert values("SBDM", path) == pytest.approx(expected, rel=1e-10)


def test_wrong_arguments_are_named():
    assert set(FORMS) == set(gaussians.FORMS)
    refused(lambda: values("sbdm", "linear"), "diffusion_form", "'sbdm'", *gaussians.FORMS)
    refused(lambda: values("sigma", "linear", norm=-0.5), "diffusion_norm", "-0.5", "at least 0")
