"""REPA's folders as they are: images/ and vae-sd/, one PNG and one .npy file per sample.

    images/00000/img00000000.png            RGB, at the dataset's resolution; .jpg and .npy too
    vae-sd/00000/img-mean-std-00000000.npy  float32 (2C, h, w) or (1, 2C, h, w), unscaled
    vae-sd/dataset.json                     {"labels": [["00000/img-mean-std-00000000.npy", 6]]}

A latent and an image belong together if folder and number agree. Latents alone will do where no
encoder needs the images.
"""

import hashlib
import io
import os
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from repa_fast.data.dataset import Metadata, Sample, check_sample, decode, encode
from repa_fast.data.features import FeatureColumn, describing
from repa_fast.whole import parse_json, read_regular, whole_or_not
from repa_fast.words import first_line, one_line, short, some

SD_VAE_FACTOR = 8
SD_VAE_SCALE = 0.18215
CACHE_NAME = ".repa-fast-index.npz"
NUMBER = re.compile(r"(\d+)\.\w+$")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".npy")
MAX_LABEL = 10**6
"""A class is named for each label up to the largest."""
KINDS = {"latents": "S", "images": "S", "labels": "i"}
"""Of the arrays of an index: bytes, and integers."""


class OfficialFolder:
    """Rows of an official folder, in the order of its dataset.json; the interface of LatentDataset.

    The paired names are cached in the folder (in ~/.cache/repa-fast if it cannot be written), so
    that only the first start walks it.

    Raises:
        ValueError: no labels, a latent without label or image, or the other way round; names some.
    """

    features: Mapping[str, FeatureColumn] = {}  # there are none

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.uri = str(root)
        index = load_index(self.root)
        self._latents, self._images, self._labels = map(index.get, KINDS)
        first = self._read_moments(0)
        channels, side = first.shape[0] // 2, first.shape[-1]
        self.metadata = Metadata(
            resolution=side * SD_VAE_FACTOR,
            latent_shape=(channels, side, side),
            vae="sd-vae-ft-mse",
            scale=SD_VAE_SCALE,
            bias=0.0,
            class_names=tuple(str(label) for label in range(int(self._labels.max()) + 1)),
        )

    def __len__(self) -> int:
        return len(self._latents)

    def labels(self) -> np.ndarray:
        """Return the class indices of all rows, int64 (N)."""
        return self._labels

    def fetch(
        self, indices: np.ndarray, *, images: bool = True, features: Sequence[str] = ()
    ) -> list[tuple[int, bool]]:
        """Return what `decode` needs for each row; nothing is read yet.

        Raises:
            ValueError: images or features are asked for and there are none.
        """
        if features:
            raise ValueError(
                f"{self.root} is an official folder, which has no columns of features; copy it "
                "with `repa-fast prepare import-official`"
            )
        if images and not self.has_images:
            raise ValueError(
                f"{self.root} has no images/, expected them for the encoder; --enc-type none "
                "trains on the latents alone"
            )
        return [(int(index), images) for index in indices]

    def decode(self, fetched: tuple[int, bool]) -> Sample:
        """Read one row's files; ValueError names one that is missing, damaged or misshapen."""
        index, images = fetched
        moments, label = self._read_moments(index), int(self._labels[index])
        sample: Sample = {"index": index, "moments": moments, "label": label}
        if images:
            sample["image"] = self._read_image(index)
        check_sample(str(self._latent_path(index)), sample, self.metadata)
        return sample

    @property
    def has_images(self) -> bool:
        """Whether there are images beside the latents."""
        return len(self._images) > 0

    def image_bytes(self, index: int) -> bytes:
        """Return the image file of a row as it is; a .npy image as PNG."""
        path = self._image_path(index)
        if path.suffix != ".npy":
            return read_bytes(path)
        return encode(self._read_image(index).transpose(1, 2, 0))

    def _latent_path(self, index: int) -> Path:
        return self.root / "vae-sd" / os.fsdecode(self._latents[index])

    def _image_path(self, index: int) -> Path:
        return self.root / "images" / os.fsdecode(self._images[index])

    def _read_moments(self, index: int) -> np.ndarray:
        path = self._latent_path(index)
        moments = _npy(path)
        if moments.ndim == 4 and len(moments) == 1:
            moments = moments[0]
        if moments.ndim != 3 or len(moments) % 2 or not moments.size or moments.dtype.kind != "f":
            got = f"{moments.dtype} {moments.shape}"
            raise ValueError(f"{path}: moments are {got}, expected float32 (2C, h, w)")
        return moments.astype(np.float32, copy=False)

    def _read_image(self, index: int) -> np.ndarray:
        path, side = self._image_path(index), self.metadata.resolution
        if path.suffix != ".npy":
            return decode(read_bytes(path), side, str(path))
        pixels, shape = _npy(path), (3, side, side)
        if pixels.shape != shape or pixels.dtype != np.uint8:
            raise ValueError(f"{path}: {pixels.dtype} {pixels.shape}, expected uint8 {shape}")
        return pixels


