"""Images by their numbers: what decides them, and what does not."""

import copy
import dataclasses
import sys
from unittest import mock

import numpy as np
import pytest
import scipy.stats
import torch

from repa_fast import ops
from repa_fast.configs.objective import ObjectiveConfig
from repa_fast.configs.sampler import SamplerConfig
from repa_fast.diffusion import samplers
from repa_fast.diffusion.path import get
from repa_fast.eval import sampling
from repa_fast.eval.load import load
from repa_fast.eval.sampling import ImageSampler, labels_of
from repa_fast.objective import build_objective
from tests.eval import checkpoints
from tests.refusals import refused

CPU = torch.device("cpu")
INDEX = np.array([0, 1, 2, 3, 4, 5])
LABELS = np.array([3, 1, 4, 1, 5, 9])


def sampler(loaded, **settings) -> ImageSampler:
    if "adaptive" in settings:
        pytest.importorskip("torchdiffeq")
    return ImageSampler(loaded, SamplerConfig(**{"num_steps": 4} | settings), CPU)


@pytest.mark.parametrize("mode", [{}, {"heun": True}, {"adaptive": True}, {"mode": "sde"}])
def test_an_image_does_not_depend_on_its_batch_or_place_and_the_same_batch_has_the_same_bits(
    loaded, mode
):
    """Matrix products of another batch size sum in another order: rounding, and no more."""
    drawn = sampler(loaded, **mode)
    together = drawn.latents(INDEX, LABELS, 0)
    assert torch.equal(sampler(loaded, **mode).latents(INDEX, LABELS, 0), together)
    assert together.std() > 0.1
    order = np.array([4, 0, 5, 2, 1, 3])
    alone = [drawn.latents(INDEX[i : i + 1], LABELS[i : i + 1], 0) for i in range(6)]
    # the error that chooses dopri5's steps is that of the whole batch
    of_order, of_batch = (1e-3, 2e-2) if "adaptive" in mode else (1e-4, 1e-4)
    moved = drawn.latents(INDEX[order], LABELS[order], 0)
    assert torch.allclose(moved, together[order], rtol=0, atol=of_order)
    assert torch.allclose(torch.cat(alone), together, rtol=0, atol=of_batch)


@pytest.mark.parametrize("mode", ["ode", "sde"])
def test_seed_number_and_label_decide(loaded, mode):
    drawn = sampler(loaded, mode=mode)
    first = drawn.latents(INDEX, LABELS, 0)
    others = [
        drawn.latents(INDEX, LABELS, 1),
        drawn.latents(INDEX + 6, LABELS, 0),
        drawn.latents(INDEX, (LABELS + 1) % 10, 0),
    ]
    differences = [(other - first).abs().amax((1, 2, 3)).min() for other in others]
    assert min(differences) > 1e-2


def test_noise_is_the_generators_of_a_step_that_no_sampler_takes(loaded):
    numbers = np.array([7, 2, 2**40, 0])
    noise = sampler(loaded).noise(numbers, 5)
    assert noise.shape == (4, 3, 16, 16) and noise.dtype == torch.float32
    expected = ops.standard_normal(noise.shape, 5, 2**32 - 1, torch.from_numpy(numbers))
    assert torch.equal(noise, expected)


@pytest.mark.parametrize("kind", ["random", "balanced"])
@pytest.mark.parametrize("seed", [0, 3])
def test_labels_are_a_function_of_the_number(kind, seed):
    whole, again = (labels_of(np.arange(5000), 10, seed, kind) for _ in range(2))
    assert whole.dtype == np.int64 and set(whole) == set(range(10))
    assert np.array_equal(again, whole)
    for numbers in (np.arange(70), np.array([4321, 7, 7, 0]), np.arange(0)):
        assert np.array_equal(labels_of(numbers, 10, seed, kind), whole[numbers])
    if kind == "balanced":
        assert whole[:25].tolist() == [*range(10), *range(10), *range(5)]


