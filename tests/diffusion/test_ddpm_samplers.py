import math

import pytest
import torch

from repa_fast import ops
from repa_fast.diffusion.ddpm import Diffusion
from repa_fast.diffusion.ddpm_samplers import ancestral, ddim
from repa_fast.testing import seeded
from tests.diffusion.chains import (
    LABELS,
    NULL,
    SHAPE,
    STD,
    Model,
    exact_noise,
    exact_v,
    forward,
    latents,
    means,
    posterior,
)

STEPS = 12
# Dividing by sqrt(abar) at the last time, 1 / 157, multiplies roundings of fp64.
EXACT = {"rtol": 1e-11, "atol": 1e-11}
SAMPLERS = (ancestral, ddim)


def increments(num_steps=STEPS):
    return seeded((num_steps - 1, *SHAPE), seed=2, dtype=torch.float64)


def joined(num_steps):
    """(time before, time) of the steps in the order of sampling; -1 is the data."""
    times = Diffusion.linear().respaced(num_steps).times.tolist()
    return list(zip([-1, *times[:-1]], times))[::-1]


def guided_noise(x, time, scale, channels):
    """The exact noise, guided in the leading channels."""
    conditional = exact_noise(x, time, LABELS)
    null = exact_noise(x, time, torch.full_like(LABELS, NULL))
    guided = conditional.clone()
    guided[:, :channels] = (null + scale * (conditional - null))[:, :channels]
    return guided


def clean_latents(x, time, eps):
    factor, variance = forward(-1, time)
    return (x - math.sqrt(variance) * eps) / factor


def ancestral_recursion(x, noise, v, *, scale=1.0, channels=4, clip=False):
    """x at every model call, and the result, from the chain by Bayes' rule."""
    states = []
    for number, (previous, time) in enumerate(joined(len(noise) + 1)):
        states.append(x)
        clean = clean_latents(x, time, guided_noise(x, time, scale, channels))
        clean = clean.clamp(-1, 1) if clip else clean
        if previous < 0:
            return [*states, clean]
        of_clean, of_noisy, low = posterior(previous, time)
        part = (v(time) + 1) / 2
        variance = forward(previous, time)[1] ** part * low ** (1 - part)
        x = of_clean * clean + of_noisy * x + math.sqrt(variance) * noise[number]


def ddim_recursion(x, noise, *, eta, scale=1.0, channels=4, clip=False):
    """x at every model call, and the result, by DDIM's equations 12 and 16."""
    states = []
    for number, (previous, time) in enumerate(joined(len(noise) + 1)):
        states.append(x)
        factor, variance = forward(-1, time)
        clean = clean_latents(x, time, guided_noise(x, time, scale, channels))
        clean = clean.clamp(-1, 1) if clip else clean
        if previous < 0:
            return [*states, clean]
        eps = (x - factor * clean) / math.sqrt(variance)
        factor_before, variance_before = forward(-1, previous)
        sigma = eta * math.sqrt(variance_before / variance)
        sigma *= math.sqrt(1 - factor**2 / factor_before**2)
        x = factor_before * clean + math.sqrt(variance_before - sigma**2) * eps
        x = x + sigma * noise[number]


def visited(sampler, *, model=None, x=None, **options):
    """(x at every model call and the result, the model)."""
    model = Model() if model is None else model
    result = sampler(model, latents() if x is None else x, LABELS, **options)
    return [*(x[: len(LABELS)] for x, _, _ in model.calls), result], model


GUIDANCE = ((1.0, None), (1.0, 2), (2.5, None), (4.0, 3), (0.0, 1))