def load_index(root: Path) -> dict[str, np.ndarray]:
    """Return the names of "latents" and of "images" (empty without images/) and "labels", by row.

    They come from the cache where it belongs to this dataset.json; else they are paired and cached.
    """
    listing = _listing(root)
    status = listing.stat()
    state = np.array([status.st_size, status.st_mtime_ns, (root / "images").is_dir()])
    home = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:16]
    caches = [root / CACHE_NAME, Path.home() / ".cache" / "repa-fast" / f"{home}.npz"]
    for cache in caches:
        if cache.is_file() and (index := _cached(cache, state)) is not None:
            return index
    index = pair(root, listing)
    for cache in caches:
        try:
            with whole_or_not(cache, replace=True) as partial, open(partial, "xb") as file:
                np.savez(file, state=state, **index)
            break
        except OSError:
            continue
    return index


def _cached(cache: Path, state: np.ndarray) -> dict[str, np.ndarray] | None:
    """Return the index that a cache holds; None unless it is whole and belongs to this listing."""
    try:
        with zipfile.ZipFile(cache) as archive:
            if any(part.file_size > part.compress_size for part in archive.infolist()):
                return None  # ours are not compressed; a stranger's might unpack to gigabytes
        with np.load(cache, allow_pickle=False) as stored:
            found, index = stored["state"], {name: stored[name] for name in KINDS}
    except Exception:  # cut short, of another program, or of objects: it is made anew
        return None
    latents, images, labels = index.values()
    whole = (
        np.array_equal(found, state)
        and all(a.ndim == 1 and a.dtype.kind == KINDS[name] for name, a in index.items())
        and len(latents) == len(labels) > 0
        and len(images) in (0, len(latents))
        and 0 <= labels.min() <= labels.max() <= MAX_LABEL
    )
    return index if whole else None


def pair(root: Path, listing: Path) -> dict[str, np.ndarray]:
    """Walk the folder once and pair latents, labels and images by folder and number.

    Raises:
        ValueError: something has no counterpart.
    """
    labels = _labels(listing)
    latents = dict(_walk(root / "vae-sd", (".npy",)))
    _expect_same(latents, labels, "latents", f"labels in {listing}")
    images: dict[str, str] = {}
    if (root / "images").is_dir():
        images = dict(_walk(root / "images", IMAGE_SUFFIXES))
        _expect_same(latents, images, "latents", "images")
    return {
        "latents": _bytes(latents[key] for key in labels),
        "images": _bytes(images[key] for key in labels if images),
        "labels": np.array(list(labels.values()), dtype=np.int64),
    }


def _bytes(names: Iterable[str]) -> np.ndarray:
    return np.array(list(map(os.fsencode, names)), dtype=np.bytes_)


def _listing(root: Path) -> Path:
    for folder in ("vae-sd", "images"):
        if (root / folder / "dataset.json").is_file():
            return root / folder / "dataset.json"
    raise ValueError(f"{root} has no vae-sd/dataset.json, expected the labels there")


def _labels(listing: Path) -> dict[str, int]:
    content = parse_json(read_bytes(listing), listing)
    with describing(str(listing)):
        pairs = content.get("labels") if isinstance(content, dict) else None
        if not pairs or not isinstance(pairs, list):
            raise ValueError("has no labels, expected a list of [name, class] under that name")
        labels: dict[str, int] = {}
        for item in pairs:
            if not isinstance(item, list) or [*map(type, item)] != [str, int]:
                raise ValueError(f"{short(item)}, expected [name, class] with an integer class")
            if not 0 <= item[1] <= MAX_LABEL:
                expected = f"expected 0..{MAX_LABEL}"
                raise ValueError(f"label of {short(item[0])} is {short(item[1])}, {expected}")
            labels[_key(item[0], listing)] = item[1]
    if len(labels) != len(pairs):
        raise ValueError(f"{listing} lists {len(pairs)} names, {len(labels)} of them different")
    return labels


def _walk(folder: Path, suffixes: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Yield (key, name relative to `folder`) of every file with one of the suffixes."""
    with os.scandir(folder) as entries:
        subfolders = sorted(entry.name for entry in entries if entry.is_dir())
    for subfolder in subfolders:
        with os.scandir(folder / subfolder) as entries:
            for entry in entries:
                if entry.name.lower().endswith(suffixes):
                    name = f"{subfolder}/{entry.name}"
                    yield _key(name, folder), name


def _key(name: str, where: Path) -> str:
    """Return folder and number, by which files pair: 00000/img00000007.png -> 00000/00000007."""
    number = NUMBER.search(name)
    if number is None:
        raise ValueError(
            f"{where}: {short(name)} has no number, expected a name like img00000000.png"
        )
    return f"{name.rpartition('/')[0]}/{number[1]}"


def _expect_same(ours: dict, theirs: dict, our_name: str, their_name: str) -> None:
    for here, there, name, other in (
        (ours, theirs, our_name, their_name),
        (theirs, ours, their_name, our_name),
    ):
        lone = [key for key in here if key not in there]
        if lone:
            raise ValueError(f"{len(lone)} {name} have no counterpart among {other}: {some(lone)}")


def read_bytes(path: Path) -> bytes:
    """Read a file, or raise ValueError that names it: also a pipe or a device."""
    try:
        return read_regular(path)
    except OSError as error:
        reason = one_line(error.strerror or error)
        raise ValueError(f"{one_line(path)}: cannot be read ({reason})") from error


def _npy(path: Path) -> np.ndarray:
    data = read_bytes(path)
    try:
        return npy.read_array(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # lack of memory too, for what a header claims
        raise ValueError(f"{path}: not a .npy array ({first_line(error)})") from error
