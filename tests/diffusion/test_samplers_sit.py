"""The samplers with SiT's options against SiT's equations, in SiT's direction of time."""

import math

import pytest
import torch

from repa_fast.diffusion import path as paths
from repa_fast.diffusion.samplers import euler, euler_maruyama
from repa_fast.testing import seeded
from tests.diffusion import gaussians
from tests.diffusion.gaussians import FORMS, LABELS, NULL, PATHS, SHAPE, STD, Model, latents

LAST_STEPS = ("mean", "euler", "tweedie", "none")
STEPS = 12
SCALE, INTERVAL = 1.5, (0.23, 0.71)
EPS = 1e-3


def close(actual, expected):
    """Equal up to 1e-12 of the largest value.

    The first alpha of a path that starts at 0.999 has lost 1e3 roundings of fp64, 2e-13.
    """
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=1e-12 * e.abs().max().item())


def guided(path, x, tau, *, scale=SCALE, interval=INTERVAL, channels=4):
    """Velocity and score in SiT's time, guided in the leading channels inside the interval."""
    conditional = gaussians.predictions(path, x, tau, LABELS)
    null = gaussians.predictions(path, x, tau, torch.full_like(LABELS, NULL))
    values = []
    for name in ("v", "score"):
        value = conditional[name].clone()
        if interval[0] <= 1 - tau <= interval[1]:
            difference = conditional[name] - null[name]
            value[:, :channels] = (null[name] + scale * difference)[:, :channels]
        values.append(value)
    return values


def bounds(path, *, singular, size):
    """SiT's first and last time of the stochastic steps; size is 0 without a last step."""
    first = EPS if singular and path != "VP" else 0.0
    if size:
        return first, 1 - size
    return first, 1 - EPS if singular or path == "VP" else 1.0


def sde_recursion(path, x, noise, *, form, norm, last_step, size, singular, channels=4):
    """x at every model call, and the result."""
    size = 0.0 if last_step == "none" else size
    first, last = bounds(path, singular=singular or form == "SBDM", size=size)
    taus = torch.linspace(first, last, len(noise) + 1, dtype=torch.float64).tolist()
    dt = (last - first) / len(noise)
    states = []
    for tau, z in zip(taus[:-1], noise, strict=True):
        states.append(x)
        v, s = guided(path, x, tau, channels=channels)
        w = gaussians.diffusion(form, norm, path, tau)
        x = x + (v + w * s) * dt + math.sqrt(2 * w * dt) * z
    states.append(x)
    if last_step == "none":
        return states
    v, s = guided(path, x, last, channels=channels)
    alpha, sigma, *_ = gaussians.coefficients(path, last)
    w = gaussians.diffusion(form, norm, path, last)
    results = {
        "mean": x + (v + w * s) * size,
        "euler": x + v * size,
        "tweedie": (x + sigma**2 * s) / alpha,
    }
    return [*states, results[last_step]]


def run_sde(path, prediction="v", **options):
    model = Model(path, prediction)
    noise = seeded((STEPS - 1, *SHAPE), seed=2, dtype=torch.float64)
    result = euler_maruyama(
        model,
        latents(),
        LABELS,
        num_steps=STEPS,
        noise=noise,
        path=paths.get(path),
        prediction=prediction,
        cfg_scale=SCALE,
        guidance_interval=INTERVAL,
        **options,
    )
    return [*model.states, result], noise, model


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("last_step", LAST_STEPS)
@pytest.mark.parametrize("norm, size", ((1.0, 0.04), (0.3, 0.1)))
def test_every_form_and_last_step_follow_sits_recursion(path, form, last_step, norm, size):
    actual, noise, model = run_sde(
        path, diffusion_form=form, diffusion_norm=norm, last_step=last_step, last_step_size=size
    )
    options = {"form": form, "norm": norm, "last_step": last_step, "size": size}
    expected = sde_recursion(path, latents(), noise, singular=False, **options)
    close(actual, expected)
    assert len(model.calls) == (STEPS - 1 if last_step == "none" else STEPS)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prediction", ("score", "noise"))
@pytest.mark.parametrize("last_step", LAST_STEPS)
@pytest.mark.parametrize("channels", (None, 3))
def test_score_and_noise_give_the_trajectory_of_the_velocity(path, prediction, last_step, channels):
    options = {"diffusion_form": "sigma", "last_step": last_step}
    actual, noise, _ = run_sde(path, prediction, guidance_channels=channels, **options)
    expected = sde_recursion(
        path,
        latents(),
        noise,
        form="sigma",
        norm=1.0,
        last_step=last_step,
        size=0.04,
        singular=True,
        channels=channels or 4,
    )
    close(actual, expected)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prediction", ("v", "score", "noise"))