@pytest.mark.parametrize("clip", (False, True))
@pytest.mark.parametrize("scale, channels", GUIDANCE)
def test_ancestral_follows_bayes_rule_at_every_step(scale, channels, clip):
    def v(time):
        return math.sin(time)

    actual, _ = visited(
        ancestral,
        model=Model(v),
        num_steps=STEPS,
        noise=increments(),
        cfg_scale=scale,
        guidance_channels=channels,
        clip_denoised=clip,
    )
    channels = 4 if channels is None else channels
    options = {"scale": scale, "channels": channels, "clip": clip}
    torch.testing.assert_close(
        actual, ancestral_recursion(latents(), increments(), v, **options), **EXACT
    )


@pytest.mark.parametrize("clip", (False, True))
@pytest.mark.parametrize("eta", (0.0, 0.4, 1.0))
@pytest.mark.parametrize("scale, channels", GUIDANCE)
def test_ddim_follows_its_equations_at_every_step(scale, channels, eta, clip):
    actual, _ = visited(
        ddim,
        num_steps=STEPS,
        noise=increments(),
        eta=eta,
        cfg_scale=scale,
        guidance_channels=channels,
        clip_denoised=clip,
    )
    channels = 4 if channels is None else channels
    options = {"eta": eta, "scale": scale, "channels": channels, "clip": clip}
    torch.testing.assert_close(actual, ddim_recursion(latents(), increments(), **options), **EXACT)


def test_the_variances_follow_the_conditional_output_under_guidance():
    class Labelled(Model):
        def __call__(self, x, t, y):
            output, rest = super().__call__(x, t, y)
            output[:, 4:] = torch.where(y == NULL, 7.0, -0.5).view(-1, 1, 1, 1)
            return output, rest

    options = {"num_steps": STEPS, "noise": increments(), "cfg_scale": 3.0}
    actual, _ = visited(ancestral, model=Labelled(), **options)
    expected = ancestral_recursion(latents(), increments(), lambda time: -0.5, scale=3.0)
    torch.testing.assert_close(actual, expected, **EXACT)


def moments(sampler, num_steps, v=lambda time: 0.0, **options):
    """Mean and variance of samples of label 4, (C) each, exactly, from the exact marginal of x_999.

    For Gaussian data every step is affine in the state and in its noise and treats every value
    alone. So the sample at no noise is the mean, and those at one unit of noise each, at the
    start or at one step, differ from it by the factors whose squares sum to the variance.
    """
    channels = 2
    labels = torch.full((num_steps + 1,), 4)
    factor, variance = forward(-1, 999)
    start = factor * means(labels, channels)
    start[1] += math.sqrt(factor**2 * STD**2 + variance)
    noise = torch.zeros(num_steps - 1, num_steps + 1, channels, 1, 1, dtype=torch.float64)
    steps = torch.arange(num_steps - 1)
    noise[steps, steps + 2] = 1
    samples = sampler(Model(v), start, labels, num_steps=num_steps, noise=noise, **options)
    samples = samples.flatten(1)
    return samples[0], (samples[1:] - samples[0]).square().sum(0)


