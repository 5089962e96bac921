"""Small datasets, a cheap stand-in for the Inception, and an evaluation as processes run it."""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image

from repa_fast.analysis.cknna import CHUNK, alignment, neighbourhood
from repa_fast.data import dataset
from repa_fast.data.digits import pixel_moments
from repa_fast.distributed import World
from repa_fast.eval import inception, metrics, reference
from repa_fast.eval.inception import Features
from repa_fast.eval.metrics import EvalConfig
from repa_fast.testing import seeded

SIDE = 16
TRAIN, VAL = 120, 60
"""Rows of the room's tables."""
COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255), (20, 20, 20))
"""Of the classes."""
WIDTHS = {"pool": 6, "spatial": 5, "logits": 4}
"""Of the stand-in's features: few, so that little of their distance is rounding."""


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
    metadata = dataset.Metadata(
        resolution=SIDE, latent_shape=(3, SIDE, SIDE), vae="none", scale=1.0, bias=0.0,
        class_names=tuple(f"class {number}" for number in range(classes)),
    )  # fmt: skip
    columns = zip(map(png, images), pixel_moments(images), map(int, labels), strict=True)
    rows: list[dataset.Row] = [
        {"image": image, "moments": moments, "label": label} for image, moments, label in columns
    ]
    dataset.write(uri, rows, metadata)
    return uri


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


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


class SmallInception:
    """Three fixed linear maps of the pixels, with the interface of Inception."""

    def __init__(self, weights: str = "", device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)

    def __call__(self, images: torch.Tensor) -> Features:
        flat = images.flatten(1).float() / 255
        maps = (
            seeded((flat.shape[1], width), seed=seed) for seed, width in enumerate(WIDTHS.values())
        )
        return Features(*(flat @ one for one in maps))


@contextmanager
def small_inception() -> Iterator[None]:
    """SmallInception in the place of the Inception, and its widths in that of the published."""
    pool, spatial, logits = WIDTHS.values()
    shapes = {"mu": (pool,), "sigma": (pool, pool), "mu_s": (spatial,), "sigma_s": (spatial,) * 2}
    widths = {"POOL_WIDTH": pool, "SPATIAL_WIDTH": spatial, "CLASSES": logits}
    with (
        mock.patch.multiple(inception, **widths),
        mock.patch.object(metrics, "Inception", SmallInception),
        mock.patch.object(reference, "SHAPES", shapes),
    ):
        yield


def evaluate_all(world: World, configs: list[EvalConfig]) -> list[bool]:
    """Evaluate one after the other inside a session; which of them this process wrote."""
    written = []
    with (
        small_inception(),
        mock.patch.object(metrics, "session", return_value=nullcontext(world)),
    ):
        for config in configs:
            written.append(bool(metrics.evaluate(config)))
            world.barrier()  # a later config may read what an earlier one writes
    return written
