"""Files of images and of reference statistics, in the layout of ADM's evaluator.

An npz of images has arr_0, uint8 (N, H, W, 3). A reference has in addition the mean and covariance
of the features of a whole dataset, mu and sigma of pool_3, mu_s and sigma_s of sFID's features, and
in arr_0 the images for precision and recall (10,000 in the published files).
"""

import hashlib
import os
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from numpy.lib import format as npy

from repa_fast.checkpoint.layout import GENERATED
from repa_fast.eval.inception import POOL_WIDTH, SPATIAL_WIDTH
from repa_fast.whole import open_regular, parse_json, read_regular, whole_or_not
from repa_fast.words import first_line, one_line

Statistics = tuple[np.ndarray, np.ndarray]
"""Mean (F) and covariance (F, F), fp64."""
SHAPES = {
    "mu": (POOL_WIDTH,),
    "sigma": (POOL_WIDTH, POOL_WIDTH),
    "mu_s": (SPATIAL_WIDTH,),
    "sigma_s": (SPATIAL_WIDTH, SPATIAL_WIDTH),
}


class ImageFile:
    """The images of an npz, read in batches: 50,000 of 256x256 pixels would be 9.8 GB at once.

    Args:
        path: npz with arr_0, uint8 (N, H, W, 3), compressed or not.
        count: how many to take, the first ones; all if None.

    Raises:
        ValueError: no such file, another content, or fewer than `count` images.
    """

    def __init__(self, path: str | Path, count: int | None = None) -> None:
        self.path = Path(path)
        with self._images() as (_, shape):
            available, self.height, self.width, _ = shape
        if count is not None and available < count:
            expected = f"expected at least {count} (--num-samples)"
            raise ValueError(f"{path} has {available} images, {expected}")
        self.count, self._available = available if count is None else count, available

    @cached_property
    def name(self) -> str:
        """Its file name, with the first 16 hexadecimal digits of the file's SHA-256."""
        with open_regular(self.path) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        return f"{self.path.name}, sha256 {digest}"

    @cached_property
    def labels(self) -> torch.Tensor | None:
        """Its images' classes, int64 (count), which are its arr_1; None where there is none.

        ValueError: arr_1 is not one integer for each image.
        """
        with _archive(self.path) as archive:
            if "arr_1.npy" not in archive.namelist():
                return None
            with _naming(self.path), archive.open("arr_1.npy") as stream:
                shape, _, dtype = _header(stream)
            if shape != (self._available,) or dtype.kind not in "iu":
                expected = f"expected integers ({self._available},), a label for each image"
                raise ValueError(f"{self.path}: arr_1 is {dtype} {shape}, {expected}")
            with _naming(self.path), archive.open("arr_1.npy") as stream:
                labels = npy.read_array(stream, allow_pickle=False)
        return torch.from_numpy(labels[: self.count].astype(np.int64))

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
        with _archive(self.path, "arr_0") as archive, ExitStack() as opened:
            with _naming(self.path):
                stream = opened.enter_context(archive.open("arr_0.npy"))
                shape, fortran, dtype = _header(stream)
            if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or min(shape) < 1 or fortran:
                raise ValueError(
                    f"{self.path}: arr_0 is {dtype} {shape}{' in Fortran order' * fortran}, "
                    "expected uint8 (N, H, W, 3)"
                )
            yield stream, shape


def newest_images(path: Path, weights: str = "") -> Path:
    """Return the file that is meant: `path`, or the newest .npz of a run's folder RUN/generated.

    There only those of a set of `weights` (any where empty) count, as the JSON beside them says.

    Raises:
        ValueError: there is none in that folder, or in RUN where it is `path` itself.
    """
    if not path.is_dir():
        return path
    run = path.parent if path.name == GENERATED else path
    found = [file for file in run.glob(f"{GENERATED}/*.npz") if not file.name.startswith(".")]
    if weights:
        found = [file for file in found if _weights_of(file) == weights]
    if not found:
        of, flag = (f" of weights {weights}", f" --weights {weights}") if weights else ("", "")
        raise ValueError(
            f"{run / GENERATED} has no .npz of images{of}, expected one of `repa-fast generate "
            f"--ckpt {run}{flag}`"
        )
    return max(found, key=lambda file: (file.stat().st_mtime_ns, file.name))


def _weights_of(images: Path) -> object:
    beside = images.with_suffix(".json")
    described = parse_json(read_regular(beside), beside) if beside.is_file() else {}
    return described.get("weights") if isinstance(described, dict) else None


