"""Native checkpoints: a directory written through torch.distributed.checkpoint.

It is complete when its marker file exists, and the marker is written last; a directory without it
is what a crash left behind, is never loaded, and is removed when its step is saved again.
"""

import json
import os
import shutil
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from repa_fast.models.weights import MARKER, alone, path_of, steps
from repa_fast.train.state import TrainState

COUNTERS = "counters.json"


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
    with alone():
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
    with alone():
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
