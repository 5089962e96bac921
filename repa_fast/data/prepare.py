"""`repa-fast prepare`: data sources to native datasets."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from repa_fast.data import dataset, digits, images

DIGITS_DIR = Path("data/digits")


def prepare_digits(out: str | Path = DIGITS_DIR) -> Path:
    """Write the bundled digits with pixel latents to OUT/{train,val}.lance; returns OUT.

    The folder appears at once, whole, or not at all.

    Raises:
        ValueError: `out` exists already.
    """
    out = Path(out)
    if out.exists():
        raise ValueError(f"{out} exists already; remove it first, or train from it")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        for split in ("train", "val"):
            pixels, labels = digits.digit_images(split)
            columns = zip(pixels, pixel_moments(pixels), labels, strict=True)
            rows: Iterator[dataset.Row] = (
                {"image": images.encode_png(image), "moments": moments, "label": int(label)}
                for image, moments, label in columns
            )
            dataset.write(partial / f"{split}.lance", rows, digits_metadata())
        partial.chmod(0o755)
        os.rename(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return out


def ensure_digits(out: Path = DIGITS_DIR) -> Path:
    """`prepare_digits` unless it is there; of several processes at it the first to finish wins."""
    if not out.exists():
        try:
            prepare_digits(out)
        except OSError:
            if not out.exists():
                raise
    return out


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
