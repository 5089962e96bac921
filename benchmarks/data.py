"""Images per second of the data path: `python -m benchmarks.data`.

A temporary table of photographs at 256x256 (JPEG of quality 95, chroma at full resolution) is read
in random order from the page cache: rows alone, then with the images decoded by each decoder. A
decoder whose images are not Pillow's gets no figure.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.environment import RESULTS, stamp
from repa_fast.data.crop import encode
from repa_fast.data.dali import GPU_MAX, GPU_MEAN, choose
from repa_fast.data.dataset import LatentDataset, Metadata, Row, write
from repa_fast.data.loader import Loader
from repa_fast.data.order import SampleOrder

RESOLUTION, QUALITY = 256, 95
METADATA = Metadata(
    resolution=RESOLUTION,
    latent_shape=(4, RESOLUTION // 8, RESOLUTION // 8),
    vae="none",
    scale=1.0,
    bias=0.0,
    class_names=("photograph",),
)
READERS = ("rows", "dali-cpu", "torch", "dali-gpu")


def photographs(count: int) -> Iterator[Row]:
    """Random parts of scikit-learn's two photographs, mirrored half of the time, with moments."""
    from sklearn.datasets import load_sample_images

    random = np.random.default_rng(0)
    photos = load_sample_images().images
    for _ in range(count):
        photo = photos[random.integers(len(photos))]
        side = random.integers(RESOLUTION, min(photo.shape[:2]) + 1)
        top, left = (random.integers(extent - side + 1) for extent in photo.shape[:2])
        part = Image.fromarray(photo[top : top + side, left : left + side])
        pixels = np.asarray(part.resize((RESOLUTION, RESOLUTION)))
        pixels = pixels[:, :: random.choice((-1, 1))].copy()
        moments = random.standard_normal(METADATA.moments_shape, np.float32)
        yield {"image": encode(pixels, "jpeg", QUALITY), "moments": moments, "label": 0}


def open_loader(dataset: LatentDataset, reader: str, steps: int, options: argparse.Namespace):
    """A loader whose batches are as `reader` makes them: "rows" reads images and decodes none."""
    return Loader(
        dataset,
        SampleOrder(len(dataset), options.batch, 0),
        start=0,
        stop=steps,
        num_workers=options.threads,
        pin_memory=torch.cuda.is_available(),
        decode=reader,
        device="cuda" if reader == "dali-gpu" else "cpu",
    )


def rate(dataset: LatentDataset, reader: str, options: argparse.Namespace) -> list[float]:
    """Images per second of each round, after an epoch that warms up."""
    order = SampleOrder(len(dataset), options.batch, 0)
    rounds, steps = [], order.steps_per_epoch
    if reader == "rows":
        for epoch in range(1 + options.rounds):
            started = time.perf_counter()
            for step in range(steps):
                dataset.rows(order.rows(epoch * steps + step))
            rounds.append(steps * options.batch / (time.perf_counter() - started))
        return rounds[1:]
    with open_loader(dataset, reader, (1 + options.rounds) * steps, options) as loader:
        started = time.perf_counter()
        for step, _ in enumerate(loader, 1):
            if step % steps == 0:
                now = time.perf_counter()
                rounds.append(steps * options.batch / (now - started))
                started = now
    return rounds[1:]


def why_wrong(dataset: LatentDataset, reader: str, options: argparse.Namespace) -> str:
    """What is wrong with the first images, "" if nothing is."""
    if reader in ("rows", "torch"):
        return ""
    images = []
    for name in (reader, "torch"):
        with open_loader(dataset, name, 1, options) as loader:
            images.append(next(iter(loader))["image"].cpu().double())
    error = (images[0] - images[1]).abs()
    bounds = (GPU_MAX, GPU_MEAN) if reader == "dali-gpu" else (0, 0)
    found = (float(error.max()), float(error.mean()))
    if found[0] > bounds[0] or found[1] > bounds[1]:
        return f"differs from Pillow by {found} (maximum, mean), expected at most {bounds}"
    return ""


def measure(dataset: LatentDataset, reader: str, options: argparse.Namespace) -> dict:
    """A row: the figures of a reader, or why there are none."""
    row = {"reader": reader, "threads": options.threads, "batch": options.batch, **stamp()}
    row |= {"rows": len(dataset), "resolution": RESOLUTION, "jpeg_quality": QUALITY}
    try:
        wrong = why_wrong(dataset, reader, options)
        if wrong:
            return {**row, "status": "failed", "message": wrong}
        rounds = rate(dataset, reader, options)
    except Exception as error:  # DALI's are of any kind
        return {**row, "status": "failed", "message": f"{type(error).__name__}: {error}"}
    low, middle, high = np.percentile(rounds, (20, 50, 80)).round(1).tolist()
    figures = {"images_per_s_p20": low, "images_per_s_p50": middle, "images_per_s_p80": high}
    return {**row, "status": "ok", **figures, "rounds": options.rounds}


def runnable(reader: str) -> bool:
    """Whether this machine has what the reader needs."""
    if reader in ("rows", "torch"):
        return True
    try:
        choose(reader, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    except ValueError as error:
        print(f"{reader}: skipped, {error}", flush=True)
        return False
    return True


def main() -> int:
    """Measure every reader that can run here and append the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reader", nargs="*", choices=READERS, default=list(READERS))
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5, help="epochs that count")
    parser.add_argument("--out", type=Path, help="file to append the rows to")
    options = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "train.lance", photographs(options.rows), METADATA)
        dataset = LatentDataset(Path(folder) / "train.lance")
        for reader in filter(runnable, options.reader):
            row = measure(dataset, reader, options)
            failed |= row["status"] != "ok"
            print(json.dumps(row), flush=True)
            device = row["device"].lower().replace(" ", "-") if torch.cuda.is_available() else "cpu"
            out = options.out or RESULTS / device / f"{row['date']}_data" / "rows.jsonl"
            out.parent.mkdir(parents=True, exist_ok=True)
            with open(out, "a") as rows:
                rows.write(json.dumps(row) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
