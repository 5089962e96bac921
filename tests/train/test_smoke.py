"""SiT-XL/2 with DINOv2, once through: a step, save, resume, sample."""

import dataclasses

import pytest
import torch

from repa_fast.configs import presets
from repa_fast.configs.build import expected_metadata
from repa_fast.diffusion.samplers import euler
from repa_fast.testing import random_encoder_weights
from repa_fast.train import checkpoint
from repa_fast.train.state import TrainState, build_state
from repa_fast.train.step import synthetic_batch, train_step
from tests.train.conftest import ALONE

PAST_THE_ALIGNMENT = {"enc_type": "dinov2-vit-s", "depth": 9}


def fresh(config) -> TrainState:
    state = build_state(config, expected_metadata(config), ALONE)
    state.micro_batch = 1
    return state


@pytest.mark.parametrize(
    "size",
    [
        pytest.param(
            PAST_THE_ALIGNMENT, id="to one block past the alignment", marks=pytest.mark.heavy
        ),
        # `make smoke-full`, within 22 GiB of memory and 12 GiB of disk
        pytest.param(
            {"enc_type": "dinov2-vit-b", "depth": 28}, id="whole", marks=pytest.mark.smoke_full
        ),
    ],
)
def test_once_through(size, tmp_path):
    weights = random_encoder_weights(size["enc_type"], 256, tmp_path)
    options = {"data_dir": "/nowhere", "batch_size": 1, "enc_weights": weights}
    config = dataclasses.replace(presets.get("sit-xl2-repa"), **options, **size)
    state = fresh(config)
    batch, _ = synthetic_batch(state, 1)
    train_step(state, batch)
    reading = state.metrics.read(state.world)
    assert reading["skipped"] == 0 and -1 <= reading[f"align/{config.enc_type}"] <= 1
    target = checkpoint.save(tmp_path, state)
    expected = state.ema.blocks[-1].mlp.fc1.weight.detach().clone()
    del state
    resumed = fresh(config)
    checkpoint.load(target, resumed)
    assert resumed.step == 1
    assert torch.equal(resumed.ema.blocks[-1].mlp.fc1.weight, expected)
    samples = euler(resumed.ema, torch.randn(1, 4, 32, 32), torch.tensor([207]), num_steps=2)
    assert samples.isfinite().all()
