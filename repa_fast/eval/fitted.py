"""A small classifier that is fitted on a dataset's own rows, for features without any download.

It sees images of 32 x 32 pixels: larger ones are averaged over areas, smaller ones interpolated.
Its features are a property of the dataset's rows and the seed: distances in them compare models of
one dataset with each other, and neither datasets nor published figures.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from repa_fast.data.loader import read_batch
from repa_fast.data.open import Dataset, open_dataset
from repa_fast.data.store import is_url
from repa_fast.distributed import World
from repa_fast.eval.inception import Features, exact_fp32

WIDTH = 32
SIDE = 32
ROWS = 10_000
"""At most, to fit on and to hold out: more take longer to read than they are worth."""
STEPS, BATCH, LEARNING_RATE = 300, 48, 4e-3
"""Of AdamW; a step for ten rows where that is more."""
SHIFT = 3
"""Pixels of SIDE that images are moved by, at most, while it is fitted."""
LIGHT = 0.2
"""Of the range of pixels, by which contrast and brightness change, at most."""
PART = 5
"""One of so many rows is held out where there is no val split."""
READ_AT_ONCE = 256


class HeldOut(NamedTuple):
    """How many of `rows` real rows that it was not fitted on a classifier is right about.

    `accuracy` is None where there are none.
    """

    accuracy: float | None
    rows: int
    fitted_rows: int

    def __str__(self) -> str:
        found = "none" if self.accuracy is None else f"{100 * self.accuracy:.1f} % of {self.rows}"
        return f"classifier on held-out real rows: {found} (fitted on {self.fitted_rows})"


class Classifier(nn.Module):
    """Four convolutions, their mean over places as features, and a linear head."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.blocks = nn.Sequential(
            *_block(3, 16, stride=2),
            *_block(16, 24),
            nn.MaxPool2d(2),
            *_block(24, 48),
            nn.MaxPool2d(2),
            *_block(48, 96),
            nn.Conv2d(96, WIDTH, 1),
        )
        self.head = nn.Linear(WIDTH, classes)

    def pool(self, images: torch.Tensor) -> torch.Tensor:
        """Map what `at_side` gives (B, 3, 32, 32) to features (B, 32)."""
        return self.blocks(images).mean((2, 3))

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> Features:
        """Return features (B, 32) and logits (B, classes), fp32, of uint8 images (B, 3, H, W)."""
        with exact_fp32(images.device):
            pool = self.pool(at_side(images))
            return Features(pool, logits=self.head(pool))


def _block(before: int, after: int, stride: int = 1) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(before, after, 3, stride=stride, padding=1)
    return convolution, nn.GroupNorm(4, after), nn.ReLU()


def at_side(images: torch.Tensor) -> torch.Tensor:
    """Return uint8 images (B, 3, H, W) as fp32 (B, 3, 32, 32) in [-1, 1]."""
    mode = "area" if min(images.shape[-2:]) >= SIDE else "bilinear"
    return F.interpolate(images.float(), (SIDE, SIDE), mode=mode) / 127.5 - 1


def fit(dataset: Dataset, seed: int, world: World) -> tuple[Classifier, HeldOut]:
    """Fit a classifier on the first process and hand it to the others; every one calls it.

    It is a function of the seed and the rows, at most `ROWS` of them, drawn by the seed. Held out
    are the rows of the val split beside train, else a fifth of each class.

    Raises:
        ValueError: there are rows of one class only, or a row is bad.
    """
    state, held_out = world.on_first(lambda: _fit(dataset, seed, world.device))
    classifier = _build(dataset, seed)
    classifier.load_state_dict(state)
    return classifier.to(world.device).eval().requires_grad_(False), held_out


def _build(dataset: Dataset, seed: int) -> Classifier:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch's own would seed the GPUs too
        return Classifier(len(dataset.metadata.class_names))


