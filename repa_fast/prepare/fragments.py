"""Fragments of a Lance table that processes write unit by unit and the first commits at once.

A unit is a range of rows. A process takes every WORLD_SIZE-th one, writes its fragments and then a
record; so the table does not depend on who computed it. A unit without a record is computed again.
When every one has a record, the first process commits them all: before that the table is as it was.
Processes meet in the file system alone.
"""

import itertools
import json
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from repa_fast.data.dataset import Fetched, LatentDataset
from repa_fast.ledger import share, write_whole

AHEAD = 2
"""Batches that are decoded while one is encoded."""
VERIFIED_ROWS = 256
"""Rows that are read again at once."""
CHECKED = ("rows", "crc32", "skipped")
"""What the file of checks keeps of the records."""

Parts = Iterable[bytes | np.ndarray]
"""What a row's checksum is of."""


class Fragments:
    """Fragments that are being written. A subclass has

    Attributes:
        uri, folder: of the table and of the ledger.
        settings: what decides the rows; others than before are refused.
        starts: the first row of each unit, and the number of rows.
        checks_file: gets rows and checksum of each unit, for `expect_checksums`.
        kept: what a full disk keeps, for the message.
        taken: () -> "", or that the table has already what would be written.
        write: (unit) writes its fragments, then its record.
        operation: (records, fragments) -> Lance's operation that commits them all.
    """

    def run(
        self,
        *,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 4,
        progress: Callable[[int], None] = lambda done: None,
    ) -> int | None:
        """Write this process's share; every process calls it, and the first gets the rows.

        Args:
            rank, world_size: which process this is, of how many.
            workers: threads that decode images.
            progress: called with the rows that are done, of all processes.

        Raises:
            ValueError: a bad image (named), a name that is taken, or another recipe than before.
            RuntimeError: the disk is full; finished units are kept.
        """
        if rank == 0 and (reason := self.taken()):
            raise ValueError(reason)
        units = len(self.starts) - 1
        shared = share(self.folder, self.settings, units, rank, world_size, self.taken)
        if shared is None:
            return None
        self.ledger, left = shared
        sizes = np.diff(self.starts)

        def report() -> None:
            progress(int(sizes[self.ledger.done()].sum()))

        with ThreadPoolExecutor(workers, thread_name_prefix="repa-fast-decode") as self.pool:
            self.ledger.work(left, self.write, report, self.kept)
        if rank:
            return None
        self.ledger.wait_for(units, report)
        progress(int(self.starts[-1]))
        return self.commit()

    def commit(self) -> int:
        """Commit all units and return their rows."""
        import lance

        records = [self.ledger.read(unit) for unit in range(len(self.starts) - 1)]
        fragments = [
            lance.FragmentMetadata.from_json(json.dumps(fragment))
            for record in records
            for fragment in record["fragments"]
        ]
        operation = self.operation(records, fragments)
        checks = [{key: record[key] for key in CHECKED if key in record} for record in records]
        write_whole(self.checks_file, json.dumps(checks, indent=1))
        lance.LanceDataset.commit(str(self.uri), operation, read_version=self.version)
        self.ledger.remove()
        return sum(record["rows"] for record in records)

    def batched(self, read: Callable, items: Iterable, batch: int) -> Iterator[list]:
        """Yield what `read` makes of the items, a batch at a time, some of them ahead."""
        results = ahead(self.pool, read, items, AHEAD * batch)
        while part := list(itertools.islice(results, batch)):
            yield part


def encode_padded(encode: Callable, images: list[np.ndarray], batch: int) -> Sequence:
    """Return what `encode` makes of fewer images than a batch, padded with the first of them."""
    return encode(np.stack(images + images[:1] * (batch - len(images))))[: len(images)]


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


def checksum(value: int, parts: Parts) -> int:
    """Extend a CRC-32 by bytes and arrays."""
    for part in parts:
        value = zlib.crc32(part if isinstance(part, bytes) else np.ascontiguousarray(part), value)
    return value


def expect_checksums(
    table: LatentDataset,
    checks_file: Path,
    fetch: Callable[[np.ndarray], list[Fetched]],
    parts: Callable[[Fetched], Parts],
    names: tuple[str, str, str],
    progress: Callable[[int], None],
) -> int:
    """Read everything again and return the rows.

    Args:
        fetch: indices -> rows, of each of which `parts` are checked.
        names: of what is checked, of a unit and of the command, for messages.
        progress: called with the rows that are done.

    Raises:
        ValueError: `checks_file` is missing, or rows or a checksum are not what they were.
    """
    what, unit, command = names
    if not checks_file.exists():
        raise ValueError(f"{checks_file} is missing: {what} was not written by prepare {command}")
    checks = json.loads(checks_file.read_text())
    rows = sum(check["rows"] for check in checks)
    if len(table) != rows:
        raise ValueError(f"{table.uri} has {len(table)} rows, expected {rows}")
    start = 0
    for number, expected in enumerate(checks):
        value, stop = 0, start + expected["rows"]
        for first in range(start, stop, VERIFIED_ROWS):
            last = min(first + VERIFIED_ROWS, stop)
            for fetched in fetch(np.arange(first, last)):
                value = checksum(value, parts(fetched))
            progress(last)
        if value != expected["crc32"]:
            raise ValueError(
                f"{table.uri}: {what} of rows {start} to {stop - 1} ({unit} {number}) has "
                f"checksum {value:08x}, expected {expected['crc32']:08x}"
            )
        start = stop
    return rows
