"""`repa-fast prepare features`: an encoder's features as further columns of a dataset.

The unit of work is a fragment of the table (4,096 rows as prepare writes them), whose images are
decoded as training would, and encoded in batches of one size, the last one padded.
"""

import functools
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from repa_fast.data.dataset import Fetched, LatentDataset
from repa_fast.data.features import FeatureColumn, Storage
from repa_fast.data.store import to_lists, unwrapped
from repa_fast.distributed import own_device, progress_bar, rank_and_size
from repa_fast.failure import Failure
from repa_fast.prepare.fragments import (
    ANEW,
    Fragments,
    Parts,
    checksum,
    encode_padded,
    expect_checksums,
    weights_digest,
)
from repa_fast.words import one_line

if TYPE_CHECKING:
    import pyarrow as pa

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
RESERVED = ("index", "image", "moments", "label")
NEVER = timedelta(days=36_500)
"""Age at which versions of the table that are no longer the newest are removed."""

EncodeImages = Callable[[np.ndarray], torch.Tensor]
"""uint8 (B, 3, R, R) -> features (B, N, D)."""


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig:
    """`repa-fast prepare features`: encode the images of a dataset and store the features."""

    data_dir: str
    """Folder of a native dataset; the columns are added to DATA_DIR/SPLIT.lance."""
    enc_type: str = "dinov2-vit-b"
    """The encoder."""
    enc_weights: str = ""
    """Its weights file; its own source where empty."""
    column: str = ""
    """Name of the column; the encoder's, with underscores, where empty."""
    storage: Storage = "fp16"
    """fp16, or int8 with a scale per token, half the size."""
    split: Literal["train", "val"] = "train"
    """Name of the table."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the encoder."""
    batch_size: int = 64
    """Images per encoding; part of the recipe, since it can change the last bit."""
    compile: bool = False
    """torch.compile the encoder."""
    num_workers: int = 4
    """Threads that decode, per process."""
    restart: bool = False
    """Throw away an unfinished beginning, of whatever column, and begin anew."""
    verify: bool = False
    """Read a finished column again and compare its checksums, instead of writing one."""


def prepare_features(config: FeaturesConfig) -> str:
    """Add a column of features, or verify one; all processes of torchrun call it.

    Returns:
        What was done, for people; empty on processes other than the first.

    Raises:
        ValueError: dataset, encoder or an earlier beginning do not fit, or an image is bad.
        RuntimeError: the encoder's weights cannot be had, or, a Failure, the disk is full.
    """
    from repa_fast import encoders

    rank, world_size = rank_and_size()
    dataset = LatentDataset(config.data_dir, config.split)
    if not Path(dataset.uri).is_dir():
        raise ValueError(f"{dataset.uri} is not a local folder, expected one to write into")
    name = config.column or config.enc_type.replace("-", "_")
    if config.verify:
        with progress_bar("verifying", rank == 0) as progress:
            verify(dataset, name, progress(len(dataset)))
        return f"{dataset.uri}: {len(dataset)} rows of {name}, all as they were written"
    spec, resolution = encoders.spec(config.enc_type), dataset.metadata.resolution
    column = FeatureColumn(
        name=name,
        encoder=spec.name,
        resolution=resolution,
        tokens=spec.num_tokens(resolution),
        width=spec.width,
        storage=config.storage,
        precision=config.precision,
    )
    device = own_device()
    encoder = encoders.load(spec.name, resolution, device, config.enc_weights)
    if config.compile:
        encoder.compile()

    @torch.no_grad()
    def encode(images: np.ndarray) -> torch.Tensor:
        on_device = torch.from_numpy(images).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            return encoder(on_device)

    with progress_bar(f"{dataset.uri} {name}", rank == 0) as progress:
        weights = weights_digest(config.enc_weights)
        rows = Extraction(dataset, column, encode, config.batch_size, weights).run(
            rank=rank,
            world_size=world_size,
            workers=config.num_workers,
            restart=config.restart,
            progress=progress(len(dataset)),
        )
    if rows is None:
        return ""
    size = column.bytes_per_image
    total = f"{size * rows / 1e9:.2f} GB, {size / 1000:.1f} kB per image"
    return f"{dataset.uri}: {rows} rows of {name} ({total})"


