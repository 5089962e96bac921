"""Images by their numbers: what decides them, and what does not."""

import dataclasses
import sys

import numpy as np
import pytest
import scipy.stats
import torch

from repa_fast import ops
from repa_fast.configs.objective import ObjectiveConfig
from repa_fast.configs.sampler import SamplerConfig
from repa_fast.diffusion import samplers
from repa_fast.diffusion.path import get
from repa_fast.eval.load import load
from repa_fast.eval.sampling import ImageSampler, labels_of
from repa_fast.objective import build_objective
from tests.eval import checkpoints
from tests.refusals import refused

CPU = torch.device("cpu")
INDEX = np.array([0, 1, 2, 3, 4, 5])
LABELS = np.array([3, 1, 4, 1, 5, 9])
MODES = {
    "euler": {},
    "heun": {"heun": True},
    "dopri5": {"adaptive": True},
    "sde": {"mode": "sde"},
    "sde-euler": {"mode": "sde", "last_step": "euler", "diffusion_form": "sigma"},
    "sde-none": {"mode": "sde", "last_step": "none", "diffusion_norm": 0.5},
}


@pytest.fixture(scope="session")
def pixels(loaded):
    """A model of pixels."""
    return loaded


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    """A model of an autoencoder's latents."""
    folder = tmp_path_factory.mktemp("latents")
    return load(checkpoints.run(folder, checkpoints.LATENTS, enc_type="none", patch_size=2))


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """The folder of an autoencoder of these latents."""
    return str(checkpoints.autoencoder(tmp_path_factory.mktemp("vae")))


def sampler(loaded, **settings) -> ImageSampler:
    return ImageSampler(loaded, SamplerConfig(**{"num_steps": 4} | settings), CPU)


def mode(name: str, loaded, **settings) -> ImageSampler:
    if name == "dopri5":
        pytest.importorskip("torchdiffeq")
    return sampler(loaded, **MODES[name] | settings)


@pytest.mark.parametrize("name", MODES)
def test_an_image_does_not_depend_on_its_batch_or_place(pixels, name):
    """Matrix products of another batch size sum in another order: rounding, and no more."""
    drawn = mode(name, pixels)
    together = drawn.latents(INDEX, LABELS, 0)
    order = np.array([4, 0, 5, 2, 1, 3])
    assert torch.allclose(
        drawn.latents(INDEX[order], LABELS[order], 0), together[order],
        rtol=0, atol=1e-3 if name == "dopri5" else 1e-4,
    )  # fmt: skip
    alone = [drawn.latents(INDEX[i : i + 1], LABELS[i : i + 1], 0) for i in range(6)]
    # the error that chooses dopri5's steps is that of the whole batch
    bound = 2e-2 if name == "dopri5" else 1e-4
    assert torch.allclose(torch.cat(alone), together, rtol=0, atol=bound)
    assert together.std() > 0.1


@pytest.mark.parametrize("name", MODES)
def test_the_same_batch_gives_the_same_bits_and_images_of_the_datasets_size(pixels, name):
    first = mode(name, pixels).latents(INDEX, LABELS, 0)
    assert torch.equal(mode(name, pixels).latents(INDEX, LABELS, 0), first)
    images = mode(name, pixels).images(INDEX, LABELS, 0)
    assert images.shape == (6, 3, 16, 16) and images.dtype == torch.uint8
    assert images.float().std() > 20


@pytest.mark.parametrize("name", ["euler", "sde"])
def test_seed_number_and_label_decide(pixels, name):
    drawn = mode(name, pixels)
    first = drawn.latents(INDEX, LABELS, 0)
    others = [
        drawn.latents(INDEX, LABELS, 1),
        drawn.latents(INDEX + 6, LABELS, 0),
        drawn.latents(INDEX, (LABELS + 1) % 10, 0),
    ]
    differences = [(other - first).abs().amax((1, 2, 3)).min() for other in others]
    assert min(differences) > 1e-2


def test_noise_is_a_function_of_seed_and_number(pixels):
    drawn, order = sampler(pixels), np.array([7, 2, 2**40, 0])
    together = drawn.noise(order, 5)
    assert together.shape == (4, 3, 16, 16) and together.dtype == torch.float32
    alone = [drawn.noise(order[place : place + 1], 5) for place in range(4)]
    assert torch.equal(torch.cat(alone), together)
    assert not torch.equal(drawn.noise(order, 6), together)


