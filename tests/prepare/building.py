"""A made-up source of images, and a build of it that can be run, and killed, as a process."""

import io
import os
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from repa_fast.data.digits import pixel_metadata, pixel_moments
from repa_fast.prepare import build
from repa_fast.prepare.sources import Item

RESOLUTION, CLASSES = 8, 3


class Photographs:
    """`count` noisy images of odd sizes; those in `bad` are no images."""

    class_names = tuple("abc")

    def __init__(self, count, bad=()):
        self.count, self.bad = count, bad

    def __len__(self):
        return self.count

    def read(self, index):
        if index in self.bad:
            return Item(f"image {index}", b"no image", index % CLASSES)
        generator = np.random.default_rng(index)
        height, width = generator.integers(9, 40, size=2)
        pixels = generator.integers(0, 256, size=(height, width, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="PNG")
        return Item(f"image {index}", buffer.getvalue(), index % CLASSES)


def recipe(rows, **changes):
    metadata = pixel_metadata(RESOLUTION, Photographs.class_names)
    settings = {"image": "png", "encoder": "pixels", "batch": 4, "block": 6} | changes
    return build.Recipe(source="photographs", rows=rows, metadata=metadata, **settings)


def encode(pixels):
    time.sleep(float(os.environ.get("ENCODE_SECONDS", "0")))
    assert pixels.shape[1:] == (3, RESOLUTION, RESOLUTION) and pixels.dtype == np.uint8
    return pixel_moments(pixels.transpose(0, 2, 3, 1))


def run(out, rows=45, rank=0, world_size=1, split="train", bad=(), **changes):
    photographs = Photographs(rows, bad)
    building = build.Building(photographs, Path(out), split, recipe(rows, **changes), encode)
    return building.run(rank=rank, world_size=world_size, workers=2)


if __name__ == "__main__":
    out, rank, world_size, rows = sys.argv[1], *map(int, sys.argv[2:])
    print(run(out, rows, rank=rank, world_size=world_size))
