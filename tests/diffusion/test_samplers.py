"""The samplers of flows against SiT's equations, in SiT's direction of time."""

import math
from functools import partial

import pytest
import torch

from repa_fast.diffusion import path as paths
from repa_fast.diffusion.samplers import euler, euler_maruyama
from repa_fast.testing import seeded
from tests.diffusion import gaussians
from tests.diffusion.gaussians import FORMS, LABELS, NULL, PATHS, SHAPE, STD, Model, bounds, latents

heun = partial(euler, heun=True)
LAST_STEPS = ("mean", "euler", "tweedie", "none")
STEPS = 12
NOISE = seeded((STEPS - 1, *SHAPE), seed=2, dtype=torch.float64)
EVERYWHERE = (0.0, 1.0)
GUIDANCE = ((1.0, EVERYWHERE), (2.5, EVERYWHERE), (0.0, EVERYWHERE), (1.5, (0.23, 0.71)))


def close(actual, expected):
    """Equal up to 1e-12 of the largest value.

    The first alpha of a path that starts at 0.999 has lost 1e3 roundings of fp64, 2e-13.
    """
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=1e-12 * e.abs().max().item())


def guided(path, x, tau, *, guidance, channels, decided_at=None):
    """Velocity and score in SiT's time, guided in the leading channels inside the interval."""
    scale, interval = guidance
    conditional = gaussians.predictions(path, x, tau, LABELS)
    null = gaussians.predictions(path, x, tau, torch.full_like(LABELS, NULL))
    values = []
    for name in ("v", "score"):
        value = conditional[name].clone()
        if interval[0] <= 1 - (tau if decided_at is None else decided_at) <= interval[1]:
            difference = conditional[name] - null[name]
            value[:, :channels] = (null[name] + scale * difference)[:, :channels]
        values.append(value)
    return values


def ode_recursion(path, guidance, *, singular, second_order, channels):
    """x at every model call, and the result."""
    first, last = bounds(path, singular=singular)
    dt = (last - first) / STEPS
    states, x = [], latents()

    def velocity(x, tau, decided_at):
        states.append(x)
        options = {"guidance": guidance, "channels": channels, "decided_at": decided_at}
        return guided(path, x, tau, **options)[0]

    for step in range(STEPS):
        tau = first + step * dt
        v = velocity(x, tau, tau)
        if second_order and step < STEPS - 1:
            v = (v + velocity(x + dt * v, tau + dt, tau)) / 2
        x = x + dt * v
    return [*states, x]


def sde_recursion(
    path,
    guidance,
    singular,
    *,
    diffusion_form="linear",
    diffusion_norm=1.0,
    last_step="mean",
    last_step_size=0.04,
    guidance_channels=None,
):
    """x at every model call, and the result; by default with the options of REPA's release."""
    size = 0.0 if last_step == "none" else last_step_size
    first, last = bounds(path, singular=singular or diffusion_form == "SBDM", size=size)
    form = partial(gaussians.diffusion, diffusion_form, diffusion_norm, path)
    field = partial(guided, path, guidance=guidance, channels=guidance_channels)
    taus = torch.linspace(first, last, len(NOISE) + 1, dtype=torch.float64).tolist()
    dt = (last - first) / len(NOISE)
    states, x = [], latents()
    for tau, z in zip(taus[:-1], NOISE, strict=True):
        states.append(x)
        v, s = field(x, tau)
        w = form(tau)
        x = x + (v + w * s) * dt + math.sqrt(2 * w * dt) * z
    states.append(x)
    if last_step == "none":
        return states
    v, s = field(x, last)
    if last_step == "tweedie":
        alpha, sigma, *_ = gaussians.coefficients(path, last)
        return [*states, (x + sigma**2 * s) / alpha]
    w = form(last) if last_step == "mean" else 0
    return [*states, x + (v + w * s) * size]


def visited(sampler, path="linear", prediction="v", guidance=(1.0, EVERYWHERE), **options):
    """(x at every model call and the result, the model)."""
    model, (scale, interval) = Model(path, prediction), guidance
    options |= {"path": paths.get(path), "prediction": prediction}
    options |= {"cfg_scale": scale, "guidance_interval": interval}
    result = sampler(model, latents(), LABELS, **options)
    return [*model.states, result], model


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prediction", ("v", "score", "noise"))
@pytest.mark.parametrize("second_order", (False, True))
@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize("channels", (None, 1, 3))
def test_the_ode_follows_sits_recursion(path, prediction, second_order, guidance, channels):
    """Heun's correction is guided where the start of its step is."""
    sampler = heun if second_order else euler
    options = {"num_steps": STEPS, "guidance_channels": channels}
    actual, _ = visited(sampler, path, prediction, guidance, **options)
    options = {"singular": prediction != "v", "second_order": second_order, "channels": channels}
    close(actual, ode_recursion(path, guidance, **options))


def expect_sits_sde(path, prediction, guidance, **options):
    sampler = partial(euler_maruyama, num_steps=STEPS, noise=NOISE, **options)
    actual, _ = visited(sampler, path, prediction, guidance)
    close(actual, sde_recursion(path, guidance, prediction != "v", **options))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("last_step", LAST_STEPS)
@pytest.mark.parametrize("norm, size", ((1.0, 0.04), (0.3, 0.1)))
def test_every_form_and_last_step_follow_sits_recursion(path, form, last_step, norm, size):
    options = {"diffusion_form": form, "diffusion_norm": norm}
    options |= {"last_step": last_step, "last_step_size": size}
    expect_sits_sde(path, "v", GUIDANCE[-1], **options)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prediction", ("v", "score", "noise"))
