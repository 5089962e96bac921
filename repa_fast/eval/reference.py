"""Files of images and of reference statistics, in the layout of ADM's evaluator.

An npz of images has arr_0, uint8 (N, H, W, 3). A reference has in addition the mean and covariance
of the features of a whole dataset, mu and sigma of pool_3, mu_s and sigma_s of sFID's features, and
in arr_0 the images for precision and recall (10,000 in the published files).
"""

import hashlib
import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.lib import format as npy

from repa_fast.eval.inception import POOL_WIDTH, SPATIAL_WIDTH, Inception
from repa_fast.eval.statistics import Moments

SHAPES = {
    "mu": (POOL_WIDTH,),
    "sigma": (POOL_WIDTH, POOL_WIDTH),
    "mu_s": (SPATIAL_WIDTH,),
    "sigma_s": (SPATIAL_WIDTH, SPATIAL_WIDTH),
}
HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


class ImageFile:
    """The images of an npz, read in batches: 50,000 of 256x256 pixels would be 9.8 GB at once.

    Args:
        path: npz with arr_0, uint8 (N, H, W, 3), compressed or not.
        count: how many to take, the first ones; all if None.

    Attributes:
        count, height, width: of the images that are taken.

    Raises:
        ValueError: no such file, another content, or fewer than `count` images.
    """

    def __init__(self, path: str | Path, count: int | None = None) -> None:
        self.path = Path(path)
        with self._images() as (_, shape):
            available, self.height, self.width, _ = shape
        if count is not None and available < count:
            raise ValueError(f"{path} has {available} images, expected at least {count}")
        self.count = available if count is None else count

    def batches(
        self, size: int, rank: int = 0, world_size: int = 1
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(index int64 (B), images uint8 (B, 3, H, W)), at most `size` images at a time, in order.

        Of several processes each gets every world_size-th batch.

        Raises:
            ValueError: the file is damaged.
        """
        bytes_per_image = self.height * self.width * 3
        with self._images() as (stream, _):
            for number, start in enumerate(range(0, self.count, size)):
                index = torch.arange(start, min(start + size, self.count))
                length = len(index) * bytes_per_image
                with _naming(self.path):
                    if number % world_size != rank:
                        stream.seek(length, os.SEEK_CUR)
                        continue
                    data = stream.read(length)
                    if len(data) != length:
                        raise ValueError(f"arr_0 ends early, expected {self.count} images")
                pixels = np.frombuffer(data, np.uint8).reshape(-1, self.height, self.width, 3)
                yield index, torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())

    @contextmanager
    def _images(self) -> Iterator[tuple[BinaryIO, tuple[int, ...]]]:
        """arr_0 as a stream that stands at the first pixel, and its shape (N, H, W, 3)."""
        with _archive(self.path) as archive:
            if "arr_0.npy" not in archive.namelist():
                raise ValueError(f"{self.path} lacks arr_0, expected images, {_content(archive)}")
            with archive.open("arr_0.npy") as stream:
                with _naming(self.path):
                    version = npy.read_magic(stream)
                    if version not in HEADERS:
                        raise ValueError(f"arr_0 has header version {version}, expected 1.0 or 2.0")
                    shape, fortran, dtype = HEADERS[version](stream)
                if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or fortran:
                    raise ValueError(
                        f"{self.path}: arr_0 is {dtype} {shape}{' in Fortran order' * fortran}, "
                        "expected uint8 (N, H, W, 3)"
                    )
                yield stream, shape


@dataclass(frozen=True)
class Reference:
    """What generated images are compared with.

    Attributes:
        path: the file.
        sha256: the first 16 hexadecimal digits of the file's.
        images: for precision and recall.
        pool: mean (2048) and covariance (2048, 2048) of pool_3, fp64.
        spatial: mean (2023) and covariance (2023, 2023) of sFID's features, fp64.
    """

    path: Path
    sha256: str
    images: ImageFile
    pool: tuple[np.ndarray, np.ndarray]
    spatial: tuple[np.ndarray, np.ndarray]


def load(path: str | Path) -> Reference:
    """Read a reference; its images are not read yet.

    Raises:
        ValueError: no such file, or something in it is missing, of another shape or not finite.
    """
    with _archive(path) as archive:
        missing = [key for key in ("arr_0", *SHAPES) if f"{key}.npy" not in archive.namelist()]
        if missing:
            raise ValueError(f"{path} lacks {', '.join(missing)}, {_content(archive)}")
    images = ImageFile(path)
    with _naming(path), np.load(path, allow_pickle=False) as content:
        arrays = {key: content[key] for key in SHAPES}
    for key, array in arrays.items():
        _expect_statistics(f"{path}: {key}", array, SHAPES[key])
    mean, cov, spatial_mean, spatial_cov = (a.astype(np.float64) for a in arrays.values())
    return Reference(
        Path(path), fingerprint(path), images, (mean, cov), (spatial_mean, spatial_cov)
    )


def measure(batches: Iterable[torch.Tensor], inception: Inception) -> tuple[Moments, Moments]:
    """Moments of pool_3 and of sFID's features of batches of images, each uint8 (B, 3, H, W).

    Of several processes' batches, `reduce` each of the two before they are written.
    """
    pool = Moments(POOL_WIDTH, inception.device)
    spatial = Moments(SPATIAL_WIDTH, inception.device)
    for images in batches:
        features = inception(images)
        pool.update(features.pool)
        spatial.update(features.spatial)
    return pool, spatial


def write(path: str | Path, *, images: np.ndarray, pool: Moments, spatial: Moments) -> None:
    """Write a reference; the file appears whole or not at all, in the place of an older one.

    Args:
        images: uint8 (N, H, W, 3), a sample of the dataset for precision and recall.
        pool, spatial: of the whole dataset, as `measure` gives them.

    Raises:
        ValueError: other images, or moments of another width or of fewer than two images.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"images are {images.dtype} {images.shape}, expected uint8 (N, H, W, 3)")
    if pool.count != spatial.count:
        raise ValueError(
            f"pool is of {pool.count} images, spatial of {spatial.count}, expected the same"
        )
    arrays = dict(zip(SHAPES, (*pool.statistics(), *spatial.statistics()), strict=True))
    for key, array in arrays.items():
        _expect_statistics(key, array, SHAPES[key])
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(partial, "wb") as file:
            np.savez(file, arr_0=np.ascontiguousarray(images), **arrays)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def fingerprint(path: str | Path) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


@contextmanager
def _archive(path: str | Path) -> Iterator[zipfile.ZipFile]:
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not an npz file: {error}") from error
    with archive:
        yield archive


@contextmanager
def _naming(path: str | Path) -> Iterator[None]:
    """What goes wrong in reading `path`, as a ValueError that names it."""
    try:
        yield
    except (ValueError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _content(archive: zipfile.ZipFile) -> str:
    return f"it has {', '.join(n.removesuffix('.npy') for n in archive.namelist()) or 'nothing'}"


def _expect_statistics(name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
    if array.shape != shape or array.dtype.kind != "f":
        raise ValueError(f"{name} is {array.dtype} {array.shape}, expected floating point {shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} is not finite")
