"""`repa-fast prepare`: data sources to native datasets."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from repa_fast.data import dataset, digits, images
from repa_fast.data.official import SD_VAE_FACTOR, SD_VAE_SCALE, OfficialFolder
from repa_fast.data.processes import own_device, progress_bar, rank_and_size, watched
from repa_fast.data.vae import VAE

DIGITS_DIR = Path("data/digits")
FILES_PER_FOLDER = 1000  # of an official folder
EXPORTED_ROWS = 256


def prepare_digits(out: str | Path = DIGITS_DIR) -> Path:
    """Write the bundled digits with pixel latents to OUT/{train,val}.lance; returns OUT.

    The folder appears at once, whole, or not at all.

    Raises:
        ValueError: `out` exists already.
    """
    with _whole_or_not(Path(out)) as partial:
        for split in ("train", "val"):
            pixels, labels = digits.digit_images(split)
            columns = zip(pixels, pixel_moments(pixels), labels, strict=True)
            rows: Iterator[dataset.Row] = (
                {"image": images.encode_png(image), "moments": moments, "label": int(label)}
                for image, moments, label in columns
            )
            dataset.write(partial / f"{split}.lance", rows, digits_metadata())
    return Path(out)


def ensure_digits(out: Path = DIGITS_DIR) -> Path:
    """`prepare_digits` unless it is there; of several processes at it the first to finish wins."""
    if not out.exists():
        try:
            prepare_digits(out)
        except OSError:
            if not out.exists():
                raise
    return out


def import_official(source: str | Path, out: str | Path, *, with_images: bool = True) -> Path:
    """Copy an official folder into OUT/train.lance: moments bit for bit, image files untouched.

    The folder appears at once, whole, or not at all; one batch of rows is held in memory. Without
    images, or where there are none, each row has an empty image.

    Raises:
        ValueError: `out` exists already, or a file of the source is bad; names it.
    """
    from rich.progress import track

    folder = OfficialFolder(source)
    with_images = with_images and folder.has_images

    def rows() -> Iterator[dataset.Row]:
        for index in track(range(len(folder)), description=f"{out}", disable=not watched()):
            sample = folder.decode((index, with_images))
            yield {
                "image": folder.image_bytes(index) if with_images else b"",
                "moments": sample["moments"],
                "label": sample["label"],
            }

    with _whole_or_not(Path(out)) as partial:
        dataset.write(partial / "train.lance", rows(), folder.metadata)
    return Path(out)


def export_official(source: str | Path, out: str | Path, split: str = "train") -> Path:
    """Write a native dataset as an official folder: moments bit for bit, image files untouched.

    What import_official makes of the result equals the source row by row. Images keep their
    encoding (.png or .jpg); the folder appears at once, whole, or not at all.

    Raises:
        ValueError: `out` exists already, or there is no such dataset.
    """
    from rich.progress import track

    table = dataset.LatentDataset(source, split)
    stored = table.metadata
    expected = replace(stored, scale=SD_VAE_SCALE, bias=0.0)
    if stored != expected or stored.latent_shape[1] * SD_VAE_FACTOR != stored.resolution:
        raise ValueError(
            f"{table.uri}: latents {stored.latent_shape} of {stored.resolution} pixels, scale "
            f"{stored.scale}; an official folder means 1/{SD_VAE_FACTOR} of the side and "
            f"{SD_VAE_SCALE}"
        )
    labels = []
    with _whole_or_not(Path(out)) as partial:
        starts = range(0, len(table), EXPORTED_ROWS)
        for start in track(starts, description=f"{out}", disable=not watched()):
            rows = table.rows(np.arange(start, min(start + EXPORTED_ROWS, len(table))))
            for index, image, moments, label in zip(*rows.values(), strict=True):
                folder = f"{index // FILES_PER_FOLDER:05d}"
                latent = f"{folder}/img-mean-std-{index:08d}.npy"
                (partial / "vae-sd" / folder).mkdir(parents=True, exist_ok=True)
                np.save(partial / "vae-sd" / latent, moments)
                labels.append([latent, int(label)])
                if image:
                    suffix = "png" if image.startswith(b"\x89PNG") else "jpg"
                    (partial / "images" / folder).mkdir(parents=True, exist_ok=True)
                    file = partial / "images" / folder / f"img{index:08d}.{suffix}"
                    file.write_bytes(image)
        (partial / "vae-sd" / "dataset.json").write_text(json.dumps({"labels": labels}))
    return Path(out)


@dataclass(frozen=True, kw_only=True)
class ImagesConfig:
    """`repa-fast prepare images`: encoded images and their latents, to one table."""

    data_dir: str
    """Class folders, a flat folder, .parquet or .arrow files, or .tar files of WebDataset."""
    out: str
    """Folder to write; the table is OUT/SPLIT.lance."""
    split: Literal["train", "val"] = "train"
    """Name of the table."""
    kind: Literal["auto", "imagefolder", "flat", "huggingface", "webdataset"] = "auto"
    """What DATA_DIR is; auto looks."""
    labels: str = ""
    """Labels of a flat folder: lines of file name and class, or of class indices alone."""
    classes: str = ""
    """The classes in the order of their labels: a text file, or a folder of class folders."""
    resolution: int = 256
    """Images are cropped as ADM does, to this many pixels a side."""
    vae: str = "sd-vae-ft-mse"
    """Autoencoder: sd-vae-ft-mse, sd-vae-ft-ema, a folder, a hub name; none for pixel latents."""
    image: Literal["jpeg", "png", "original"] = "jpeg"
    """How images are stored; original keeps files that already have the resolution."""
    quality: int = 95
    """JPEG quality, 1 to 100."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the autoencoder."""
    batch_size: int = 32
    """Images per encoding; part of the recipe, since it can change the last bit."""
    compile: bool = False
    """torch.compile the autoencoder."""
    subset: int = 0
    """Take so many images, chosen by SEED; 0 takes all."""
    seed: int = 0
    """Chooses the subset."""
    on_bad_image: Literal["error", "skip"] = "error"
    """A file that is no image: stop, or leave it out and record it in SPLIT.blocks.json."""
    num_workers: int = 4
    """Threads that decode and crop, per process."""
    verify: bool = False
    """Read a finished table again and check everything, instead of writing one."""


