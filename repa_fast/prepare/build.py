"""Images to a native dataset, by any number of processes, resumable after a kill at any moment.

The unit of work is a block of consecutive images. A process takes every WORLD_SIZE-th block, crops
and encodes it in batches of one size, the last one padded, writes it as fragments of the table and
then a record of it; so the rows do not depend on who computed them. A block without a record is
computed again. When every block has one, the first process commits them all at once: before that
there is no table, after it there is the whole one. Processes meet in the file system alone.
"""

import functools
import itertools
import json
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from repa_fast.data import dataset
from repa_fast.data.dataset import Metadata, Row
from repa_fast.ledger import Ledger, share, write_whole
from repa_fast.prepare.crop import center_crop, encode, original
from repa_fast.prepare.sources import Source

BLOCK = 4096
"""Images per block: what a kill can cost, and the rows of a fragment."""
AHEAD = 2
"""Batches that are decoded while one is encoded."""
VERIFIED_ROWS = 256
"""Rows that are read again at once."""

Encode = Callable[[np.ndarray], np.ndarray]
"""uint8 (B, 3, R, R) -> float32 moments (B, 2C, h, w)."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What decides the rows, beside the source.

    Attributes:
        source: its path, and what was asked of it; for messages and for resuming.
        rows: images of the source.
        metadata: of the dataset.
        image: "jpeg", "png" or "original" (the file's own bytes).
        quality: of JPEG.
        encoder: of the latents: autoencoder, precision and batch.
        batch: images per encoding.
        on_bad_image: "error" or "skip".
        block: images per block.
    """

    source: str
    rows: int
    metadata: Metadata
    image: str = "jpeg"
    quality: int = 95
    encoder: str
    batch: int = 32
    on_bad_image: str = "error"
    block: int = BLOCK

    @property
    def blocks(self) -> int:
        return -(-self.rows // self.block)


class Building:
    """A table that is being built; its ledger holds the recipe and the finished blocks."""

    def __init__(self, uri: Path, recipe: Recipe, ledger: Ledger) -> None:
        self.uri = uri
        self.blocks_file = uri.with_suffix(".blocks.json")
        self.recipe = recipe
        self.ledger = ledger

    def write(self, block: int, rows: Sequence[Row], skipped: Sequence[str]) -> None:
        """Write a block's rows, then its record."""
        import lance
        import pyarrow as pa

        schema = dataset.schema(self.recipe.metadata)
        batches = [
            dataset.record_batch(rows[i : i + 256], schema) for i in range(0, len(rows), 256)
        ]
        fragments = []
        if batches:
            reader = pa.RecordBatchReader.from_batches(schema, batches)
            fragments = lance.fragment.write_fragments(
                reader, str(self.uri), schema=schema, mode="create"
            )
        record = {
            "rows": len(rows),
            "crc32": functools.reduce(checksum, rows, 0),
            "skipped": list(skipped),
            "fragments": [fragment.to_json() for fragment in fragments],
        }
        self.ledger.write(block, record)

    def rows_done(self) -> int:
        """Return the images of the source in finished blocks."""
        return min(len(self.ledger.done()) * self.recipe.block, self.recipe.rows)

    def commit(self) -> int:
        """Make the table of all blocks and return its rows.

        Raises:
            ValueError: no image was good.
        """
        import lance

        records = [self.ledger.read(block) for block in range(self.recipe.blocks)]
        fragments = [
            lance.FragmentMetadata.from_json(json.dumps(fragment))
            for record in records
            for fragment in record["fragments"]
        ]
        if not fragments:
            raise ValueError(f"{self.recipe.source} has no good image")
        self._remove_orphans(fragments)
        checks = [{key: record[key] for key in ("rows", "crc32", "skipped")} for record in records]
        write_whole(self.blocks_file, json.dumps(checks, indent=1))
        operation = lance.LanceOperation.Overwrite(dataset.schema(self.recipe.metadata), fragments)
        lance.LanceDataset.commit(str(self.uri), operation)
        self.ledger.remove()
        return sum(record["rows"] for record in records)

    def _remove_orphans(self, fragments: Iterable) -> None:
        """Remove files of blocks that a kill cut off between their rows and their record."""
        kept = {Path(file.path).name for fragment in fragments for file in fragment.files}
        for file in (self.uri / "data").iterdir():
            if file.name not in kept:
                file.unlink()


def build(
    source: Source,
    out: Path,
    split: str,
    recipe: Recipe,
    encode_batch: Encode,
    *,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 4,
    progress: Callable[[int], None] = lambda done: None,
) -> int | None:
    """Write OUT/SPLIT.lance; every process calls it, and the first gets the number of rows.

    Args:
        source, out, split: what to read, and where to write.
        recipe: what else decides the rows.
        encode_batch: for exactly `recipe.batch` images.
        rank, world_size: which process this is, of how many.
        workers: threads that decode and crop.
        progress: called with the images that are done, of all processes.

    Raises:
        ValueError: a bad image (named), a table that exists, or another recipe than before.
        RuntimeError: the disk is full; finished blocks are kept.
    """
    uri = out / f"{split}.lance"
    versions = uri / "_versions"
    if rank == 0 and versions.exists():
        raise ValueError(f"{uri} exists already; remove it first, or --verify it")
    folder, units = out / f".{split}.building", recipe.blocks
    shared = share(folder, asdict(recipe), units, rank, world_size, versions.exists)
    if shared is None:
        return None
    ledger, left = shared
    building = Building(uri, recipe, ledger)

    def finish(block: int) -> None:
        building.write(block, *block_rows(source, block, recipe, encode_batch, pool))

    def report() -> None:
        progress(building.rows_done())

    with ThreadPoolExecutor(workers, thread_name_prefix="repa-fast-crop") as pool:
        ledger.work(left, finish, report, f"of {units} blocks")
    if rank:
        return None
    ledger.wait_for(units, report)
    progress(recipe.rows)
    return building.commit()


def block_rows(
    source: Source, block: int, recipe: Recipe, encode_batch: Encode, pool: ThreadPoolExecutor
) -> tuple[list[Row], list[str]]:
    """Return the rows of a block, and what was wrong with each image that was skipped."""
    start = block * recipe.block
    indices = range(start, min(start + recipe.block, recipe.rows))
    rows: list[Row] = []
    skipped: list[str] = []
    images = ahead(pool, lambda i: _image(source, i, recipe), indices, AHEAD * recipe.batch)
    while part := list(itertools.islice(images, recipe.batch)):
        good = [image for image in part if not isinstance(image, ValueError)]
        skipped += [str(image) for image in part if isinstance(image, ValueError)]
        if not good:
            continue
        pixels = np.stack([pixels for pixels, _, _ in good])
        padded = np.concatenate([pixels, pixels[:1].repeat(recipe.batch - len(good), axis=0)])
        moments = encode_batch(padded)[: len(good)]
        for (_, data, label), of_image in zip(good, moments, strict=True):
            row: Row = {"image": data, "moments": of_image, "label": label}
            dataset.check_sample(f"{recipe.source} block {block}", row, recipe.metadata)
            rows.append(row)
    return rows, skipped


def _image(
    source: Source, index: int, recipe: Recipe
) -> tuple[np.ndarray, bytes, int] | ValueError:
    """Return pixels uint8 (3, R, R), file and label; the error of a bad image to be skipped."""
    try:
        item = source.read(index)
        pixels = center_crop(item.data, recipe.metadata.resolution, item.name)
        if recipe.image == "original":
            data = original(item.data, recipe.metadata.resolution, item.name)
        else:
            data = encode(pixels, recipe.image, recipe.quality)
    except ValueError as error:
        if recipe.on_bad_image == "error":
            raise
        return error
    return pixels.transpose(2, 0, 1), data, item.label


def ahead(pool: ThreadPoolExecutor, function: Callable, items: Iterable, depth: int) -> Iterator:
    """Yield results in order, at most `depth` of them computed before they are asked for."""
    pending: deque = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > depth:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()


def checksum(value: int, row: Row) -> int:
    """Extend a CRC-32 by image bytes, moments and label of a row."""
    value = zlib.crc32(row["image"], value)
    value = zlib.crc32(np.ascontiguousarray(row["moments"], dtype=np.float32), value)
    return zlib.crc32(int(row["label"]).to_bytes(8, "little"), value)


def verify(out: Path, split: str, progress: Callable[[int], None] = lambda done: None) -> int:
    """Read everything again (shapes, finite moments, images, checksums) and return the rows.

    Raises:
        ValueError: what is wrong, and where.
    """
    table = dataset.LatentDataset(out, split)
    blocks_file = out / f"{split}.blocks.json"
    if not blocks_file.exists():
        raise ValueError(f"{blocks_file} is missing: {table.uri} was not written by prepare images")
    blocks = json.loads(blocks_file.read_text())
    expected = sum(block["rows"] for block in blocks)
    if len(table) != expected:
        raise ValueError(f"{table.uri} has {len(table)} rows, expected {expected}")

    def checksum_of(indices: np.ndarray, value: int) -> int:
        for fetched in table.fetch(indices):
            value = checksum(value, table.decode(fetched) | {"image": fetched.image})
        return value

    expect_checksums(blocks, checksum_of, f"{table.uri}: content", "block", progress)
    return expected


def expect_checksums(
    parts: Iterable[dict],
    checksum_of: Callable[[np.ndarray, int], int],
    what: str,
    part: str,
    progress: Callable[[int], None],
) -> None:
    """Raise ValueError unless consecutive parts of a table have their checksums.

    Args:
        parts: "rows" and "crc32" of each.
        checksum_of: (indices, value before them) -> value after them.
        what, part: is checked, and is a part's name, for the message.
        progress: called with the rows that are done.
    """
    start = 0
    for number, expected in enumerate(parts):
        value, stop = 0, start + expected["rows"]
        for first in range(start, stop, VERIFIED_ROWS):
            last = min(first + VERIFIED_ROWS, stop)
            value = checksum_of(np.arange(first, last), value)
            progress(last)
        if value != expected["crc32"]:
            raise ValueError(
                f"{what} of rows {start} to {stop - 1} ({part} {number}) has checksum "
                f"{value:08x}, expected {expected['crc32']:08x}"
            )
        start = stop