@pytest.mark.parametrize("last_step", LAST_STEPS)
@pytest.mark.parametrize("channels", (None, 3))
@pytest.mark.parametrize("guidance", GUIDANCE)
def test_every_prediction_follows_sits_recursion(path, prediction, last_step, channels, guidance):
    options = {"last_step": last_step, "guidance_channels": channels, "diffusion_form": "sigma"}
    expect_sits_sde(path, prediction, guidance, **options)


def test_by_default_the_sde_is_the_released_one():
    """Velocities of the linear path unguided, diffusion 2t, a last step of 0.04 to the mean."""
    model = Model()
    result = euler_maruyama(model, latents(), LABELS, num_steps=STEPS, noise=NOISE)
    close([*model.states, result], sde_recursion("linear", GUIDANCE[0], singular=False))


@pytest.mark.parametrize("num_steps", (1, 2, 7))
def test_the_model_is_evaluated_on_a_uniform_grid(num_steps):
    """By Heun's method at both ends of every step but the last; down to 0.04 for the SDE."""
    grid = [1 - step / num_steps for step in range(num_steps)]
    both = [t for ends in zip(grid, grid[1:]) for t in ends]
    down = [1 - 0.96 * step / num_steps for step in range(num_steps + 1)]
    for sampler, times in ((euler, grid), (heun, [*both, grid[-1]]), (euler_maruyama, down)):
        _, model = visited(sampler, num_steps=num_steps + (sampler is euler_maruyama))
        assert model.times == pytest.approx(times, abs=1e-15)


SDE_TIMES = torch.linspace(1, 0.04, 5, dtype=torch.float64).tolist()
JUST_INSIDE = (math.nextafter(0.25, 1), math.nextafter(0.75, 0))


@pytest.mark.parametrize(
    "sampler, num_steps, interval, which",
    (
        (euler, 8, (0.25, 0.75), range(2, 7)),  # 0.75 to 0.25
        (euler, 4, JUST_INSIDE, (2,)),  # 0.5 alone
        (heun, 4, (0.5, 0.75), range(2, 6)),  # the correction of the first step is at 0.75
        (euler_maruyama, 5, (SDE_TIMES[4], SDE_TIMES[0]), range(5)),
        (euler_maruyama, 5, (SDE_TIMES[2], SDE_TIMES[2]), (2,)),
        (euler_maruyama, 5, (SDE_TIMES[3], SDE_TIMES[1]), (1, 2, 3)),
    ),
)
def test_there_is_guidance_from_border_to_border_of_the_interval(
    sampler, num_steps, interval, which
):
    _, model = visited(sampler, guidance=(2.0, interval), num_steps=num_steps)
    assert [call for call, (x, *_) in enumerate(model.calls) if len(x) == 6] == list(which)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
@pytest.mark.parametrize("sampler", (euler, euler_maruyama))
def test_time_is_not_rounded_to_less_than_fp32(sampler, dtype):
    exact, model = Model(), Model()
    sampler(exact, latents(), LABELS, num_steps=7)
    sampler(model, latents(dtype), LABELS, num_steps=7)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert {t.dtype for _, t, _ in model.calls} == {expected}
    assert model.times == torch.tensor(exact.times, dtype=expected).tolist()


@pytest.mark.parametrize("sampler", (euler, euler_maruyama))
def test_an_fp32_state_is_within_the_rounding_of_its_steps(sampler):
    """A step rounds less than ten values, and no step of this field amplifies an error."""
    single, double = (
        sampler(Model(), latents(), LABELS, num_steps=STEPS, state_dtype=dtype)
        for dtype in (torch.float32, torch.float64)
    )
    bound = 10 * STEPS * torch.finfo(torch.float32).eps / 2 * latents().abs().max()
    assert 0 < (single - double).abs().max() < bound


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("sampler, order", ((euler, 1), (heun, 2)))
def test_the_ode_converges_with_the_order_of_its_method(path, sampler, order):
    """The next term of the error is 1/80 of the last one, times a constant that is not large."""
    exact = gaussians.flow(path, latents(), *bounds(path, singular=False))
    few, many = (
        (visited(sampler, path, num_steps=num_steps)[0][-1] - exact).abs().max().item()
        for num_steps in (80, 320)
    )
    assert math.log(few / many) / math.log(320 / 80) == pytest.approx(order, abs=0.1)


def ends(path, form, num_steps, size):
    """Mean and variance of the clean latents of label 9, started in the distribution of the states.

    The sampler is affine: row 0 starts at the mean, row 1 one standard deviation above it, and row
    k + 2 at the mean with a noise of 1 in step k.
    """
    first, _ = bounds(path, singular=form == "SBDM", size=size)
    alpha, sigma, *_ = gaussians.coefficients(path, first)
    labels = torch.full((num_steps + 1,), 9)
    x = alpha * gaussians.means(labels, 1)
    x[1] += math.sqrt(alpha**2 * STD**2 + sigma**2)
    noise = torch.zeros(num_steps - 1, num_steps + 1, 1, 1, 1)
    noise[:, 2:, 0, 0, 0] = torch.eye(num_steps - 1)
    options = {"diffusion_form": form, "last_step": "tweedie", "last_step_size": size}
    options |= {"num_steps": num_steps, "noise": noise, "path": paths.get(path)}
    result = euler_maruyama(Model(path), x, labels, **options).flatten()
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
