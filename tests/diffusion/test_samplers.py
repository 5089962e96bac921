import math

import pytest
import torch

from repa_fast.diffusion import path as paths
from repa_fast.diffusion.samplers import euler, euler_maruyama, sample
from repa_fast.testing import seeded

EXACT = {"rtol": 1e-12, "atol": 1e-12}
SHAPE = (3, 4, 2, 2)
LABELS = torch.tensor([0, 4, 9])
NULL = 10
STEPS = 12


def field(x, t, labels):
    """A velocity linear in x, with another slope and offset for each label and channel."""
    label = labels.to(x.dtype).view(-1, 1, 1, 1)
    channel = torch.arange(x.shape[1], dtype=x.dtype).view(1, -1, 1, 1)
    return (0.3 - 0.8 * t + 0.05 * label) * x + math.sin(3 * t) + 0.1 * label + 0.2 * channel


class Model:
    """The field as a model that records its calls."""

    num_classes = NULL

    def __init__(self):
        self.calls = []

    def __call__(self, x, t, y):
        assert t.shape == y.shape == x.shape[:1]
        assert (t == t[0]).all()
        self.calls.append((x.clone(), t.clone(), y.clone()))
        return field(x, t[0].item(), y), []

    @property
    def times(self):
        return [t[0].item() for _, t, _ in self.calls]


def released_score(velocity, x, t, path):
    """REPA's released code, from the path's table."""
    if path is paths.linear:
        alpha, d_alpha, sigma, d_sigma = 1 - t, -1.0, t, 1.0
    else:
        alpha, sigma = math.cos(math.pi * t / 2), math.sin(math.pi * t / 2)
        d_alpha, d_sigma = -math.pi / 2 * sigma, math.pi / 2 * alpha
    ratio = alpha / d_alpha
    return (ratio * velocity - x) / (sigma**2 - ratio * d_sigma * sigma)


def guided(value, x, t, scale, interval, t_guidance):
    """`value` of the conditional half, or both halves combined inside the interval."""
    conditional = value(x, LABELS)
    if scale == 1 or not interval[0] <= t_guidance <= interval[1]:
        return conditional
    null = value(x, torch.full_like(LABELS, NULL))
    return null + scale * (conditional - null)


def euler_recursion(x, num_steps, *, heun=False, scale=1.0, interval=(0.0, 1.0)):
    """x at every model call, and the result."""
    states = []
    times = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64).tolist()

    def velocity(x, t, t_guidance):
        states.append(x)
        return guided(lambda x, y: field(x, t, y), x, t, scale, interval, t_guidance)

    for i, (t, t_next) in enumerate(zip(times[:-1], times[1:])):
        d = velocity(x, t, t)
        end = x + (t_next - t) * d
        if heun and i < num_steps - 1:
            end = x + (t_next - t) * (0.5 * d + 0.5 * velocity(end, t_next, t))
        x = end
    return [*states, x]


def sde_times(num_steps):
    return [*torch.linspace(1, 0.04, num_steps, dtype=torch.float64).tolist(), 0.0]


def maruyama_recursion(
    x, noise, *, path=paths.linear, scale=1.0, interval=(0.0, 1.0), w=lambda t: 2 * t
):
    """x at every model call, and the result, guidance acting on the drift as released."""
    states = []
    times = sde_times(len(noise) + 1)
    for i, (t, t_next) in enumerate(zip(times[:-1], times[1:])):
        dt = t_next - t
        states.append(x)

        def drift(x, y, t=t):
            v = field(x, t, y)
            return v - 0.5 * w(t) * released_score(v, x, t, path)

        x = x + guided(drift, x, t, scale, interval, t) * dt
        if i < len(noise):
            x = x + math.sqrt(w(t)) * math.sqrt(abs(dt)) * noise[i]
    return [*states, x]


def latents(dtype=torch.float64):
    return seeded(SHAPE, seed=1, dtype=dtype)


def increments(num_steps=STEPS):
    return seeded((num_steps - 1, *SHAPE), seed=2, dtype=torch.float64)


def visited(sampler, *, x=None, **options):
    """(x at every model call and the result, the model)."""
    model = Model()
    result = sampler(model, latents() if x is None else x, LABELS, **options)
    return [*(x[: len(LABELS)] for x, _, _ in model.calls), result], model


