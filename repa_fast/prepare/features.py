"""`repa-fast prepare features`: an encoder's features as further columns of a dataset.

The unit of work is a fragment of the table (4,096 rows as prepare writes them). A process takes
every WORLD_SIZE-th one, decodes its images as training would, encodes them in batches of one size,
the last one padded, and writes the new columns beside the old ones and then a record; so the
columns do not depend on who computed them. When every fragment has a record, the first process
commits all at once: before that the table is as it was.
"""

import functools
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from repa_fast.data.dataset import LatentDataset
from repa_fast.data.features import FeatureColumn, Storage
from repa_fast.distributed import own_device, progress_bar, rank_and_size
from repa_fast.ledger import Ledger, share, write_whole
from repa_fast.prepare.build import AHEAD, ahead, expect_checksums

if TYPE_CHECKING:
    import lance
    import pyarrow as pa
    from lance.schema import LanceSchema

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
    verify: bool = False
    """Read a finished column again and compare its checksums, instead of writing one."""


def prepare_features(config: FeaturesConfig) -> str:
    """Add a column of features, or verify one; all processes of torchrun call it.

    Returns:
        What was done, for people; empty on processes other than the first.

    Raises:
        ValueError: dataset, encoder or an earlier beginning do not fit, or an image is bad.
        RuntimeError: the encoder's weights cannot be had, or the disk is full.
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
    encode = functools.partial(_encode, encoder, device, config.precision)
    with progress_bar(f"{dataset.uri} {name}", rank == 0) as progress:
        finished = extract(
            dataset,
            column,
            encode,
            batch=config.batch_size,
            rank=rank,
            world_size=world_size,
            workers=config.num_workers,
            progress=progress(len(dataset)),
        )
    size = column.bytes_per_image
    total = f"{size * len(dataset) / 1e9:.2f} GB, {size / 1000:.1f} kB per image"
    return f"{dataset.uri}: {len(dataset)} rows of {name} ({total})" if finished else ""


@torch.no_grad()
def _encode(
    encoder: torch.nn.Module, device: torch.device, precision: str, images: np.ndarray
) -> torch.Tensor:
    on_device = torch.from_numpy(images).to(device)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        return encoder(on_device)


def extract(
    dataset: LatentDataset,
    column: FeatureColumn,
    encode: EncodeImages,
    *,
    batch: int,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 4,
    progress: Callable[[int], None] = lambda done: None,
) -> bool:
    """Add `column` to the table; every process calls it; return whether this one committed it.

    Args:
        encode: for exactly `batch` images.
        rank, world_size: which process this is, of how many.
        workers: threads that decode images.
        progress: called with the rows that are done, of all processes.

    Raises:
        ValueError: a bad image (named), a name that is taken, or another recipe than before.
        RuntimeError: the disk is full, or the table was changed meanwhile.
    """
    if not NAME.fullmatch(column.name) or column.name in RESERVED:
        raise ValueError(
            f"column is {column.name!r}, expected letters, digits and underscores, and none of "
            f"{', '.join(RESERVED)}"
        )
    table, uri = dataset.table, Path(dataset.uri)
    taken = functools.partial(_taken, column, uri)
    if rank == 0 and (names := taken()):
        raise ValueError(f"{uri} has a column {names[0]} already; --verify it")
    recipe = asdict(column) | {"batch": batch, "version": table.version}
    folder, fragments = uri.parent / f".{uri.stem}.features", table.get_fragments()
    shared = share(folder, recipe, len(fragments), rank, world_size, lambda: bool(taken()))
    if shared is None:
        return False
    ledger, left = shared
    starts = np.cumsum([0, *(fragment.count_rows() for fragment in fragments)])

    def finish(unit: int) -> None:
        indices = range(starts[unit], starts[unit + 1])
        packed = _packed(dataset, column, encode, indices, batch, pool)
        ledger.write(unit, _add(fragments[unit], column, packed))

    def report() -> None:
        progress(int(sum(starts[unit + 1] - starts[unit] for unit in ledger.done())))

    with ThreadPoolExecutor(workers, thread_name_prefix="repa-fast-decode") as pool:
        ledger.work(left, finish, report, "fragments")
    if rank:
        return False
    ledger.wait_for(len(fragments), report)
    progress(len(dataset))
    _commit(dataset, column, ledger, len(fragments))
    return True


def _taken(column: FeatureColumn, uri: Path) -> list[str]:
    """Return which of its columns the newest version of the table has."""
    import lance

    return sorted(set(column.columns) & set(lance.dataset(str(uri)).schema.names))


def _packed(
    dataset: LatentDataset,
    column: FeatureColumn,
    encode: EncodeImages,
    indices: range,
    batch: int,
    pool: ThreadPoolExecutor,
) -> Iterator[dict[str, np.ndarray]]:
    """Yield the features of some rows as they are stored, batch by batch."""
    parts = [indices[i : i + batch] for i in range(0, len(indices), batch)]
    fetched = itertools.chain.from_iterable(dataset.fetch(np.array(part)) for part in parts)
    images = ahead(pool, lambda row: dataset.decode(row)["image"], fetched, AHEAD * batch)
    while part := list(itertools.islice(images, batch)):
        padded = np.stack(part + [part[0]] * (batch - len(part)))
        yield column.pack(encode(padded)[: len(part)])


def _add(
    fragment: "lance.LanceFragment",
    column: FeatureColumn,
    packed: Iterator[dict[str, np.ndarray]],
) -> dict:
    """Write the new columns of a fragment and return its record."""
    import pyarrow as pa

    schema = pa.schema(column.fields())
    failed: list[Exception] = []  # Lance wraps what the generator raises
    checksum = 0

    def batches() -> Iterator["pa.RecordBatch"]:
        nonlocal checksum
        try:
            for arrays in packed:
                checksum = _checksum(arrays, column, checksum)
                yield _record_batch(arrays, schema)
        except Exception as error:
            failed.append(error)
            raise

    try:
        metadata, merged = fragment.merge_columns(
            pa.RecordBatchReader.from_batches(schema, batches())
        )
    except (OSError, RuntimeError):
        if failed:
            raise failed[0] from None
        raise
    return {
        "rows": fragment.count_rows(),
        "crc32": checksum,
        "fragment": metadata.to_json(),
        "schema": _stored(merged),
    }


def _record_batch(arrays: dict[str, np.ndarray], schema: "pa.Schema") -> "pa.RecordBatch":
    import pyarrow as pa

    columns = [
        pa.FixedSizeListArray.from_arrays(
            pa.array(arrays[field.name].reshape(-1)), field.type.list_size
        )
        for field in schema
    ]
    return pa.record_batch(columns, schema=schema)


def _checksum(arrays: dict[str, np.ndarray], column: FeatureColumn, value: int) -> int:
    """Extend a CRC-32 by values and scales, row by row, so that batches do not matter."""
    for row in zip(*(arrays[name] for name in column.columns), strict=True):
        for stored in row:
            value = zlib.crc32(np.ascontiguousarray(stored), value)
    return value


def _commit(dataset: LatentDataset, column: FeatureColumn, ledger: Ledger, units: int) -> None:
    import lance
    from lance.commit import CommitConflictError

    records = [ledger.read(unit) for unit in range(units)]
    fragments = [
        lance.FragmentMetadata.from_json(json.dumps(record["fragment"])) for record in records
    ]
    schema = _restored(records[0]["schema"], dataset.table.lance_schema)
    checks = [{"rows": record["rows"], "crc32": record["crc32"]} for record in records]
    write_whole(_checks_file(dataset, column.name), json.dumps(checks, indent=1))
    operation = lance.LanceOperation.Merge(fragments, schema)
    try:
        lance.LanceDataset.commit(dataset.uri, operation, read_version=dataset.table.version)
    except (OSError, CommitConflictError) as error:
        raise RuntimeError(
            f"{dataset.uri} was changed while the features were computed; remove {ledger.folder} "
            f"and begin again ({error})"
        ) from error
    ledger.remove()
    # what a kill cut off between the columns of a fragment and their record
    lance.dataset(dataset.uri).cleanup_old_versions(older_than=NEVER, delete_unverified=True)


def _stored(schema: "LanceSchema") -> list[str]:
    """Return a schema as text: Arrow's form of it would lose the numbers of the fields."""
    metadata, *fields = schema.__reduce__()[1]
    return [metadata, *(field.hex() for field in fields)]


def _restored(stored: list[str], like: "LanceSchema") -> "LanceSchema":
    """Return the schema that `_stored` wrote; `like` is any schema."""
    rebuild = like.__reduce__()[0]
    return rebuild(stored[0], *map(bytes.fromhex, stored[1:]))


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
    checks_file = _checks_file(dataset, name)
    if not checks_file.exists():
        raise ValueError(f"{checks_file} is missing: {name} was not written by prepare features")

    def checksum_of(indices: np.ndarray, value: int) -> int:
        for fetched in dataset.fetch(indices, images=False, features=[name]):
            for stored in dataset.decode(fetched)["features"].values():
                value = zlib.crc32(np.ascontiguousarray(stored), value)
        return value

    parts = json.loads(checks_file.read_text())
    expect_checksums(parts, checksum_of, f"{dataset.uri}: {name}", "part", progress)