@pytest.mark.parametrize("num_steps", (2, 10, 100))
def test_ancestral_sampling_with_the_true_variances_is_exact_at_any_number_of_steps(num_steps):
    v = {time: exact_v(previous, time) for previous, time in joined(num_steps)[:-1]}
    mean, variance = moments(ancestral, num_steps, lambda time: v.get(time, 0.0))
    # x_0 comes out exactly; the last step then returns the mean of the data given x_0.
    factor, noise = forward(-1, 0)
    gain = factor**2 * STD**2 / (factor**2 * STD**2 + noise)
    torch.testing.assert_close(mean, means(torch.tensor([4]), 2).flatten(), rtol=0, atol=1e-9)
    expected = torch.full((2,), STD**2 * gain, dtype=torch.float64)
    torch.testing.assert_close(variance, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("v, too_little", ((-1.0, True), (1.0, False)))
def test_the_extreme_variances_enclose_the_variance_of_the_data(v, too_little):
    (_, few), (_, many) = (moments(ancestral, steps, lambda time: v) for steps in (25, 250))
    assert ((few < STD**2) == too_little).all()
    # First order: a tenth of the step leaves about a tenth of the error.
    assert ((many - STD**2).abs() < 0.2 * (few - STD**2).abs()).all()


def flow(x):
    """Where the probability-flow ODE takes x from the last time to the data."""
    factor, variance = forward(-1, 999)
    mean = means(LABELS, x.shape[1])
    return mean + STD / math.sqrt(factor**2 * STD**2 + variance) * (x - factor * mean)


def test_ddim_converges_to_the_flow_in_the_first_order():
    errors = [
        (ddim(Model(), latents(), LABELS, num_steps=n) - flow(latents())).abs().max().item()
        for n in (125, 250, 500)
    ]
    # Exactly 2 in the limit; the corrections are of the order of one step in 125.
    assert [a / b for a, b in zip(errors[:-1], errors[1:])] == pytest.approx([2, 2], rel=0.1)


def test_ddim_with_eta_one_is_the_ancestral_step_with_the_small_variance():
    small, _ = visited(
        ancestral, model=Model(lambda time: -1.0), num_steps=50, noise=increments(50)
    )
    stochastic, _ = visited(ddim, num_steps=50, noise=increments(50), eta=1.0)
    torch.testing.assert_close(stochastic, small, **EXACT)


def test_ddim_ignores_the_variances_and_without_eta_the_noise():
    wild = Model(lambda time: 9.0)
    quiet = [
        ddim(Model(), latents(), LABELS, num_steps=STEPS),
        ddim(wild, latents(), LABELS, num_steps=STEPS, noise=increments()),
        ddim(Model(), latents(), LABELS, num_steps=STEPS, seed=1),
    ]
    assert all(torch.equal(quiet[0], other) for other in quiet[1:])
    assert not torch.equal(quiet[0], ddim(Model(), latents(), LABELS, num_steps=STEPS, eta=0.1))


@pytest.mark.parametrize("scale", (1.0, 2.0))
@pytest.mark.parametrize("num_steps", (2, 7, 250))
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_model_is_evaluated_once_per_step_at_the_original_times(sampler, num_steps, scale):
    _, model = visited(sampler, num_steps=num_steps, cfg_scale=scale)
    assert model.times == Diffusion.linear().respaced(num_steps).times.tolist()[::-1]
    assert {len(x) for x, _, _ in model.calls} == {3 if scale == 1 else 6}


def test_guidance_evaluates_both_labels_at_the_same_state():
    _, model = visited(ancestral, num_steps=3, cfg_scale=2.0)
    for x, _, y in model.calls:
        assert torch.equal(x[:3], x[3:]) and y.tolist() == [*LABELS.tolist(), *[NULL] * 3]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_model_may_return_its_output_alone(sampler):
    class Alone(Model):
        def __call__(self, x, t, y):
            return super().__call__(x, t, y)[0]

    results = [sampler(model, latents(), LABELS, num_steps=4) for model in (Model(), Alone())]
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("state_dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_model_is_called_in_the_dtype_of_the_latents(sampler, state_dtype, dtype):
    model = Model()
    options = {"num_steps": 3, "cfg_scale": 2.0, "state_dtype": state_dtype}
    result = sampler(model, latents(dtype), LABELS, **options)
    assert {x.dtype for x, _, _ in model.calls} == {dtype}
    assert result.dtype == state_dtype and result.shape == SHAPE


def test_the_state_stays_fp64_between_calls_of_an_fp32_model():
    actual, model = visited(ddim, x=latents(torch.float32), num_steps=STEPS)
    state = latents(torch.float32).double()
    for (seen, _, y), (previous, time) in zip(model.calls, joined(STEPS)):
        assert torch.equal(seen, state.float())
        eps = exact_noise(seen, time, y).float().double()
        factor, variance = forward(-1, previous)
        state = factor * clean_latents(state, time, eps) + math.sqrt(variance) * eps
    torch.testing.assert_close(actual[-1], state, **EXACT)
    assert not torch.equal(actual[-1], actual[-1].float().double())


NOISY = ((ancestral, {}), (ddim, {"eta": 1.0}))


@pytest.mark.parametrize("sampler, options", NOISY)
def test_a_seed_gives_the_counters_noise_and_leaves_the_global_one_alone(sampler, options):
    state = torch.get_rng_state()
    index = torch.tensor([7, 2**40, 3])
    drawn = torch.stack([ops.standard_normal(SHAPE, 5, step, index) for step in range(STEPS - 1)])
    given = sampler(Model(), latents(), LABELS, num_steps=STEPS, noise=drawn, **options)
    seeds = [
        sampler(Model(), latents(), LABELS, num_steps=STEPS, seed=seed, index=index, **options)
        for seed in (5, 6)
    ]
    assert torch.equal(given, seeds[0]) and not torch.equal(*seeds)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("sampler, options", NOISY)
def test_a_sample_does_not_depend_on_the_batch_it_is_drawn_in(sampler, options):
    index = torch.tensor([7, 2**40, 3])
    whole = sampler(Model(), latents(), LABELS, num_steps=5, index=index, **options)
    at = slice(1, 2)
    alone = sampler(Model(), latents()[at], LABELS[at], num_steps=5, index=index[at], **options)
    torch.testing.assert_close(alone, whole[at], **EXACT)
    other = sampler(Model(), latents(), LABELS, num_steps=5, **options)
    assert not torch.equal(other[at], whole[at])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_latents_are_left_as_they_are_and_nothing_is_recorded_for_autograd(sampler):
    x = latents().requires_grad_()
    result = sampler(Model(), x, LABELS, num_steps=3)
    assert torch.equal(x, latents()) and not result.requires_grad


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    "changes, parts",
    (
        ({"num_steps": 1}, ("num_steps", "1", "2 to 1000")),
        ({"num_steps": 1001}, ("num_steps", "1001", "2 to 1000")),
        ({"labels": LABELS[:2]}, ("labels", "(2,)", "expected (3,)")),
        ({"labels": LABELS + 2}, ("labels", "11", "[0, 10]")),
        ({"guidance_channels": 5}, ("guidance_channels", "5", "1 to 4")),
        ({"state_dtype": torch.bfloat16}, ("state_dtype", "bfloat16", "float32")),
        ({"noise": torch.zeros(4, *SHAPE)}, ("noise", "(4, 3, 4, 2, 2)", "(3, 3, 4, 2, 2)")),
        ({"seed": -1}, ("seed", "-1", "0 <= seed < 2^63")),
        ({"index": torch.arange(2)}, ("index", "(2,)", "expected (3,)")),
        ({"index": torch.arange(3.0)}, ("index", "float32", "int64")),
    ),
)
def test_wrong_arguments_are_named_with_expected_and_got(sampler, changes, parts):
    arguments = {"labels": LABELS, "num_steps": 4} | changes
    with pytest.raises(ValueError) as error:
        sampler(Model(), latents(), **arguments)
    assert all(part in str(error.value) for part in parts)


@pytest.mark.parametrize("eta", (-0.1, 1.1, math.nan))
def test_eta_lies_between_0_and_1(eta):
    with pytest.raises(ValueError, match=f"eta is {eta}, expected 0 to 1"):
        ddim(Model(), latents(), LABELS, eta=eta)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_model_without_variances_is_refused(sampler):
    with pytest.raises(
        ValueError, match=r"output has shape \(3, 4, 2, 2\), expected \(3, 8, 2, 2\)"
    ):
        sampler(lambda x, t, y: x, latents(), LABELS, num_steps=4)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_guidance_without_a_null_label_is_refused(sampler):
    def model(x, t, y):
        return torch.cat([x, x], dim=1)

    with pytest.raises(ValueError, match="num_classes"):
        sampler(model, latents(), LABELS, num_steps=2, cfg_scale=2.0)
    sampler(model, latents(), LABELS, num_steps=2)
