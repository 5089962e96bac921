"""Many images of a checkpoint to one .npz: `torchrun -m repa_fast.eval.generate --ckpt FILE ...`.

The unit of work is a block of consecutive image numbers, as many as a batch, the last one padded.
A process takes every WORLD_SIZE-th block and writes its images to a file and then a record with the
file's CRC-32; a block without a record is computed again. When every block has one, the first
process joins them, computes again what does not match its record, and the .npz appears whole.
Processes meet in the file system alone; a lock keeps a second launch out.
"""

import functools
import glob
import io
import itertools
import json
import shutil
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from repa_fast import command, lock
from repa_fast.checkpoint.layout import GENERATED, run_folder
from repa_fast.configs.part import expect_at_least
from repa_fast.configs.sampler import SamplerConfig
from repa_fast.contracts import expect_writable
from repa_fast.data.dataset import Metadata
from repa_fast.distributed import own_device, progress_bar, rank_and_size
from repa_fast.eval.load import Loaded, WeightsConfig
from repa_fast.eval.pictures import arrange, save_png
from repa_fast.eval.reference import ImageFile, write_npz
from repa_fast.eval.sampling import ImageSampler, file_name, labels_of, settings
from repa_fast.failure import Failure
from repa_fast.ledger import Ledger, share
from repa_fast.lock import Lock
from repa_fast.whole import expect_no_link, is_disk_full, read_regular, write_whole
from repa_fast.words import first_line, note

SHEET_IMAGES = 64
SHEET_COLUMNS = 8


@dataclass(kw_only=True)
class GenerateConfig(SamplerConfig, WeightsConfig):
    """`repa-fast generate`: REPA's generate.py, its flags and more."""

    sample_dir: str = ""
    """Folder of the .npz; where empty generated/ in the run's folder, or samples/ for weights that
    are no run's. Other settings are another name."""
    num_fid_samples: int = 50_000
    """How many images."""
    per_proc_batch_size: int = 32
    """Images at a time on each process; part of the settings, since it can change the last bit."""
    global_seed: int = 0
    """Determines noise and labels, together with the number of an image."""
    labels: Literal["random", "balanced"] = "random"
    """Labels drawn at random as upstream, or one class after the other."""
    class_label: int = -1
    """One class for all images."""
    pngs: bool = False
    """Write every image as a PNG too, into a folder beside the .npz."""

    model: str = ""
    """SiT-{S,B,L,XL}/{2,4,8}; known from the weights, and checked if given."""
    resolution: int = 0
    """Of the images; known from the weights, and checked if given."""
    num_classes: int = 0
    """Known from the weights, and checked if given."""
    encoder_depth: int = 8
    """Accepted for compatibility: projectors are not loaded."""
    projector_embed_dims: str = ""
    """Accepted for compatibility: projectors are not loaded."""
    fused_attn: bool = True
    """The fastest attention; otherwise the explicit softmax."""
    qk_norm: bool = False
    """Accepted for compatibility: known from the weights."""
    legacy: bool = False
    """Accepted for compatibility: old names are recognised."""


def generate(config: GenerateConfig) -> Path:
    """Write the .npz (or leave a finished one as it is); every process of torchrun calls it.

    Returns:
        Its path. It holds arr_0, uint8 (N, R, R, 3), and arr_1, int64 labels (N); beside it are a
        JSON of all settings and a contact sheet.

    Raises:
        ValueError: weights or settings that do not fit, or another launch that is at work on this
            .npz.
        Failure: the disk is full.
        RuntimeError: the autoencoder cannot be loaded.
    """
    folder = folder_of(config)
    expect_writable("sample_dir", folder, folder=True)
    rank, _ = rank_and_size()
    loaded = config.load(own_device(), model=config.model, prediction=config.prediction)
    _check(config, loaded)
    for block in loaded.model.blocks:
        block.attn.fused_attn = config.fused_attn
    out = folder / f"{name_of(config, loaded)}.npz"
    work = out.with_name(f".{out.stem}.generating")
    try:
        with lock.hold(work, rank) as held:
            _generate(config, loaded, out, work, held)
    except OSError as error:
        if not is_disk_full(error):
            raise
        raise Failure(f"the disk of {work} is full, make room; {_kept(work, config)}") from error
    except KeyboardInterrupt:
        note(_kept(work, config))
        raise
    return out


