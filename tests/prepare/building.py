"""A made-up source of images, and a build of it that can be run, and killed, as a process."""

import os
import sys
import time
from pathlib import Path

import numpy as np

from repa_fast.data.dataset import LatentDataset
from repa_fast.data.digits import pixel_metadata, pixel_moments
from repa_fast.prepare import build
from repa_fast.prepare.sources import Item
from tests.data.encoding import encode as saved
from tests.prepare.writing import rgb

RESOLUTION, CLASSES, ROWS = 8, 3, 45
WORK = build.Building
FOLDER, CHECKS, KEPT = ".train.building", "train.blocks.json", "of 8 blocks"
TAKEN, WRONG = "exists already", r"rows 12 to 17 \(block 2\)"
HOW = {"rank", "world_size", "restart"}
ANOTHER = {"quality": 90}, "quality: 95, now 90"


class Photographs:
    """`count` noisy images of odd sizes; those in `bad` are no images."""

    class_names = tuple("abc")

    def __init__(self, count, bad=()):
        self.count, self.bad = count, bad

    def __len__(self):
        return self.count

    def read(self, index):
        size = np.random.default_rng(index).integers(9, 40, size=2)
        data = b"no image" if index in self.bad else saved(rgb(*size, seed=index))
        return Item(f"image {index}", data, index % CLASSES)

    def identity(self):
        return {"names": "images", "labels": str(CLASSES)}


def encode(pixels):
    time.sleep(float(os.environ.get("ENCODE_SECONDS", "0")))
    assert pixels.shape[1:] == (3, RESOLUTION, RESOLUTION) and pixels.dtype == np.uint8
    return pixel_moments(pixels.transpose(0, 2, 3, 1))


def begin(out, rows=ROWS, bad=()):
    """There is nothing before the work."""


def run(out, rows=ROWS, split="train", bad=(), progress=None, **changes):
    how = {name: changes.pop(name) for name in HOW & changes.keys()}
    settings = {"image": "png", "encoder": "pixels", "batch": 4, "block": 6} | changes
    metadata = pixel_metadata(RESOLUTION, Photographs.class_names)
    recipe = build.Recipe(source="photographs", rows=rows, metadata=metadata, **settings)
    building = build.Building(Photographs(rows, bad), Path(out), split, recipe, encode)
    options = {"progress": progress} if progress else {}
    return building.run(workers=2, **how, **options)


def content(out, split="train"):
    """Images, moments and labels of a table."""
    table = LatentDataset(out, split)
    rows = table.rows(np.arange(len(table)))
    return rows["image"], rows["moments"].tobytes(), rows["label"].tolist()


def untouched(out):
    return not (out / "train.lance" / "_versions").exists()


def verify(out, progress=lambda done: None):
    return build.verify(out, "train", progress)


if __name__ == "__main__":
    run(sys.argv[1], int(sys.argv[2]))
