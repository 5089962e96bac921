"""Native checkpoints: a directory written through torch.distributed.checkpoint.

It is complete when its marker file exists, and the marker is written last, with the checksum of
every other file. A directory without it is what a crash left behind, is never loaded, and is
removed when its step is saved again.
"""

import json
import os
import shutil
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from repa_fast.models import formats
from repa_fast.models.weights import MARKER, alone, expect_complete, path_of, steps
from repa_fast.train.state import TrainState

COUNTERS = "counters.json"
CONFIG = "config.json"
DATASET = "dataset.json"


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
        (target / CONFIG).write_text(json.dumps(state.config.to_dict(), indent=2))
        (target / DATASET).write_text(json.dumps(asdict(state.metadata), indent=2))
        _write_marker(target, checksums(target))
        prune(folder, state.config.keep_last, state.config.keep_every)
    world.barrier()
    return target


def prune(folder: Path, keep_last: int, keep_every: int) -> None:
    """Remove complete checkpoints but the last K and those of every N steps; 0 for K keeps all.

    The marker goes first, so that a crash half-way leaves no checkpoint that looks whole.
    """
    for step in steps(folder)[:-keep_last] if keep_last else []:
        if not (keep_every and step % keep_every == 0):
            (path_of(folder, step) / MARKER).unlink()
            shutil.rmtree(path_of(folder, step))


def checksums(path: Path) -> dict[str, int]:
    """CRC-32 of every file of a checkpoint but the marker; zlib lets threads run side by side."""
    files = sorted(file for file in path.iterdir() if file.name != MARKER)
    with ThreadPoolExecutor() as pool:
        return dict(zip((file.name for file in files), pool.map(_checksum, files), strict=True))


def damage(path: Path) -> str:
    """What differs from the checksums in the marker, "" if nothing does."""
    try:
        expected = json.loads((path / MARKER).read_text())
    except (OSError, ValueError) as error:
        return f"its marker cannot be read ({error})"
    found = checksums(path)
    missing = sorted(expected.keys() - found.keys())
    if missing:
        return f"missing {', '.join(missing)}"
    changed = sorted(name for name, value in expected.items() if found[name] != value)
    return f"wrong checksum of {', '.join(changed)}" if changed else ""


def load(source: Path, state: TrainState) -> None:
    """Read a checkpoint directory into `state`, in place; hyperparameters stay the config's.

    Raises:
        ValueError: it is not complete, or of another model (lists what differs).
    """
    expect_complete(source)
    _expect_same_model(source, state)
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
    # Without states torch would make them by a step of its own, which moves averages too.
    state.optimizer.begin_states()
    return {
        "model": state.model.state_dict(),
        "ema": state.ema.state_dict(),
        **{
            f"ema_{number}": average.state_dict()
            for number, average in enumerate(state.more_emas, start=2)
        },
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


def _expect_same_model(source: Path, state: TrainState) -> None:
    entries = dcp.FileSystemReader(source).read_metadata().state_dict_metadata
    stored = {
        name.removeprefix("model."): torch.empty(entry.size, device="meta")
        for name, entry in entries.items()
        if name.startswith("model.")
    }
    averages = len({name.split(".")[0] for name in entries if name.startswith("ema")})
    if averages != 1 + len(state.more_emas):
        raise ValueError(
            f"{source} holds {averages} averages of the weights, expected "
            f"{1 + len(state.more_emas)} (--ema-decay {state.config.ema_decay})"
        )
    problems = formats.differences(state.model.state_dict(), stored)
    if problems:
        raise ValueError(
            f"{source} holds a {formats.shape_of(stored)}, the run's model is a "
            f"{formats.shape_of(state.model.state_dict())}\n" + "\n".join(problems)
        )


def _checksum(file: Path) -> int:
    value = 0
    with open(file, "rb") as stream:
        while chunk := stream.read(1 << 24):
            value = zlib.crc32(chunk, value)
    return value


def _write_marker(target: Path, content: dict[str, int]) -> None:
    """Create the marker so that it survives a power cut only if everything before it does."""
    with open(target / MARKER, "w") as marker:
        json.dump(content, marker, indent=2)
        marker.flush()
        os.fsync(marker.fileno())
    for folder in (target, target.parent):
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
