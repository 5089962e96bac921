"""`repa-fast prepare`: data sources to native datasets."""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from repa_fast.data import dataset, digits, images
from repa_fast.data.official import OfficialFolder

DIGITS_DIR = Path("data/digits")


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
        for index in track(range(len(folder)), description=f"{out}", disable=not _watched()):
            sample = folder.decode((index, with_images))
            yield {
                "image": folder.image_bytes(index) if with_images else b"",
                "moments": sample["moments"],
                "label": sample["label"],
            }

    with _whole_or_not(Path(out)) as partial:
        dataset.write(partial / "train.lance", rows(), folder.metadata)
    return Path(out)


def _watched() -> bool:
    return sys.stdout.isatty()


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
