"""Weights of native checkpoints, without the trainer.

A native checkpoint is a directory written through torch.distributed.checkpoint, named by its step;
it is complete when its marker file exists.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

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
        ValueError: the checkpoint is not complete.
    """
    expect_complete(checkpoint)
    with alone():
        dcp.load({"ema": model.state_dict()}, checkpoint_id=checkpoint, no_dist=True)


def read_native(checkpoint: Path, prefix: str) -> dict[str, torch.Tensor]:
    """The tensors of a complete checkpoint whose names start with `prefix`, without it, on the CPU.

    Raises:
        ValueError: the checkpoint is not complete.
    """
    expect_complete(checkpoint)
    stored = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in stored.items()
        if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }
    with alone():
        dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}


def expect_complete(checkpoint: Path) -> None:
    """Raise ValueError unless `checkpoint` is a complete native checkpoint."""
    if not (checkpoint / MARKER).exists():
        raise ValueError(f"{checkpoint} is not a complete checkpoint (it has no file {MARKER})")


@contextmanager
def alone() -> Iterator[None]:
    """Without torch's warning that a single process saves or loads alone, which is meant here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
