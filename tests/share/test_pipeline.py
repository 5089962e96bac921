"""A pipeline of diffusers draws the images that our samplers draw."""

import json
import re

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from safetensors.torch import load_file, save_file

from repa_fast.configs.sampler import SamplerConfig
from repa_fast.data.latents import VAE
from repa_fast.share.pipeline import SiTPipeline, SiTTransformer
from repa_fast.share.pretrained import load
from tests.eval import checkpoints
from tests.refusals import refused

LABELS = [1, 2, 3]
Y = torch.tensor(LABELS)


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def noise(loaded) -> torch.Tensor:
    return torch.randn(3, *loaded.metadata.latent_shape, generator=torch.manual_seed(3))


def ours(loaded, start, seed=0, **settings) -> torch.Tensor:
    config = SamplerConfig(**settings)
    return loaded.objective.sample(loaded.model, start, Y, config, seed=seed)


@pytest.fixture(scope="module")
def flow(run):
    return load(run)


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    changes = {"objective": "ddpm", "model": "DiT-S/4", "enc_type": "none"}
    return load(checkpoints.run(tmp_path_factory.mktemp("dit"), **changes))


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_of_a_folder_it_draws_our_ode_by_diffusers_scheduler(flow, tmp_path, scale):
    saved = flow.save_pretrained(tmp_path / "shared")
    pipeline = quiet(SiTPipeline.from_pretrained(saved))
    assert type(pipeline.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
    start = noise(flow)
    given = {"latents": start, "num_inference_steps": 20, "guidance_scale": scale}
    expected = ours(flow, start, num_steps=20, cfg_scale=scale)
    found = pipeline(LABELS, output_type="latent", **given).images
    assert expected.abs().max() > 1
    assert (found - expected).abs().max() < 1e-5
    images = pipeline(["1", "2", "3"], output_type="pt", **given).images
    expected = (expected / 2 + 0.5).clamp(0, 1)  # digits are pixels
    assert (images - expected).abs().max() < 1e-5
    pictures = pipeline(LABELS, **given).images
    levels = torch.frombuffer(bytearray(pictures[0].tobytes()), dtype=torch.uint8)
    there = (images[0] * 255).round().permute(1, 2, 0).flatten()
    assert torch.equal(levels, there.to(torch.uint8))


def test_of_a_dit_it_draws_our_ancestral_steps_by_diffusers_scheduler(chain, monkeypatch):
    pipeline, start = quiet(chain.pipeline()), noise(chain)
    drawn = torch.randn(24, *start.shape, generator=torch.manual_seed(1))
    left = iter(drawn)
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: next(left)
    )
    options = {"output_type": "latent", "num_inference_steps": 25, "guidance_scale": 1.5}
    found = pipeline(LABELS, latents=start, **options).images
    from repa_fast.diffusion.ddpm_samplers import ancestral

    known = {"num_steps": 25, "cfg_scale": 1.5, "noise": drawn}
    expected = ancestral(chain.model, start, Y, **known)
    assert next(left, None) is None
    # the scheduler's tables are fp32: 1 - alpha_t / alpha_(t-1) loses digits
    assert (found - expected).abs().max() < 2e-5 * expected.abs().max()


def test_where_no_scheduler_is_exact_our_sampler_runs(flow, chain, tmp_path):
    start = noise(flow)
    sde = SamplerConfig(mode="sde", num_steps=6, cfg_scale=1.5, guidance_high=0.7)
    for loaded, settings in ((flow, sde), (chain, SamplerConfig(num_steps=5))):
        pipeline = quiet(loaded.pipeline())
        generator = torch.Generator().manual_seed(11)
        given = {"latents": start, "generator": generator, "output_type": "latent"}
        found = pipeline(LABELS, sampler=settings, **given).images
        assert torch.equal(found, ours(loaded, start, 11, **vars(settings)).float())
    pipeline, drawn = quiet(flow.pipeline()), {"latents": start, "output_type": "latent"}
    torch.manual_seed(0)
    first, second = (pipeline(LABELS, sampler=sde, **drawn).images for _ in range(2))
    assert not torch.equal(first, second)
    pipeline(LABELS, sampler=sde, generator=torch.Generator().manual_seed(-5), **drawn)
    cosine = load(checkpoints.run(tmp_path / "cosine", path_type="cosine"))
    pipeline = quiet(SiTPipeline.from_pretrained(cosine.save_pretrained(tmp_path / "shared")))
    assert pipeline.scheduler is None
    options = {"latents": start, "num_inference_steps": 4, "output_type": "latent"}
    found = pipeline(LABELS, **options).images
    assert torch.equal(found, ours(cosine, start, num_steps=4).float())