def test_noise_is_standard_normal_and_independent(pixels):
    count, values = 1000, 768
    noise = sampler(pixels).noise(np.arange(count), 0).flatten(1).double().numpy()
    assert scipy.stats.kstest(noise.ravel(), "norm").pvalue > 1e-3
    # correlations of independent columns (and of neighbours) are N(0, 1 / count)
    neighbours = (noise[1:] * noise[:-1]).mean(axis=1) * values**0.5
    assert scipy.stats.kstest(neighbours, "norm").pvalue > 1e-3
    correlation = np.corrcoef(noise[:, :40].T)[np.triu_indices(40, 1)] * count**0.5
    assert np.abs(correlation).max() < 5


def test_noise_of_seeds_and_of_the_sdes_steps_is_other_noise(pixels):
    drawn, numbers = sampler(pixels), torch.arange(50)
    first = drawn.noise(np.arange(50), 0).flatten().double()
    others = [drawn.noise(np.arange(50), 1)]
    shape = torch.Size((50, 3, 16, 16))
    others += [ops.standard_normal(shape, 0, step, numbers) for step in (0, 1, 249)]
    for other in others:
        assert abs(np.corrcoef(first, other.flatten())[0, 1]) < 5 / len(first) ** 0.5


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


@pytest.mark.parametrize(
    "settings, options",
    [
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
        ({"mode": "sde"}, {}),
        ({"mode": "sde", "diffusion_form": "constant", "diffusion_norm": 0.3}, None),
        ({"mode": "sde", "diffusion_form": "SBDM"}, None),
        ({"mode": "sde", "diffusion_form": "increasing-decreasing"}, None),
        ({"mode": "sde", "last_step": "tweedie", "last_step_size": 0.1}, None),
        ({"mode": "sde", "last_step": "none"}, None),
    ],
)
def test_settings_arrive_at_the_sampler(pixels, settings, options):
    """Under the same names, where no others are given."""
    drawn, numbers = sampler(pixels, **settings), INDEX * 1000
    noise, labels = drawn.noise(numbers, 9), torch.from_numpy(LABELS)
    same = {name: value for name, value in settings.items() if name != "mode"}
    options = {"num_steps": 4, "cfg_scale": 1.5} | (same if options is None else options)
    if "mode" in settings:
        of_sde = {"seed": 9, "index": torch.from_numpy(numbers)}
        expected = samplers.euler_maruyama(pixels.model, noise, labels, **options | of_sde)
    else:
        expected = samplers.euler(pixels.model, noise, labels, **options)
    got = drawn.latents(numbers, LABELS, 9)
    assert got.dtype == options.get("state_dtype", torch.float64)
    assert torch.equal(got, expected)


def test_path_and_prediction_are_the_checkpoints_unless_given(pixels):
    other = build_objective(ObjectiveConfig(path_type="cosine", prediction="noise"))
    loaded = dataclasses.replace(pixels, objective=other)
    implied = sampler(loaded).latents(INDEX, LABELS, 0)
    said = sampler(pixels, path_type="cosine", prediction="noise").latents(INDEX, LABELS, 0)
    back = sampler(loaded, path_type="linear", prediction="v").latents(INDEX, LABELS, 0)
    assert torch.equal(implied, said)
    assert torch.equal(back, sampler(pixels).latents(INDEX, LABELS, 0))
    assert (implied - back).abs().max() > 1e-2


def test_dopri5_is_near_many_small_steps(pixels):
    adaptive = mode("dopri5", pixels).latents(INDEX, LABELS, 0)
    fine = sampler(pixels, heun=True, num_steps=40).latents(INDEX, LABELS, 0)
    assert (adaptive - fine).abs().max() < 2e-2 < 0.1 < fine.std()


@pytest.mark.usefixtures("inductor", "heavy")
def test_compiled_is_close_to_eager(run, pixels):
    eager = sampler(pixels, cfg_scale=1.0).latents(INDEX, LABELS, 0)
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


def test_pixels_are_cut_off_or_rounded_and_need_no_autoencoder(pixels, monkeypatch):
    """Pixel values of a latent x are 127.5 x + 127.5."""
    monkeypatch.setitem(sys.modules, "diffusers", None)
    drawn = sampler(pixels)
    levels = (127.5 * drawn.latents(INDEX, LABELS, 0) + 127.5).clamp(0, 255).numpy()
    cut = drawn.images(INDEX, LABELS, 0).numpy()
    rounded = sampler(pixels, uint8="round").images(INDEX, LABELS, 0).numpy()
    assert np.array_equal(cut, np.floor(levels)) and np.array_equal(rounded, np.rint(levels))
    assert not np.array_equal(cut, rounded)