def folder_of(config: GenerateConfig) -> Path:
    """Return the folder of the images: as asked for, or in the run's, or the current one.

    ValueError if that in the run's is a link: a stranger's run would choose what is written to.
    """
    if config.sample_dir:
        return Path(config.sample_dir)
    run = run_folder(Path(config.ckpt))
    folder = run / GENERATED if run else Path("samples")
    if run:
        expect_no_link(folder)
    return folder


def _generate(config: GenerateConfig, loaded: Loaded, out: Path, work: Path, held: Lock) -> None:
    """Write this process's share of the blocks; as the first process also join all of them."""
    (rank, world_size), device, blocks = rank_and_size(), own_device(), _blocks(config)
    described = settings(config, loaded)
    shape = (config.num_fid_samples, *(loaded.metadata.resolution,) * 2, 3)
    if out.exists():
        fault = fault_of(out, shape)
        if not fault:
            if rank == 0:  # of a process that was killed right after the .npz took its name
                shutil.rmtree(work, ignore_errors=True)
            return
        if rank == 0:
            _set_aside(out, fault)
    shared = share(work, described, blocks, rank, world_size, lambda: not fault_of(out, shape))
    if shared is None:
        return
    ledger, mine = shared
    sampler = functools.cache(lambda: ImageSampler(loaded, config, device))

    def compute(block: int) -> np.ndarray:
        images = sample_block(sampler(), config, block)
        _write_block(ledger, block, images)
        return images

    with progress_bar(out.name, rank == 0) as progress:
        advance, batch = progress(config.num_fid_samples), config.per_proc_batch_size
        for block in mine:
            compute(block)
            advance(len(ledger.done()) * batch)
        if rank:
            return
        ledger.wait_for(blocks, lambda: advance(len(ledger.done()) * batch), world_size)
        advance(config.num_fid_samples)

    def parts() -> Iterator[np.ndarray]:
        counts = (min(batch, shape[0] - block * batch) for block in range(blocks))
        shapes = ((count, *shape[1:]) for count in counts)
        return (_read_block(ledger, block, of, compute) for block, of in enumerate(shapes))

    _write_beside(config, loaded, parts, out)
    held.expect()
    for half in out.parent.glob(f".{glob.escape(out.name)}-*"):  # of a process that was killed
        half.unlink()
    labels = chosen_labels(config, loaded.metadata, np.arange(config.num_fid_samples))
    write_npz(out, parts(), shape, arr_1=labels)
    ledger.remove()


def _kept(work: Path, config: GenerateConfig) -> str:
    done = len([*work.glob("[0-9]*.json")])
    of = f"{done} of {_blocks(config)} batches are written and kept"
    return f"{of}: the same command goes on from there"


