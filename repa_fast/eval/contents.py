"""What a dataset holds: splits, rows of each class, latents as the model sees them, a few images.

Its names and texts may be a stranger's: they are shown in one line each, and cut off.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from repa_fast.data.dataset import Metadata
from repa_fast.data.latents import can_decode
from repa_fast.data.open import Dataset, open_dataset
from repa_fast.data.store import NoTable
from repa_fast.eval.pictures import arrange, save_png
from repa_fast.words import one_line

CLASSES_SHOWN, CHANNELS_SHOWN, LETTERS_SHOWN = 20, 32, 60
MOST_ROWS = 2_000
"""Whose latents are read; a batch of BATCH_ROWS at a time."""
BATCH_ROWS = 64
SHEET_ROWS, SHEET_COLUMNS = 25, 5
SMALLEST, LARGEST = 128, 256
"""Pixels of a side on the sheet: titles need some, and images may be of any size."""


def open_splits(path: str) -> list[Dataset]:
    """Open the tables train and val of a folder, those that there are, or the one dataset it is.

    Raises:
        ValueError: there is none, or one does not hold together.
    """
    found: dict[str, Dataset] = {}
    missing = None
    for split in ("train", "val"):
        try:
            dataset = open_dataset(path, split)
            found.setdefault(dataset.uri, dataset)
        except NoTable as error:
            missing = missing or error
    if missing and not found:
        raise missing
    return list(found.values())


def describe(dataset: Dataset, labels: np.ndarray) -> list[str]:
    """Return lines for people about a dataset, whose labels are int64 (N)."""
    meta = dataset.metadata
    lines = [
        f"{dataset.uri}: dataset of {len(dataset)} rows, images of {meta.resolution} pixels, "
        f"latents {meta.latent_shape} of {_vae(meta)} (scale {meta.scale}, bias {meta.bias}), "
        f"{len(meta.class_names)} classes",
        describe_classes(labels, meta.class_names),
        describe_latents(dataset),
    ]
    lines += [
        f"features {_cut(column.name)}: {column.tokens} tokens of width {column.width} by "
        f"{_cut(column.encoder)}, {column.storage}, {column.bytes_per_image / 1000:.1f} kB per "
        "image"
        for column in dataset.features.values()
    ]
    return [one_line(line) for line in lines]


def describe_classes(labels: np.ndarray, names: Sequence[str]) -> str:
    """Return a line with the rows of each class, or of many classes the range of them."""
    known = _known(labels, names)
    counts = np.bincount(labels[known], minlength=len(names))
    there = np.flatnonzero(counts)
    if len(names) <= CLASSES_SHOWN:
        each = (f"{_name(names, label)}: {count}" for label, count in enumerate(counts))
        text = f"rows of each class: {'; '.join(each)}"
    elif len(there):
        ends = there[[counts[there].argmin(), counts[there].argmax()]]
        least, most = (f"{counts[label]} ({_name(names, label)})" for label in ends)
        median = f"median {np.median(counts[there]):g}"
        empty = f"{len(names) - len(there)} of {len(names)} classes have no row"
        text = f"rows of a class: {least} to {most}, {median}; {empty}"
    else:
        text = f"rows of a class: none of {len(names)} classes has any"
    other = len(labels) - len(known)
    return text + (f"; {other} rows have a label of no class" if other else "")


def describe_latents(dataset: Dataset) -> str:
    """Return a line with mean and standard deviation of latents, by channel."""
    mean, deviation, bad = latent_statistics(dataset)
    rows = min(len(dataset), MOST_ROWS) - len(bad)
    text = f"latents as the model sees them, over {rows} of {len(dataset)} rows"
    if rows:
        text += f": mean {_listed(mean)}; standard deviation {_listed(deviation)}"
    return text + (f"; {len(bad)} more are bad, the first: {bad[0]}" if bad else "")


def latent_statistics(dataset: Dataset) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Return mean and standard deviation of the model's latents, and what is wrong with bad rows.

    They are of the distribution `mean + std * noise`, scaled, over at most MOST_ROWS rows, evenly
    chosen: fp64 (C), not a number where no row is good.

    Raises:
        StoreError: an object store failed.
    """
    meta, count = dataset.metadata, min(len(dataset), MOST_ROWS)
    chosen = np.arange(count) * len(dataset) // count
    sums, bad = np.zeros((3, meta.latent_shape[0])), []
    for start in range(0, count, BATCH_ROWS):
        for fetched in dataset.fetch(chosen[start : start + BATCH_ROWS], images=False):
            try:
                moments = dataset.decode(fetched)["moments"]
            except ValueError as error:
                bad.append(one_line(error))
                continue
            mean, std = moments.astype(np.float64).reshape(2, meta.latent_shape[0], -1)
            sums += (mean.mean(1), np.square(mean).mean(1), np.square(std).mean(1))
    with np.errstate(invalid="ignore"):
        mean, square, variance = sums / (count - len(bad))
    deviation = np.sqrt((square - mean**2).clip(min=0) + variance)
    return mean * meta.scale + meta.bias, deviation * abs(meta.scale), bad


