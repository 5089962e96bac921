import math
import re
from functools import partial

import numpy as np
import pytest
import torch
from scipy import stats
from torch.distributions import Normal, kl_divergence

from repa_fast.diffusion import ddpm
from repa_fast.diffusion.ddpm import Diffusion, ddpm_losses
from repa_fast.testing import assert_within_budget, seeded
from tests.diffusion.chains import BETAS, forward, posterior
from tests.refusals import refused

SHAPE = (5, 3, 4, 4)
TIMES = torch.tensor([1, 2, 250, 640, 999])
LINEAR = Diffusion.linear()
# A product of 1000 factors, each rounded, in another order.
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def batch(dtype=torch.float64, shape=SHAPE):
    """(output, clean latents, noise)."""
    output = seeded((shape[0], 2 * shape[1], *shape[2:]), seed=1, dtype=dtype, std=0.5)
    return output, seeded(shape, seed=2, dtype=dtype), seeded(shape, seed=3, dtype=dtype)


def likelihood(x, mean, log_variance):
    """Probability of the bin around x, by scipy."""
    std = math.exp(log_variance / 2)
    low = -math.inf if x < -0.999 else x - 1 / 255
    high = math.inf if x > 0.999 else x + 1 / 255
    if low > mean:  # the difference of small numbers
        return stats.norm.sf(low, mean, std) - stats.norm.sf(high, mean, std)
    return stats.norm.cdf(high, mean, std) - stats.norm.cdf(low, mean, std)


def test_the_betas_are_linear_and_the_times_count_them():
    torch.testing.assert_close(LINEAR.betas, torch.tensor(BETAS, dtype=torch.float64), **EXACT)
    assert LINEAR.times.tolist() == list(range(1000))
    assert LINEAR.times.dtype == torch.int64
    assert {table.dtype for table in LINEAR[1:]} == {torch.float64}
    assert LINEAR.alphas_cumprod[-1].item() == pytest.approx(4.036e-5, rel=1e-3)


