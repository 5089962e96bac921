"""Pictures of samples: `repa-fast sample --ckpt RUN --class "golden retriever" --seed 0`; strip."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from repa_fast.checkpoint.layout import run_checkpoints, run_folder
from repa_fast.checkpoint.marker import trusted
from repa_fast.configs.part import expect_at_least
from repa_fast.configs.sampler import SamplerConfig
from repa_fast.contracts import expect_writable
from repa_fast.distributed import own_device
from repa_fast.eval.load import WeightsConfig, load
from repa_fast.eval.pictures import arrange, save_png, squarest
from repa_fast.eval.sampling import (
    ImageSampler,
    file_name,
    line_of,
    settings,
    write_settings,
)

IMAGENET_CLASSES = 1000
MOST_ROWS = 10
SHOWN = 5


@dataclass(kw_only=True)
class SampleConfig(SamplerConfig, WeightsConfig):
    """`repa-fast sample`: samples of one class, or of several, as a PNG."""

    classes: tuple[str, ...] = ()
    """(or --class) Names or numbers; all, at most ten, where none is given."""
    count: int = 8
    """Images of each class."""
    seed: int = 0
    """Determines the noise, the same for every class."""
    out: str = ""
    """The .png to write; where empty sample-STEP-....png in the run's folder, or in the current one
    for weights that are no run's. A JSON of the settings is written beside it."""


def draw_sample(config: SampleConfig) -> str:
    """Write the picture; return a line that names it."""
    return line_of(sample(config))


def sample(config: SampleConfig) -> Path:
    """Write the picture, and its settings as JSON beside it; return its path.

    A class has one row or several neighbouring ones, so that the picture is nearly square.
    """
    folder = Path() if config.out else run_folder(Path(config.ckpt)) or Path()
    if config.out:
        expect_writable("out", Path(config.out), ".png")
    else:
        expect_writable("out", folder, folder=True)
    expect_at_least(config, 1, "count")
    device = own_device()
    loaded = config.load(device, prediction=config.prediction)
    names = class_names(loaded.metadata.class_names)
    index, labels = numbered(config.classes, config.count, names)
    rows = labels[:: config.count].tolist()
    sampler = ImageSampler(loaded, config, device)
    images = sampler.images(index, labels, config.seed)
    titles = [names[label].split(",")[0] for label in labels]
    chosen = {"classes": [names[label] for label in rows], "labels": rows}
    described = settings(config, loaded) | chosen
    out = Path(config.out or folder / f"{file_name('sample', described, loaded)}.png")
    divisors = [n for n in range(1, config.count + 1) if config.count % n == 0]
    save_png(arrange(images, squarest(divisors, len(labels)), titles), out)
    write_settings(out, described, loaded.source)
    return out


@dataclass(kw_only=True)
class StripConfig(SamplerConfig):
    """`repa-fast strip`: a row for each image, a column for each checkpoint."""

    ckpt: str
    """A run's folder."""
    weights: str = "ema"
    """model (those that are trained), ema, or ema_2 and so on of a run with several EMAs."""
    classes: tuple[str, ...] = ()
    """(or --class) Names or numbers, a row each; one class after the other where none is given."""
    count: int = 4
    """Rows, where no class is given."""
    seed: int = 0
    """Determines the noise."""
    out: str = ""
    """The .png to write; strip.png in the run's folder where empty, strip-WEIGHTS.png of other
    weights than ema. A JSON of the settings is written beside it."""
    verify: bool = True
    """Compare checksums of what is read; otherwise read it as it is."""


def draw_strip(config: StripConfig) -> str:
    """Write the picture; return a line that names it."""
    return line_of(strip(config))


def strip(config: StripConfig) -> Path:
    """Write the picture, and its settings as JSON beside it; return its path."""
    which = "" if config.weights == "ema" else f"-{config.weights}"
    folder = Path() if config.out else run_folder(Path(config.ckpt)) or Path()
    out, device = Path(config.out or folder / f"strip{which}.png"), own_device()
    expect_writable("out", out, ".png")
    columns, read = [], []
    for source in run_checkpoints(Path(config.ckpt)):
        with trusted(not config.verify):
            loaded = load(source, device, weights=config.weights)
        known = loaded.metadata.class_names
        if config.classes:
            names = class_names(known)
            labels = np.array([class_index(name, names) for name in config.classes])
        else:
            labels = np.arange(config.count) % len(known)
        sampler = ImageSampler(loaded, config, device)
        columns.append(sampler.images(np.arange(len(labels)), labels, config.seed).cpu())
        read.append((loaded.step, loaded.digest))
    steps, digests = zip(*read, strict=True)
    titles = [str(step) for step in steps]
    pictures = torch.stack(columns, dim=1)  # rows, columns, 3, R, R
    shown = arrange(pictures.flatten(0, 1), len(columns), titles * len(pictures))
    save_png(shown, out)
    of_all = {"step": steps, "digest": digests, "classes": [known[label] for label in labels]}
    write_settings(out, settings(config, loaded) | of_all, Path(config.ckpt))
    return out


def numbered(
    classes: int | str | Sequence[int | str], count: int, names: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Return numbers and labels, int64 (B) each, of `count` images of each class, one by one.

    The classes are those of `class_index`, or the first ten where none is given; images of the same
    number, of whichever class, begin with the same noise.
    """
    chosen = class_indices(classes, class_names(names))
    rows = chosen or range(min(len(names), MOST_ROWS))
    return np.tile(np.arange(count), len(rows)), np.repeat(np.array(rows, np.int64), count)


def class_names(known: Sequence[str]) -> tuple[str, ...]:
    """Return names for people: ImageNet's, with synonyms, where the dataset has numbers only."""
    if len(known) != IMAGENET_CLASSES or not all(name.isdecimal() for name in known):
        return tuple(known)
    from timm.data import ImageNetInfo

    imagenet = ImageNetInfo()
    return tuple(imagenet.index_to_description(index) for index in range(IMAGENET_CLASSES))


def class_indices(wanted: int | str | Sequence[int | str], names: Sequence[str]) -> list[int]:
    """Return the classes of one or several numbers and names, each by `class_index`."""
    alone = isinstance(wanted, str) or not hasattr(wanted, "__iter__")
    return [class_index(one, names) for one in ([wanted] if alone else wanted)]


def class_index(wanted: int | str, names: Sequence[str]) -> int:
    """Return the class of that number or, in any case of letters, that name or part of a name.

    A text is a name first, then a number.

    Raises:
        ValueError: none, or several; lists some.
    """
    found = _classes_of(wanted, names)
    if len(found) == 1:
        return found[0]
    some = [f"{index} ({names[index]})" for index in found or range(len(names))]
    raise ValueError(
        f"class is {wanted!r}, expected a number below {len(names)} or a name; "
        f"{len(found)} classes have it{'' if found else ', there are'}: "
        f"{', '.join(some[:SHOWN])}{' ...' if len(some) > SHOWN else ''}"
    )


def _classes_of(wanted: int | str, names: Sequence[str]) -> list[int]:
    """Return the classes that have that number, that name, or else that part of a name."""
    if not isinstance(wanted, str):
        number = operator.index(wanted)  # numpy's and torch's integers too
        return [number] if 0 <= number < len(names) else []
    word = wanted.lower()
    if exact := [index for index, name in enumerate(names) if word in name.lower().split(", ")]:
        return exact
    if wanted.isdecimal() and int(wanted) < len(names):
        return [int(wanted)]
    return [index for index, name in enumerate(names) if word in name.lower()]
