import pytest
import torch

from repa_fast.diffusion import path as paths
from repa_fast.diffusion.forms import FORMS, diffusion
from tests.diffusion import gaussians

TIMES = torch.linspace(0.001, 0.999, 41, dtype=torch.float64).tolist()


@pytest.mark.parametrize("path", gaussians.PATHS)
@pytest.mark.parametrize("form", gaussians.FORMS)
@pytest.mark.parametrize("norm", (1.0, 0.3))
def test_every_form_is_twice_sits_at_the_mirrored_time(path, form, norm):
    actual = [diffusion(form, t, path=paths.get(path), norm=norm) for t in TIMES]
    expected = [2 * gaussians.diffusion(form, norm, path, 1 - t) for t in TIMES]
    # 1 - t has an absolute error of eps / 2, which weighs up to 1 / 0.001 at the ends of time.
    assert actual == pytest.approx(expected, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("path", gaussians.PATHS)
def test_sbdm_is_the_noise_rate_of_the_forward_process(path):
    """d(sigma^2)/dt = 2 alpha'/alpha sigma^2 + w, the variance equation of dx = f x dt + g dW."""
    t = torch.tensor(TIMES, dtype=torch.float64, requires_grad=True)
    alpha, sigma, *_ = paths.get(path).coefficients(t)
    (rate,) = torch.autograd.grad(alpha.log().sum(), t, retain_graph=True)
    (growth,) = torch.autograd.grad(sigma.square().sum(), t)
    expected = (growth - 2 * rate * sigma**2).tolist()
    actual = [diffusion("SBDM", value, path=paths.get(path)) for value in TIMES]
    assert actual == pytest.approx(expected, rel=1e-10)


def test_sbdm_of_the_vp_path_is_its_linear_rate():
    actual = [diffusion("SBDM", t, path=paths.vp) for t in TIMES]
    assert actual == pytest.approx([0.1 + 19.9 * t for t in TIMES], rel=1e-12)


@pytest.mark.parametrize("path", gaussians.PATHS)
def test_the_linear_form_is_that_of_the_released_sampler(path):
    assert [diffusion("linear", t, path=paths.get(path)) for t in TIMES] == [2 * t for t in TIMES]


@pytest.mark.parametrize("path", gaussians.PATHS)
@pytest.mark.parametrize("form", tuple(FORMS))
def test_no_form_is_negative(path, form):
    assert all(diffusion(form, t, path=paths.get(path)) >= 0 for t in TIMES)


@pytest.mark.parametrize(
    "form, norm, parts",
    (
        ("sbdm", 1.0, ("diffusion_form", "'sbdm'", *gaussians.FORMS)),
        ("sigma", -0.5, ("diffusion_norm", "-0.5", "at least 0")),
    ),
)
def test_wrong_arguments_are_named(form, norm, parts):
    with pytest.raises(ValueError) as error:
        diffusion(form, 0.5, path=paths.linear, norm=norm)
    assert all(part in str(error.value) for part in parts)