@pytest.mark.parametrize("num_steps", (2, 3, 7, 10, 21, 250, 999, 1000))
def test_a_respaced_chain_joins_steps_of_the_original_one(num_steps):
    """Its times are rounded multiples of a stride, its noise that of the steps it joins."""
    chain = LINEAR.respaced(num_steps)
    times, tables = chain.times.tolist(), {name: x.tolist() for name, x in chain._asdict().items()}
    assert chain.num_steps == num_steps == len(times)
    assert times[0] == 0 and times[-1] == 999 and times == sorted(set(times))
    stride = 999 / (num_steps - 1)
    assert all(abs(time - step * stride) <= 0.5 + 1e-9 for step, time in enumerate(times))
    assert tables["alphas_cumprod_prev"] == [1, *tables["alphas_cumprod"][:-1]]
    parts = [BETAS[previous + 1 : time + 1] for previous, time in zip(times, times[1:])]
    expected = [1 - math.prod(1 - beta for beta in part) for part in parts]
    assert tables["betas"][1:] == pytest.approx(expected, rel=1e-9)
    for step in range(0, num_steps, max(1, num_steps // 10)):
        factor, variance = forward(-1, times[step])
        assert tables["alphas_cumprod"][step] == pytest.approx(factor**2, rel=1e-12)
        assert 1 - tables["alphas_cumprod"][step] == pytest.approx(variance, rel=1e-11)
        if step > 0:  # 1 - abar at the first times has lost 4 digits
            expected = pytest.approx(posterior(times[step - 1], times[step]), rel=1e-10)
            of_clean, of_noisy = tables["posterior_clean"][step], tables["posterior_noisy"][step]
            variance = math.exp(tables["posterior_log_variance"][step])
            assert (of_clean, of_noisy, variance) == expected


def test_known_and_impossible_chains():
    """The published one of 250 steps, a tie that the running sum breaks, and one of a respaced."""
    times = LINEAR.respaced(250).times.tolist()
    assert times[:4] == [0, 4, 8, 12] and times[-4:] == [987, 991, 995, 999]
    # A stride of 4 + 3 / 249: the third of four thirds more steps is one longer.
    assert [b - a for a, b in zip(times, times[1:])].count(5) == 3
    # The 10th multiple of 999 / 20 is 499.5; 500 is even, the sum is a little less.
    assert LINEAR.respaced(21).times[10] == 499
    twice = LINEAR.respaced(250).respaced(2)
    assert twice.times.tolist() == [0, 999]
    torch.testing.assert_close(twice.betas, LINEAR.respaced(2).betas, **EXACT)
    for num_steps in (0, 1, 1001):
        words = f"num_steps is {num_steps}, expected 2 to 1000"
        refused(partial(LINEAR.respaced, num_steps), words)


def test_the_first_posterior_is_the_data_with_the_second_variance():
    assert LINEAR.posterior_clean[0].item() == pytest.approx(1, abs=1e-11)
    assert LINEAR.posterior_noisy[0] == 0
    assert LINEAR.posterior_log_variance[0] == LINEAR.posterior_log_variance[1]


def test_q_sample_follows_the_chain_at_each_samples_time_in_fp32_at_least():
    _, x, noise = batch()
    times = [0, 1, 300, 640, 999]
    samples = LINEAR.q_sample(x, noise, torch.tensor(times))
    for i, time in enumerate(times):
        factor, variance = forward(-1, time)
        expected = factor * x[i] + math.sqrt(variance) * noise[i]
        torch.testing.assert_close(samples[i], expected, **EXACT)
    x, noise = x.bfloat16(), noise.bfloat16()
    sample, exact = LINEAR.q_sample(x, noise, TIMES), LINEAR.q_sample(x.double(), noise, TIMES)
    assert sample.dtype == torch.float32
    torch.testing.assert_close(sample.double(), exact, rtol=1e-6, atol=1e-6)


def reference(output, x, noise, t):
    """Both losses with the means formed, by Bayes' rule on the chain, in the dtype of x."""

    def at(values):
        return torch.tensor(values, dtype=x.dtype).view(-1, 1, 1, 1)

    times = t.tolist()
    factor, variance = (np.array(values) for values in zip(*(forward(-1, time) for time in times)))
    of_clean, of_noisy, low = zip(*(posterior(time - 1, time) for time in times))
    noisy = at(factor) * x + at(np.sqrt(variance)) * noise
    predicted, v = output.to(x.dtype).chunk(2, dim=1)
    clean = at(1 / factor) * noisy - at(np.sqrt(variance) / factor) * predicted
    true, mean = (at(of_clean) * c + at(of_noisy) * noisy for c in (x, clean))
    low, high = at(np.log(low)), at([math.log(BETAS[time]) for time in times])
    log_variance = (v + 1) / 2 * high + (1 - (v + 1) / 2) * low
    ratio = (low - log_variance).exp()
    error = (true - mean).square() * (-log_variance).exp()
    divergence = (log_variance - low - 1 + ratio + error) / 2
    return (predicted - noise).square().mean((1, 2, 3)), divergence.mean((1, 2, 3)) / math.log(2)


def test_the_losses_are_the_error_of_the_noise_and_the_divergence_of_two_gaussians_in_bits():
    output, x, noise = batch()
    losses = ddpm_losses(LINEAR, output, x, noise, TIMES)
    simple, variational = reference(output, x, noise, TIMES)
    torch.testing.assert_close(losses.simple, simple, rtol=1e-12, atol=0)
    # Forming both means costs digits that ddpm_losses does not lose: 1 / factor is up to 157.
    torch.testing.assert_close(losses.variational, variational, rtol=1e-9, atol=0)


def test_v_reaches_from_the_posterior_variance_to_beta():
    """With the noise itself; there the true posterior has the divergence 0."""
    _, x, noise = batch()
    of_times = [(posterior(time - 1, time)[2], BETAS[time]) for time in TIMES.tolist()]
    low, high = torch.tensor(of_times, dtype=torch.float64).sqrt().T
    for v, std in ((-1, low), (1, high)):
        output = torch.cat([noise, torch.full_like(noise, v)], dim=1)
        losses = ddpm_losses(LINEAR, output, x, noise, TIMES)
        assert losses.simple.tolist() == [0] * 5
        assert ((losses.variational == 0) == (v == -1)).all()
        expected = kl_divergence(Normal(0.0, low), Normal(0.0, std)) / math.log(2)
        # torch's formula subtracts numbers near 1.
        torch.testing.assert_close(losses.variational, expected, rtol=1e-9, atol=1e-15)


def first_step(x, mean, v):
    """variational at t = 0 of values x (B) where the model's mean is `mean`."""
    ratio = math.sqrt(BETAS[0] / (1 - BETAS[0]))
    error = (x - mean) / ratio
    output = torch.stack([error, torch.full_like(error, v)], dim=1)[..., None, None]
    column = x.view(-1, 1, 1, 1)
    t = torch.zeros(len(x), dtype=torch.int64)
    return ddpm_losses(LINEAR, output, column, torch.zeros_like(column), t).variational


@pytest.mark.parametrize("v", (-1.0, 0.3, 1.0))
@pytest.mark.parametrize("mean", (-3.0, -1.0, -0.2, 0.5001, 0.999, 1.01))
def test_the_likelihood_of_all_pixel_values_is_one(mean, v):
    values = torch.arange(256).double() / 127.5 - 1
    assert (-first_step(values, mean, v)).exp2().sum().item() == pytest.approx(1, rel=1e-11)


@pytest.mark.parametrize("v", (-1.0, 0.3, 1.0))
@pytest.mark.parametrize("x", (-4.0, -1.0, -0.9989, -0.3, 0.0, 0.7, 0.9989, 1.0, 2.5))
@pytest.mark.parametrize("distance", (-0.04, -0.003, 0.0, 0.01, 0.04))
def test_the_first_step_is_the_likelihood_of_a_bin(x, distance, v):
    low = math.log(posterior(0, 1)[2])
    log_variance = low + (v + 1) / 2 * (math.log(BETAS[0]) - low)
    expected = -math.log2(likelihood(x, x - distance, log_variance))
    actual = first_step(torch.tensor([x], dtype=torch.float64), x - distance, v).item()
    # scipy's difference of two values of the distribution function, at least 1e-8 here.
    assert actual == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("error", (1e4, -1e4))
def test_a_value_far_from_the_mean_has_a_finite_likelihood_and_gradient(error):
    output, x, noise = (tensor.float() for tensor in batch())
    output[:, :3] += error
    output.requires_grad_()
    t = torch.tensor([0, 0, 1, 500, 999])
    variational = ddpm_losses(LINEAR, output, x, noise, t).variational
    variational.sum().backward()
    assert variational.isfinite().all() and output.grad.isfinite().all()


@pytest.mark.parametrize("first", (0, 1))
def test_the_bound_trains_the_variance_alone_and_the_error_the_noise_alone(first):
    output, x, noise = batch()
    output.requires_grad_()
    losses = ddpm_losses(LINEAR, output, x, noise, torch.arange(first, first + 5))
    (of_simple,) = torch.autograd.grad(losses.simple.sum(), output, retain_graph=True)
    (of_bound,) = torch.autograd.grad(losses.variational.sum(), output)
    assert (of_simple[:, :3] != 0).all() and (of_simple[:, 3:] == 0).all()
    assert (of_bound[:, :3] == 0).all() and (of_bound[:, 3:] != 0).all()


def test_the_gradient_of_the_bound_is_its_slope():
    output, x, noise = batch(shape=(5, 1, 2, 2))
    t = torch.tensor([0, 0, 1, 500, 999])
    x[0] = torch.tensor([[-1.0, 1.0], [0.999, 0.3]])

    def bound(v):
        return ddpm_losses(LINEAR, torch.cat([output[:, :1], v], 1), x, noise, t).variational

    assert torch.autograd.gradcheck(bound, (output[:, 1:].clone().requires_grad_(),))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_losses_are_computed_in_fp32_from_any_output(dtype):
    output, x, noise = batch(torch.float32, (32, 4, 8, 8))
    output, t = output.to(dtype), torch.arange(1, 33) * 31
    losses = ddpm_losses(LINEAR, output, x, noise, t)
    oracle = reference(output, x.double(), noise.double(), t)
    for name, *values in zip(losses._fields, losses, oracle, reference(output, x, noise, t)):
        assert_within_budget(name, *values)


def test_no_value_is_read_on_the_host():
    chain = LINEAR.to("meta")
    output, x, noise = (tensor.to("meta") for tensor in batch())
    t = TIMES.to("meta")
    assert chain.q_sample(x, noise, t).shape == SHAPE
    assert [tuple(loss.shape) for loss in ddpm_losses(chain, output, x, noise, t)] == [(5,), (5,)]


@pytest.mark.parametrize(
    "name, shape, expected",
    (("output", (5, 3, 4, 4), (5, 6, 4, 4)), ("noise", (5, 3, 4), SHAPE), ("t", (1,), (5,))),
)
def test_shapes_that_do_not_fit_are_named(name, shape, expected):
    arguments = dict(zip(("output", "x", "noise"), batch())) | {"t": TIMES}
    arguments[name] = torch.zeros(shape, dtype=arguments[name].dtype)
    words = re.escape(f"{name} has shape {shape}, expected {expected}")
    refused(lambda: ddpm_losses(LINEAR, **arguments), words)
    if name != "output":
        del arguments["output"]
        refused(lambda: LINEAR.q_sample(**arguments), words)


# The chain as a path

RATIOS = torch.tensor(1 / np.cumprod(1 - np.array(BETAS)) - 1).sqrt()
"""sigma / alpha of every step."""


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("factor, later", ((0.999, 0), (1.001, 1)))
def test_the_time_of_a_ratio_is_the_middle_of_the_first_step_that_has_it(dtype, factor, later):
    """Ratios of neighbouring steps are at least half a percent apart."""
    t = ddpm.path.time_of_ratio((factor * RATIOS).to(dtype))
    steps = (torch.arange(1000) + later).clamp(max=999)
    torch.testing.assert_close(t.double(), (steps.double() + 0.5) / 1000, rtol=1e-6, atol=0)
    for shift in (-0.49, 0, 0.49):  # a step has all times of its thousandth
        assert torch.equal(ddpm.path.model_times(t + shift / 1000), steps)


def test_a_step_has_its_ratio_and_a_ratio_beyond_them_the_first_or_last_step():
    alpha, sigma, *_ = ddpm.path.coefficients(torch.arange(1000))
    torch.testing.assert_close((sigma / alpha).double(), RATIOS, rtol=1e-6, atol=0)
    t = ddpm.path.time_of_ratio(torch.tensor([0.0, 1e-30, 1e-3, 200.0, 1e30, math.inf]))
    assert ddpm.path.model_times(t).tolist() == [0, 0, 0, 999, 999, 999]
