"""Weights of native checkpoints, without the trainer.

A native checkpoint is a directory written through torch.distributed.checkpoint, named by its step;
it is complete when its marker file exists.
"""

from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from repa_fast.checkpoint import reader

MARKER = "COMPLETE"


def path_of(folder: Path, step: int) -> Path:
    """The directory of a step's checkpoint."""
    return folder / f"{step:07d}"


def steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in `folder`, ascending."""
    return sorted(
        int(path.parent.name) for path in folder.glob(f"*/{MARKER}") if path.parent.name.isdecimal()
    )


def load_ema(checkpoint: Path, model: torch.nn.Module) -> None:
    """Read the moving average of a complete checkpoint into `model`, and nothing else.

    Raises:
        ValueError: the checkpoint is not complete, or not of this model.
    """
    expect_complete(checkpoint)
    reader.load({f"ema.{name}": t for name, t in model.state_dict().items()}, checkpoint)


def read_native(checkpoint: Path, prefix: str) -> dict[str, torch.Tensor]:
    """The tensors of a complete checkpoint whose names start with `prefix`, without it, on the CPU.

    They are whole, by however many processes the checkpoint was written.

    Raises:
        ValueError: the checkpoint is not complete, or unreadable.
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
