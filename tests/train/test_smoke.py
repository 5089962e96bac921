"""Real widths with DINOv2, once through: a step, save, resume, sample."""

import dataclasses

import pytest
import torch

from repa_fast.configs import presets
from repa_fast.configs.build import expected_metadata
from repa_fast.diffusion.samplers import euler
from repa_fast.distributed import World
from repa_fast.testing import random_encoder_weights
from repa_fast.train import checkpoint
from repa_fast.train.state import TrainState, build_state
from repa_fast.train.step import synthetic_batch, train_step


def fresh(config) -> TrainState:
    state = build_state(config, expected_metadata(config), World(0, 1, torch.device("cpu")))
    state.micro_batch = 1
    return state


def once_through(config, folder) -> None:
    state = fresh(config)
    batch, _ = synthetic_batch(state, 1)
    train_step(state, batch)
    reading = state.metrics.read(state.world)
    assert reading["skipped"] == 0 and -1 <= reading[f"align/{config.enc_type}"] <= 1
    target = checkpoint.save(folder, state)
    expected = state.ema.blocks[-1].mlp.fc1.weight.detach().clone()
    del state
    resumed = fresh(config)
    checkpoint.load(target, resumed)
    assert resumed.step == 1
    assert torch.equal(resumed.ema.blocks[-1].mlp.fc1.weight, expected)
    samples = euler(resumed.ema, torch.randn(1, 4, 32, 32), torch.tensor([207]), num_steps=2)
    assert samples.isfinite().all()


def test_xl_width_to_one_block_past_the_alignment(tmp_path):
    config = dataclasses.replace(
        presets.get("sit-xl2-repa"),
        data_dir="/nowhere",
        depth=9,
        batch_size=1,
        enc_type="dinov2-vit-s",
        enc_weights=random_encoder_weights("dinov2-vit-s", 256, tmp_path),
    )
    once_through(config, tmp_path)


@pytest.mark.smoke_full
def test_sit_xl_with_dinov2_b(tmp_path):
    """The whole model: `make smoke-full`, within 22 GiB of memory and 12 GiB of disk."""
    config = dataclasses.replace(
        presets.get("sit-xl2-repa"),
        data_dir="/nowhere",
        batch_size=1,
        enc_weights=random_encoder_weights("dinov2-vit-b", 256, tmp_path),
    )
    once_through(config, tmp_path)
