"""Weights of native checkpoints, without the trainer.

A native checkpoint is a directory written through torch.distributed.checkpoint, named by its step;
it is complete when its marker file exists.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from repa_fast.checkpoint import reader
from repa_fast.checkpoint.index import read_index
from repa_fast.checkpoint.marker import MARKER, expect_intact, is_complete
from repa_fast.configs.config import TrainConfig, from_saved
from repa_fast.data.dataset import Metadata

CONFIG, COUNTERS, DATASET = "config.json", "counters.json", "dataset.json"
"""Beside the tensors: the run's config, its counters (the step and so on), its data's metadata."""


def path_of(folder: Path, step: int) -> Path:
    """Return the directory of a step's checkpoint."""
    return folder / f"{step:07d}"


def steps(folder: Path) -> list[int]:
    """Return the steps of the complete checkpoints in `folder`, ascending."""
    found = (path.parent for path in folder.glob(f"*/{MARKER}"))
    return sorted(
        int(path.name)
        for path in found
        if path.name.isdecimal() and path == path_of(folder, int(path.name))
    )


def run_checkpoints(run: Path) -> list[Path]:
    """Return a run's (or a folder's) complete checkpoints by step; ValueError if it has none."""
    for folder in (run, run / "checkpoints"):
        if found := [path_of(folder, step) for step in steps(folder)]:
            return found
    raise ValueError(f"{run} is neither a complete checkpoint nor a run that has one")


def newest_checkpoint(path: Path) -> Path:
    """Return `path` if it is a complete checkpoint, else the newest one of the run it is."""
    return path if is_complete(path) else run_checkpoints(path)[-1]


@dataclass(frozen=True)
class Settings:
    """What a checkpoint says beside its tensors."""

    config: TrainConfig
    counters: dict
    metadata: Metadata


def read_settings(checkpoint: Path) -> Settings:
    """Return what a checkpoint of this version or an earlier one says beside its tensors.

    ValueError if it is damaged, of a later version, or of another step than its name says.
    """
    config, counters, metadata = (
        _read_json(checkpoint, name) for name in (CONFIG, COUNTERS, DATASET)
    )
    step = counters.get("step")
    if type(step) is not int or (checkpoint.name.isdecimal() and step != int(checkpoint.name)):
        raise ValueError(f"{checkpoint} is of step {step!r}, expected the step that it is named by")
    try:
        return Settings(from_saved(config), counters, Metadata.from_dict(metadata))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{checkpoint}: {error}") from error


def _read_json(checkpoint: Path, name: str) -> dict:
    expect_intact(checkpoint, [name])
    try:
        values = json.loads((checkpoint / name).read_bytes())
    except ValueError as error:
        raise ValueError(f"{checkpoint / name} is not JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{checkpoint / name} holds {values!r:.40}, expected values by name")
    return values


def load_ema(checkpoint: Path, model: torch.nn.Module) -> None:
    """Read the EMA of a complete checkpoint into `model`; ValueError if it is not of this model."""
    reader.load({f"ema.{name}": t for name, t in model.state_dict().items()}, checkpoint)


def read_native(checkpoint: Path, prefix: str) -> dict[str, torch.Tensor]:
    """Read the tensors whose names start with `prefix`, and name them without it, on the CPU.

    They are whole, however many processes wrote them. ValueError if the checkpoint is not complete,
    or a file that is read is damaged.
    """
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in read_index(checkpoint).state_dict_metadata.items()
        if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }
    reader.load(tensors, checkpoint)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