def assert_levels(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Convolutions of another batch size turn a level that lies on an edge, and no more."""
    difference = (got.float() - expected).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() < 1e-2


def test_latents_are_decoded_by_the_autoencoder(latents, vae):
    """Against diffusers: x = decode((latent - bias) / scale), pixel values 127.5 x + 127.5."""
    from diffusers import AutoencoderKL

    labels = LABELS % 4

    def images(**settings) -> torch.Tensor:
        return sampler(latents, vae_path=vae, **settings).images(INDEX, labels, 0)

    model = AutoencoderKL.from_pretrained(vae, low_cpu_mem_usage=False)
    given = (sampler(latents, vae_path=vae).latents(INDEX, labels, 0) - 0.25) / 0.5
    with torch.no_grad():
        levels = (127.5 * model.decode(given.float()).sample + 127.5).clamp(0, 255)
    cut, rounded = images(), images(uint8="round")
    assert cut.shape == (6, 3, 16, 16) and levels.std() > 5
    assert_levels(cut, levels.floor())
    assert_levels(rounded, levels.round())
    assert not torch.equal(cut, rounded)
    difference = (images(vae_precision="bf16").float() - cut.float()).abs().mean()
    assert 0 < difference < 2  # 8 bits of precision, 256 levels


@pytest.mark.parametrize("tiled", [True, False])
def test_decoding_in_tiles_is_for_those_who_ask(latents, vae, monkeypatch, tiled):
    """Images as small as these are one tile."""
    from diffusers import AutoencoderKL

    calls, enable_tiling = [], AutoencoderKL.enable_tiling
    monkeypatch.setattr(
        AutoencoderKL, "enable_tiling", lambda vae: calls.append(vae) or enable_tiling(vae)
    )
    drawn = sampler(latents, vae_path=vae, vae_tiled=tiled)
    assert drawn.images(INDEX, LABELS % 4, 0).shape == (6, 3, 16, 16)
    assert len(calls) == tiled


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({}, "stabilityai/sd-vae-ft-ema"),
        ({"vae": "mse"}, "stabilityai/sd-vae-ft-mse"),
        ({"vae": "mse", "vae_path": "someone/other"}, "someone/other"),
    ],
)
def test_the_autoencoder_is_the_one_asked_for(latents, monkeypatch, settings, expected):
    from diffusers import AutoencoderKL

    asked = []

    def offline(source, **_):
        asked.append(source)
        raise OSError("no route to host")

    monkeypatch.setattr(AutoencoderKL, "from_pretrained", offline)
    with pytest.raises(RuntimeError, match="--vae-path"):
        sampler(latents, **settings)
    assert asked == [expected]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"adaptive": True, "mode": "sde"}, "adaptive is for the ODE"),
        ({"adaptive": True, "heun": True}, "adaptive is for the ODE"),
        ({"guidance_low": 0.8, "guidance_high": 0.2}, "guidance_low is 0.8"),
        ({"guidance_high": 1.1}, "guidance_high 1.1"),
        ({"guidance_low": -0.1}, "guidance_low is -0.1"),
        ({"num_steps": 0}, "num_steps is 0, expected at least 1"),
        ({"mode": "sde", "num_steps": 1}, "num_steps is 1, expected at least 2"),
        ({"path_type": "warp"}, "'warp', expected one of linear"),
        ({"prediction": "x"}, "prediction is 'x', expected one of v"),
        ({"mode": "sde", "diffusion_form": "x"}, "diffusion_form is 'x', expected"),
        ({"mode": "sde", "diffusion_norm": -1.0}, "diffusion_norm is -1"),
        ({"mode": "sde", "last_step_size": 0.0}, "last_step_size is 0"),
        ({"guidance_channels": 4}, "guidance_channels is 4, expected .* 3"),
        ({"guidance_channels": -1}, "guidance_channels is -1"),
    ],
)
def test_what_does_not_fit_together_or_the_model_is_refused(pixels, settings, message):
    refused(lambda: sampler(pixels, **settings).images(INDEX, LABELS, 0), message)


def test_labels_that_are_no_classes_are_refused(pixels):
    labels = np.array([3, 11])
    refused(lambda: sampler(pixels).images(INDEX[:2], labels, 0), r"labels lie in \[3, 11\]")


@pytest.mark.parametrize("tf32, precision", [(True, "high"), (False, "highest")])
def test_tf32_is_on_and_off(pixels, tf32, precision):
    sampler(pixels, tf32=tf32)
    assert torch.get_float32_matmul_precision() == precision
    assert torch.backends.cudnn.allow_tf32 is tf32