@pytest.mark.parametrize("path", (paths.linear, paths.cosine))
@pytest.mark.parametrize("heun", (False, True))
@pytest.mark.parametrize(
    "scale, interval", ((1.0, (0.0, 1.0)), (2.5, (0.0, 1.0)), (4.0, (0.2, 0.7)))
)
def test_euler_follows_the_recursion_at_every_step(path, heun, scale, interval):
    options = {"cfg_scale": scale, "guidance_interval": interval, "path": path}
    actual, _ = visited(euler, num_steps=STEPS, heun=heun, **options)
    expected = euler_recursion(latents(), STEPS, heun=heun, scale=scale, interval=interval)
    torch.testing.assert_close(actual, expected, **EXACT)


@pytest.mark.parametrize("path", (paths.linear, paths.cosine))
@pytest.mark.parametrize(
    "scale, interval", ((1.0, (0.0, 1.0)), (2.5, (0.0, 1.0)), (4.0, (0.2, 0.7)))
)
def test_euler_maruyama_follows_the_released_recursion_at_every_step(path, scale, interval):
    options = {"path": path, "scale": scale, "interval": interval}
    actual, _ = visited(
        euler_maruyama,
        num_steps=STEPS,
        noise=increments(),
        path=path,
        cfg_scale=scale,
        guidance_interval=interval,
    )
    expected = maruyama_recursion(latents(), increments(), **options)
    torch.testing.assert_close(actual, expected, **EXACT)


@pytest.mark.parametrize("path", (paths.linear, paths.cosine))
def test_half_the_diffusion_is_noticed_from_the_first_step(path):
    actual, _ = visited(euler_maruyama, num_steps=STEPS, noise=increments(), path=path)
    wrong = maruyama_recursion(latents(), increments(), path=path, w=lambda t: t)
    assert torch.equal(actual[0], wrong[0])
    for a, e in zip(actual[1:], wrong[1:]):
        with pytest.raises(AssertionError):
            torch.testing.assert_close(a, e, **EXACT)


def test_cosine_and_linear_paths_differ_in_the_sde():
    on_linear, on_cosine = (
        visited(euler_maruyama, num_steps=STEPS, noise=increments(), path=path)[0][-1]
        for path in (paths.linear, paths.cosine)
    )
    assert (on_linear - on_cosine).abs().max() > 1e-3


@pytest.mark.parametrize("num_steps", (1, 2, 7))
def test_euler_evaluates_once_per_step_on_a_uniform_grid(num_steps):
    _, model = visited(euler, num_steps=num_steps)
    assert model.times == pytest.approx([1 - i / num_steps for i in range(num_steps)], abs=1e-15)


@pytest.mark.parametrize("num_steps", (1, 2, 7))
def test_heun_evaluates_twice_per_step_but_the_last(num_steps):
    _, model = visited(euler, num_steps=num_steps, heun=True)
    grid = [1 - i / num_steps for i in range(num_steps)]
    expected = [t for start, end in zip(grid, grid[1:]) for t in (start, end)] + grid[-1:]
    assert len(model.calls) == 2 * num_steps - 1
    assert model.times == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("num_steps", (2, 3, 9))
def test_euler_maruyama_evaluates_once_per_step_down_to_0_04(num_steps):
    _, model = visited(euler_maruyama, num_steps=num_steps, noise=increments(num_steps))
    grid = [1 - 0.96 * i / (num_steps - 1) for i in range(num_steps)]
    assert model.times == pytest.approx(grid, abs=1e-15)


def guided_calls(model):
    """Which calls held both halves; checks the halves and the labels of each."""
    both = []
    for x, _, y in model.calls:
        if len(x) == 6:
            assert torch.equal(x[:3], x[3:]) and y.tolist() == [*LABELS.tolist(), *[NULL] * 3]
        else:
            assert y.tolist() == LABELS.tolist()
        both.append(len(x) == 6)
    return both


def test_guidance_doubles_the_batch_from_border_to_border_of_the_interval():
    options = {"cfg_scale": 2.0, "guidance_interval": (0.25, 0.75)}
    _, model = visited(euler, num_steps=8, **options)
    assert model.times == [1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]
    assert guided_calls(model) == [False, False, True, True, True, True, True, False]