def test_another_scheduler_of_diffusers_can_take_its_place(flow):
    pipeline, start = quiet(flow.pipeline()), noise(flow)
    pipeline.scheduler = FlowMatchHeunDiscreteScheduler.from_config(pipeline.scheduler.config)
    options = {"latents": start, "output_type": "latent", "guidance_scale": 1.0}
    found = pipeline(LABELS, num_inference_steps=20, **options).images
    expected = ours(flow, start, heun=True, num_steps=20, cfg_scale=1.0)
    assert (found - expected).abs().max() < 0.005 * expected.abs().max()


@pytest.mark.parametrize("kind, of_flow", [
    (DDIMScheduler, False), (UniPCMultistepScheduler, False), (UniPCMultistepScheduler, True),
    (DPMSolverMultistepScheduler, True), (DDPMScheduler, True),
])  # fmt: skip
def test_a_scheduler_made_of_ours_runs_or_is_refused_by_its_kind(flow, chain, kind, of_flow):
    loaded = flow if of_flow else chain
    pipeline, start = quiet(loaded.pipeline()), noise(loaded)
    flows = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    given = flows if of_flow and kind is not DDPMScheduler else {}
    pipeline.scheduler = kind.from_config(pipeline.scheduler.config, **given)
    options = {"latents": start, "output_type": "latent", "guidance_scale": 1.0}
    if kind is DDPMScheduler:
        words = "scheduler is a DDPMScheduler, expected one of flow matching, for a SiT"
        refused(lambda: pipeline(LABELS, num_inference_steps=5, **options), words)
        return
    found = pipeline(LABELS, num_inference_steps=100, **options).images
    exact = ours(loaded, start, num_steps=400, cfg_scale=1.0)
    assert (found - exact).abs().max() < 0.1 * exact.abs().max()


def test_latents_are_decoded_by_the_pipelines_autoencoder(tmp_path):
    changes = {"enc_type": "none", "patch_size": 2}
    loaded = load(checkpoints.run(tmp_path / "run", checkpoints.LATENTS, **changes))
    vae = VAE(str(checkpoints.autoencoder(tmp_path / "vae"))).load(loaded.metadata)
    saved = loaded.save_pretrained(tmp_path / "shared")
    pipeline, start = quiet(SiTPipeline.from_pretrained(saved, vae=vae)), noise(loaded)
    given = {"latents": start, "num_inference_steps": 4}
    latents = ours(loaded, start, num_steps=4)
    names = [loaded.metadata.class_names[label] for label in LABELS]
    assert names == ["dog", "red fox", "arctic fox"]
    images = pipeline(names, output_type="pt", **given).images
    assert images.shape == (3, 3, 16, 16)
    with torch.no_grad():
        decoded = vae.decode(((latents - 0.25) / 0.5).float()).sample
    assert (images - (decoded / 2 + 0.5).clamp(0, 1)).abs().max() < 1e-5
    pipeline.save_pretrained(tmp_path / "with-vae")  # as diffusers has it, decoder and all
    written = (tmp_path / "with-vae").rglob("*.json")
    ours_alone = [path for path in written if path.parent.name != "vae"]
    assert not [path for path in ours_alone if str(saved) in path.read_text()]
    again = quiet(SiTPipeline.from_pretrained(tmp_path / "with-vae"))
    for name, weight in vae.state_dict().items():
        assert torch.equal(again.vae.state_dict()[name], weight)
    images_again = again(names, output_type="pt", **given).images
    assert (images_again - images).abs().max() < 1e-5  # a convolution's bits depend on addresses


