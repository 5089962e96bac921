"""Pictures of samples: `repa-fast sample --ckpt RUN --class "golden retriever" --seed 0`; strip."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from repa_fast.checkpoint.layout import run_checkpoints
from repa_fast.checkpoint.marker import trusted
from repa_fast.configs.part import expect_at_least
from repa_fast.configs.sampler import SamplerConfig
from repa_fast.contracts import expect_writable
from repa_fast.distributed import own_device
from repa_fast.eval.load import WeightsConfig, load
from repa_fast.eval.pictures import arrange, save_png
from repa_fast.eval.sampling import ImageSampler

IMAGENET_CLASSES = 1000
MOST_ROWS = 10
SHOWN = 5


@dataclass(kw_only=True)
class SampleConfig(SamplerConfig, WeightsConfig):
    """`repa-fast sample`: samples of one class, or of several, as a PNG."""

    classes: tuple[str, ...] = ()
    """(or --class) Names or numbers, one row each; all, at most ten, where none is given."""
    count: int = 8
    """Images of each class."""
    seed: int = 0
    """Determines the noise, the same for every class."""
    out: str = "sample.png"
    """The .png to write."""


def sample(config: SampleConfig) -> Path:
    """Write the picture; return its path."""
    out = Path(config.out)
    expect_writable("out", out, ".png")
    expect_at_least(config, 1, "count")
    device = own_device()
    loaded = config.load(device, prediction=config.prediction)
    names = class_names(loaded.metadata.class_names)
    chosen = [class_index(name, names) for name in config.classes]
    rows = chosen or list(range(min(len(names), MOST_ROWS)))
    labels = np.repeat(rows, config.count)
    index = np.tile(np.arange(config.count), len(rows))
    sampler = ImageSampler(loaded, config, device)
    images = sampler.images(index, labels, config.seed)
    titles = [names[label].split(",")[0] for label in labels]
    save_png(arrange(images, config.count, titles), out)
    return out


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
    """The .png to write; strip.png in the run's folder where empty."""
    verify: bool = True
    """Compare checksums of what is read; otherwise read it as it is."""


def strip(config: StripConfig) -> Path:
    """Write the picture; return its path."""
    out, device = Path(config.out or Path(config.ckpt) / "strip.png"), own_device()
    expect_writable("out", out, ".png")
    columns, titles = [], []
    for source in run_checkpoints(Path(config.ckpt)):
        with trusted(not config.verify):
            loaded = load(source, device)
        known = loaded.metadata.class_names
        if config.classes:
            names = class_names(known)
            labels = np.array([class_index(name, names) for name in config.classes])
        else:
            labels = np.arange(config.count) % len(known)
        sampler = ImageSampler(loaded, config, device)
        columns.append(sampler.images(np.arange(len(labels)), labels, config.seed).cpu())
        titles.append(str(loaded.step))
    pictures = torch.stack(columns, dim=1)  # rows, columns, 3, R, R
    shown = arrange(pictures.flatten(0, 1), len(columns), titles * len(pictures))
    save_png(shown, out)
    return out


def class_names(known: Sequence[str]) -> tuple[str, ...]:
    """Return names for people: ImageNet's, with synonyms, where the dataset has numbers only."""
    if len(known) != IMAGENET_CLASSES or not all(name.isdecimal() for name in known):
        return tuple(known)
    from timm.data import ImageNetInfo

    imagenet = ImageNetInfo()
    return tuple(imagenet.index_to_description(index) for index in range(IMAGENET_CLASSES))


def class_index(wanted: str, names: Sequence[str]) -> int:
    """Return the class of that number or, in any case of letters, that name or part of a name.

    Raises:
        ValueError: none, or several; lists some.
    """
    word = wanted.lower()
    exact = [index for index, name in enumerate(names) if word in name.lower().split(", ")]
    if not exact and wanted.isdecimal() and int(wanted) < len(names):
        return int(wanted)
    found = exact or [index for index, name in enumerate(names) if word in name.lower()]
    if len(found) == 1:
        return found[0]
    some = [f"{index} ({names[index]})" for index in found or range(len(names))]
    raise ValueError(
        f"class is {wanted!r}, expected a number below {len(names)} or a name; "
        f"{len(found)} classes have it{'' if found else ', there are'}: "
        f"{', '.join(some[:SHOWN])}{' ...' if len(some) > SHOWN else ''}"
    )