class Reference(NamedTuple):
    """What images are compared with: images for precision and recall, and statistics of pool_3
    (width 2048) and of sFID's features (width 2023)."""

    images: ImageFile
    pool: Statistics
    spatial: Statistics


def load(path: str | Path) -> Reference:
    """Read a reference; its images are not read yet.

    Raises:
        ValueError: no such file, or something in it is missing, of another shape, not finite or no
            covariance.
    """
    with _archive(path, "arr_0", *SHAPES) as archive:
        images = ImageFile(path)
        arrays = {key: _array(archive, path, key) for key in SHAPES}
    _expect_statistics(arrays, f"{path}: ")
    mean, cov, spatial_mean, spatial_cov = (a.astype(np.float64) for a in arrays.values())
    return Reference(images, (mean, cov), (spatial_mean, spatial_cov))


def write(path: str | Path, *, images: np.ndarray, pool: Statistics, spatial: Statistics) -> None:
    """Write a reference: statistics of a dataset, and a sample of it, images uint8 (N, H, W, 3).

    The file appears whole or not at all, in the place of an older one.

    Raises:
        ValueError: other images, or statistics of another width.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"images are {images.dtype} {images.shape}, expected uint8 (N, H, W, 3)")
    arrays = dict(zip(SHAPES, (*pool, *spatial), strict=True))
    _expect_statistics(arrays)
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
    with (
        whole_or_not(out, replace=True) as partial,
        open(partial, "xb") as whole,
        zipfile.ZipFile(whole, "w", zipfile.ZIP_STORED) as archive,
    ):
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


@contextmanager
def _archive(path: str | Path, *needed: str) -> Iterator[zipfile.ZipFile]:
    """Open an .npz, which must have the arrays `needed`."""
    with ExitStack() as opened:
        try:
            file = opened.enter_context(open_regular(Path(path)))
            archive = opened.enter_context(zipfile.ZipFile(file))
        except Exception as error:  # a damaged archive fails in any way
            raise ValueError(f"{path} is not an npz file: {first_line(error)}") from error
        names = archive.namelist()
        if missing := [name for name in needed if f"{name}.npy" not in names]:
            known = ", ".join(name.removesuffix(".npy") for name in names) or "nothing"
            raise ValueError(f"{path} lacks {', '.join(missing)}, it has {one_line(known)}")
        yield archive


@contextmanager
def _naming(path: str | Path) -> Iterator[None]:
    """Turn what goes wrong in reading `path` into a ValueError that names it."""
    try:
        yield
    except Exception as error:  # of zip, zlib or numpy, and lack of memory that a header claims
        raise ValueError(f"{path} cannot be read: {first_line(error)}") from error


def _header(stream: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Read the shape of an array, whether it is in Fortran order, and its dtype."""
    if (version := npy.read_magic(stream)) != (1, 0):  # other headers may be of 4 GB
        raise ValueError(f"version {version} of the npy format, expected (1, 0)")
    return npy.read_array_header_1_0(stream)


def _array(archive: zipfile.ZipFile, path: str | Path, key: str) -> np.ndarray:
    """Read an array of `SHAPES`, if its header says that it is one."""
    with _naming(path), archive.open(f"{key}.npy") as stream:
        shape, _, dtype = _header(stream)
    _expect_kind(key, shape, dtype, f"{path}: ")
    with _naming(path), archive.open(f"{key}.npy") as stream:
        return npy.read_array(stream, allow_pickle=False)


def _expect_kind(key: str, shape: tuple[int, ...], dtype: np.dtype, where: str) -> None:
    if shape != SHAPES[key] or dtype.kind != "f":
        got = f"{where}{key} is {dtype} {shape}"
        raise ValueError(f"{got}, expected floating point {SHAPES[key]}")


def _expect_statistics(arrays: dict[str, np.ndarray], where: str = "") -> None:
    for key, array in arrays.items():
        _expect_kind(key, array.shape, array.dtype, where)
        if not np.isfinite(array).all():
            raise ValueError(f"{where}{key} is not finite")
        if array.ndim == 2 and not _may_be_covariance(array):
            expected = "expected a symmetric matrix whose diagonal is at least 0"
            raise ValueError(f"{where}{key} is no covariance, {expected}")


def _may_be_covariance(matrix: np.ndarray) -> bool:
    """Return whether (F, F) has variances of at least 0 and is symmetric to rounding in F terms."""
    rounding = len(matrix) * np.finfo(matrix.dtype).eps * np.abs(matrix).max()
    with np.errstate(over="ignore"):
        symmetric = np.abs(matrix - matrix.T).max() <= rounding
    return bool(symmetric and (np.diagonal(matrix) >= 0).all())
