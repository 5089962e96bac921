"""The native dataset: one Lance table of image bytes, latent moments and labels."""

import errno
import functools
import io
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, NotRequired, TypedDict

import numpy as np

from repa_fast.data.features import (
    COUNT,
    METADATA_KEY,
    TEXT,
    FeatureColumn,
    describing,
    expect_fields,
    expect_type,
    feature_columns,
)
from repa_fast.data.images import open_image, to_rgb
from repa_fast.data.store import (
    NULL,
    from_lists,
    no_panic,
    open_table,
    read_column,
    take,
    to_lists,
    unwrapped,
)
from repa_fast.whole import is_disk_full, parse_json

if TYPE_CHECKING:
    import pyarrow as pa

ROWS_PER_FILE = 4096
"""Rows of a fragment: what a kill costs while a column is added."""

LARGEST, SMALLEST = 1e6, 1e-6
"""Of scales and biases: beyond, latents or pixels overflow, or nothing of them is left."""

Encoding = Literal["jpeg", "png"]


def _within(value: object, smallest: float = 0.0) -> bool:
    return type(value) in (int, float) and smallest <= abs(value) <= LARGEST


def _all(value: object, fits: Callable[[object], bool]) -> bool:
    return isinstance(value, list | tuple) and all(map(fits, value))


FIELDS = {
    "resolution": COUNT,
    "latent_shape": ("three integers above 0", lambda v: _all(v, COUNT[1]) and len(v) == 3),
    "vae": TEXT,
    "scale": (
        f"a number from {SMALLEST:g} to {LARGEST:g}, or its negative",
        lambda value: _within(value, SMALLEST),
    ),
    "bias": (f"a number of at most {LARGEST:g} either way", _within),
    "class_names": ("texts, at least one", lambda value: _all(value, TEXT[1]) and len(value) > 0),
}


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """What holds for every row. Moments are (2C, h, w), mean then standard deviation, unscaled."""

    resolution: int  # height and width of the images, in pixels
    latent_shape: tuple[int, int, int]  # (C, h, w)
    vae: str  # name of the autoencoder; "none" for pixel latents x / 127.5 - 1
    scale: float  # the model's latents are sample * scale + bias
    bias: float
    class_names: tuple[str, ...]  # one per class; labels index it

    @classmethod
    def from_dict(cls, fields: dict) -> "Metadata":
        """Return the metadata that `asdict` and JSON wrote, where tuples are lists.

        ValueError names a field that is missing, too much, or not what it has to be.
        """
        expect_fields(fields, FIELDS)
        lists = {name: tuple(fields[name]) for name in ("latent_shape", "class_names")}
        return cls(**fields | lists)

    @property
    def moments_shape(self) -> tuple[int, int, int]:
        channels, height, width = self.latent_shape
        return (2 * channels, height, width)


class Row(TypedDict):
    """image: encoded bytes (PNG or JPEG); moments: float32 (2C, h, w); label: class index."""

    image: bytes
    moments: np.ndarray
    label: int


class Rows(TypedDict):
    """Rows in the order asked for: index int64 (B), image bytes, moments float32 (B, 2C, h, w),
    label int64 (B), arrays of the columns of features."""

    index: np.ndarray
    image: list[bytes]
    moments: np.ndarray
    label: np.ndarray
    features: dict[str, np.ndarray]


class Fetched(NamedTuple):
    """One row as it is stored: image bytes, or None where not asked for; arrays of the columns of
    features that were."""

    index: int
    image: bytes | None
    moments: np.ndarray
    label: int
    features: dict[str, np.ndarray]


class Sample(TypedDict):
    """One row, decoded: moments float32 (2C, h, w); where asked for, image uint8 (3, R, R) and
    features as stored, by column."""

    index: int
    moments: np.ndarray
    label: int
    image: NotRequired[np.ndarray]
    features: NotRequired[dict[str, np.ndarray]]


def schema(metadata: Metadata) -> "pa.Schema":
    """Return the table's Arrow schema, with the metadata in it."""
    import pyarrow as pa

    values = math.prod(metadata.moments_shape)
    fields = [
        pa.field("image", pa.binary()),
        pa.field("moments", pa.list_(pa.float32(), values)),
        pa.field("label", pa.int64()),
    ]
    return pa.schema(fields, metadata={METADATA_KEY: json.dumps(asdict(metadata)).encode()})


