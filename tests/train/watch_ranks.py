"""Runs of two processes that stop or fail."""

import contextlib
import json
import os
import time
from pathlib import Path
from unittest import mock

import torch

from repa_fast.cli import main as command
from repa_fast.distributed import World, session
from repa_fast.train import graph, watch
from repa_fast.train import run as runs
from repa_fast.train.spikes import TrainingDiverged
from repa_fast.train.state import TrainState
from repa_fast.train.step import train_step
from tests.train.conftest import config_of_run

STEPS = 16
POISONED = 10
FAILING = 5
TIMEOUT = 2.0


def inside(world: World):
    """A run that begins in here takes part in the session that is open."""
    return mock.patch.object(runs, "session", return_value=contextlib.nullcontext(world))


def train_by_flags(world: World, flags: list[str]) -> int:
    with inside(world):
        return command(["train", *flags])


def train(data: str, folder: Path, name: str, step, **overrides) -> None:
    """A run whose steps are `step`(state, batch)."""
    options = {"enc_type": "none", "max_train_steps": STEPS} | overrides
    with mock.patch.object(graph, "train_step", step):
        runs.train(config_of_run(data, folder / name, **options))


def spike(world: World, data: str, folder: Path) -> dict:
    """A sharded run that spikes after some data, and saves while it trains."""
    seen = []

    def step(state: TrainState, batch: dict) -> None:
        seen.append(state.data_step)
        spoilt = state.data_step == POISONED
        train_step(state, batch)
        if spoilt:
            with torch.no_grad():
                state.model.final_layer.linear.bias.add_(3)

    flags = {"stop_on_spike": True, "checkpointing_steps": 10, "parallel": "fsdp"}
    with inside(world), mock.patch.object(watch, "LAST_WORD", 0.0):  # no torchrun waits for it
        try:
            train(data, folder, "spikes", step, **flags)
        except TrainingDiverged as error:
            return {"seen": seen, "message": str(error)}


def wait_in_vain(rank: int) -> dict:
    """How a collective ends when the other process does not come."""
    message, begun = "", time.monotonic()
    with session(60.0 if rank else TIMEOUT) as world:  # the first comes later, from plotting
        if rank == 0:
            try:
                world.barrier()
            except RuntimeError as error:
                message = str(error)
        else:
            time.sleep(2 * TIMEOUT)
    return {"message": message, "seconds": time.monotonic() - begun}


def main() -> None:
    """Under torchrun: one session ends late, and the next by an error of the second process."""
    torch.set_num_threads(1)
    folder, rank = Path(os.environ["OUT"]), int(os.environ["RANK"])
    (folder / f"waited.{rank}").write_text(json.dumps(wait_in_vain(rank)))

    def step(state: TrainState, batch: dict) -> None:
        if rank == 1 and state.step == FAILING:
            raise RuntimeError("a GPU fell off the bus")
        train_step(state, batch)

    train(os.environ["DIGITS"], folder, "fails", step)


if __name__ == "__main__":
    main()