def test_it_runs_in_half_precision(flow, tmp_path):
    saved = flow.save_pretrained(tmp_path / "shared")
    pipeline = quiet(SiTPipeline.from_pretrained(saved, dtype=torch.bfloat16))
    dtypes = {name: of.dtype for name, of in pipeline.transformer.named_parameters()}
    assert dtypes.pop("pos_embed") == torch.float32 and set(dtypes.values()) == {torch.bfloat16}
    start = noise(flow)
    options = {"latents": start, "num_inference_steps": 5, "output_type": "latent"}
    found, expected = pipeline(LABELS, **options).images, ours(flow, start, num_steps=5)
    assert found.dtype == torch.float32
    assert 0 < (found - expected).abs().mean() < 0.1 * expected.abs().mean()


def test_bad_calls_and_folders_are_refused(flow, tmp_path):
    pipeline = quiet(flow.pipeline())
    refused(lambda: pipeline(LABELS, output_type="jpg"), "output_type is 'jpg', expected one of")
    refused(lambda: pipeline(["x"]), "class is 'x', expected a number below 10")
    refused(lambda: pipeline([10]), "class is 10, expected a number below 10")
    refused(lambda: pipeline([1], num_inference_steps=0), "num_inference_steps is 0, expected at l")
    sde, two = SamplerConfig(mode="sde"), [torch.Generator()] * 2
    refused(lambda: pipeline([1, 2], sampler=sde, generator=two), "generator is a list, expected o")
    refused(lambda: SiTPipeline(flow.model), "transformer is a SiT, expected a SiTTransformer")
    refused(lambda: flow.sample([1], mode="odee"), "mode is 'odee', expected one of ode, sde")
    words = re.escape("latents are (1, 3, 16, 16), expected (3, 3, 16, 16)")
    refused(lambda: pipeline(LABELS, latents=noise(flow)[:1]), words)
    words = r"run\d+ is no shared folder, expected one that `repa-fast share` wrote"
    for kind in (SiTPipeline, SiTTransformer):
        refused(lambda kind=kind: kind.from_pretrained(flow.source.parents[1]), words)
    saved = flow.save_pretrained(tmp_path / "shared")
    file = saved / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    del state["blocks.0.attn.qkv.weight"]
    save_file(state, file, {"format": "pt"})
    refused(lambda: SiTTransformer.from_pretrained(file.parent), "lacks 1 of its weights")


@pytest.mark.parametrize("change, words", [
    ({"model": {"depth": 10**9}}, "depth is 1000000000, expected 3"),
    ({"model": {"hidden_size": "32"}}, "hidden_size is '32', expected 32"),
    ({"model": {"num_heads": 0}}, "no num_heads, expected what describes a model"),
    ({"model": {"num_heads": 4.0}}, "num_heads is 4.0, expected an integer from 0 on"),
    ({"model": {"evil": 1}}, "evil is 1, expected nothing by that name"),
    ({"model": {"z_dims": [5]}}, r"z_dims is \[5\], expected nothing by that name"),
    ({"objective": {"objective": "ddpm"}}, "objective is ddpm, but the weights have 3 output"),
    ({"dataset": {"class_names": [*"abcdefghijk"]}}, "11 class names, expected at most 10"),
])  # fmt: skip
def test_a_model_that_the_weights_do_not_tell_is_refused_before_it_is_built(
    flow, tmp_path, change, words
):
    saved = flow.save_pretrained(tmp_path / "shared")
    config = saved / "transformer" / "config.json"
    values = json.loads(config.read_text())
    for part, changed in change.items():
        values[part] |= changed
    config.write_text(json.dumps(values))
    refused(lambda: SiTPipeline.from_pretrained(saved), r"config\.json: ", words)
