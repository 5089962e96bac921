"""The readers that benchmarks/data/data.py compares, ours and what people do elsewhere.

Opening a reader starts what lasts from epoch to epoch (worker processes, threads) and gives a
function that opens an epoch: the batches of one, in random order, none of them begun. So rounds of
several readers can be interleaved, and nobody works ahead while another is timed. Nothing here
forks, since Lance is loaded.
"""

import ctypes
import itertools
import json
import mmap
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, default_collate
from torch.utils.data import Dataset as TorchDataset

from repa_fast import encoders
from repa_fast.data.dali import Decode
from repa_fast.data.dataset import LatentDataset, Row
from repa_fast.data.loader import Loader
from repa_fast.data.order import SampleOrder
from repa_fast.encoders.vit import IMAGENET_MEAN, IMAGENET_STD

INPUT_SIZE = 224

Epoch = Callable[[], AbstractContextManager[Iterator[torch.Tensor | list[bytes]]]]
Reader = AbstractContextManager[Epoch]


@dataclass(frozen=True)
class Source:
    """Where the readers read, and how."""

    folder: Path  # train.lance; jpeg/ with its image files; images/ and vae-sd/ as REPA has them
    dataset: LatentDataset  # the table
    batch: int  # images per batch
    threads: int  # threads or processes that decode

    @property
    def steps(self) -> int:
        """Batches of an epoch."""
        return len(self.dataset) // self.batch


def also_files(rows: Iterator[Row], folder: Path) -> Iterator[Row]:
    """Write each row also as a JPEG file, and as REPA's PNG (uncompressed) and .npy."""
    labels = []
    for index, row in enumerate(rows):
        jpeg = folder / "jpeg" / "photograph" / f"{index:08d}.jpg"
        png = folder / "images" / f"{index // 1000:05d}" / f"img{index:08d}.png"
        moments = folder / "vae-sd" / f"{index // 1000:05d}" / f"img-mean-std-{index:08d}.npy"
        for path in (jpeg, png, moments):
            path.parent.mkdir(parents=True, exist_ok=True)
        jpeg.write_bytes(row["image"])
        Image.open(jpeg).save(png, compress_level=0)
        np.save(moments, row["moments"])
        labels.append([f"{moments.parent.name}/{moments.name}", row["label"]])
        yield row
    (folder / "vae-sd" / "dataset.json").write_text(json.dumps({"labels": labels}))


def table_rows(source: Source, cold: bool = False) -> Reader:
    """Read the table alone: images as bytes, moments, labels; `cold` drops its pages first."""
    order = SampleOrder(len(source.dataset), source.batch, 0)
    epochs = itertools.count()

    @contextmanager
    def epoch() -> Iterator[Iterator[list[bytes]]]:
        if cold:
            drop_pages(source.folder / "train.lance")
        first = next(epochs) * source.steps
        steps = range(first, first + source.steps)
        yield (source.dataset.rows(order.rows(step))["image"] for step in steps)

    return nullcontext(epoch)


def drop_pages(table: Path) -> None:
    """Drop a table from the page cache; raise RuntimeError if 1 % stays, as on a tmpfs."""
    files = [path for path in table.rglob("*") if path.is_file()]
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    resident, pages = map(sum, zip(*map(resident_pages, files)))
    if resident > 0.01 * pages:
        raise RuntimeError(f"{resident} of {pages} pages of {table} are still in memory")


def resident_pages(path: Path) -> tuple[int, int]:
    """Return how many of a file's pages are in the page cache, and how many it has: mincore(2)."""
    size = path.stat().st_size
    if not size:
        return 0, 0
    flags = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    with open(path, "rb") as file, mmap.mmap(file.fileno(), size, mmap.MAP_PRIVATE) as mapped:
        start = ctypes.c_char.from_buffer(mapped)
        libc = ctypes.CDLL(None, use_errno=True)
        length = ctypes.c_size_t(size)
        failed = libc.mincore(ctypes.c_void_p(ctypes.addressof(start)), length, flags)
        del start  # a mapping that is pointed at cannot be closed
    if failed:
        raise OSError(ctypes.get_errno(), f"mincore of {path}")
    return sum(flag & 1 for flag in flags), len(flags)