def _fit(dataset: Dataset, seed: int, device: torch.device) -> tuple[dict, HeldOut]:
    rng = np.random.default_rng(seed)
    images, labels = _read(dataset, rng)
    if len(labels.unique()) < 2:
        raise ValueError(
            f"{dataset.uri} has rows of one class only, expected at least 2 to fit a classifier "
            "on: take other --features, inception or an encoder's name"
        )
    if (val := _val_split(dataset)) is not None:
        if val.metadata.class_names != dataset.metadata.class_names:
            raise ValueError(f"{val.uri} has other classes than {dataset.uri}, expected the same")
        held = _read(val, rng)
    else:
        chosen = held_out_rows(labels.numpy(), rng)
        held = images[chosen], labels[chosen]
        images, labels = images[~chosen], labels[~chosen]
    classifier = _build(dataset, seed).to(device)
    with exact_fp32(device), _deterministic(), torch.enable_grad():
        train(classifier, images.to(device), labels.to(device), seed)
    with exact_fp32(device), torch.no_grad():
        parts = (part.to(device) for part in held[0].split(READ_AT_ONCE))
        found = [classifier.head(classifier.pool(part)).argmax(1).cpu() for part in parts]
    right = (torch.cat(found) == held[1]).double().mean().item() if len(held[1]) else None
    state = {name: tensor.cpu() for name, tensor in classifier.state_dict().items()}
    return state, HeldOut(right, len(held[1]), len(labels))


def train(classifier: Classifier, images: torch.Tensor, labels: torch.Tensor, seed: int) -> None:
    """Fit a classifier on what `at_side` gives (N, 3, 32, 32) and labels, int64 (N)."""
    generator, steps = torch.Generator().manual_seed(seed), max(STEPS, len(images) // 10)
    optimizer = torch.optim.AdamW(classifier.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps)
    for _ in range(steps):
        chosen = torch.randint(len(images), (BATCH,), generator=generator).to(labels.device)
        seen = changed(images[chosen], generator)
        logits = classifier.head(classifier.pool(seen))
        loss = F.cross_entropy(logits, labels[chosen], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def changed(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return images (B, 3, S, S) each moved a little, and of other brightness and contrast.

    None is mirrored: a letter would be another one, or none.
    """
    count, side = len(images), images.shape[-1]
    moved = torch.randint(2 * SHIFT + 1, (2, count, 1), generator=generator)
    rows, columns = (moved + torch.arange(side)).to(images.device)
    light = LIGHT * (2 * torch.rand((2, count, 1, 1, 1), generator=generator) - 1)
    contrast, brightness = light.to(images.device)
    wide = F.pad(images, (SHIFT,) * 4, mode="replicate")
    each = torch.arange(count, device=images.device)[:, None, None]
    cut = wide[each, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    return cut * (1 + contrast) + brightness


def held_out_rows(labels: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
    """Return which of the rows with these labels (N) are held out, bool (N): a fifth of each class.

    A class of two rows or more has at least one on either side, another's only row is fitted on.
    """
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        held[rows[: min(max(1, round(len(rows) / PART)), len(rows) - 1)]] = True
    return held


def _read(dataset: Dataset, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images as `at_side` gives them, and labels, int64 (N), of at most ROWS rows."""
    rows = np.sort(rng.permutation(len(dataset))[:ROWS])
    images, labels = [], []
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(rows), READ_AT_ONCE):
            batch = read_batch(dataset, rows[start : start + READ_AT_ONCE], pool=pool)
            images.append(at_side(batch["image"]))
            labels.append(batch["label"])
    return torch.cat(images), torch.cat(labels)


def _val_split(dataset: Dataset) -> Dataset | None:
    """Open val.lance beside a train.lance; None where there is none."""
    folder, _, name = dataset.uri.rpartition("/")
    path = f"{folder}/val.lance"
    if name != "train.lance" or not (is_url(path) or Path(path).exists()):
        return None
    with suppress(ValueError if is_url(path) else ()):
        return open_dataset(path)
    return None


@contextmanager
def _deterministic() -> Iterator[None]:
    """Let cuDNN take convolutions without atomics; restores what was set."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before
