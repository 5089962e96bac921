"""A tiny run saved and loaded by several processes, under DDP, FSDP and HSDP."""

from pathlib import Path
from unittest import mock

import torch

from repa_fast.checkpoint import writer
from repa_fast.data.digits import digits_metadata
from repa_fast.distributed import World
from repa_fast.train import checkpoint, resume
from repa_fast.train.state import build_state
from repa_fast.train.step import train_step
from tests.train.conftest import tiny_config
from tests.train.parallel_ranks import build, everything, local_batch

SAVED = 2
AVERAGES = {"ema_decay": "0.9,0.99", "ema_warmup": True}


def save_while_training(world: World, mode: dict, folder: Path) -> dict:
    """Train to SAVED, begin to save, and train on beside it."""
    state = build(world, tiny_config(**AVERAGES, **mode))
    found = {"start": everything(state), "lines": []}
    for step in range(SAVED):
        train_step(state, local_batch(state, step))
    found["saved"] = everything(state)
    saves = checkpoint.Checkpointer(folder, world)
    saves.announce = found["lines"].append
    saves.save(state)
    train_step(state, local_batch(state, SAVED))
    saves.settle()
    saves.close()
    return found | {"next": everything(state)}


def load_and_go_on(world: World, mode: dict, source: Path, folder: Path) -> dict:
    """Load into another start, save again in another folder, and train one step."""
    state = build_state(tiny_config(**AVERAGES, **mode), digits_metadata(), world)
    state.micro_batch = state.local_batch
    checkpoint.load(source, state)
    found = {"saved": everything(state), "step": state.step}
    if world.size > 1:
        checkpoint.save(folder, state)
    train_step(state, local_batch(state, SAVED))
    return found | {"next": everything(state)}


def load_official(world: World, mode: dict, file: Path) -> dict[str, torch.Tensor]:
    state = build_state(tiny_config(**mode), digits_metadata(), world)
    resume.load_official(file, state)
    return everything(state)


def fail(world: World, mode: dict, folder: Path) -> dict:
    """The disk of the second process is full from the second save on: what is said and raised."""
    state = build(world, tiny_config(**mode))
    lines, raised = [], []
    saves = checkpoint.Checkpointer(folder, world)
    saves.announce = lines.append
    saves.save(state)
    saves.settle()

    def full(files: list[Path]) -> dict:
        raise OSError(28, "No space left on device", str(files[0]))

    with mock.patch.object(writer, "seal", full if world.rank == 1 else writer.seal):
        for state.step in (1, 2, 3):
            try:
                saves.save(state)
                saves.settle()
            except checkpoint.CheckpointFailed as error:
                raised.append(f"{state.step}: {error}")
        saves.close()
    return {"lines": lines, "raised": raised}
