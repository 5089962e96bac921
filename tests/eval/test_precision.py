"""What rounding does to samples, on a tiny model that predicts something."""

import copy

import numpy as np
import pytest
import torch

from repa_fast.configs.sampler import SamplerConfig
from repa_fast.diffusion import samplers
from repa_fast.eval.sampling import ImageSampler

CPU = torch.device("cpu")
INDEX = np.arange(8)
LABELS = INDEX % 10
MODES, STEPS = ("ode", "sde"), 12
GUIDANCE = 1.5
FP32, BF16 = 2**-24, 2**-8
"""Unit roundoffs."""
ROUNDINGS = 3 * 12
"""Rounded results in a row on the way through the model: a dozen in each of its three blocks."""
AMPLIFIED = GUIDANCE + (GUIDANCE - 1)
"""Weights of the two velocities that guidance adds."""
BOUND = (ROUNDINGS / 3) ** 0.5 * AMPLIFIED
"""On an error relative to the velocity, in units of roundoff: roundings, uniform within one unit,
add up like a random walk. Whether the errors of the steps are independent or the same, the path's
is no larger than one step's, relative to the change along the path."""


@pytest.fixture(scope="module")
def oracle(loaded):
    """mode -> (latents in fp64 from weights in fp64, RMS of the change from the noise)."""
    found = {}
    for mode in MODES:
        noise = sampler(loaded, mode).noise(INDEX, 0).double()
        latents = samplers.sample(
            copy.deepcopy(loaded.model).double(), noise, torch.from_numpy(LABELS), mode=mode,
            num_steps=STEPS, cfg_scale=GUIDANCE, seed=0, index=torch.from_numpy(INDEX),
        )  # fmt: skip
        found[mode] = latents, rms(latents - noise)
    return found


def sampler(loaded, mode, **precision) -> ImageSampler:
    config = SamplerConfig(mode=mode, num_steps=STEPS, cfg_scale=GUIDANCE, **precision)
    return ImageSampler(loaded, config, CPU)


def sampled(loaded, mode, **precision) -> torch.Tensor:
    return sampler(loaded, mode, **precision).latents(INDEX, LABELS, 0).double()


def rms(x: torch.Tensor) -> float:
    return x.square().mean().sqrt().item()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("state", ["fp64", "fp32"])
@pytest.mark.parametrize("precision, roundoff", [("no", FP32), ("bf16", BF16)])
def test_rounding_the_model_is_within_what_its_roundings_add_up_to(
    loaded, oracle, mode, state, precision, roundoff
):
    exact, change = oracle[mode]
    got = sampled(loaded, mode, mixed_precision=precision, state_dtype=state)
    error = rms(got - exact)
    assert roundoff / 32 * change < error < BOUND * roundoff * change


@pytest.mark.parametrize("mode", MODES)
def test_the_states_precision_adds_roundings_of_its_own_and_no_more(loaded, oracle, mode):
    """Three roundings of the state in a step add up like a random walk, and the model, which sees
    the rounded state, at most doubles them; beside those of bf16 they do not matter."""
    exact, _ = oracle[mode]
    size = max(rms(exact), 1.0)
    kept, rounded = (sampled(loaded, mode, state_dtype=dtype) for dtype in ("fp64", "fp32"))
    assert 0 < rms(rounded - kept) < 2 * (3 * STEPS) ** 0.5 * FP32 * size
    errors = [
        rms(sampled(loaded, mode, mixed_precision="bf16", state_dtype=dtype) - exact)
        for dtype in ("fp64", "fp32")
    ]
    assert errors[1] == pytest.approx(errors[0], rel=0.1)