def ours(
    source: Source, decode: Decode, prepare: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> Reader:
    """Read batches of the Loader; `prepare` works on the images in the thread that takes them."""

    @contextmanager
    def epoch() -> Iterator[Iterator[torch.Tensor]]:
        with Loader(
            source.dataset,
            SampleOrder(len(source.dataset), source.batch, 0),
            start=0,
            stop=source.steps + 1,
            num_workers=source.threads,
            pin_memory=torch.cuda.is_available(),
            decode=decode,
            device="cuda" if decode == "dali-gpu" else "cpu",
        ) as loader:
            taken = iter(loader)
            next(taken)  # by now DALI's pipeline is built, and the next batch is only begun
            images = (batch["image"] for batch in taken)
            yield map(prepare, images) if prepare else images

    return nullcontext(epoch)


def encoder_input() -> Callable[[torch.Tensor], torch.Tensor]:
    """Return what DINOv2 does before its ViT: uint8 (B, 3, R, R) -> float32 (B, 3, 224, 224)."""
    encoder = encoders.spec("dinov2-vit-s").build(INPUT_SIZE, pretrained=False)
    encoder.vit = vit = torch.nn.Identity()  # the tokens are its input
    vit.num_prefix_tokens, vit.forward_features = 0, vit.forward
    return torch.no_grad()(encoder.forward)


class JpegFiles(TorchDataset):
    """Decoded by Pillow, resized and normalised by torchvision, image by image."""

    def __init__(self, folder: Path) -> None:
        from torchvision import transforms

        self.files = sorted(folder.rglob("*.jpg"))
        bicubic, side = transforms.InterpolationMode.BICUBIC, (INPUT_SIZE, INPUT_SIZE)
        parts = transforms.Resize(side, bicubic), transforms.ToTensor()
        normalise = transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)
        self.transform = transforms.Compose([*parts, normalise])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> torch.Tensor:
        with Image.open(self.files[index]) as image:
            return self.transform(image.convert("RGB"))


class OfficialFiles(TorchDataset):
    """REPA's way: a PNG and a .npy file per sample, opened one by one; image, moments, label."""

    def __init__(self, folder: Path) -> None:
        self.images = sorted((folder / "images").rglob("*.png"))
        self.moments = sorted((folder / "vae-sd").rglob("*.npy"))
        listing = json.loads((folder / "vae-sd" / "dataset.json").read_text())
        labels = dict(listing["labels"])
        self.labels = [labels[f"{path.parent.name}/{path.name}"] for path in self.moments]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        with Image.open(self.images[index]) as image:
            pixels = np.array(image).transpose(2, 0, 1)
        moments = np.load(self.moments[index])
        return torch.from_numpy(pixels), torch.from_numpy(moments), torch.tensor(self.labels[index])


def in_processes(source: Source, items: TorchDataset) -> Reader:
    """Read by torch's DataLoader with `threads` worker processes, which last; default collate."""
    options = {"num_workers": source.threads, "persistent_workers": True}
    options["multiprocessing_context"] = "spawn"
    loader = DataLoader(items, source.batch, shuffle=True, drop_last=True, **options)

    @contextmanager
    def epoch() -> Iterator[Iterator[torch.Tensor]]:
        def batches() -> Iterator[torch.Tensor]:
            for batch in loader:  # whose workers begin with the first batch that is asked for
                yield batch[0] if isinstance(batch, list) else batch

        yield batches()

    return nullcontext(epoch)


@contextmanager
def in_threads(source: Source, items: TorchDataset) -> Iterator[Epoch]:
    """Read items in `threads` threads, which work one batch ahead of the thread that collates."""

    @contextmanager
    def epoch() -> Iterator[Iterator[torch.Tensor]]:
        indices = np.random.permutation(len(items))[: source.steps * source.batch]
        yield collated(indices.reshape(source.steps, source.batch).tolist())

    def collated(parts: list[list[int]]) -> Iterator[torch.Tensor]:
        following = pool.map(items.__getitem__, parts[0])
        for part in [*parts[1:], []]:
            current, following = following, pool.map(items.__getitem__, part)
            yield default_collate(list(current))

    # one each: torch's own threads would stand in the way of the pool's
    one = {"initializer": torch.set_num_threads, "initargs": (1,)}
    with ThreadPoolExecutor(source.threads, **one) as pool:
        yield epoch


def dali_whole(source: Source, shuffle: bool = True) -> Reader:
    """Read by a DALI pipeline on the CPU that reads JPEG files, decodes, resizes, normalises."""
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.plugin.pytorch import feed_ndarray

    @pipeline_def(batch_size=source.batch, num_threads=source.threads, device_id=None)
    def pipeline():
        encoded, _ = fn.readers.file(file_root=str(source.folder / "jpeg"), random_shuffle=shuffle)
        pixels = fn.decoders.image(encoded, device="cpu", output_type=types.RGB)
        pixels = fn.resize(pixels, size=(INPUT_SIZE, INPUT_SIZE), interp_type=types.INTERP_CUBIC)
        return fn.crop_mirror_normalize(
            pixels,
            dtype=types.FLOAT,
            output_layout="CHW",
            mean=[255 * value for value in IMAGENET_MEAN],
            std=[255 * value for value in IMAGENET_STD],
        )

    def taken(built) -> torch.Tensor:
        dense = built.run()[0].as_tensor()
        return feed_ndarray(dense, torch.empty(dense.shape()))

    @contextmanager
    def epoch() -> Iterator[Iterator[torch.Tensor]]:
        built = pipeline()
        built.build()
        taken(built)  # it works ahead, so the next batch is begun
        yield (taken(built) for _ in range(source.steps))
        del built

    return nullcontext(epoch)
