"""scikit-learn's bundled handwritten digits as small RGB images: real data, no download."""

from __future__ import annotations

from typing import Literal

import numpy as np

RESOLUTION = 16
NUM_CLASSES = 10
SPLIT_SEED = 0
VAL_SIZE = 297


def digit_images(split: Literal["train", "val"]) -> tuple[np.ndarray, np.ndarray]:
    """Return one split of the 1,797 digit scans (8x8, 17 grey levels), upscaled to 16x16 RGB.

    The split is stratified by class with seed `SPLIT_SEED`: 1,500 images train, 297 held out.

    Args:
        split: "train" or "val".

    Returns:
        images: uint8 (N, 16, 16, 3), 0 = paper, 255 = ink; the three channels are equal.
        labels: int64 (N,), 0..9.

    Raises:
        ValueError: if `split` is neither "train" nor "val".
    """
    if split not in ("train", "val"):
        raise ValueError(f"split: expected 'train' or 'val', got {split!r}")
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    scans, labels = load_digits(return_X_y=True)
    train, val = train_test_split(
        np.arange(len(labels)), test_size=VAL_SIZE, random_state=SPLIT_SEED, stratify=labels
    )
    chosen = train if split == "train" else val
    grey8 = np.rint(scans[chosen].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    size = (RESOLUTION, RESOLUTION)
    grey = np.stack([np.asarray(Image.fromarray(g).resize(size, Image.BICUBIC)) for g in grey8])
    images = np.repeat(grey[..., None], 3, axis=-1)  # (N, 16, 16, 3)
    return images, labels[chosen].astype(np.int64)
