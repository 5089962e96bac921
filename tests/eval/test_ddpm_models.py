"""DiT through what takes a checkpoint."""

import numpy as np
import pytest
import torch

from repa_fast.analysis.gather import AnalysisConfig, gather
from repa_fast.analysis.hidden import sample_noise
from repa_fast.configs.sampler import SamplerConfig
from repa_fast.data import latents
from repa_fast.data.loader import read_batch
from repa_fast.data.open import open_dataset
from repa_fast.diffusion.ddpm import Diffusion
from repa_fast.diffusion.ddpm_samplers import ancestral, ddim
from repa_fast.eval.generate import generate
from repa_fast.eval.load import load
from repa_fast.eval.sampling import ImageSampler
from repa_fast.models.dit import DiT
from tests.eval import checkpoints
from tests.refusals import refused

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load(checkpoints.run(tmp_path_factory.mktemp("run"), objective="ddpm"))


@pytest.mark.parametrize("mode, draw", [("sde", ancestral), ("ode", ddim)])
def test_samples_are_those_of_the_chain(loaded, mode, draw):
    assert isinstance(loaded.model, DiT) and loaded.objective.name == "ddpm"
    config = SamplerConfig(mode=mode, num_steps=6, cfg_scale=2.0, guidance_channels=2)
    sampler = ImageSampler(loaded, config, CPU)
    index = np.array([4, 9])
    found = sampler.latents(index, index % 10, seed=3)
    expected = draw(
        loaded.model, sampler.noise(index, 3), torch.tensor([4, 9]), num_steps=6, cfg_scale=2.0,
        guidance_channels=2, seed=3, index=torch.tensor([4, 9]),
    )  # fmt: skip
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "flow", [{"heun": True}, {"adaptive": True}, {"guidance_high": 0.7}, {"path_type": "linear"}]
)
def test_what_only_flows_have_is_refused(loaded, flow):
    config = SamplerConfig(**flow)
    refused(lambda: ImageSampler(loaded, config, CPU), "the model is a DiT, which has no flow")


def test_generate_takes_it(loaded, make, tmp_path):
    path = generate(make(tmp_path, ckpt=str(loaded.source), num_fid_samples=5))
    assert np.load(path)["arr_0"].shape == (5, 16, 16, 3) and path.name.startswith("DiT")


def test_the_original_s_weights_are_sampled_as_they_are(loaded, tmp_path):
    torch.save(loaded.model.state_dict(), tmp_path / "DiT.pt")
    original = load(tmp_path / "DiT.pt", origin="dit", num_heads=4)
    assert original.objective.name == "ddpm" and original.digest == loaded.digest


def test_hidden_states_are_at_the_chain_s_noise_and_times(loaded, digits_dir):
    """As the analyses gather them."""
    dataset, rows = open_dataset(digits_dir), np.array([2, 9, 30, 4])
    config = AnalysisConfig(ckpt="run", times=(0.3,), cache="", num_workers=1)
    found = gather(loaded, dataset, rows, [], config, CPU).hidden[0]
    batch = read_batch(dataset, rows)
    draws = sample_noise(config.seed, batch["index"], dataset.metadata.latent_shape)
    clean = latents.sample(batch["moments"], draws[:, 0], dataset.metadata)
    step, null = torch.full((4,), 300), torch.full((4,), loaded.model.num_classes)
    noisy = Diffusion.linear().q_sample(clean, draws[:, 1], step)
    with torch.no_grad():
        expected = loaded.model.hidden(noisy, step, null, depth=2).mean(1)
    assert torch.allclose(found[1], expected, atol=1e-5)