def prepare_images(config: ImagesConfig) -> str:
    """Write a table from images, or verify one; all processes of torchrun call it.

    Returns:
        What was done, for people; empty on processes other than the first.

    Raises:
        ValueError: source, options or an earlier beginning do not fit, or an image is bad.
        RuntimeError: the autoencoder cannot be loaded, or the disk is full.
    """
    from repa_fast.prepare import build
    from repa_fast.prepare.sources import open_source, subset

    out = Path(config.out)
    rank, world_size = rank_and_size()
    if config.verify:
        with progress_bar("verifying", rank == 0) as progress:
            rows = build.verify(out, config.split, progress(None))
        return f"{out / config.split}.lance: {rows} rows, all as they were written"
    source = open_source(
        config.data_dir, config.kind, config.labels or None, config.classes or None
    )
    if config.subset:
        source = subset(source, config.subset, config.seed)
    device = own_device()
    metadata, encode, encoder = _latents(config, source.class_names, device)
    recipe = build.Recipe(
        source=_described(config),
        rows=len(source),
        metadata=metadata,
        image=config.image,
        quality=config.quality,
        encoder=encoder,
        batch=config.batch_size,
        on_bad_image=config.on_bad_image,
    )
    with progress_bar(str(out), rank == 0) as progress:
        rows = build.build(
            source,
            out,
            config.split,
            recipe,
            encode,
            rank=rank,
            world_size=world_size,
            workers=config.num_workers,
            progress=progress(len(source)),
        )
    return (
        "" if rows is None else f"{out / config.split}.lance: {rows} rows of {len(source)} images"
    )


def _described(config: ImagesConfig) -> str:
    parts = [str(Path(config.data_dir).resolve())]
    if config.labels:
        parts.append(f"labels {config.labels}")
    if config.classes:
        parts.append(f"classes {config.classes}")
    if config.subset:
        parts.append(f"{config.subset} by seed {config.seed}")
    return ", ".join(parts)


def _latents(
    config: ImagesConfig, class_names: tuple[str, ...], device: torch.device
) -> tuple[dataset.Metadata, Callable[[np.ndarray], np.ndarray], str]:
    """Metadata, the function from pixels to moments, and what it is, for the recipe."""
    if config.vae == "none":
        shape = (3, config.resolution, config.resolution)
        metadata = dataset.Metadata(
            resolution=config.resolution, latent_shape=shape, vae="none", scale=1.0, bias=0.0,
            class_names=class_names,
        )  # fmt: skip
        return metadata, lambda p: pixel_moments(p.transpose(0, 2, 3, 1)), "pixels"
    vae = VAE(config.vae)
    metadata = vae.metadata(config.resolution, class_names)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.precision]
    encode = vae.encoder(metadata, device, dtype, config.compile)
    return metadata, encode, f"{config.vae}, {config.precision}"


@contextmanager
def _whole_or_not(out: Path) -> Iterator[Path]:
    """A folder to write into that takes the name `out` at the end, or vanishes."""
    if out.exists():
        raise ValueError(f"{out} exists already; remove it first, or train from it")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        yield partial
        partial.chmod(0o755)
        os.rename(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def digits_metadata() -> dataset.Metadata:
    """Metadata of the digits: 16x16 pixel latents, ten classes."""
    return dataset.Metadata(
        resolution=16,
        latent_shape=(3, 16, 16),
        vae="none",
        scale=1.0,
        bias=0.0,
        class_names=tuple(str(digit) for digit in range(10)),
    )


def pixel_moments(pixels: np.ndarray) -> np.ndarray:
    """uint8 (N, R, R, 3) -> float32 (N, 6, R, R): mean x / 127.5 - 1, standard deviation 0."""
    mean = pixels.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1
    return np.concatenate([mean, np.zeros_like(mean)], axis=1)
