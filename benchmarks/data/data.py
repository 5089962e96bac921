"""Images per second of the data path: `python -m benchmarks.data.data`.

A temporary table of photographs at 256x256 (JPEG, chroma at full resolution) and files with the
same content are read in random order, readers taking turns round by round, so that other work on
the machine hits all alike. A reader whose images are wrong gets no figure.

    rows, rows-cold       the table alone, from the page cache and after it was dropped
    torch, dali-*         batches of images and moments by our Loader, decoded by each decoder
    official              REPA's way: a DataLoader over a PNG and a .npy file per sample
    dali-cpu-224          ours up to a ViT's input: DINOv2's preprocessing of the Loader's batches
    pillow-224-threads,   its rival: Pillow and torchvision's transforms, image by image, files
    pillow-224-processes  of images alone
    dali-224              a DALI pipeline from files to a ViT's input

`--startup` measures the first batch of a table of 1.28 M rows instead.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.data import readers
from benchmarks.data.report import markdown
from benchmarks.data.startup import start_up
from benchmarks.harness.environment import parser, results_folder, stamp
from benchmarks.harness.rows import append, read
from benchmarks.harness.timing import spread
from repa_fast.data.dali import GPU_MAX, GPU_MEAN, choose
from repa_fast.data.dataset import LatentDataset, Metadata, Row, encode, write

RESOLUTION = 256
PLAIN = {"vae": "none", "scale": 1.0, "bias": 0.0, "class_names": ("photograph",)}
METADATA = Metadata(resolution=RESOLUTION, latent_shape=(4, 32, 32), **PLAIN)
BOUNDS = dict.fromkeys(("dali-cpu", "official", "dali-cpu-224"), (0, 0))
BOUNDS |= {"dali-gpu": (GPU_MAX, GPU_MEAN), "dali-224": (np.inf, 0.01)}
"""Reader -> bounds on the maximum and mean difference from Pillow's images, in levels of 256, or,
resized, in standard deviations. DALI resizes with a filter table of its own: 0.0025 on average
here; a shift by a tenth of a pixel makes 0.017, bilinear 0.027, no antialiasing 0.023."""

READERS: dict[str, Callable[[readers.Source], readers.Reader]] = {
    "rows": readers.table_rows,
    "rows-cold": partial(readers.table_rows, cold=True),
    "dali-cpu": partial(readers.ours, decode="dali-cpu"),
    "torch": partial(readers.ours, decode="torch"),
    "dali-gpu": partial(readers.ours, decode="dali-gpu"),
    "official": lambda s: readers.in_processes(s, readers.OfficialFiles(s.folder)),
    "dali-cpu-224": lambda s: readers.ours(s, "dali-cpu", readers.encoder_input()),
    "pillow-224-threads": lambda s: readers.in_threads(s, readers.JpegFiles(s.folder)),
    "pillow-224-processes": lambda s: readers.in_processes(s, readers.JpegFiles(s.folder)),
    "dali-224": readers.dali_whole,
}


def photographs(count: int, quality: int) -> Iterator[Row]:
    """Cut random parts of scikit-learn's two photographs, half of them mirrored, with moments."""
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
        moments = np.abs(random.standard_normal(METADATA.moments_shape, np.float32))
        yield {"image": encode(pixels, "jpeg", quality), "moments": moments, "label": 0}


def row_bytes(dataset: LatentDataset) -> int:
    """Return the mean bytes of a row: its image, its moments in fp32, its label."""
    images = dataset.rows(np.arange(len(dataset)))["image"]
    moments = 4 * int(np.prod(dataset.metadata.moments_shape))
    return round(sum(map(len, images)) / len(images)) + moments + 8


def rate(epoch: readers.Epoch) -> float:
    """Return the images per second of an epoch."""
    with epoch() as batches:
        started = time.perf_counter()
        images = sum(len(batch) for batch in batches)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return images / (time.perf_counter() - started)


def first_images(reader: readers.Reader) -> torch.Tensor:
    """Return the first batch of an epoch, which is the order's or the folder's second one."""
    with reader as epoch, epoch() as batches:
        return next(batches).cpu().float()


