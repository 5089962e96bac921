"""A made-up dataset, and a column of features for it that can be computed by killable processes."""

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch

from repa_fast.data import dataset
from repa_fast.data.dataset import LatentDataset
from repa_fast.data.digits import pixel_metadata, pixel_moments
from repa_fast.data.features import FeatureColumn
from repa_fast.data.loader import read_batch
from repa_fast.prepare import features as extract

RESOLUTION, TOKENS, WIDTH, ROWS = 8, 4, 6, 45
METADATA = pixel_metadata(RESOLUTION, ("a", "b"))
WORK = extract.Extraction
FOLDER, CHECKS, KEPT = ".train.features", "train.made_up.json", "fragments"
TAKEN, WRONG = "made_up already", r"made_up of rows 12 to 17 \(part 2\) has checksum"
HOW = {"rank", "world_size", "restart"}
ANOTHER = {"storage": "int8"}, "storage: 'fp16', now 'int8'"


def column(**changes):
    fields = {"name": "made_up", "encoder": "made-up", "storage": "fp16", "precision": "fp32"}
    sizes = {"resolution": RESOLUTION, "tokens": TOKENS, "width": WIDTH}
    return FeatureColumn(**fields | sizes | changes)


def pixels_of(rows):
    shape = (rows, RESOLUTION, RESOLUTION, 3)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def begin(out, rows=ROWS, bad=()):
    """OUT/train.lance in fragments of 6 rows; the images of rows in `bad` are none."""
    pixels = pixels_of(rows)
    whole, dataset.ROWS_PER_FILE = dataset.ROWS_PER_FILE, 6
    images = [b"no image" if i in bad else dataset.encode(pixels[i]) for i in range(rows)]
    made = (
        {"image": image, "moments": moments, "label": i % 2}
        for i, (image, moments) in enumerate(zip(images, pixel_moments(pixels), strict=True))
    )
    dataset.write(out / "train.lance", made, METADATA)
    dataset.ROWS_PER_FILE = whole


def encode(images):
    """Means of patches of 4x4 pixels, per channel, and their negatives, over 100."""
    time.sleep(float(os.environ.get("ENCODE_SECONDS", "0")))
    assert images.shape == (4, 3, RESOLUTION, RESOLUTION) and images.dtype == np.uint8
    means = torch.from_numpy(images).float().unflatten(2, (2, 4)).unflatten(4, (2, 4)).mean((3, 5))
    means = means.flatten(2).transpose(1, 2) / 100  # B, 4, 3
    return torch.cat([means, -means], dim=-1)


def run(out, rows=ROWS, weights="", **changes):
    how = {name: changes.pop(name) for name in HOW & changes.keys()}
    work = extract.Extraction(LatentDataset(out), column(**changes), encode, 4, weights)
    return work.run(workers=2, **how)


def stored(out, name="made_up"):
    table = LatentDataset(out)
    batch = read_batch(table, np.arange(len(table)), images=False, features=[name])
    return table.features[name].unpack(batch)


def content(out):
    """Features of a table, and what is kept of them for `verify`."""
    return stored(out).tolist(), json.loads((out / CHECKS).read_text())


def untouched(out):
    return LatentDataset(out).features == {}


def verify(out, progress=lambda done: None):
    return extract.verify(LatentDataset(out), "made_up", progress)


if __name__ == "__main__":
    run(Path(sys.argv[1]))
