"""`repa-fast prepare images`: images and their latents to native datasets."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from repa_fast.data.dataset import Metadata
from repa_fast.data.digits import pixel_metadata, pixel_moments
from repa_fast.data.latents import VAE
from repa_fast.distributed import own_device, progress_bar, rank_and_size
from repa_fast.prepare import build
from repa_fast.prepare.fragments import weights_digest
from repa_fast.prepare.sources import Subset, open_source


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
    restart: bool = False
    """Throw away an unfinished beginning, never a finished table, and begin anew."""
    num_workers: int = 4
    """Threads that decode and crop, per process."""
    verify: bool = False
    """Read a finished table again and check everything, instead of writing one."""


def prepare_images(config: ImagesConfig) -> str:
    """Write a table from images, or verify one; all processes of torchrun call it.

    Returns:
        What was done, for people; empty on processes other than the first.

    Raises:
        ValueError: source, options or an earlier beginning do not fit, an image is bad, or
            another launch prepares the same table.
        RuntimeError: the autoencoder cannot be loaded, or, a Failure, the disk is full.
    """
    out, (rank, world_size) = Path(config.out), rank_and_size()
    uri = f"{out / config.split}.lance"
    if config.verify:
        with progress_bar("verifying", rank == 0) as progress:
            rows = build.verify(out, config.split, progress(None))
        return f"{uri}: {rows} rows, all as they were written"
    given = (config.labels or None, config.classes or None)
    source = open_source(config.data_dir, config.kind, *given)
    if config.subset:
        source = Subset(source, config.subset, config.seed)
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
        rows = build.Building(source, out, config.split, recipe, encode).run(
            rank=rank,
            world_size=world_size,
            workers=config.num_workers,
            restart=config.restart,
            progress=progress(len(source)),
        )
    classes = len(source.class_names)
    return "" if rows is None else f"{uri}: {rows} rows of {len(source)} images, {classes} classes"


def _described(config: ImagesConfig) -> str:
    parts = [str(Path(config.data_dir).resolve())]
    parts += [f"labels {config.labels}"] if config.labels else []
    parts += [f"classes {config.classes}"] if config.classes else []
    parts += [f"{config.subset} by seed {config.seed}"] if config.subset else []
    return ", ".join(parts)


def _latents(
    config: ImagesConfig, class_names: tuple[str, ...], device: torch.device
) -> tuple[Metadata, build.Encode, str]:
    """Return metadata, the function from pixels to moments, and its name in the recipe."""
    if config.vae == "none":
        metadata = pixel_metadata(config.resolution, class_names)
        return metadata, lambda p: pixel_moments(p.transpose(0, 2, 3, 1)), "pixels"
    vae = VAE(config.vae)
    metadata = vae.metadata(config.resolution, class_names)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.precision]
    encode = vae.encoder(metadata, device, dtype, config.compile)
    digest = weights_digest(vae.source)
    weights = f", weights {digest}" if digest else ""
    return metadata, encode, f"{vae.source}, {config.precision}{weights}"
