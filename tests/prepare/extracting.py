"""A made-up dataset, and a column of features for it that can be computed by killable processes."""

import os
import sys
import time

import numpy as np
import torch

from repa_fast.data import dataset
from repa_fast.data.dataset import LatentDataset
from repa_fast.data.digits import pixel_metadata, pixel_moments
from repa_fast.data.features import FeatureColumn
from repa_fast.prepare import features as extract

RESOLUTION, TOKENS, WIDTH = 8, 4, 6
METADATA = pixel_metadata(RESOLUTION, ("a", "b"))


def column(**changes):
    fields = {
        "name": "made_up",
        "encoder": "made-up",
        "resolution": RESOLUTION,
        "tokens": TOKENS,
        "width": WIDTH,
        "storage": "fp16",
        "precision": "fp32",
    }
    return FeatureColumn(**fields | changes)


def pixels_of(rows):
    shape = (rows, RESOLUTION, RESOLUTION, 3)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def write(out, rows=45, rows_per_file=6, bad=()):
    """OUT/train.lance in fragments of `rows_per_file`; the images of rows in `bad` are none."""
    pixels = pixels_of(rows)
    whole, dataset.ROWS_PER_FILE = dataset.ROWS_PER_FILE, rows_per_file
    images = [b"no image" if i in bad else dataset.encode(pixels[i]) for i in range(rows)]
    moments = pixel_moments(pixels)
    made = (
        {"image": image, "moments": m, "label": i % 2}
        for i, (image, m) in enumerate(zip(images, moments, strict=True))
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


def run(out, rank=0, world_size=1, **changes):
    table = LatentDataset(out)
    extraction = extract.Extraction(table, column(**changes), encode, 4)
    return extraction.run(rank=rank, world_size=world_size, workers=2)


if __name__ == "__main__":
    from pathlib import Path

    print(run(Path(sys.argv[1]), *map(int, sys.argv[2:])))
