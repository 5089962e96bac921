"""What test_watch_ranks.py asks of two processes, in one start of torchrun."""

import json
import os
import time
from pathlib import Path

import torch

from repa_fast.distributed import session
from repa_fast.train import graph, watch
from repa_fast.train import run as runs
from repa_fast.train.spikes import TrainingDiverged
from repa_fast.train.state import TrainState
from repa_fast.train.step import train_step
from tests.train.conftest import tiny_config

STEPS = 24
POISONED = 17
FAILING = 5
TIMEOUT = 3.0


def train(folder: Path, name: str, step, **overrides) -> None:
    """A run whose steps are `step`(state, batch)."""
    graph.train_step = step
    values = {"data_dir": os.environ["DIGITS"], "output_dir": str(folder), "exp_name": name}
    values |= {"enc_type": "none", "max_train_steps": STEPS, "log_every": 1}
    runs.train(tiny_config(**values | overrides))


def stopping(folder: Path) -> dict:
    """A sharded run that spikes after some data, and saves while it trains."""
    seen = []

    def step(state: TrainState, batch: dict) -> None:
        seen.append(state.data_step)
        spoilt = state.data_step == POISONED
        train_step(state, batch)
        if spoilt:
            with torch.no_grad():
                state.model.final_layer.linear.bias.add_(3)

    message, last_word = "", watch.LAST_WORD
    watch.LAST_WORD = 0.0  # whoever stops second would come late to what follows
    try:
        train(folder, "spikes", step, stop_on_spike=True, checkpointing_steps=5, parallel="fsdp")
    except TrainingDiverged as error:
        message = str(error)
    watch.LAST_WORD = last_word
    return {"seen": seen, "message": message}


def waiting(rank: int) -> dict:
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


def failing(folder: Path, rank: int) -> None:
    """The second process's step raises; the first one's then loses its peer."""

    def step(state: TrainState, batch: dict) -> None:
        if rank == 1 and state.step == FAILING:
            raise RuntimeError("a GPU fell off the bus")
        train_step(state, batch)

    train(folder, "fails", step)


def main() -> None:
    torch.set_num_threads(1)
    folder, rank = Path(os.environ["OUT"]), int(os.environ["RANK"])
    (folder / f"stopping.{rank}").write_text(json.dumps(stopping(folder)))
    (folder / f"waiting.{rank}").write_text(json.dumps(waiting(rank)))
    failing(folder, rank)


if __name__ == "__main__":
    main()
