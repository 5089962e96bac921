"""A tiny run on the digits, small enough to train in a test."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from repa_fast import testing
from repa_fast.configs import presets
from repa_fast.configs.config import TrainConfig
from repa_fast.data import digits
from repa_fast.data.digits import digit_images, digits_metadata
from repa_fast.distributed import World
from repa_fast.train.resume import find, resume
from repa_fast.train.state import TrainState, build_state

ALONE = World(0, 1, torch.device("cpu"))
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
    return tiny_state


def tiny_state(**overrides) -> TrainState:
    """A state whose adaLN and final layers are not at their zero init."""
    state = build_state(tiny_config(**overrides), digits_metadata(), ALONE)
    state.micro_batch = state.local_batch
    randomise(state)
    return state


def resumed(folder: Path, state: TrainState) -> Path | None:
    """Resume as the state's config asks, in the place of a run; return from what."""
    source = find(folder, state.config, state.world)
    resume(source, folder, state)
    return source


@pytest.fixture(scope="session")
def few_digits(tmp_path_factory):
    """The first 200 of the digits, where their number does not matter."""
    with pytest.MonkeyPatch.context() as patch:
        few = {split: [part[:200] for part in digit_images(split)] for split in ("train", "val")}
        patch.setattr(digits, "digit_images", few.get)
        return str(digits.prepare_digits(tmp_path_factory.mktemp("data") / "few"))


@pytest.fixture
def train(digits_dir, tmp_path):
    """(name, config overrides) -> folder of a run of 5 steps, each of them logged."""

    def run(name="run", **overrides) -> Path:
        return trained(digits_dir, tmp_path / name, **overrides)

    return run


def config_of_run(digits_dir: str, folder: Path, **overrides) -> TrainConfig:
    values = {"data_dir": digits_dir, "output_dir": str(folder.parent), "exp_name": folder.name}
    return tiny_config(**values | {"max_train_steps": 5, "log_every": 1} | overrides)


def trained(digits_dir: str, folder: Path, *, plotted: bool = False, **overrides) -> Path:
    """Train a tiny run in `folder`, in this process; return it.

    It leaves no loss.png unless `plotted`, which takes longer than the steps.
    """
    from repa_fast.train import run

    with pytest.MonkeyPatch.context() as patch:
        if not plotted:
            patch.setattr(run, "plot_losses", lambda *_: None)
        return run.train(config_of_run(digits_dir, folder, **overrides))


def randomise(state: TrainState) -> None:
    """As repa_fast.testing's, of model and average."""
    testing.randomise(state.model)
    state.ema.load_state_dict(state.model.state_dict())


def gradients_of(state: TrainState) -> dict[str, torch.Tensor]:
    """What the next step takes, by the names of the weights."""
    weights = state.model.state_dict(keep_vars=True)
    found = {name: state.optimizer.gradient(weight) for name, weight in weights.items()}
    return {name: gradient for name, gradient in found.items() if gradient is not None}


def assert_same(found: Iterable[torch.Tensor], expected: Iterable[torch.Tensor]) -> None:
    """Two lists of tensors are as long and equal to the bit."""
    differ = [i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if not a.equal(b)]
    assert not differ
