"""How long a run on ImageNet's number of rows waits for its first batch, and the memory it takes.

The rows are tiny, since what grows with their number is the index, not the images. Each start is a
process of its own, which opens the dataset as a run does and takes one shuffled batch.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.harness.environment import ROOT, stamp
from repa_fast.data.dataset import Metadata, Row, encode, write
from repa_fast.data.loader import Loader
from repa_fast.data.open import open_dataset
from repa_fast.data.order import SampleOrder

ROWS, STARTS = 1_281_167, 5
IMAGES, NOISE, CHUNK = 64, 200, 16_384  # different images, bytes per row, rows made at once
METADATA = Metadata(
    resolution=8, latent_shape=(1, 2, 2), vae="none", scale=1.0, bias=0.0, class_names=("noise",)
)


def tiny(count: int) -> Iterator[Row]:
    """Make rows of a few hundred bytes: one of 64 images, moments, and noise after the image's end,
    which decoders do not read and Lance cannot compress."""
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (IMAGES, 8, 8, 3), np.uint8)
    images = [encode(image) for image in pixels]
    for start in range(0, count, CHUNK):
        moments = np.abs(random.standard_normal((CHUNK, *METADATA.moments_shape), np.float32))
        noise = random.bytes(CHUNK * NOISE)
        for some in range(min(CHUNK, count - start)):
            image = images[some % IMAGES] + noise[some * NOISE : (some + 1) * NOISE]
            yield {"image": image, "moments": moments[some], "label": 0}


def start_up(options: argparse.Namespace, folder: Path) -> list[dict]:
    """Return a row: seconds to the first batch and peak memory of each start."""
    started = time.perf_counter()
    write(folder / "train.lance", tiny(ROWS), METADATA, batch_rows=CHUNK)
    built = time.perf_counter() - started
    command = [sys.executable, "-m", "benchmarks.data.startup", str(folder), str(options.batch)]
    starts = []
    for _ in range(STARTS):
        done = subprocess.run(
            [*command, repr(time.time())], cwd=ROOT, capture_output=True, text=True, check=True
        )
        starts.append(json.loads(done.stdout))
    middle = {
        f"{name}_p50": round(float(np.median([start[name] for start in starts])), 3)
        for name in starts[0]
    }
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    row = {"reader": "startup", **stamp(), "rows": ROWS, "batch": options.batch}
    row |= {"row_bytes": size // ROWS, "built_s": round(built, 1)}
    row |= {"load_average_after": round(os.getloadavg()[0], 2)}
    return [{**row, "status": "ok", **middle, "starts": starts}]


def first_batch(folder: str, batch: int, born: float) -> dict[str, float]:
    """Return seconds since `born` (the process's start, on the wall clock) and since the dataset
    was opened, and GiB of memory at the peak."""
    opened = time.perf_counter()
    dataset = open_dataset(folder)
    with Loader(dataset, SampleOrder(len(dataset), batch, 0), start=0, stop=1) as loader:
        images = next(iter(loader))["image"]
        seconds = time.perf_counter() - opened
    assert len(images) == batch
    status = Path("/proc/self/status").read_text()
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])  # ru_maxrss has the parent's in it
    return {
        "since_open_s": round(seconds, 3),
        "since_process_s": round(time.time() - born, 3),
        "peak_gib": round(peak / 2**20, 3),
    }


if __name__ == "__main__":
    print(json.dumps(first_batch(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))))