def test_random_labels_are_uniform_and_change_with_the_seed():
    labels = labels_of(np.arange(20_000), 10, 0, "random")
    assert scipy.stats.chisquare(np.bincount(labels, minlength=10)).pvalue > 1e-3
    pairs = np.bincount(10 * labels[:-1] + labels[1:], minlength=100)
    assert scipy.stats.chisquare(pairs).pvalue > 1e-3
    other = labels_of(np.arange(20_000), 10, 1, "random")
    assert abs((labels == other).mean() - 0.1) < 0.02


@pytest.mark.parametrize("settings, options", [
    ({}, {}),
    ({"heun": True}, {"heun": True}),
    ({"cfg_scale": 1.0}, {"cfg_scale": 1.0}),
    ({"guidance_low": 0.2, "guidance_high": 0.7}, {"guidance_interval": (0.2, 0.7)}),
    ({"guidance_channels": 2}, {"guidance_channels": 2}),
    ({"path_type": "GVP"}, {"path": get("cosine")}),
    ({"path_type": "VP"}, {"path": get("VP")}),
    ({"prediction": "noise"}, {"prediction": "noise"}),
    ({"state_dtype": "fp32"}, {"state_dtype": torch.float32}),
    ({"num_steps": 7}, {"num_steps": 7}),
    ({"adaptive": True}, {}),
    ({"mode": "sde"}, {}),
    ({"mode": "sde", "diffusion_form": "constant", "diffusion_norm": 0.3}, None),
    ({"mode": "sde", "diffusion_form": "SBDM"}, None),
    ({"mode": "sde", "diffusion_form": "increasing-decreasing"}, None),
    ({"mode": "sde", "last_step": "tweedie", "last_step_size": 0.1}, None),
    ({"mode": "sde", "last_step": "none"}, None),
])  # fmt: skip
def test_settings_arrive_at_the_sampler(loaded, settings, options):
    """Under the same names, where no others are given."""
    drawn, numbers = sampler(loaded, **settings), INDEX * 1000
    noise, labels = drawn.noise(numbers, 9), torch.from_numpy(LABELS)
    same = {name: value for name, value in settings.items() if name != "mode"}
    options = {"num_steps": 4, "cfg_scale": 1.5} | (same if options is None else options)
    if "adaptive" in settings:
        expected, _ = samplers.dopri5(loaded.model, noise, labels, cfg_scale=1.5)
    elif "mode" in settings:
        of_sde = {"seed": 9, "index": torch.from_numpy(numbers)}
        expected = samplers.euler_maruyama(loaded.model, noise, labels, **options | of_sde)
    else:
        expected = samplers.euler(loaded.model, noise, labels, **options)
    got = drawn.latents(numbers, LABELS, 9)
    assert got.dtype == options.get("state_dtype", torch.float64)
    assert torch.equal(got, expected)


def test_path_and_prediction_are_the_checkpoints_unless_given(loaded):
    other = build_objective(ObjectiveConfig(path_type="cosine", prediction="noise"))
    others = dataclasses.replace(loaded, objective=other)
    implied = sampler(others).latents(INDEX, LABELS, 0)
    said = sampler(loaded, path_type="cosine", prediction="noise").latents(INDEX, LABELS, 0)
    back = sampler(others, path_type="linear", prediction="v").latents(INDEX, LABELS, 0)
    assert torch.equal(implied, said)
    assert torch.equal(back, sampler(loaded).latents(INDEX, LABELS, 0))
    assert (implied - back).abs().max() > 1e-2


@pytest.mark.usefixtures("inductor", "heavy")
def test_compiled_is_close_to_eager(run, loaded):
    eager = sampler(loaded, cfg_scale=1.0).latents(INDEX, LABELS, 0)
    drawn = sampler(load(run), cfg_scale=1.0, compile=True)
    assert torch.allclose(drawn.latents(INDEX, LABELS, 0), eager, rtol=0, atol=1e-4)