def write_sheet(dataset: Dataset, labels: np.ndarray, out: Path) -> str:
    """Write a PNG of SHEET_ROWS rows under the names of their classes; return a line about it.

    Raises:
        ValueError: there are no images, or none of the chosen ones can be decoded.
        StoreError: an object store failed.
    """
    names, pictures, titles, bad = dataset.metadata.class_names, [], [], []
    known = _known(labels, names)
    rows = known[spread(labels[known], SHEET_ROWS)]
    for fetched in dataset.fetch(rows):
        try:
            sample = dataset.decode(fetched)
        except ValueError as error:
            bad.append(one_line(error))
            continue
        pictures.append(_thumbnail(sample["image"]))
        titles.append(_name(names, sample["label"]))
    if not pictures:
        why = bad[0] if bad else "no row has a label of a class"
        raise ValueError(f"{dataset.uri} has no image for the sheet: {why}")
    images = torch.from_numpy(np.stack(pictures))
    save_png(arrange(images, SHEET_COLUMNS, titles, SMALLEST), out)
    lacking = f"; {len(bad)} rows are bad, the first: {bad[0]}" if bad else ""
    return f"{len(pictures)} rows of {dataset.uri}: {out}{lacking}"


def spread(labels: np.ndarray, count: int) -> np.ndarray:
    """Return indices of at most `count` labels, ordered by label: of every class as many, if it
    has them, or one each of classes that are evenly chosen."""
    order = np.argsort(labels, kind="stable")
    ordered = labels[order]
    turn = np.arange(len(order)) - np.searchsorted(ordered, ordered)  # of its class, from 0
    firsts = order[turn == 0]
    if len(firsts) > count:
        return firsts[np.arange(count) * len(firsts) // count]
    return order[np.sort(np.argsort(turn, kind="stable")[:count])]


def _known(labels: np.ndarray, names: Sequence[str]) -> np.ndarray:
    return np.flatnonzero((labels >= 0) & (labels < len(names)))


def _thumbnail(pixels: np.ndarray) -> np.ndarray:
    """Return an image (3, R, R) with sides of at most LARGEST."""
    if pixels.shape[-1] <= LARGEST:
        return pixels
    from PIL import Image

    image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    return np.asarray(image.resize((LARGEST, LARGEST), reducing_gap=2.0)).transpose(2, 0, 1)


def _name(names: Sequence[str], label: int) -> str:
    return _cut(names[label].strip() or label)


def _vae(meta: Metadata) -> str:
    return "pixels" if can_decode(meta) else _cut(meta.vae)


def _cut(text: object) -> str:
    return one_line(text)[:LETTERS_SHOWN]


def _listed(values: np.ndarray) -> str:
    more = ", ..." if len(values) > CHANNELS_SHOWN else ""
    return ", ".join(f"{value:.3g}" for value in values[:CHANNELS_SHOWN]) + more