def write(uri: str | Path, rows: Iterable[Row], metadata: Metadata, batch_rows: int = 1024) -> None:
    """Write a new table in one atomic commit.

    Raises:
        ValueError: a row whose moments or label do not fit the metadata (it is named), or a
            table that exists already.
    """
    import lance
    import pyarrow as pa

    table_schema = schema(metadata)

    def batches() -> Iterator[pa.RecordBatch]:
        numbered = iter(enumerate(rows))
        while pending := list(itertools.islice(numbered, batch_rows)):
            for index, row in pending:
                check_sample(f"row {index}", row, metadata)
            yield record_batch([row for _, row in pending], table_schema)

    try:
        with unwrapped(batches()) as given:
            lance.write_dataset(
                given,
                str(uri),
                schema=table_schema,
                mode="create",
                max_rows_per_file=ROWS_PER_FILE,
            )
    except OSError as error:
        if "already exists" in str(error).lower():
            raise ValueError(f"dataset {uri} exists already; remove it first") from error
        if is_disk_full(error):  # in Lance's words, with a line of its source
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(uri)) from error
        raise


def check_sample(name: str, row: Row | Sample, metadata: Metadata) -> None:
    """Raise ValueError, naming the row, unless its moments and label fit the metadata."""
    if row["moments"].shape != metadata.moments_shape:
        raise ValueError(
            f"{name}: moments have shape {row['moments'].shape}, expected {metadata.moments_shape}"
        )
    if not np.isfinite(row["moments"]).all():
        raise ValueError(f"{name}: moments are not finite")
    if (row["moments"][metadata.latent_shape[0] :] < 0).any():
        raise ValueError(f"{name}: a standard deviation is below 0, expected none")
    if not 0 <= row["label"] < len(metadata.class_names):
        raise ValueError(
            f"{name}: label is {row['label']}, expected 0..{len(metadata.class_names) - 1}"
        )


def record_batch(rows: Sequence[Row], table_schema: "pa.Schema") -> "pa.RecordBatch":
    """Return rows as Arrow columns of `schema`."""
    import pyarrow as pa

    moments = np.stack([row["moments"] for row in rows]).astype(np.float32)
    columns = [
        pa.array([row["image"] for row in rows], pa.binary()),
        to_lists(moments),
        pa.array([row["label"] for row in rows], pa.int64()),
    ]
    return pa.record_batch(columns, schema=table_schema)


def decode(data: bytes, resolution: int, name: str = "image") -> np.ndarray:
    """Decode an image of that size to uint8 RGB (3, resolution, resolution).

    Raises:
        ValueError: the bytes cannot be decoded or have another size; `name` is in the message.
    """
    image = open_image(data, name, resolution)
    return np.asarray(to_rgb(image, name)).transpose(2, 0, 1)


def encode(pixels: np.ndarray, kind: Encoding = "png", quality: int = 95) -> bytes:
    """Encode uint8 RGB (R, R, 3) as PNG, or as JPEG with chroma at full resolution (4:4:4).

    Raises:
        ValueError: another kind, dtype or shape, or a quality of a JPEG outside of 1..100.
    """
    from PIL import Image

    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"image is {pixels.dtype} {pixels.shape}, expected uint8 (R, R, 3)")
    if kind not in ("jpeg", "png"):
        raise ValueError(f"image kind is {kind!r}, expected 'jpeg' or 'png'")
    if kind == "jpeg" and not 1 <= quality <= 100:
        raise ValueError(f"JPEG quality is {quality}, expected 1..100")
    options = {"quality": quality, "subsampling": 0} if kind == "jpeg" else {}
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=kind.upper(), **options)
    return buffer.getvalue()


