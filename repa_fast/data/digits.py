"""scikit-learn's bundled handwritten digits as small RGB images: real data, no download."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from repa_fast.data import dataset
from repa_fast.data.dataset import Metadata, Row, encode
from repa_fast.whole import whole_or_not

DIGITS_DIR = Path("data/digits")
RESOLUTION = 16
NUM_CLASSES = 10


def digit_images(split: Literal["train", "val"]) -> tuple[np.ndarray, np.ndarray]:
    """Return one split of the 1,797 digit scans (8x8, 17 grey levels), upscaled to 16x16 RGB.

    The split is stratified by class: 1,500 images train, 297 held out. Images are uint8
    (N, 16, 16, 3), 0 = paper, 255 = ink, with three equal channels; labels int64 (N,), 0..9.
    ValueError for another split than "train" and "val".
    """
    if split not in ("train", "val"):
        raise ValueError(f"split: expected 'train' or 'val', got {split!r}")
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    scans, labels = load_digits(return_X_y=True)
    train, val = train_test_split(
        np.arange(len(labels)), test_size=297, random_state=0, stratify=labels
    )
    chosen = train if split == "train" else val
    grey8 = np.rint(scans[chosen].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    size = (RESOLUTION, RESOLUTION)
    grey = np.stack([np.asarray(Image.fromarray(g).resize(size, Image.BICUBIC)) for g in grey8])
    images = np.repeat(grey[..., None], 3, axis=-1)  # (N, 16, 16, 3)
    return images, labels[chosen].astype(np.int64)


def digits_metadata() -> Metadata:
    """Return the metadata of the digits: 16x16 pixel latents, ten classes."""
    return pixel_metadata(RESOLUTION, tuple(str(digit) for digit in range(NUM_CLASSES)))


def pixel_metadata(resolution: int, class_names: tuple[str, ...]) -> Metadata:
    """Return the metadata of a dataset whose latents are its pixels, x / 127.5 - 1."""
    return Metadata(
        resolution=resolution,
        latent_shape=(3, resolution, resolution),
        vae="none",
        scale=1.0,
        bias=0.0,
        class_names=class_names,
    )


def pixel_moments(pixels: np.ndarray) -> np.ndarray:
    """Map uint8 (N, R, R, 3) to float32 (N, 6, R, R): mean x / 127.5 - 1, standard deviation 0."""
    mean = pixels.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1
    return np.concatenate([mean, np.zeros_like(mean)], axis=1)


def prepare_digits(out: str | Path = DIGITS_DIR) -> Path:
    """Write the digits to OUT/{train,val}.lance, whole or not at all; return `out`.

    Raises:
        ValueError: `out` exists already.
    """
    with whole_or_not(Path(out)) as partial:
        for split in ("train", "val"):
            pixels, labels = digit_images(split)
            columns = zip(pixels, pixel_moments(pixels), labels, strict=True)
            rows: Iterator[Row] = (
                {"image": encode(image), "moments": moments, "label": int(label)}
                for image, moments, label in columns
            )
            dataset.write(partial / f"{split}.lance", rows, digits_metadata())
    return Path(out)


def ensure_digits(out: Path = DIGITS_DIR) -> Path:
    """Call `prepare_digits` unless `out` is there; of several processes the first wins."""
    if not out.exists():
        try:
            prepare_digits(out)
        except (OSError, ValueError):
            if not out.exists():
                raise
    return out
