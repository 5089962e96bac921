"""Native checkpoints: a directory written through torch.distributed.checkpoint.

It is complete when its marker file exists, and the marker is written last; a directory without it
is what a crash left behind, is never loaded, and is removed when its step is saved again.
"""

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from repa_fast.train.state import TrainState

MARKER = "COMPLETE"
COUNTERS = "counters.json"


def path_of(folder: Path, step: int) -> Path:
    """The directory of a step's checkpoint."""
    return folder / f"{step:07d}"


def steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in `folder`, ascending."""
    return sorted(
        int(path.parent.name) for path in folder.glob(f"*/{MARKER}") if path.parent.name.isdecimal()
    )


def save(folder: Path, state: TrainState) -> Path:
    """Write the checkpoint of the current step; all processes call it. Returns its directory.

    A complete checkpoint of this step is left as it is.
    """
    target = path_of(folder, state.step)
    world = state.world
    if (target / MARKER).exists():
        return target
    if world.is_main and target.exists():
        shutil.rmtree(target)
    world.barrier()
    with _quiet():
        dcp.save(_tensors(state), checkpoint_id=target, no_dist=world.size == 1)
    counters = _counters(state)
    if world.is_main:
        (target / COUNTERS).write_text(json.dumps(counters, indent=2))
        (target / "config.json").write_text(json.dumps(state.config.to_dict(), indent=2))
        _write_marker(target)
    world.barrier()
    return target


def load(folder: Path, step: int, state: TrainState) -> None:
    """Read the checkpoint of `step` into `state`, in place; hyperparameters stay the config's.

    Raises:
        ValueError: there is no complete checkpoint of that step.
    """
    if step not in steps(folder):
        found = ", ".join(map(str, steps(folder))) or "none"
        raise ValueError(f"no complete checkpoint of step {step} in {folder} (found: {found})")
    source = path_of(folder, step)
    hyperparameters = [
        {key: value for key, value in group.items() if key != "params"}
        for group in state.optimizer.param_groups
    ]
    tensors = _tensors(state)
    with _quiet():
        dcp.load(tensors, checkpoint_id=source, no_dist=state.world.size == 1)
    set_optimizer_state_dict(state.model, state.optimizer, tensors["optimizer"])
    for group, values in zip(state.optimizer.param_groups, hyperparameters, strict=True):
        group.update(values)
    counters = json.loads((source / COUNTERS).read_text())
    if state.scaler.is_enabled() and counters["scaler"]:
        state.scaler.load_state_dict(counters["scaler"])
    state.metrics.load_state(counters["metrics"], state.world)
    if counters["world_size"] == state.world.size:
        state.micro_batch = counters["micro_batch"]
    state.step = counters["step"]


def load_ema(checkpoint: Path, model: torch.nn.Module) -> None:
    """Read the moving average of a complete checkpoint into `model`, and nothing else.

    Raises:
        ValueError: the checkpoint is not complete.
    """
    if not (checkpoint / MARKER).exists():
        raise ValueError(f"{checkpoint} is not a complete checkpoint (it has no file {MARKER})")
    with _quiet():
        dcp.load({"ema": model.state_dict()}, checkpoint_id=checkpoint, no_dist=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warning that a single process saves alone, which is meant here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _tensors(state: TrainState) -> dict:
    return {
        "model": state.model.state_dict(),
        "ema": state.ema.state_dict(),
        "optimizer": get_optimizer_state_dict(state.model, state.optimizer),
    }


def _counters(state: TrainState) -> dict:
    """Plain numbers; sample order and noise need no more than the step."""
    return {
        "step": state.step,
        "world_size": state.world.size,
        "micro_batch": state.micro_batch,
        "scaler": state.scaler.state_dict(),
        "metrics": state.metrics.state(state.world),
    }


def _write_marker(target: Path) -> None:
    """Create the marker so that it survives a power cut only if everything before it does."""
    with open(target / MARKER, "w") as marker:
        marker.flush()
        os.fsync(marker.fileno())
    for folder in (target, target.parent):
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