class LatentDataset:
    """Random access to a table; `table` is Lance's own, of the version that was opened.

    Args:
        uri: path or object-store URL of the table, or a folder that holds SPLIT.lance.
        split: "train" or "val", for such a folder.

    Raises:
        ValueError: there is no such table, its store fails, it has no rows, or it is not as this
            package writes it: names the field or column, what was expected and what there is.
    """

    def __init__(self, uri: str | Path, split: str = "train") -> None:
        self.table, self.uri = open_table(uri, split)
        with no_panic(self.uri):
            there, self._length = self.table.schema, self.table.count_rows()
        stored = (there.metadata or {}).get(METADATA_KEY)
        if stored is None:
            raise ValueError(f"{self.uri} is a Lance table without repa-fast's metadata")
        named = f"{self.uri}: metadata {METADATA_KEY.decode()}"
        fields = parse_json(stored, named)
        with describing(named):
            self.metadata = Metadata.from_dict(fields)
        with describing(self.uri):
            for field in schema(self.metadata):
                if field.name != "image" or "image" in there.names:
                    expect_type(there, field)
        if not self._length:
            raise ValueError(f"{self.uri} has no rows, expected at least one")

    def __len__(self) -> int:
        return self._length

    @functools.cached_property
    def features(self) -> dict[str, FeatureColumn]:
        """Columns of features that `repa-fast prepare features` has added, by name."""
        with describing(self.uri):
            return feature_columns(self.table.schema)

    def labels(self) -> np.ndarray:
        """Return the class indices of all rows, int64 (N), -1 for null; raises as `rows`."""
        return read_column(self.table, self.uri, "label").fill_null(-1).to_numpy()

    def rows(
        self, indices: np.ndarray, *, images: bool = True, features: Sequence[str] = ()
    ) -> Rows:
        """Return the rows at `indices` (B), in order; `image` is empty where not asked for.

        What is null comes as what `decode` refuses: no bytes, label -1, and as `from_lists` says.

        Raises:
            ValueError: there is no such column of features, or none of images.
            StoreError: the object store failed, and all retries too.
        """
        for name in features:
            if name not in self.features:
                there = ", ".join(self.features) or "none"
                raise ValueError(
                    f"{self.uri} has no column of features {name!r}, expected one of: {there}; "
                    "`repa-fast prepare features` adds one"
                )
        if images and "image" not in self.table.schema.names:
            raise ValueError(f"{self.uri} has no column image, expected one for the encoder")
        columns = [self.features[name] for name in features]
        names = ["moments", "label", *(["image"] if images else [])]
        names += [name for column in columns for name in column.columns]
        table = take(self.table, self.uri, indices.tolist(), names)
        return {
            "index": np.asarray(indices, dtype=np.int64),
            "image": table["image"].fill_null(b"").to_pylist() if images else [],
            "moments": from_lists(table["moments"], self.metadata.moments_shape),
            "label": table["label"].fill_null(-1).to_numpy(),
            "features": {k: array for column in columns for k, array in column.read(table).items()},
        }

    def fetch(
        self, indices: np.ndarray, *, images: bool = True, features: Sequence[str] = ()
    ) -> list[Fetched]:
        """Return what `decode` needs for each row; raises as `rows`."""
        order = np.argsort(indices)  # Lance sorts too, and then copies everything back in order
        rows = self.rows(indices[order], images=images, features=features)
        stored = rows.pop("features")
        rows["image"] = rows["image"] or [None] * len(indices)
        fetched = [
            Fetched(*row, {name: array[i] for name, array in stored.items()})
            for i, row in enumerate(zip(*rows.values(), strict=True))
        ]
        return [fetched[place] for place in np.argsort(order)]

    def decode(self, fetched: Fetched) -> Sample:
        """Decode one row to arrays.

        Raises:
            ValueError: its image cannot be decoded, or the rest does not fit; names the row.
        """
        index, encoded, moments, label, features = fetched
        name = f"{self.uri} row {index}"
        sample: Sample = {"index": int(index), "moments": moments, "label": int(label)}
        if encoded is not None:
            sample["image"] = decode(encoded, self.metadata.resolution, name)
        check_sample(name, sample, self.metadata)
        if features:
            sample["features"] = features
        for column, values in features.items():
            null = values.dtype == np.int8 and (values == NULL).any()
            if null or not np.isfinite(values).all():
                raise ValueError(f"{name}: {column} is {'null' if null else 'not finite'}")
        return sample
