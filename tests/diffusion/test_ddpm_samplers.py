"""Ancestral sampling and DDIM against the chain, and where they lead."""

import math
from functools import partial

import pytest
import torch

from repa_fast.diffusion.ddpm import Diffusion
from repa_fast.diffusion.ddpm_samplers import ancestral, ddim
from repa_fast.testing import seeded
from tests.diffusion.chains import Model, exact_noise, exact_v, forward, posterior
from tests.diffusion.gaussians import LABELS, NULL, SHAPE, STD, latents, means
from tests.refusals import refused

STEPS = 12
# Dividing by sqrt(abar) at the last time, 1 / 157, multiplies roundings of fp64.
EXACT = {"rtol": 1e-11, "atol": 1e-11}


def increments():
    return seeded((STEPS - 1, *SHAPE), seed=2, dtype=torch.float64)


def joined(num_steps):
    """(time before, time) of the steps in the order of sampling; -1 is the data."""
    times = Diffusion.linear().respaced(num_steps).times.tolist()
    return list(zip([-1, *times[:-1]], times))[::-1]


def predicted_clean(x, time, *, scale=1.0, channels=None, clip=False):
    """What the exact noise, guided in the leading channels, says of the clean latents."""
    conditional = exact_noise(x, time, LABELS)
    null = exact_noise(x, time, torch.full_like(LABELS, NULL))
    eps = conditional.clone()
    eps[:, :channels] = (null + scale * (conditional - null))[:, :channels]
    factor, variance = forward(-1, time)
    clean = (x - math.sqrt(variance) * eps) / factor
    return clean.clamp(-1, 1) if clip else clean


def ancestral_step(x, clean, noise, previous, time, v):
    """From the chain by Bayes' rule."""
    of_clean, of_noisy, low = posterior(previous, time)
    part = (v(time) + 1) / 2
    variance = forward(previous, time)[1] ** part * low ** (1 - part)
    return of_clean * clean + of_noisy * x + math.sqrt(variance) * noise


def ddim_step(x, clean, noise, previous, time, eta):
    """By DDIM's equations 12 and 16."""
    factor, variance = forward(-1, time)
    eps = (x - factor * clean) / math.sqrt(variance)
    factor_before, variance_before = forward(-1, previous)
    sigma = eta * math.sqrt(variance_before / variance)
    sigma *= math.sqrt(1 - factor**2 / factor_before**2)
    x = factor_before * clean + math.sqrt(variance_before - sigma**2) * eps
    return x + sigma * noise


def recursion(step, parameter, **options):
    """x at every model call, and the result."""
    states, x = [], latents()
    for number, (previous, time) in enumerate(joined(STEPS)):
        states.append(x)
        clean = predicted_clean(x, time, **options)
        if previous < 0:
            return [*states, clean]
        x = step(x, clean, increments()[number], previous, time, parameter)


def visited(sampler, model, **options):
    """x at every model call, and the result."""
    result = sampler(model, latents(), LABELS, num_steps=STEPS, noise=increments(), **options)
    return [*model.states, result]


@pytest.mark.parametrize("clip", (False, True))
@pytest.mark.parametrize("eta", (None, 0.0, 0.4, 1.0))
@pytest.mark.parametrize(
    "scale, channels", ((1.0, None), (1.0, 2), (2.5, None), (4.0, 3), (0.0, 1))
)
def test_every_step_is_that_of_bayes_rule_or_of_ddims_equations(scale, channels, eta, clip):
    """Ancestral sampling where eta is None; DDIM ignores the variances."""
    sampler, step, parameter = partial(ddim, eta=eta), ddim_step, eta
    if eta is None:
        sampler, step, parameter = ancestral, ancestral_step, math.sin
    options = {"guidance_channels": channels, "clip_denoised": clip}
    actual = visited(sampler, Model(math.sin), cfg_scale=scale, **options)
    expected = recursion(step, parameter, scale=scale, channels=channels, clip=clip)
    torch.testing.assert_close(actual, expected, **EXACT)


def test_the_variances_follow_the_conditional_output_under_guidance():
    class Labelled(Model):
        def answer(self, x, time, y):
            output = super().answer(x, time, y)
            output[:, 4:] = torch.where(y == NULL, 7.0, -0.5).view(-1, 1, 1, 1)
            return output

    actual = visited(ancestral, Labelled(), cfg_scale=3.0)
    expected = recursion(ancestral_step, lambda time: -0.5, scale=3.0)
    torch.testing.assert_close(actual, expected, **EXACT)


@pytest.mark.parametrize("num_steps", (2, 10, 100))
def test_ancestral_sampling_with_the_true_variances_is_exact_at_any_number_of_steps(num_steps):
    """From the marginal of x_999, of two channels of label 4.

    For Gaussian data every step is affine in the state and in its noise and treats every value
    alone. So the sample at no noise is the mean, and those at one unit of noise each, at the
    start or at one step, differ from it by the factors whose squares sum to the variance.
    """
    v = {time: exact_v(previous, time) for previous, time in joined(num_steps)[:-1]}
    factor, variance = forward(-1, 999)
    labels, mean = torch.full((num_steps + 1,), 4), means(torch.tensor([4]), 2).flatten()
    start = factor * means(labels, 2)
    start[1] += math.sqrt(factor**2 * STD**2 + variance)
    noise = torch.zeros(num_steps - 1, num_steps + 1, 2, 1, 1, dtype=torch.float64)
    noise[range(num_steps - 1), range(2, num_steps + 1)] = 1
    model = Model(lambda time: v.get(time, 0.0))
    samples = ancestral(model, start, labels, num_steps=num_steps, noise=noise).flatten(1)
    torch.testing.assert_close(samples[0], mean, rtol=0, atol=1e-9)
    # x_0 comes out exactly; the last step then returns the mean of the data given x_0.
    factor, variance = forward(-1, 0)
    gain = factor**2 * STD**2 / (factor**2 * STD**2 + variance)
    found = (samples[1:] - samples[0]).square().sum(0)
    torch.testing.assert_close(found, torch.full_like(mean, STD**2 * gain), rtol=0, atol=1e-9)


def test_ddim_converges_to_the_probability_flow_in_the_first_order():
    factor, variance = forward(-1, 999)
    mean = means(LABELS, SHAPE[1])
    ratio = STD / math.sqrt(factor**2 * STD**2 + variance)
    flow = mean + ratio * (latents() - factor * mean)
    errors = [
        (ddim(Model(), latents(), LABELS, num_steps=n) - flow).abs().max().item()
        for n in (125, 250, 500)
    ]
    # Exactly 2 in the limit; the corrections are of the order of one step in 125.
    assert [a / b for a, b in zip(errors[:-1], errors[1:])] == pytest.approx([2, 2], rel=0.1)


@pytest.mark.parametrize("sampler", (ancestral, ddim))
def test_a_model_without_variances_is_refused(sampler):
    words = r"output has shape \(3, 4, 2, 2\), expected \(3, 8, 2, 2\)"
    refused(lambda: sampler(lambda x, t, y: x, latents(), LABELS, num_steps=4), words)
