"""Official folders (images/ and vae-sd/) to native datasets, and back."""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from repa_fast.data import dataset
from repa_fast.data.digits import DIGITS_DIR, prepare_digits
from repa_fast.data.images import open_image
from repa_fast.data.official import SD_VAE_FACTOR, SD_VAE_SCALE, OfficialFolder
from repa_fast.whole import whole_or_not

FILES_PER_FOLDER = 1000
EXPORTED_ROWS = 256
SUFFIXES = {"PNG": "png", "JPEG": "jpg", "MPO": "jpg"}
"""By the format of an image: an MPO begins with a JPEG."""


@dataclass(kw_only=True)
class DigitsConfig:
    """Write scikit-learn's bundled scans of digits as a dataset."""

    out: Path = DIGITS_DIR
    """Folder to write."""


@dataclass(kw_only=True)
class ImportConfig:
    """Copy an images/ + vae-sd/ folder into a dataset."""

    data_dir: Path
    """The folder."""
    out: Path
    """Folder to write."""
    images: bool = True
    """Copy the images too."""


@dataclass(kw_only=True)
class ExportConfig:
    """Write a dataset as an images/ + vae-sd/ folder."""

    data_dir: Path
    """The dataset."""
    out: Path
    """Folder to write."""
    split: str = "train"
    """train or val."""


def write_digits(config: DigitsConfig) -> Path:
    """Write the digits; return the folder."""
    return prepare_digits(config.out)


def import_folder(config: ImportConfig) -> Path:
    """Copy an official folder into OUT/train.lance: moments bit for bit, image files untouched.

    The folder appears at once, whole, or not at all; one batch of rows is held in memory. Without
    images, or where there are none, each row has an empty image.

    Raises:
        ValueError: `out` exists already, or a file of the source is bad; names it.
    """
    from rich.progress import track

    folder = OfficialFolder(config.data_dir)
    images = config.images and folder.has_images

    def rows() -> Iterator[dataset.Row]:
        hidden = not sys.stdout.isatty()
        for index in track(range(len(folder)), description=f"{config.out}", disable=hidden):
            sample = folder.decode((index, images))
            yield {
                "image": folder.image_bytes(index) if images else b"",
                "moments": sample["moments"],
                "label": sample["label"],
            }

    with whole_or_not(config.out) as partial:
        dataset.write(partial / "train.lance", rows(), folder.metadata)
    return config.out


def export_folder(config: ExportConfig) -> Path:
    """Write a native dataset as an official folder: moments bit for bit, image files untouched.

    What import_folder makes of the result equals the source row by row. Images keep their
    encoding (.png or .jpg); the folder appears at once, whole, or not at all.

    Raises:
        ValueError: `out` exists already, there is no such dataset, or a row of it is bad: moments,
            label, an image that is no PNG or JPEG of the right size, or none where others have one.
    """
    from rich.progress import track

    table = dataset.LatentDataset(config.data_dir, config.split)
    stored = table.metadata
    expected = replace(stored, scale=SD_VAE_SCALE, bias=0.0)
    if stored != expected or stored.latent_shape[1] * SD_VAE_FACTOR != stored.resolution:
        raise ValueError(
            f"{table.uri}: latents {stored.latent_shape} of {stored.resolution} pixels, scale "
            f"{stored.scale}; an official folder means 1/{SD_VAE_FACTOR} of the side and "
            f"{SD_VAE_SCALE}"
        )
    labels, illustrated = [], 0
    with whole_or_not(config.out) as partial:
        starts = range(0, len(table), EXPORTED_ROWS)
        for start in track(starts, description=f"{config.out}", disable=not sys.stdout.isatty()):
            rows = table.fetch(np.arange(start, min(start + EXPORTED_ROWS, len(table))))
            for index, image, moments, label, _ in rows:
                name = f"{table.uri} row {index}"
                sample: dataset.Sample = {"index": index, "moments": moments, "label": int(label)}
                dataset.check_sample(name, sample, stored)
                illustrated += bool(image)
                if illustrated not in (0, len(labels) + 1):
                    raise ValueError(f"{name}: some rows have an image, expected all or none")
                folder = f"{index // FILES_PER_FOLDER:05d}"
                latent = f"{folder}/img-mean-std-{index:08d}.npy"
                (partial / "vae-sd" / folder).mkdir(parents=True, exist_ok=True)
                np.save(partial / "vae-sd" / latent, moments)
                labels.append([latent, int(label)])
                if image:
                    suffix = _suffix(image, stored.resolution, name)
                    (partial / "images" / folder).mkdir(parents=True, exist_ok=True)
                    file = partial / "images" / folder / f"img{index:08d}.{suffix}"
                    file.write_bytes(image)
        listing = json.dumps({"labels": labels})
        (partial / "vae-sd" / "dataset.json").write_text(listing, encoding="utf-8")
    return config.out


def _suffix(image: bytes, side: int, name: str) -> str:
    """Return the suffix of an image's file by its header; ValueError if it has no place there."""
    kind = open_image(image, name, side).format
    if kind not in SUFFIXES:
        raise ValueError(f"{name}: image is {kind}, expected PNG or JPEG")
    return SUFFIXES[kind]