def _blocks(config: GenerateConfig) -> int:
    return -(-config.num_fid_samples // config.per_proc_batch_size)


def _check(config: GenerateConfig, loaded: Loaded) -> None:
    known = {"resolution": loaded.metadata.resolution, "num_classes": loaded.model.num_classes}
    for name, value in known.items():
        if getattr(config, name) not in (0, value):
            raise ValueError(f"{name} is {getattr(config, name)}, expected {value} (the weights')")
    expect_at_least(config, 1, "num_fid_samples", "per_proc_batch_size")
    classes = len(loaded.metadata.class_names)
    if not -1 <= config.class_label < classes:
        raise ValueError(
            f"class_label is {config.class_label}, expected 0..{classes - 1}, or -1 for all classes"
        )


def fault_of(out: Path, shape: tuple[int, ...]) -> str:
    """Return "" for a whole .npz of images of that shape and their labels, else what is wrong.

    A file that was cut off has no directory. The images themselves, 9.8 GB for 50,000 of 256x256
    pixels, are not read.
    """
    try:
        file = ImageFile(out)
        found = (file.count, file.height, file.width, 3)
        with zipfile.ZipFile(out) as archive, np.load(out) as arrays:
            size, labels = archive.getinfo("arr_0.npy").file_size, arrays["arr_1"].shape
    except Exception as error:  # of a damaged directory zipfile and numpy raise all kinds
        return first_line(error)
    if found != shape or size < np.prod(shape, dtype=np.int64) or labels != shape[:1]:
        return f"arr_0 {found} of {size} bytes and arr_1 {labels}, expected {shape}"
    return ""


def _set_aside(out: Path, fault: str) -> None:
    names = (out.with_name(f"{out.name}.broken-{number}") for number in itertools.count(1))
    aside = next(path for path in names if not path.exists())
    out.replace(aside)
    note(f"{out.name} is broken ({fault}): kept as {aside.name}, and generated again")


def name_of(config: GenerateConfig, loaded: Loaded) -> str:
    """Return the .npz's name, without its ending, as `file_name` makes it."""
    described, count = settings(config, loaded), f"-n-{config.num_fid_samples}"
    return file_name(loaded.name, described, loaded, count)


def chosen_labels(config: GenerateConfig, metadata: Metadata, index: np.ndarray) -> np.ndarray:
    """Return the labels, int64 (B), of images by their numbers (B)."""
    if config.class_label >= 0:
        return np.full(len(index), config.class_label)
    return labels_of(index, len(metadata.class_names), config.global_seed, config.labels)


def sample_block(sampler: ImageSampler, config: GenerateConfig, block: int) -> np.ndarray:
    """Return the images of a block, uint8 (B, R, R, 3); those of the last may be fewer."""
    size = config.per_proc_batch_size
    index = np.arange(block * size, (block + 1) * size)
    labels = chosen_labels(config, sampler.metadata, index)
    images = sampler.images(index, labels, config.global_seed).permute(0, 2, 3, 1)
    return images.cpu().numpy()[: config.num_fid_samples - block * size]


def _write_block(ledger: Ledger, block: int, images: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.save(buffer, images)  # straight to the file, it would not say that the disk is full
    write_whole(ledger.folder / f"{block:06d}.npy", buffer.getbuffer())
    ledger.write(block, {"crc32": zlib.crc32(buffer.getbuffer())})


def _read_block(
    ledger: Ledger, block: int, shape: tuple[int, ...], compute: Callable[[int], np.ndarray]
) -> np.ndarray:
    """Return the images of a block, computed again where file or record is missing or damaged.

    Also where they are others than uint8 of `shape`, that of the block.
    """
    file = ledger.folder / f"{block:06d}.npy"
    try:
        data, record = read_regular(file), ledger.read(block)
    except (FileNotFoundError, ValueError):
        data, record = b"", {}
    if record == {"crc32": zlib.crc32(data)}:
        with suppress(Exception):  # numpy raises all kinds
            images = np.load(io.BytesIO(data))
            if images.dtype == np.uint8 and images.shape == shape:
                return images
    note(f"{file} does not match its record, and is computed again")
    return compute(block)


def _write_beside(
    config: GenerateConfig, loaded: Loaded, parts: Callable[[], Iterator[np.ndarray]], out: Path
) -> None:
    """Write the contact sheet, PNGs where they are asked for, and the settings."""
    metadata = loaded.metadata
    shown = np.stack(list(itertools.islice(itertools.chain.from_iterable(parts()), SHEET_IMAGES)))
    labels = chosen_labels(config, metadata, np.arange(len(shown)))
    titles = [metadata.class_names[label] for label in labels]
    sheet = arrange(torch.from_numpy(shown).permute(0, 3, 1, 2), SHEET_COLUMNS, titles)
    save_png(sheet, out.with_suffix(".png"))
    if config.pngs:
        for number, image in enumerate(itertools.chain.from_iterable(parts())):
            save_png(image, out.with_suffix("") / f"{number:06d}.png")
    described = settings(config, loaded) | {"ckpt": str(loaded.source.resolve())}
    write_whole(out.with_suffix(".json"), json.dumps(described, indent=2))


if __name__ == "__main__":
    PROG = "python -m repa_fast.eval.generate"
    sys.exit(
        command.main(
            lambda words: generate(command.parse(GenerateConfig, words, PROG)), sys.argv[1:]
        )
    )
