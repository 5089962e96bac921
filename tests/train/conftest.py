"""A tiny run on the digits, small enough to train in a test."""

import dataclasses

import pytest
import torch

from repa_fast import testing
from repa_fast.configs import presets
from repa_fast.configs.config import TrainConfig
from repa_fast.data.digits import digits_metadata
from repa_fast.distributed import World
from repa_fast.train.state import TrainState, build_state

TINY = {
    "hidden_size": 32,
    "depth": 3,
    "num_heads": 2,
    "encoder_depth": 2,
    "projector_dim": 32,
    "batch_size": 12,
    "report_to": "none",
    "sampling_steps": 0,
}


def tiny_config(**overrides) -> TrainConfig:
    encoders = {"enc_type": None} if "align" in overrides else {}  # the digits name one
    return dataclasses.replace(presets.get("digits"), **{**TINY, **encoders, **overrides})


@pytest.fixture
def config():
    return tiny_config


@pytest.fixture
def make_state():
    """(config overrides) -> state whose adaLN and final layers are not at their zero init."""

    def make(**overrides) -> TrainState:
        world = World(rank=0, size=1, device=torch.device("cpu"))
        state = build_state(tiny_config(**overrides), digits_metadata(), world)
        state.micro_batch = state.local_batch
        randomise(state)
        return state

    return make


def randomise(state: TrainState) -> None:
    """As repa_fast.testing's, of model and average."""
    testing.randomise(state.model)
    state.ema.load_state_dict(state.model.state_dict())
