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
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from numpy.lib import format as npy

from repa_fast.eval.inception import POOL_WIDTH, SPATIAL_WIDTH

Statistics = tuple[np.ndarray, np.ndarray]
"""Mean (F) and covariance (F, F), fp64."""
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

    @cached_property
    def name(self) -> str:
        """Its file name, with the first 16 hexadecimal digits of the file's SHA-256."""
        with open(self.path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        return f"{self.path.name}, sha256 {digest}"

    def batches(
        self, size: int, rank: int = 0, world_size: int = 1
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield (index int64 (B), images uint8 (B, 3, H, W)), at most `size` images, in order.

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
        """Open arr_0 as a stream that stands at the first pixel; also its shape (N, H, W, 3)."""
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


class Reference(NamedTuple):
    """What generated images are compared with.

    Attributes:
        images: for precision and recall.
        pool: statistics of pool_3, of width 2048.
        spatial: statistics of sFID's features, of width 2023.
    """

    images: ImageFile
    pool: Statistics
    spatial: Statistics


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
    return Reference(images, (mean, cov), (spatial_mean, spatial_cov))


def write(path: str | Path, *, images: np.ndarray, pool: Statistics, spatial: Statistics) -> None:
    """Write a reference; the file appears whole or not at all, in the place of an older one.

    Args:
        images: uint8 (N, H, W, 3), a sample of the dataset for precision and recall.
        pool, spatial: of the whole dataset.

    Raises:
        ValueError: other images, or statistics of another width.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"images are {images.dtype} {images.shape}, expected uint8 (N, H, W, 3)")
    arrays = dict(zip(SHAPES, (*pool, *spatial), strict=True))
    for key, array in arrays.items():
        _expect_statistics(key, array, SHAPES[key])
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_npz(Path(path), [images], images.shape, **arrays)


def write_npz(
    out: Path, parts: Iterable[np.ndarray], shape: tuple[int, ...], **arrays: np.ndarray
) -> None:
    """Write arr_0, the uint8 `parts` one after the other, and `arrays`, holding one part in memory.

    The file takes its name when it is whole.

    Raises:
        ValueError: the parts do not add up to `shape`.
    """
    partial = out.with_name(f".{out.name}.partial")
    try:
        with open(partial, "wb") as whole:
            with zipfile.ZipFile(whole, "w", zipfile.ZIP_STORED) as archive:
                with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                    npy.write_array_header_1_0(file, header)
                    written = 0
                    for part in parts:
                        written += part.size
                        file.write(np.ascontiguousarray(part, np.uint8))
                if written != np.prod(shape, dtype=np.int64):
                    raise ValueError(f"{out}: {written} values, expected the {shape} of arr_0")
                for name, array in arrays.items():  # writestr would put the time of day into it
                    with archive.open(f"{name}.npy", "w") as file:
                        np.save(file, array)
            whole.flush()
            os.fsync(whole.fileno())
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)


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
    """Turn what goes wrong in reading `path` into a ValueError that names it."""
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