@pytest.mark.parametrize("low, high", ((0, 4), (2, 2), (1, 3)))
def test_the_sde_includes_both_borders_of_the_interval(low, high):
    times = sde_times(5)
    interval = (times[high], times[low])
    options = {"cfg_scale": 2.0, "guidance_interval": interval, "noise": increments(5)}
    _, model = visited(euler_maruyama, num_steps=5, **options)
    assert guided_calls(model) == [low <= i <= high for i in range(5)]


def test_just_outside_the_interval_there_is_no_guidance():
    interval = (math.nextafter(0.25, 1), math.nextafter(0.75, 0))
    _, model = visited(euler, num_steps=4, cfg_scale=2.0, guidance_interval=interval)
    assert guided_calls(model) == [False, False, True, False]


def test_heun_tests_the_interval_at_the_start_of_the_step():
    options = {"cfg_scale": 2.0, "guidance_interval": (0.5, 0.75), "heun": True}
    _, model = visited(euler, num_steps=4, **options)
    assert model.times == [1, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25]
    assert guided_calls(model) == [False, False, True, True, True, True, False]


@pytest.mark.parametrize("sampler", (euler, euler_maruyama))
def test_scale_one_is_no_guidance(sampler):
    _, model = visited(sampler, num_steps=4, cfg_scale=1.0)
    assert guided_calls(model) == [False] * 4


def test_a_scale_below_one_is_guidance_too():
    _, model = visited(euler, num_steps=4, cfg_scale=0.0)
    assert guided_calls(model) == [True] * 4


def test_guided_velocity_mixes_all_channels():
    (_, result), _ = visited(euler, num_steps=1, cfg_scale=3.0)
    x = latents()
    conditional, null = (field(x, 1.0, y) for y in (LABELS, torch.full_like(LABELS, NULL)))
    expected = x - (null + 3.0 * (conditional - null))
    torch.testing.assert_close(result, expected, **EXACT)
    assert ((result - (x - conditional)).abs().amin((0, 2, 3)) > 1e-3).all()


def test_the_null_label_is_the_models_number_of_classes():
    model = Model()
    model.num_classes = 1000
    euler(model, latents(), LABELS, num_steps=1, cfg_scale=2.0)
    assert model.calls[0][2].tolist() == [*LABELS.tolist(), *[1000] * 3]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("sampler", (euler, euler_maruyama))
def test_model_is_called_in_the_dtype_of_the_latents_and_the_result_is_fp64(sampler, dtype):
    model = Model()
    result = sampler(model, latents(dtype), LABELS, num_steps=3, cfg_scale=2.0)
    assert {x.dtype for x, _, _ in model.calls} == {dtype}
    assert result.dtype == torch.float64 and result.shape == SHAPE


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
@pytest.mark.parametrize("sampler", (euler, euler_maruyama))
def test_time_is_not_rounded_to_less_than_fp32(sampler, dtype):
    exact, model = (visited(sampler, x=latents(d), num_steps=7)[1] for d in (torch.float64, dtype))
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert {t.dtype for _, t, _ in model.calls} == {expected}
    assert model.times == torch.tensor(exact.times, dtype=expected).tolist()


def test_the_state_stays_fp64_between_calls_of_an_fp32_model():
    model = Model()
    x = latents(torch.float32)
    result = euler(model, x, LABELS, num_steps=STEPS)
    state = x.double()
    times = torch.linspace(1, 0, STEPS + 1, dtype=torch.float64)
    for (seen, t, y), dt in zip(model.calls, times.diff().tolist()):
        assert torch.equal(seen, state.float())
        state = state + dt * field(seen, t[0].item(), y).double()
    torch.testing.assert_close(result, state, **EXACT)
    assert not torch.equal(result, result.float().double())


@pytest.mark.parametrize("sampler", (euler, euler_maruyama))
def test_latents_are_left_as_they_are_and_nothing_is_recorded_for_autograd(sampler):
    x = latents().requires_grad_()
    result = sampler(Model(), x, LABELS, num_steps=3)
    assert torch.equal(x, latents()) and not result.requires_grad


