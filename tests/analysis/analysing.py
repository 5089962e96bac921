"""Small datasets, and what the analyses make of features."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from repa_fast.analysis.cknna import CHUNK, alignment, neighbourhood
from repa_fast.data import dataset
from repa_fast.data.dataset import encode
from repa_fast.data.digits import pixel_metadata, pixel_moments

SIDE = 16
TRAIN, VAL = 120, 60
"""Rows of the room's tables."""
COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255), (20, 20, 20))
"""Of the classes."""


def noise_images(count: int, seed: int = 0, spread: int = 256) -> np.ndarray:
    """uint8 (count, 16, 16, 3) below `spread`."""
    shape = (count, SIDE, SIDE, 3)
    return np.random.default_rng(seed).integers(0, spread, shape, dtype=np.uint8)


def planes(images: np.ndarray) -> torch.Tensor:
    """(N, H, W, 3) -> (N, 3, H, W)."""
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


def write_npz(path: Path, images: np.ndarray) -> Path:
    np.savez(path, arr_0=images)
    return path


def write_table(
    uri: Path, images: np.ndarray, labels: Sequence[int], classes: int = len(COLOURS)
) -> Path:
    """A table of images (N, 16, 16, 3) with pixel latents."""
    metadata = pixel_metadata(SIDE, tuple(f"class {number}" for number in range(classes)))
    columns = zip(map(encode, images), pixel_moments(images), map(int, labels), strict=True)
    names = ("image", "moments", "label")
    dataset.write(uri, (dict(zip(names, values)) for values in columns), metadata)
    return uri


def coloured(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Images, each of its class's colour with a little noise, and labels, in random order."""
    labels = np.random.default_rng(seed).permutation(np.arange(count) % len(COLOURS))
    noise = noise_images(count, seed, spread=31).astype(np.int64) - 15
    images = np.array(COLOURS)[labels][:, None, None] + noise
    return images.clip(0, 255).astype(np.uint8), labels


def assert_picture(path: Path) -> None:
    """A readable image with something drawn on it."""
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert min(pixels.shape[:2]) > 100
    drawn = (pixels != pixels[0, 0]).any(-1).mean()
    assert 0.005 < drawn < 0.9


def cknna(a, b, k=10, *, definition="paper", normalize=None, chunk=CHUNK) -> float:
    """CKNNA of two sets of features; the platonic one normalises them if nothing is said."""
    normalize = definition == "platonic" if normalize is None else normalize
    near = [
        neighbourhood(name, features, k, normalize=normalize, chunk=chunk)
        for name, features in (("a", a), ("b", b))
    ]
    return alignment(*near, definition)
