"""`repa-fast strip`: the same noise through every checkpoint of a run (as REPA's figure 4)."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from repa_fast.checkpoint.layout import run_checkpoints
from repa_fast.configs.sampler import SamplerConfig
from repa_fast.distributed import own_device
from repa_fast.eval.load import load
from repa_fast.eval.pictures import arrange, save_png
from repa_fast.eval.sample import class_index, class_names
from repa_fast.eval.sampling import ImageSampler


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


def strip(config: StripConfig) -> Path:
    """Write the picture; return its path.

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
            labels = np.arange(config.count) % loaded.model.num_classes
        sampler = ImageSampler(loaded, config, device)
        columns.append(sampler.images(np.arange(len(labels)), labels, config.seed).cpu())
        titles.append(str(loaded.step))
    pictures = torch.stack(columns, dim=1)  # rows, columns, 3, R, R
    out = Path(config.out or Path(config.ckpt) / "strip.png")
    shown = arrange(pictures.flatten(0, 1), len(columns), titles * len(pictures))
    save_png(shown, out)
    return out
