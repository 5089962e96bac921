import math

import pytest
import torch
from scipy import stats

from repa_fast.diffusion import ddpm
from repa_fast.diffusion import path as paths
from repa_fast.diffusion.draws import draw, stream
from repa_fast.diffusion.prediction import PREDICTIONS, training_interval
from tests.refusals import refused

SHAPE = (4, 4, 4)
MANY = 20_000
LOG_RATIOS = {
    paths.linear: lambda t: torch.log(t / (1 - t)),
    paths.cosine: lambda t: torch.log(torch.tan(math.pi * t / 2)),
    paths.vp: lambda t: (9.95 * t.square() + 0.1 * t).expm1().log() / 2,
}
"""Logarithm of sigma / alpha at t."""
every_path = pytest.mark.parametrize("path", LOG_RATIOS, ids=lambda path: path.name)
every_prediction = pytest.mark.parametrize("prediction", PREDICTIONS)
every_weighting = pytest.mark.parametrize("weighting", ("uniform", "lognormal"))


def drawn(seed=0, step=3, batch=32, *, path=paths.linear, **options):
    return draw(seed, step, batch, SHAPE, path=path, **options)


def equal(a, b):
    return [torch.equal(x, y) for x, y in zip(a, b)]


def fits(values, *distribution):
    return stats.kstest(values.double().numpy(), *distribution).pvalue > 1e-3


@every_weighting
def test_draws_are_a_function_of_seed_and_step_whatever_the_global_generator_did(weighting):
    options = {"weighting": weighting, "drop_prob": 0.5}
    first = drawn(**options)
    assert [tuple(f.shape) for f in first] == [(32,), (32, *SHAPE), (32, *SHAPE), (32,), (32,)]
    assert [f.dtype for f in first] == [torch.float32] * 3 + [torch.bool, torch.float32]
    torch.manual_seed(123)
    state = torch.get_rng_state()
    assert all(equal(first, drawn(**options)))
    assert torch.equal(torch.get_rng_state(), state)
    for other in ({"seed": 1}, {"step": 4}, {"seed": 3, "step": 0}):
        assert equal(first, drawn(**options, **other)) == [False] * 5


@pytest.mark.parametrize("world_size", (1, 2, 4, 8, 32))
def test_parts_of_all_ranks_make_up_the_global_draws(world_size):
    whole = drawn(drop_prob=0.5)
    local = 32 // world_size
    parts = [whole.part(rank * local, (rank + 1) * local) for rank in range(world_size)]
    assert all(equal((torch.cat(fields) for fields in zip(*parts)), whole))


def test_drop_probability_changes_only_the_mask_which_has_that_mean():
    never, sometimes, often, always = (drawn(drop_prob=p) for p in (0.0, 0.3, 0.6, 1.0))
    for other in (sometimes, often, always):
        assert equal(never[:3], other[:3]) == [True] * 3
    assert not never.drop.any() and always.drop.all()
    assert not (sometimes.drop & ~often.drop).any()
    for probability in (0.1, 0.5):
        frequency = drawn(batch=MANY, drop_prob=probability).drop.double().mean()
        error = math.sqrt(probability * (1 - probability) / MANY)
        assert abs(frequency - probability) < 5 * error


@pytest.mark.parametrize("batch", (6, 32))
@pytest.mark.parametrize("path", (*LOG_RATIOS, ddpm.path), ids=lambda path: path.name)
def test_weighting_and_path_change_only_the_times(batch, path):
    """And the path not the uniform ones, but for the end it keeps away from."""
    uniform = drawn(batch=batch, drop_prob=0.5)
    other = drawn(batch=batch, drop_prob=0.5, weighting="lognormal", path=path)
    assert equal(uniform, other) == [False, True, True, True, True]
    assert other.t.dtype == torch.float32
    t = drawn(batch=batch, path=path).t
    assert torch.allclose(t, path.train_eps + (1 - path.train_eps) * uniform.t)
    assert path is paths.vp or torch.equal(t, uniform.t)


