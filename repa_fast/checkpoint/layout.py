"""Weights of native checkpoints, without the trainer.

A native checkpoint is a directory written through torch.distributed.checkpoint, named by its step;
it is complete when its marker file exists.
"""

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from repa_fast.checkpoint import reader
from repa_fast.checkpoint.index import read_index
from repa_fast.checkpoint.marker import expect_intact, is_complete
from repa_fast.configs.config import TrainConfig, from_saved
from repa_fast.data.dataset import Metadata
from repa_fast.whole import parse_json, read_regular
from repa_fast.words import short

CONFIG, COUNTERS, DATASET = "config.json", "counters.json", "dataset.json"
"""Beside the tensors: the run's config, its counters (the step and so on), its data's metadata."""
GENERATED = "generated"
"""Folder in a run's, of images and their scores."""
WEIGHTS = re.compile(r"model|ema(_[1-9][0-9]{0,3})?")
"""Names of sets of weights: those that are trained, and their EMAs."""
MOST = 2**40
"""Above any step or number of processes."""


def path_of(folder: Path, step: int) -> Path:
    """Return the directory of a step's checkpoint."""
    return folder / f"{step:07d}"


def steps(folder: Path) -> list[int]:
    """Return the steps of the complete checkpoints in `folder`, ascending.

    OSError if they cannot be seen: to take them for none would begin anew.
    """
    return sorted(step for step, path in step_folders(folder) if is_complete(path))


def step_folders(folder: Path) -> list[tuple[int, Path]]:
    """Return (step, path) of all that is named as a step's checkpoint, by step."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    numbers = (int(name) for name in names if re.fullmatch(r"[0-9]{7,15}", name))
    found = ((step, path_of(folder, step)) for step in sorted(numbers))
    return [(step, path) for step, path in found if path.name in names]


def run_checkpoints(run: Path) -> list[Path]:
    """Return a run's (or a folder's) complete checkpoints by step; ValueError if it has none."""
    if found := _checkpoints(run):
        return found
    raise ValueError(f"{run} is neither a complete checkpoint nor a run that has one")


def _checkpoints(run: Path) -> list[Path]:
    found = ([path_of(f, step) for step in steps(f)] for f in (run, run / "checkpoints"))
    return next(filter(None, found), [])


def newest_checkpoint(path: Path) -> Path:
    """Return `path` if it is a complete checkpoint, else the newest one of the run it is."""
    return path if is_complete(path) else run_checkpoints(path)[-1]


def run_folder(source: Path) -> Path | None:
    """Return the folder of the run that a source belongs to, which is where commands write.

    That of a run itself, of a native checkpoint, or of a file among a run's checkpoints that is
    named by its step; None of weights elsewhere, and of a folder that is no run's.
    """
    if source.is_dir() and not is_complete(source):
        found = _checkpoints(source)
        if not found:
            return None
        source = found[-1]
    above = source.parent
    if above.name in ("", ".."):
        above = Path(os.path.abspath(above))
    if source.is_dir():
        return above.parent if above.name == "checkpoints" else above
    named = re.match(r"(step-|epoch-)?[0-9]", source.name)
    return above.parent if named and above.name == "checkpoints" else None


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
    if checkpoint.name.isdecimal() and step != int(checkpoint.name):
        named = "the step that it is named by"
        raise ValueError(f"{checkpoint} is of step {short(step)}, expected {named}")
    try:
        _expect_counters(counters)
        return Settings(from_saved(config), counters, Metadata.from_dict(metadata))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{checkpoint}: {error}") from error


def _expect_counters(counters: dict) -> None:
    """Raise ValueError unless a run's counters are numbers that a run can have."""
    history = counters.get("history", {})
    if not isinstance(history, dict) or not isinstance(history.get("losses", []), list):
        raise ValueError(f"history is {short(history)}, expected what a run has been through")
    whole = {name: counters.get(name, 1) for name in ("step", "rows", "world_size", "micro_batch")}
    whole |= {name: history.get(name, 0) for name in ("skipped", "good_step")}
    for name, value in whole.items():
        if type(value) is not int or not 0 <= value < MOST:
            raise ValueError(f"{name} is {short(value)}, expected a whole number below 2^40")
    for loss in history.get("losses", []):
        if type(loss) not in (int, float) or not math.isfinite(loss):
            raise ValueError(f"history has a loss of {short(loss)}, expected finite numbers")


def _read_json(checkpoint: Path, name: str) -> dict:
    expect_intact(checkpoint, [name])
    values = parse_json(read_regular(checkpoint / name), checkpoint / name)
    if not isinstance(values, dict):
        raise ValueError(f"{checkpoint / name} is {short(values)}, expected values by name")
    return values


def weights_of(checkpoint: Path) -> list[str]:
    """Return which sets of weights a complete checkpoint has: model, ema, ema_2 and so on.

    ValueError if it is not complete, or its index is damaged.
    """
    found = {name.partition(".")[0] for name in read_index(checkpoint).state_dict_metadata}
    found = filter(WEIGHTS.fullmatch, found)
    return sorted(found, key=lambda name: (name != "model", len(name), name))


def expect_weights(source: Path, weights: str, there: Sequence[str]) -> None:
    """Raise ValueError unless a set of weights is among those that are `there`."""
    if weights not in there:
        raise ValueError(f"{source} has no weights {weights}, expected one of {', '.join(there)}")


def load_weights(checkpoint: Path, model: torch.nn.Module, weights: str = "ema") -> None:
    """Read a set of weights of a complete checkpoint into `model`.

    ValueError if there is no such set, or it is not of this model.
    """
    expect_weights(checkpoint, weights, weights_of(checkpoint))
    reader.load({f"{weights}.{name}": t for name, t in model.state_dict().items()}, checkpoint)


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