@pytest.mark.usefixtures("inductor", "heavy")
@pytest.mark.parametrize("settings", [{}, {"mode": "sde", "mixed_precision": "bf16"}])
def test_compiled_images_do_not_depend_on_what_was_sampled_before(run, settings):
    """With guidance in an interval the model meets two batch sizes."""

    def compiled() -> ImageSampler:
        torch._dynamo.reset()
        return sampler(load(run), compile=True, guidance_high=0.6, **settings)

    fresh = compiled().latents(INDEX, LABELS, 0)
    drawn = compiled()
    drawn.latents(INDEX.repeat(2), LABELS.repeat(2), 0)
    assert torch.equal(drawn.latents(INDEX, LABELS, 0), fresh)


def test_pixels_are_cut_off_or_rounded_and_need_no_autoencoder(loaded, monkeypatch):
    """Pixel values of a latent x are 127.5 x + 127.5."""
    monkeypatch.setitem(sys.modules, "diffusers", None)
    drawn = sampler(loaded)
    levels = (127.5 * drawn.latents(INDEX, LABELS, 0) + 127.5).clamp(0, 255).numpy()
    cut, rounded = drawn.images(INDEX, LABELS, 0), sampler(loaded, uint8="round")
    assert cut.shape == (6, 3, 16, 16) and cut.dtype == torch.uint8 and cut.float().std() > 20
    assert np.array_equal(cut, np.floor(levels))
    assert np.array_equal(rounded.images(INDEX, LABELS, 0), np.rint(levels))
    assert not np.array_equal(np.floor(levels), np.rint(levels))


@pytest.mark.xdist_group("diffusers")  # whose import takes seconds
def test_latents_are_decoded_by_the_autoencoder(latents, tmp_path, monkeypatch):
    """Against diffusers: x = decode((latent - bias) / scale), pixel values 127.5 x + 127.5."""
    from diffusers import AutoencoderKL

    vae, labels, tiled = str(checkpoints.autoencoder(tmp_path)), LABELS % 4, []
    monkeypatch.setattr(AutoencoderKL, "enable_tiling", lambda vae: tiled.append(vae))

    def images(**settings) -> torch.Tensor:
        return sampler(latents, vae=vae, **settings).images(INDEX, labels, 0).float()

    def assert_levels(got: torch.Tensor, expected: torch.Tensor) -> None:
        """Convolutions of another batch size turn a level that lies on an edge, and no more."""
        difference = (got - expected).abs()
        assert difference.max() <= 1 and (difference > 0).float().mean() < 1e-2

    model = AutoencoderKL.from_pretrained(vae, low_cpu_mem_usage=False)
    given = (sampler(latents, vae=vae).latents(INDEX, labels, 0) - 0.25) / 0.5
    with torch.no_grad():
        levels = (127.5 * model.decode(given.float()).sample + 127.5).clamp(0, 255)
    cut, rounded = images(), images(uint8="round")
    assert cut.shape == (6, 3, 16, 16) and levels.std() > 5
    assert_levels(cut, levels.floor())
    assert_levels(rounded, levels.round())
    assert not torch.equal(cut, rounded)
    difference = (images(vae_precision="bf16") - cut).abs().mean()
    assert 0 < difference < 2  # 8 bits of precision, 256 levels
    assert not tiled and images(vae_tiled=True).shape == cut.shape and len(tiled) == 1