def test_noises_are_standard_normal_and_what_is_drawn_separately_is_uncorrelated():
    """Noises of samples, steps, seeds and streams; label drop and times."""
    here, next_step, other_seed = (
        drawn(batch=400, **options) for options in ({}, {"step": 4}, {"seed": 1})
    )
    assert fits(here.noise.flatten(), "norm") and fits(here.posterior_noise.flatten(), "norm")
    others = [here.posterior_noise, here.noise.roll(1, 0), next_step.posterior_noise]
    others += [next_step.noise, other_seed.noise]
    for other in others:
        correlation = (here.noise.double() * other.double()).mean()
        assert abs(correlation) < 5 / math.sqrt(here.noise.numel())
    draws = drawn(batch=4096, drop_prob=0.5)
    agreement = (draws.drop == (draws.t < 0.5)).double().mean()
    assert abs(agreement - 0.5) < 5 * 0.5 / math.sqrt(4096)


def ends(path, prediction):
    """Of the training interval, in fp32."""
    return torch.tensor(training_interval(path, prediction)).tolist()


@every_path
@every_prediction
def test_uniform_times_are_uniform_on_the_interval_of_the_prediction(path, prediction):
    """Where the velocity of the path is finite."""
    first, last = ends(path, prediction)
    t = drawn(batch=MANY, path=path, prediction=prediction).t
    assert t.dtype == torch.float32
    assert first <= t.min() < first + 1e-3 and last - 1e-3 < t.max() <= last
    assert fits(t, "uniform", (first, last - first))
    assert path.interpolate(torch.ones(MANY, 1), torch.ones(MANY, 1), t)[1].isfinite().all()


@every_path
@pytest.mark.parametrize("prediction", ("v", "score"))
def test_lognormal_times_have_a_normal_log_ratio(path, prediction):
    """On the VP path up to the ratio of 152 at its end, which one of 4 million numbers exceeds."""
    t = drawn(batch=MANY, path=path, prediction=prediction, weighting="lognormal").t
    assert t.min() >= 0 and t.max() <= 1
    assert fits(LOG_RATIOS[path](t.double()), "norm")


@every_path
@every_weighting
def test_the_prediction_changes_only_the_times(path, weighting):
    velocity, score, noise = (
        drawn(path=path, weighting=weighting, prediction=prediction, drop_prob=0.5)
        for prediction in PREDICTIONS
    )
    assert all(equal(score, noise)) and all(equal(score[1:], velocity[1:]))
    moved = path.ends_in_noise and weighting == "uniform"  # few log-normal ones are near an end
    assert torch.equal(score.t, velocity.t) != moved


@every_path
@every_prediction
@pytest.mark.parametrize("ratio", (-30.0, 30.0))
def test_lognormal_times_do_not_leave_the_interval(monkeypatch, path, prediction, ratio):
    """Even ratios that no log-normal number reaches."""
    monkeypatch.setattr(torch, "randn", lambda shape, **_: torch.full((32,), ratio))
    first, last = ends(path, prediction)
    t = drawn(path=path, prediction=prediction, weighting="lognormal").t
    assert t.tolist() == pytest.approx([first if ratio < 0 else last] * 32, abs=1e-12)
    assert t.min() >= first and t.max() <= last


def test_a_stream_is_a_function_of_all_its_keys():
    """Weights, sample grid and the times of step 0 use (seed), (seed, 0) and (seed, 0, 0)."""
    keys = [(0,), (5, 1), (2**40, 3, 2), (0, 1), (1, 0), (1, 1), (0, 1, 2), (0, 2, 1), (2**40, 3)]
    keys += [(7,), (7, 0), (7, 0, 0)]
    first, again = ([torch.rand(4, generator=stream(*each)) for each in keys] for _ in range(2))
    assert all(equal(first, again)) and len({tuple(row.tolist()) for row in first}) == len(keys)


@pytest.mark.parametrize(
    "options, known",
    (
        *(({"weighting": w}, ("uniform", "lognormal")) for w in ("logit-normal", "Uniform", "")),
        *(({"prediction": name}, PREDICTIONS) for name in ("velocity", "eps", "")),
    ),
)
def test_an_unknown_choice_is_named_with_the_known_ones(options, known):
    refused(lambda: drawn(**options), *map(repr, options.values()), *known)
