"""`repa-fast strip`: the same noise through every checkpoint of a run (as REPA's figure 4)."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from repa_fast.checkpoint.layout import path_of, steps
from repa_fast.data.processes import own_device
from repa_fast.eval.load import load
from repa_fast.eval.pictures import arrange, save_png
from repa_fast.eval.sample import class_index, class_names
from repa_fast.eval.sampling import ImageSampler, SamplerConfig, labels_of


@dataclass(kw_only=True)
class StripConfig(SamplerConfig):
    """`repa-fast strip`: a row for each image, a column for each checkpoint."""

    ckpt: str
    """A run's folder."""
    classes: tuple[str, ...] = ()
    """(or --class) Names or numbers, a row each; one class after the other where none is given."""
    count: int = 4
    """Rows, where no class is given."""
    seed: int = 0
    """Determines the noise."""
    out: str = ""
    """File to write; strip.png in the run's folder where empty."""


def run_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, by step.

    Raises:
        ValueError: it has none.
    """
    folder = run / "checkpoints"
    found = [path_of(folder, step) for step in steps(folder)]
    if not found:
        raise ValueError(f"{run} is not a run with complete checkpoints, expected one")
    return found


def strip(config: StripConfig) -> Path:
    """Write the picture; returns its path.

    Raises:
        ValueError: not a run, an unknown class, or settings that do not fit.
        RuntimeError: the autoencoder cannot be loaded.
    """
    device = own_device()
    columns, titles = [], []
    for source in run_checkpoints(Path(config.ckpt)):
        loaded = load(source, device)
        if config.classes:
            names = class_names(loaded.metadata.class_names)
            labels = np.array([class_index(name, names) for name in config.classes])
        else:
            labels = labels_of(
                np.arange(config.count), loaded.model.num_classes, config.seed, "balanced"
            )
        sampler = ImageSampler(loaded, config, device)
        columns.append(sampler.images(np.arange(len(labels)), labels, config.seed).cpu())
        titles.append(f"{loaded.step}")
    pictures = torch.stack(columns, dim=1)  # rows, columns, 3, R, R
    out = Path(config.out) if config.out else Path(config.ckpt) / "strip.png"
    shown = titles * len(pictures)
    save_png(arrange(pictures.flatten(0, 1), len(columns), shown), out)
    return out