class Extraction(Fragments):
    """A table while a column is being added.

    Args:
        encode: for exactly `batch` images.
        weights: a hash of the encoder's file, "" for its own source.

    Raises:
        ValueError: the name of the column cannot be one.
    """

    def __init__(
        self,
        dataset: LatentDataset,
        column: FeatureColumn,
        encode: EncodeImages,
        batch: int,
        weights: str = "",
    ) -> None:
        if not NAME.fullmatch(column.name) or column.name in RESERVED:
            raise ValueError(
                f"column is {column.name!r}, expected letters, digits and underscores, and none "
                f"of {', '.join(RESERVED)}"
            )
        self.dataset, self.column, self.encode, self.batch = dataset, column, encode, batch
        self.uri, self.version = Path(dataset.uri), dataset.table.version
        self.folder = self.uri.parent / f".{self.uri.stem}.features"
        own = {"weights": weights, "batch": batch, "version": self.version}
        self.settings = asdict(column) | own
        self.fragments = dataset.table.get_fragments()
        self.starts = np.cumsum([0, *(fragment.count_rows() for fragment in self.fragments)])
        self.checks_file = _checks_file(dataset, column.name)
        self.kept = "fragments"

    def taken(self) -> str:
        """Return "", or that the newest version of the table has the column already."""
        import lance

        names = set(self.column.columns) & set(lance.dataset(str(self.uri)).schema.names)
        return f"{self.uri} has a column {min(names)} already; --verify it" if names else ""

    def outdated(self) -> str:
        """Return "", or that the table was changed since it was opened."""
        import lance

        same = lance.dataset(str(self.uri)).version == self.version
        return "" if same else f"{self.uri} was changed a moment ago; run the same command again"

    def clean(self) -> None:
        """Remove data files that no version of the table has."""
        import lance

        lance.dataset(str(self.uri)).cleanup_old_versions(older_than=NEVER, delete_unverified=True)

    def write(self, unit: int) -> None:
        """Write the new columns of a fragment, then its record."""
        import pyarrow as pa

        schema, crc32 = pa.schema(self.column.fields()), 0

        def batches() -> Iterator[pa.RecordBatch]:
            nonlocal crc32
            for arrays in self._packed(unit):
                # row by row, so that batches do not matter
                for row in zip(*(arrays[name] for name in self.column.columns), strict=True):
                    crc32 = checksum(crc32, row)
                yield _record_batch(arrays, schema)

        with unwrapped(batches()) as given:
            reader = pa.RecordBatchReader.from_batches(schema, given)
            metadata, merged = self.fragments[unit].merge_columns(reader)
        # Arrow's form of Lance's schema would lose the numbers of the fields
        text, *fields = merged.__reduce__()[1]
        record = {
            "rows": self.fragments[unit].count_rows(),
            "crc32": crc32,
            "fragments": [metadata.to_json()],
            "schema": [text, *(field.hex() for field in fields)],
        }
        self.ledger.write(unit, record)

    def _packed(self, unit: int) -> Iterator[dict[str, np.ndarray]]:
        """Yield the features of a fragment as they are stored, batch by batch."""
        indices = np.arange(self.starts[unit], self.starts[unit + 1])
        parts = (indices[i : i + self.batch] for i in range(0, len(indices), self.batch))
        fetched = itertools.chain.from_iterable(map(self.dataset.fetch, parts))
        decode = self.dataset.decode
        for part in self.batched(lambda row: decode(row)["image"], fetched, self.batch):
            yield self.column.pack(encode_padded(self.encode, part, self.batch))

    def operation(self, records: list[dict], fragments: list) -> object:
        """Return the replacing of all fragments."""
        import lance

        rebuild = self.dataset.table.lance_schema.__reduce__()[0]
        text, *fields = records[0]["schema"]
        return lance.LanceOperation.Merge(fragments, rebuild(text, *map(bytes.fromhex, fields)))

    def commit(self) -> int:
        """Commit all fragments; remove what a kill cut off between columns and their record."""
        from lance.commit import CommitConflictError

        try:
            rows = super().commit()
        except CommitConflictError as error:
            raise Failure(
                f"{self.uri} was changed while the features were computed; {ANEW} "
                f"({one_line(error)})"
            ) from error
        self.clean()
        return rows


def _record_batch(arrays: dict[str, np.ndarray], schema: "pa.Schema") -> "pa.RecordBatch":
    import pyarrow as pa

    return pa.record_batch([to_lists(arrays[name]) for name in schema.names], schema=schema)


def _checks_file(dataset: LatentDataset, name: str) -> Path:
    uri = Path(dataset.uri)
    return uri.with_name(f"{uri.stem}.{name}.json")


def verify(
    dataset: LatentDataset, name: str, progress: Callable[[int], None] = lambda done: None
) -> None:
    """Read a column again and compare its checksums.

    Raises:
        ValueError: there is none, it is not finite, or a checksum is not what it was.
    """
    fetch = functools.partial(dataset.fetch, images=False, features=[name])

    def parts(fetched: Fetched) -> Parts:
        return dataset.decode(fetched)["features"].values()

    names = (name, "part", "features")
    expect_checksums(dataset, _checks_file(dataset, name), fetch, parts, names, progress)