@pytest.mark.parametrize("settings, expected", [
    ({}, "sd-vae-ft-ema"),
    ({"vae": "ema"}, "sd-vae-ft-ema"),
    ({"vae": "mse"}, "sd-vae-ft-mse"),
    ({"vae": "sd-vae-ft-mse"}, "sd-vae-ft-mse"),
    ({"vae": "someone/other"}, "someone/other"),
])  # fmt: skip
def test_the_autoencoder_is_the_one_asked_for(latents, monkeypatch, settings, expected):
    asked = []
    monkeypatch.setattr(sampling, "VAE", lambda source: asked.append(source) or mock.Mock())
    sampler(latents, **settings)
    own = dataclasses.replace(latents.metadata, vae="/of/its/own")
    sampler(dataclasses.replace(latents, metadata=own), **settings)
    assert asked == [expected, expected if settings else "/of/its/own"]


@pytest.mark.parametrize("settings, message", [
    ({"adaptive": True, "mode": "sde"}, "adaptive is for the ODE"),
    ({"adaptive": True, "heun": True}, "adaptive is for the ODE"),
    ({"guidance_low": 0.8, "guidance_high": 0.2}, "guidance_low is 0.8"),
    ({"guidance_high": 1.1}, "guidance_high 1.1"),
    ({"guidance_low": -0.1}, "guidance_low is -0.1"),
    ({"num_steps": 0}, "num_steps is 0, expected at least 1"),
    ({"path_type": "warp"}, "'warp', expected one of linear"),
    ({"prediction": "x"}, "prediction is 'x', expected one of v"),
    ({"guidance_channels": 4}, "guidance_channels is 4, expected .* 3"),
])  # fmt: skip
def test_what_does_not_fit_together_or_the_model_is_refused(loaded, settings, message):
    refused(lambda: sampler(loaded, **settings).images(INDEX, LABELS, 0), message)


@pytest.mark.parametrize("tf32, precision", [(True, "high"), (False, "highest")])
def test_tf32_is_on_and_off(loaded, tf32, precision):
    sampler(loaded, tf32=tf32)
    assert torch.get_float32_matmul_precision() == precision
    assert torch.backends.cudnn.allow_tf32 is tf32


STEPS, GUIDANCE = 12, 1.5
FP32, BF16 = 2**-24, 2**-8
"""Unit roundoffs."""
BOUND = (3 * 12 / 3) ** 0.5 * (GUIDANCE + (GUIDANCE - 1))
"""On an error relative to the velocity, in units of roundoff: a dozen results in each of the three
blocks are rounded, uniformly within one unit (a variance of 1/3), and add up like a random walk;
guidance adds two velocities with these weights. Whether the errors of the steps are independent or
the same, the path's is no larger than one step's, relative to the change along the path."""


@pytest.fixture(scope="module")
def exact(loaded):
    """mode -> (latents in fp64 from weights in fp64, RMS of the change from the noise)."""
    found, labels, index = {}, torch.from_numpy(LABELS), torch.from_numpy(INDEX)
    for mode in ("ode", "sde"):
        noise = sampler(loaded).noise(INDEX, 0).double()
        latents = samplers.sample(
            copy.deepcopy(loaded.model).double(), noise, labels, mode=mode, num_steps=STEPS,
            cfg_scale=GUIDANCE, seed=0, index=index,
        )  # fmt: skip
        found[mode] = latents, (latents - noise).square().mean().sqrt().item()
    return found


@pytest.mark.parametrize("mode", ["ode", "sde"])
@pytest.mark.parametrize("state_dtype", ["fp64", "fp32"])
@pytest.mark.parametrize("mixed_precision, roundoff", [("no", FP32), ("bf16", BF16)])
def test_rounding_the_model_is_within_what_its_roundings_add_up_to(
    loaded, exact, mode, state_dtype, mixed_precision, roundoff
):
    latents, change = exact[mode]
    settings = {"mode": mode, "state_dtype": state_dtype, "mixed_precision": mixed_precision}
    drawn = sampler(loaded, num_steps=STEPS, cfg_scale=GUIDANCE, **settings)
    error = (drawn.latents(INDEX, LABELS, 0).double() - latents).square().mean().sqrt().item()
    assert roundoff / 32 * change < error < BOUND * roundoff * change