def test_a_seed_makes_the_noise_repeatable_and_leaves_the_global_one_alone():
    state = torch.get_rng_state()
    results = [
        euler_maruyama(Model(), latents(), LABELS, num_steps=5, seed=seed) for seed in (0, 0, 1)
    ]
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
    assert torch.equal(torch.get_rng_state(), state)


def test_a_sample_does_not_depend_on_the_batch_it_is_drawn_in():
    index = torch.tensor([7, 2**40, 3])
    whole = euler_maruyama(Model(), latents(), LABELS, num_steps=5, index=index)
    alone = euler_maruyama(Model(), latents()[1:2], LABELS[1:2], num_steps=5, index=index[1:2])
    torch.testing.assert_close(alone, whole[1:2], **EXACT)
    other = euler_maruyama(Model(), latents(), LABELS, num_steps=5)
    assert not torch.equal(other[1], whole[1])


def test_drawn_noise_is_standard_normal_and_new_at_every_step():
    x = torch.zeros(64, 4, 8, 8, dtype=torch.float64)
    seen = []

    def model(x, t, y):
        seen.append((x, t[0].item()))
        return torch.zeros_like(x), []

    euler_maruyama(model, x, torch.zeros(64).long(), num_steps=4, seed=3)
    noises = []
    for (x, t), (x_next, t_next) in zip(seen[:-1], seen[1:]):
        drift = -t * released_score(torch.zeros_like(x), x, t, paths.linear)
        noises.append((x_next - x - drift * (t_next - t)) / math.sqrt(2 * t * (t - t_next)))
    standard_error = 1 / math.sqrt(x.numel())
    for noise in noises:
        assert abs(noise.mean()) < 5 * standard_error
        assert abs(noise.var() - 1) < 5 * math.sqrt(2) * standard_error
    for a, b in zip(noises[:-1], noises[1:]):
        assert abs((a * b).mean()) < 5 * standard_error


def test_sample_chooses_the_sampler_by_mode():
    options = {"num_steps": 5, "cfg_scale": 2.0, "guidance_interval": (0.1, 0.8)}
    ode = sample(Model(), latents(), LABELS, mode="ode", heun=True, **options)
    assert torch.equal(ode, euler(Model(), latents(), LABELS, heun=True, **options))
    sde, direct = (
        sampler(Model(), latents(), LABELS, seed=3, **options)
        for sampler in (lambda *a, **k: sample(*a, mode="sde", **k), euler_maruyama)
    )
    assert torch.equal(sde, direct)


@pytest.mark.parametrize(
    "sampler, changes, parts",
    (
        (euler, {"num_steps": 0}, ("num_steps", "0", "at least 1")),
        (euler_maruyama, {"num_steps": 1}, ("num_steps", "1", "at least 2")),
        (euler, {"labels": LABELS[:2]}, ("labels", "(2,)", "expected (3,)")),
        (euler_maruyama, {"labels": LABELS[:2]}, ("labels", "(2,)", "expected (3,)")),
        (euler, {"labels": LABELS - 1}, ("labels", "-1", "[0, 10]")),
        (euler_maruyama, {"labels": LABELS + 2}, ("labels", "11", "[0, 10]")),
        (
            euler_maruyama,
            {"noise": torch.zeros(4, *SHAPE)},
            ("noise", "(4, 3, 4, 2, 2)", "expected (3, 3, 4, 2, 2)"),
        ),
        (sample, {"mode": "dpm"}, ("mode", "'dpm'", "ode", "sde")),
    ),
)
def test_wrong_arguments_are_named_with_expected_and_got(sampler, changes, parts):
    arguments = {"labels": LABELS, "num_steps": 4} | changes
    with pytest.raises(ValueError) as error:
        sampler(Model(), latents(), **arguments)
    assert all(part in str(error.value) for part in parts)


def test_guidance_without_a_null_label_is_refused():
    def model(x, t, y):
        return field(x, t[0].item(), y), []

    with pytest.raises(ValueError, match="num_classes"):
        euler(model, latents(), LABELS, num_steps=2, cfg_scale=2.0)
    euler(model, latents(), LABELS, num_steps=2)
