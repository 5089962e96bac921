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
from repa_fast.configs.config import TrainConfig, from_saved
from repa_fast.data.dataset import Metadata

MARKER = "COMPLETE"
CONFIG, COUNTERS, DATASET = "config.json", "counters.json", "dataset.json"
"""Beside the tensors: the run's config, its counters (the step and so on), its data's metadata."""


def path_of(folder: Path, step: int) -> Path:
    """Return the directory of a step's checkpoint."""
    return folder / f"{step:07d}"


def steps(folder: Path) -> list[int]:
    """Return the steps of the complete checkpoints in `folder`, ascending."""
    return sorted(
        int(path.parent.name) for path in folder.glob(f"*/{MARKER}") if path.parent.name.isdecimal()
    )


def run_checkpoints(run: Path) -> list[Path]:
    """Return a run's (or a folder's) complete checkpoints by step; ValueError if it has none."""
    for folder in (run, run / "checkpoints"):
        if found := [path_of(folder, step) for step in steps(folder)]:
            return found
    raise ValueError(f"{run} is neither a complete checkpoint nor a run that has one")


def newest_checkpoint(path: Path) -> Path:
    """Return `path` if it is a complete checkpoint, else the newest one of the run it is."""
    return path if (path / MARKER).exists() else run_checkpoints(path)[-1]


@dataclass(frozen=True)
class Settings:
    """What a checkpoint says beside its tensors."""

    config: TrainConfig
    counters: dict
    metadata: Metadata


def read_settings(checkpoint: Path) -> Settings:
    """Return what a checkpoint of this version or an earlier one says beside its tensors."""
    config, counters, metadata = (
        json.loads((checkpoint / name).read_text()) for name in (CONFIG, COUNTERS, DATASET)
    )
    return Settings(from_saved(config), counters, Metadata.from_dict(metadata))


def load_ema(checkpoint: Path, model: torch.nn.Module) -> None:
    """Read the EMA of a complete checkpoint into `model`; ValueError if it is not of this model."""
    expect_complete(checkpoint)
    reader.load({f"ema.{name}": t for name, t in model.state_dict().items()}, checkpoint)


def read_native(checkpoint: Path, prefix: str) -> dict[str, torch.Tensor]:
    """Read the tensors whose names start with `prefix`, and name them without it, on the CPU.

    They are whole, however many processes wrote them. ValueError if the checkpoint is not complete,
    or unreadable.
    """
    expect_complete(checkpoint)
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_index(checkpoint).state_dict_metadata.items()
        if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }
    reader.load(tensors, checkpoint)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def expect_complete(checkpoint: Path) -> None:
    """Raise ValueError unless `checkpoint` is a complete native checkpoint."""
    if not (checkpoint / MARKER).exists():
        raise ValueError(f"{checkpoint} is not a complete checkpoint (it has no file {MARKER})")
