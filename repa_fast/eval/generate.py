"""Many images of a checkpoint to one .npz: `torchrun -m repa_fast.eval.generate --ckpt FILE ...`.

The unit of work is a block of consecutive image numbers, as many as a batch, the last one padded.
A process takes every WORLD_SIZE-th block and writes its images to a file and then a record; a block
without a record is computed again. When every block has one, the first process joins them and the
.npz appears whole. Processes meet in the file system alone.
"""

import hashlib
import io
import itertools
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from repa_fast import command
from repa_fast.configs.part import expect_at_least
from repa_fast.configs.sampler import SamplerConfig
from repa_fast.data.dataset import Metadata
from repa_fast.distributed import own_device, progress_bar, rank_and_size
from repa_fast.eval.load import Loaded, WeightsConfig
from repa_fast.eval.pictures import arrange, save_png
from repa_fast.eval.reference import write_npz
from repa_fast.eval.sampling import ImageSampler, labels_of
from repa_fast.ledger import Ledger, is_disk_full, share, write_whole

SHEET_IMAGES = 64
SHEET_COLUMNS = 8
LONGEST_NAME = 190
"""Bytes of the .npz's name; file systems take 255, and some are put around it."""
INDIFFERENT = (
    "ckpt", "sample_dir", "pngs", "origin", "model", "resolution", "num_classes", "encoder_depth",
    "projector_embed_dims", "qk_norm", "legacy",
)  # fmt: skip
"""Settings that do not decide the images, once the weights are loaded."""


@dataclass(kw_only=True)
class GenerateConfig(SamplerConfig, WeightsConfig):
    """`repa-fast generate`: REPA's generate.py, its flags and more."""

    sample_dir: str = "samples"
    """Folder of the .npz; its name holds every setting."""
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
        ValueError: weights or settings that do not fit, or a finished .npz of other settings.
        RuntimeError: the autoencoder cannot be loaded, or the disk is full.
    """
    (rank, world_size), device = rank_and_size(), own_device()
    loaded = config.load(device, model=config.model, prediction=config.prediction)
    _check(config, loaded)
    for block in loaded.model.blocks:
        block.attn.fused_attn = config.fused_attn
    out = Path(config.sample_dir) / f"{name_of(config, loaded)}.npz"
    work = out.with_name(f".{out.stem}.generating")
    if out.exists():
        _expect_same(out, settings(config, loaded))
        if rank == 0:  # of a process that was killed right after the .npz took its name
            shutil.rmtree(work, ignore_errors=True)
        return out
    blocks = -(-config.num_fid_samples // config.per_proc_batch_size)
    shared = share(work, settings(config, loaded), blocks, rank, world_size, out.exists)
    if shared is None:
        return out
    ledger, mine = shared
    sampler = ImageSampler(loaded, config, device) if mine else None
    try:
        with progress_bar(out.name, rank == 0) as progress:
            advance, batch = progress(config.num_fid_samples), config.per_proc_batch_size
            for block in mine:
                _write_block(ledger, block, sample_block(sampler, config, block))
                advance(len(ledger.done()) * batch)
            if rank:
                return out
            ledger.wait_for(blocks, lambda: advance(len(ledger.done()) * batch))
            advance(config.num_fid_samples)
        _finish(config, loaded, ledger, out)
    except OSError as error:
        if not is_disk_full(error):
            raise
        raise RuntimeError(
            f"the disk of {work} is full; {len(ledger.done())} of {blocks} batches are written "
            "and kept: make room and run the same command again"
        ) from error
    return out


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


def _expect_same(out: Path, now: dict) -> None:
    """Refuse to reuse OUT if its settings differ; its name leaves digits and folders out."""
    beside = out.with_suffix(".json")
    made = json.loads(beside.read_text()) if beside.exists() else now
    changed = [
        f"{name}: {made.get(name)!r}, now {value!r}"
        for name, value in now.items()
        if name != "torch" and made.get(name) != value
    ]
    if changed:
        raise ValueError(
            f"{out} was made with other settings ({'; '.join(changed)}); remove it, or give "
            "another --sample-dir"
        )


def name_of(config: GenerateConfig, loaded: Loaded) -> str:
    """Return a file name with every setting that decides the images; a long one ends in a hash."""
    step = f"{loaded.step:07d}" if loaded.step is not None else loaded.source.stem
    attention = "" if config.fused_attn else "plain-attention-"
    labels = f"class-{config.class_label}" if config.class_label >= 0 else config.labels
    name = (
        f"{loaded.name}-{step}-{loaded.digest}-size-{loaded.metadata.resolution}-"
        f"{config.label(loaded.metadata)}-{attention}{labels}-seed-{config.global_seed}-"
        f"batch-{config.per_proc_batch_size}-n-{config.num_fid_samples}"
    ).encode()
    if len(name) <= LONGEST_NAME:
        return name.decode()
    ending = f"-{hashlib.sha256(name).hexdigest()[:8]}"
    return name[: LONGEST_NAME - len(ending)].decode(errors="ignore") + ending


def settings(config: GenerateConfig, loaded: Loaded) -> dict:
    """Return everything that decides the images, for the JSON beside them."""
    names = [field.name for field in fields(GenerateConfig) if field.name not in INDIFFERENT]
    return {name: getattr(config, name) for name in names} | {
        "digest": loaded.digest,
        "step": loaded.step,
        "num_heads": loaded.model.blocks[0].attn.num_heads,
        "path_type": config.path_type or loaded.objective.path_type,
        "prediction": loaded.objective.prediction,
        "torch": torch.__version__,
    }


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
    ledger.write(block, {})


def _finish(config: GenerateConfig, loaded: Loaded, ledger: Ledger, out: Path) -> None:
    """Join the blocks; the .npz takes its name last."""

    def parts() -> Iterator[np.ndarray]:
        return (np.load(ledger.folder / f"{block:06d}.npy") for block in ledger.done())

    metadata, count = loaded.metadata, config.num_fid_samples
    labels = chosen_labels(config, metadata, np.arange(count))
    titles = [metadata.class_names[label] for label in labels[:SHEET_IMAGES]]
    shown = np.stack(list(itertools.islice(itertools.chain.from_iterable(parts()), SHEET_IMAGES)))
    sheet = arrange(torch.from_numpy(shown).permute(0, 3, 1, 2), SHEET_COLUMNS, titles)
    save_png(sheet, out.with_suffix(".png"))
    if config.pngs:
        for number, image in enumerate(itertools.chain.from_iterable(parts())):
            save_png(image, out.with_suffix("") / f"{number:06d}.png")
    described = settings(config, loaded) | {"ckpt": str(loaded.source.resolve())}
    write_whole(out.with_suffix(".json"), json.dumps(described, indent=2))
    write_npz(out, parts(), (count, metadata.resolution, metadata.resolution, 3), arr_1=labels)
    ledger.remove()


if __name__ == "__main__":
    PROG = "python -m repa_fast.eval.generate"
    sys.exit(command.main(lambda: generate(command.parse(GenerateConfig, sys.argv[1:], PROG))))
