"""Images to a native dataset, by any number of processes, resumable after a kill at any moment.

The unit of work is a block of consecutive images, which are cropped, and encoded in batches of one
size, the last one padded.
"""

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from repa_fast.data import dataset
from repa_fast.data.dataset import Fetched, Metadata, Row, encode
from repa_fast.prepare.crop import center_crop, original
from repa_fast.prepare.fragments import (
    ANEW,
    Fragments,
    Parts,
    checksum,
    encode_padded,
    expect_checksums,
)
from repa_fast.prepare.sources import Source

BLOCK = 4096
"""Images per block: what a kill can cost, and the rows of a fragment."""

Encode = Callable[[np.ndarray], np.ndarray]
"""uint8 (B, 3, R, R) -> float32 moments (B, 2C, h, w)."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What decides the rows, beside the source."""

    source: str  # its path, and what was asked of it; for messages and for resuming
    rows: int  # images of the source
    metadata: Metadata
    image: str = "jpeg"  # "png", or "original", the file's own bytes
    quality: int = 95  # of JPEG
    encoder: str  # of the latents: autoencoder, precision and, of a local one, its weights
    batch: int = 32  # images per encoding
    on_bad_image: str = "error"  # or "skip", which may follow an "error"
    block: int = BLOCK  # images per block


class Building(Fragments):
    """OUT/SPLIT.lance while it is being built.

    Args:
        source, out, split: what to read, and where to write.
        recipe: what else decides the rows.
        encode_batch: for exactly `recipe.batch` images.
    """

    version = None  # there is no table before

    def __init__(
        self, source: Source, out: Path, split: str, recipe: Recipe, encode_batch: Encode
    ) -> None:
        self.source, self.recipe, self.encode_batch = source, recipe, encode_batch
        self.uri, self.folder = out / f"{split}.lance", out / f".{split}.building"
        self.settings = asdict(recipe) | source.identity()
        del self.settings["on_bad_image"]
        self.starts = [*range(0, recipe.rows, recipe.block), recipe.rows]
        self.checks_file = self.uri.with_suffix(".blocks.json")
        self.kept = f"of {len(self.starts) - 1} blocks"

    def taken(self) -> str:
        """Return "", or that there is a table already."""
        there = (self.uri / "_versions").exists()
        return f"{self.uri} exists already; remove it first, or --verify it" if there else ""

    def clean(self) -> None:
        """Remove the data files, where there is no table."""
        if not self.taken():
            shutil.rmtree(self.uri / "data", ignore_errors=True)

    def expect_begun(self) -> None:
        """Raise ValueError if a bad image stops, and one was skipped before."""
        for unit in self.ledger.done() if self.recipe.on_bad_image == "error" else ():
            if skipped := self.ledger.read(unit)["skipped"]:
                raise ValueError(
                    f"{self.folder}: block {unit} has left out {len(skipped)} of its images "
                    f"({skipped[0]}); go on with --on-bad-image skip, or {ANEW}"
                )

    def write(self, unit: int) -> None:
        """Write a block's rows, then its record."""
        import lance
        import pyarrow as pa

        rows, skipped = self._rows(unit)
        schema, fragments = dataset.schema(self.recipe.metadata), []
        if rows:
            batches = [
                dataset.record_batch(rows[i : i + 256], schema) for i in range(0, len(rows), 256)
            ]
            fragments = lance.fragment.write_fragments(
                pa.RecordBatchReader.from_batches(schema, batches),
                str(self.uri),
                schema=schema,
                mode="create",
            )
        record = {
            "rows": len(rows),
            "crc32": checksum(0, (part for row in rows for part in _parts(row))),
            "skipped": skipped,
            "fragments": [fragment.to_json() for fragment in fragments],
        }
        self.ledger.write(unit, record)

    def operation(self, records: list[dict], fragments: list) -> object:
        """Return the making of the table; remove files of blocks that have no record."""
        import lance

        if not fragments:
            raise ValueError(f"{self.recipe.source} has no good image")
        kept = {Path(file.path).name for fragment in fragments for file in fragment.files}
        for file in (self.uri / "data").iterdir():
            if file.name not in kept:
                file.unlink()
        return lance.LanceOperation.Overwrite(dataset.schema(self.recipe.metadata), fragments)

    def _rows(self, block: int) -> tuple[list[Row], list[str]]:
        """Return the rows of a block, and what was wrong with each image that was skipped."""
        recipe, rows, skipped = self.recipe, [], []
        indices = range(self.starts[block], self.starts[block + 1])
        for part in self.batched(self._image, indices, recipe.batch):
            good = [image for image in part if not isinstance(image, ValueError)]
            skipped += [str(image) for image in part if isinstance(image, ValueError)]
            if not good:
                continue
            moments = encode_padded(self.encode_batch, [image[0] for image in good], recipe.batch)
            for (_, data, label), of_image in zip(good, moments, strict=True):
                row: Row = {"image": data, "moments": of_image, "label": label}
                dataset.check_sample(f"{recipe.source} block {block}", row, recipe.metadata)
                rows.append(row)
        return rows, skipped

    def _image(self, index: int) -> tuple[np.ndarray, bytes, int] | ValueError:
        """Return pixels uint8 (3, R, R), file and label; the error of an image to be skipped."""
        recipe, side = self.recipe, self.recipe.metadata.resolution
        try:
            item = self.source.read(index)
            pixels = center_crop(item.data, side, item.name)
            if recipe.image == "original":
                data = original(item.data, side, item.name)
            else:
                data = encode(pixels, recipe.image, recipe.quality)
        except ValueError as error:
            if recipe.on_bad_image == "error":
                raise
            return error
        return np.ascontiguousarray(pixels.transpose(2, 0, 1)), data, item.label


def _parts(row: Row) -> Parts:
    moments = np.asarray(row["moments"], dtype=np.float32)
    return row["image"], moments, int(row["label"]).to_bytes(8, "little")


def verify(out: Path, split: str, progress: Callable[[int], None] = lambda done: None) -> int:
    """Read everything again (shapes, finite moments, images, checksums) and return the rows.

    Raises:
        ValueError: what is wrong, and where.
    """
    table = dataset.LatentDataset(out, split)

    def parts(fetched: Fetched) -> Parts:
        return _parts(table.decode(fetched) | {"image": fetched.image})

    names = ("content", "block", "images")
    return expect_checksums(
        table, out / f"{split}.blocks.json", table.fetch, parts, names, progress
    )