@pytest.mark.parametrize("channels", (None, 1, 3))
def test_euler_follows_sits_ode(path, prediction, channels):
    model = Model(path, prediction)
    result = euler(
        model,
        latents(),
        LABELS,
        num_steps=STEPS,
        path=paths.get(path),
        prediction=prediction,
        cfg_scale=SCALE,
        guidance_interval=INTERVAL,
        guidance_channels=channels,
    )
    first, last = bounds(path, singular=prediction != "v", size=0)
    x, states = latents(), []
    dt = (last - first) / STEPS
    for i in range(STEPS):
        states.append(x)
        x = x + dt * guided(path, x, first + i * dt, channels=channels or 4)[0]
    close([*model.states, result], [*states, x])
    assert len(model.calls) == STEPS


@pytest.mark.parametrize("sampler", (euler, euler_maruyama))
def test_channels_beyond_the_guided_ones_are_those_without_guidance(sampler):
    """The channels of this field do not see each other."""
    options = {"num_steps": STEPS}
    some, every, none = (
        sampler(Model("linear"), latents(), LABELS, cfg_scale=scale, guidance_channels=k, **options)
        for scale, k in ((3.0, 3), (3.0, None), (1.0, None))
    )
    torch.testing.assert_close(some[:, :3], every[:, :3], rtol=0, atol=0)
    torch.testing.assert_close(some[:, 3:], none[:, 3:], rtol=1e-12, atol=1e-12)
    assert ((some - none)[:, :3].abs().amin((0, 2, 3)) > 1e-2).all()
    assert (every[:, 3:] - none[:, 3:]).abs().min() > 1e-2


def slope(errors, counts):
    (first, last), (few, many) = (errors[0], errors[-1]), (counts[0], counts[-1])
    return math.log(first / last) / math.log(many / few)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("heun, order", ((False, 1), (True, 2)))
def test_the_ode_converges_with_the_order_of_its_method(path, heun, order):
    """The next term of the error is 1/80 of the last one, times a constant that is not large."""
    counts, errors = (80, 320), []
    exact = gaussians.flow(path, latents(), 0.0, bounds(path, singular=False, size=0)[1])
    for num_steps in counts:
        options = {"num_steps": num_steps, "path": paths.get(path), "heun": heun}
        result = euler(Model(path), latents(), LABELS, **options)
        errors.append((result - exact).abs().max().item())
    assert slope(errors, counts) == pytest.approx(order, abs=0.1)


def moments(path, form, num_steps, last_step):
    """Mean and variance of the result for a state that starts as N(0, 1): every step is affine."""
    size = 0.0 if last_step == "none" else 0.04
    first, last = bounds(path, singular=form == "SBDM", size=size)
    dt = (last - first) / (num_steps - 1)
    mean, variance = torch.zeros(SHAPE).double(), torch.ones(SHAPE).double()
    for i in range(num_steps if size else num_steps - 1):
        tau = first + i * dt
        w = gaussians.diffusion(form, 1.0, path, tau)
        at_zero, at_one = (
            sum(factor * value for factor, value in zip((1, w), guided(path, x, tau)))
            for x in (torch.zeros(SHAPE).double(), torch.ones(SHAPE).double())
        )
        stochastic = i < num_steps - 1
        step = dt if stochastic else size
        mean = mean + step * (at_zero + (at_one - at_zero) * mean)
        variance = (1 + step * (at_one - at_zero)) ** 2 * variance + 2 * w * dt * stochastic
    return mean, variance


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("last_step", ("mean", "none"))
def test_samples_with_drawn_noise_have_the_moments_of_the_recursion(path, form, last_step):
    """Within 5 standard errors, for every value of the latents."""
    num_steps, copies = 6, 1000
    mean, variance = moments(path, form, num_steps, last_step)
    result = euler_maruyama(
        Model(path),
        seeded((copies * 3, *SHAPE[1:]), seed=5, dtype=torch.float64),
        LABELS.repeat(copies),
        num_steps=num_steps,
        path=paths.get(path),
        cfg_scale=SCALE,
        guidance_interval=INTERVAL,
        diffusion_form=form,
        last_step=last_step,
        seed=3,
    ).view(copies, *SHAPE)
    assert ((result.mean(0) - mean).abs() < 5 * (variance / copies).sqrt()).all()
    assert ((result.var(0) / variance - 1).abs() < 5 * math.sqrt(2 / copies)).all()


