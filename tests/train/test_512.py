"""Training at 512x512 through every objective: 64x64x4 latents, 1024 tokens on either side."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch.utils.hooks import RemovableHandle

pytest.importorskip("timm")

from repa_fast import encoders
from repa_fast.configs import presets
from repa_fast.configs.build import expected_metadata
from repa_fast.diffusion import ddpm_samplers, samplers
from repa_fast.testing import seeded
from repa_fast.train import checkpoint
from repa_fast.train.state import TrainState, build_state
from repa_fast.train.step import synthetic_batch, train_step
from tests.train.conftest import ALONE, randomise
from tests.train.parallel_ranks import everything, unequal

pytestmark = pytest.mark.xdist_group("train 512")  # what its tests share is made once

ENCODER = "dinov2-vit-s"
TOKENS = 1024
SMALL = {
    "data_dir": "/nowhere",
    "resolution": 512,
    "num_classes": 10,
    "batch_size": 1,
    "hidden_size": 32,
    "depth": 3,
    "num_heads": 2,
    "projector_dim": 32,
    "encoder_depth": 2,
    "block_out_s": 1,
    "block_out_t": 3,
}
OBJECTIVES = {
    "nt-xent": ("sit-xl2-repa", {"enc_type": ENCODER, "loss_type": "nt-xent"}),
    "dit-sra": ("dit-xl2-sra", {}),
}
MORE_OBJECTIVES = {
    "repa": ("sit-xl2-repa", {"enc_type": ENCODER}),
    "sra": ("sit-xl2-sra-cos-512", {}),
    "dit-repa": ("dit-xl2-repa", {"enc_type": ENCODER}),
}


@pytest.fixture(scope="module")
def encoder():
    """DINOv2-S with random weights, at the size that images of 512 pixels ask for."""
    spec = encoders.spec(ENCODER)
    shallow = dataclasses.replace(spec, options={"depth": 2})  # which has no say in the size
    return shallow.build(spec.input_size(512), pretrained=False)


@pytest.fixture
def make(encoder):
    """(objective) -> a state with the shared encoder, if it aligns with any."""

    def build(name: str) -> TrainState:
        preset, overrides = (OBJECTIVES | MORE_OBJECTIVES)[name]
        config = dataclasses.replace(presets.get(preset), **SMALL, **overrides)
        state = build_state(config, expected_metadata(config), ALONE, encoders_later=True)
        state.alignment.encoders = {} if config.enc_type == "none" else {ENCODER: encoder}
        state.micro_batch = 1
        randomise(state)
        return state

    return build


def keep(kept: dict, name: str, module: torch.nn.Module) -> RemovableHandle:
    """Put the module's last input and output under `name`."""
    return module.register_forward_hook(lambda _, inputs, out: kept.update({name: (*inputs, out)}))


@pytest.fixture
def heard(encoder):
    """What goes into the shared encoder and its patch embedding, and what comes out."""
    kept = {}
    handles = [keep(kept, "patches", encoder.vit.patch_embed), keep(kept, "encoder", encoder)]
    yield kept
    for handle in handles:
        handle.remove()


def sampled(state: TrainState) -> torch.Tensor:
    noise, labels = seeded((1, 4, 64, 64), seed=3), torch.tensor([7])
    options = {"num_steps": 2, "cfg_scale": 2.0, "mode": "ode"}
    if state.config.objective == "ddpm":
        return ddpm_samplers.sample(state.ema, noise, labels, **options)
    return samplers.sample(state.ema, noise, labels, path=state.objective.path, **options)


def of_all_tokens(name: str, projection: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """The alignment loss by torch, with every patch's own cosine or row of logits."""
    a, b = (F.normalize(tokens[0], dim=-1) for tokens in (projection, features))
    if name == "nt-xent":
        return F.cross_entropy(a @ b.mT / 0.1, torch.arange(TOKENS))
    return -(a * b).sum(-1).mean()


@pytest.mark.parametrize(
    "name",
    [*OBJECTIVES, *(pytest.param(name, marks=pytest.mark.heavy) for name in MORE_OBJECTIVES)],
)
def test_once_through(make, heard, name, tmp_path):
    state = make(name)
    batch, _ = synthetic_batch(state, 1)
    assert state.metadata.latent_shape == (4, 64, 64) and batch["image"].shape == (1, 3, 512, 512)
    assert state.model.num_tokens == TOKENS
    heads = [*state.model.projectors, *([state.model.ap_head] if state.model.ap_head else [])]
    keep(heard, "projection", heads[0])
    before = state.model.blocks[0].mlp.fc1.weight.clone()
    train_step(state, batch)
    reading = state.metrics.read(state.world)
    assert len(heads) == 1 and reading["skipped"] == 0
    assert not torch.equal(state.model.blocks[0].mlp.fc1.weight, before)
    projection = heard["projection"][-1]
    if state.alignment.encoders:
        features = heard["encoder"][-1]
        assert heard["patches"][0].shape == (1, 3, 448, 448)
        assert features.shape == projection.shape == (1, TOKENS, 384)
        expected = of_all_tokens(name, projection, features)
        assert reading[f"align/{ENCODER}"] == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)
    else:
        assert "encoder" not in heard and projection.shape == (1, TOKENS, 32)
    target = checkpoint.save(tmp_path, state)
    resumed = make(name)
    for parameter in (*resumed.model.parameters(), *resumed.ema.parameters()):
        parameter.detach().fill_(torch.nan)
    checkpoint.load(target, resumed)
    assert resumed.step == 1
    assert unequal(everything(resumed), everything(state)) == []
    samples = sampled(resumed)
    assert samples.shape == (1, 4, 64, 64) and samples.isfinite().all()
    assert torch.equal(samples, sampled(state))
    for each in (state, resumed):
        train_step(each, batch)
    assert unequal(everything(resumed), everything(state)) == []


def test_patches_of_the_image_and_of_the_latents_are_in_one_order(encoder, heard):
    """Before attention mixes them, only the token in the place of a changed patch is another."""
    image = torch.zeros(1, 3, 512, 512, dtype=torch.uint8)
    row, column = 5, 20
    image[..., row * 16 : (row + 1) * 16, column * 16 : (column + 1) * 16] = 255
    encoder(image)
    patches = heard["patches"][-1][0]
    moved = (patches - patches[0]).norm(dim=-1)
    assert moved.shape == (TOKENS,) and moved.argmax() == row * 32 + column