def compared(source: readers.Source, reader: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return some images of a reader, and what they have to be, both float32."""
    if reader == "official":
        items = readers.OfficialFiles(source.folder)
        rows = source.dataset.fetch(np.arange(source.batch))
        got = [items[index][0] for index in range(source.batch)]
        expected = [torch.tensor(source.dataset.decode(row)["image"]) for row in rows]
        return torch.stack(got).float(), torch.stack(expected).float()
    if reader == "dali-224":
        items = readers.JpegFiles(source.folder)
        second = np.arange(source.batch, 2 * source.batch) % len(items)
        expected = [items[index] for index in second.tolist()]
        return first_images(readers.dali_whole(source, shuffle=False)), torch.stack(expected)
    pixels = first_images(READERS["torch"](source))
    if reader == "dali-cpu-224":
        pixels = readers.encoder_input()(pixels.to(torch.uint8))
    return first_images(READERS[reader](source)), pixels


def why_wrong(source: readers.Source, reader: str) -> str:
    """Return what is wrong with a reader's images, or ""."""
    if reader not in BOUNDS:
        return ""
    got, expected = compared(source, reader)
    error = (got - expected).abs()
    found = (float(error.max()), float(error.mean()))
    if any(one > bound for one, bound in zip(found, BOUNDS[reader])):
        return f"differs from Pillow by {found} (maximum, mean), expected at most {BOUNDS[reader]}"
    return ""


def why_not(reader: str) -> str:
    """Return what this machine lacks for a reader, or ""."""
    if reader.startswith("pillow") and find_spec("torchvision") is None:
        return "torchvision is not installed"
    if reader.startswith("dali"):
        decode = "dali-gpu" if reader == "dali-gpu" else "dali-cpu"
        try:
            choose(decode, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        except ValueError as error:
            return str(error)
    return ""


def measure(source: readers.Source, names: list[str], rounds: int) -> dict[str, dict]:
    """Return reader -> figures of `rounds` epochs after a warm-up, or why there are none."""
    found: dict[str, dict] = {}
    with ExitStack() as stack:
        epochs, rates = {}, {}
        for name in names:
            with failing(found, name):
                if wrong := why_wrong(source, name):
                    found[name] = {"status": "failed", "message": wrong}
                    continue
                epochs[name] = stack.enter_context(READERS[name](source))
        for _ in range(1 + rounds):
            for name, epoch in epochs.items():
                if name not in found:
                    with failing(found, name):
                        rates.setdefault(name, []).append(rate(epoch))
    for name in rates.keys() - found.keys():
        counted = [round(figure, 1) for figure in rates[name][1:]]
        found[name] = {"status": "ok", **spread("images_per_s", counted), "images_per_s": counted}
    return {name: found[name] for name in names}


@contextmanager
def failing(found: dict[str, dict], name: str) -> Iterator[None]:
    """Turn an error into the reader's row."""
    try:
        yield
    except Exception as error:  # DALI's are of any kind
        found[name] = {"status": "failed", "message": f"{type(error).__name__}: {error}"}


def compare(options: argparse.Namespace, folder: Path) -> list[dict]:
    """Return rows of the readers that can run here."""
    lacking = {name: why_not(name) for name in options.reader}
    for name, reason in lacking.items():
        if reason:
            print(f"{name}: skipped, {reason}", flush=True)
    names = [name for name, reason in lacking.items() if not reason]
    torch.set_num_threads(options.threads)
    rows = readers.also_files(photographs(options.rows, options.quality), folder)
    write(folder / "train.lance", rows, METADATA)
    dataset = LatentDataset(folder / "train.lance")
    source = readers.Source(folder, dataset, options.batch, options.threads)
    shape = {"threads": options.threads, "batch": options.batch, "rows": len(dataset)}
    shape |= {"row_bytes": row_bytes(dataset), "resolution": RESOLUTION}
    shape |= {"jpeg_quality": options.quality, "rounds": options.rounds}
    load = {"load_average_before": round(os.getloadavg()[0], 2)}
    figures = measure(source, names, options.rounds)
    load |= {"load_average_after": round(os.getloadavg()[0], 2)}
    return [{"reader": name, **stamp(), **shape, **load, **figures[name]} for name in names]


def main() -> int:
    """Measure every reader that can run here, append the rows and write their report."""
    flags = parser(__doc__.splitlines()[0], "file to append the rows to", device=False)
    flags.add_argument("--reader", nargs="*", choices=READERS, default=list(READERS))
    flags.add_argument("--rows", type=int, default=2048)
    flags.add_argument("--quality", type=int, default=75, help="of the JPEG files, 1 to 100")
    flags.add_argument("--batch", type=int, default=256)
    flags.add_argument("--threads", type=int, default=2)
    flags.add_argument("--rounds", type=int, default=5, help="epochs that count")
    flags.add_argument("--startup", action="store_true", help="time to the first batch instead")
    options = flags.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = start_up if options.startup else compare
        rows = work(options, Path(name))
    where = "cuda" if torch.cuda.is_available() else "cpu"
    out = options.out or results_folder("data", where) / "rows.jsonl"
    append(out, *rows)
    print(*map(json.dumps, rows), sep="\n", flush=True)
    out.with_name("report.md").write_text(markdown(read(out)))
    return int(any(row["status"] != "ok" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