def ends(path, form, num_steps, size):
    """Mean and variance of the clean latents of label 9, started in the distribution of the states.

    The sampler is affine: row 0 starts at the mean, row 1 one standard deviation above it, and row
    k + 2 at the mean with a noise of 1 in step k.
    """
    alpha, sigma, *_ = gaussians.coefficients(
        path, bounds(path, singular=form == "SBDM", size=1)[0]
    )
    labels = torch.full((num_steps + 1,), 9)
    x = alpha * gaussians.means(labels, 1)
    x[1] += math.sqrt(alpha**2 * STD**2 + sigma**2)
    noise = torch.zeros(num_steps - 1, num_steps + 1, 1, 1, 1)
    noise[:, 2:, 0, 0, 0] = torch.eye(num_steps - 1)
    options = {"diffusion_form": form, "last_step": "tweedie", "last_step_size": size}
    result = euler_maruyama(
        Model(path), x, labels, num_steps=num_steps, noise=noise, path=paths.get(path), **options
    ).flatten()
    return torch.stack([result[0], (result[1:] - result[0]).square().sum()])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("form", FORMS)
def test_any_form_ends_in_the_distribution_of_the_data(path, form):
    """In the limit of many steps: extrapolated from 50 and 100, a few terms in 1 / 100^2 remain.

    The last step gives the posterior mean, whose variance lacks that of the posterior.
    """
    size = 0.02
    few, many = (ends(path, form, num_steps, size) for num_steps in (50, 100))
    alpha, sigma, *_ = gaussians.coefficients(path, 1 - size)
    mean = gaussians.means(torch.tensor([9]), 1).item()
    variance = alpha**2 * STD**4 / (alpha**2 * STD**2 + sigma**2)
    assert (2 * many - few).tolist() == pytest.approx([mean, variance], abs=10 / 100**2)


@pytest.mark.parametrize("sampler", (euler, euler_maruyama))
def test_an_fp32_state_is_within_the_rounding_of_its_steps(sampler):
    """A step rounds less than ten values, and no step of this field amplifies an error."""
    single, double = (
        sampler(Model("linear"), latents(), LABELS, num_steps=STEPS, state_dtype=dtype)
        for dtype in (torch.float32, torch.float64)
    )
    assert single.dtype == torch.float32 and double.dtype == torch.float64
    bound = 10 * STEPS * torch.finfo(torch.float32).eps / 2 * latents().abs().max()
    assert 0 < (single - double).abs().max() < bound


@pytest.mark.parametrize("sampler", (euler, euler_maruyama))
@pytest.mark.parametrize("state_dtype", (torch.float32, torch.float64))
def test_a_model_that_answers_in_bf16_still_gets_the_state_in_the_dtype_of_the_latents(
    sampler, state_dtype
):
    model = Model("linear")

    def autocast(x, t, y):
        return model(x, t, y)[0].bfloat16(), []

    options = {"num_steps": STEPS, "state_dtype": state_dtype}
    result = sampler(autocast, latents(torch.float32), LABELS, **options)
    assert result.dtype == state_dtype
    assert {x.dtype for x in model.states} == {torch.float32}
    assert not any(torch.equal(x, x.bfloat16().float()) for x in model.states)


@pytest.mark.parametrize(
    "sampler, options, parts",
    (
        (euler, {"prediction": "eps"}, ("prediction", "'eps'", "v, score, noise")),
        (euler_maruyama, {"prediction": "x"}, ("prediction", "'x'", "v, score, noise")),
        (euler_maruyama, {"diffusion_form": "sbdm"}, ("diffusion_form", "'sbdm'", "SBDM")),
        (euler_maruyama, {"diffusion_norm": -1.0}, ("diffusion_norm", "-1.0", "at least 0")),
        (euler_maruyama, {"last_step": "Mean"}, ("last_step", "'Mean'", ", ".join(LAST_STEPS))),
        (euler_maruyama, {"last_step_size": 0.0}, ("last_step_size", "0.0", "between 0 and 1")),
        (euler_maruyama, {"last_step_size": 1.0}, ("last_step_size", "1.0", "between 0 and 1")),
        (euler, {"guidance_channels": 0}, ("guidance_channels", "0", "1 to 4")),
        (euler_maruyama, {"guidance_channels": 5}, ("guidance_channels", "5", "1 to 4")),
        (euler, {"state_dtype": torch.bfloat16}, ("state_dtype", "bfloat16", "torch.float64")),
    ),
)
def test_wrong_options_are_named_with_expected_and_got(sampler, options, parts):
    with pytest.raises(ValueError) as error:
        sampler(Model("linear"), latents(), LABELS, num_steps=3, **options)
    assert all(part in str(error.value) for part in parts)
