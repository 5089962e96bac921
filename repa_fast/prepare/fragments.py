"""Fragments of a Lance table that processes write unit by unit and the first commits at once.

A unit is a range of rows. A process takes every WORLD_SIZE-th one, writes its fragments and then a
record; so the table does not depend on who computed it. A unit without a record is computed again.
When every one has a record, the first process commits them all: before that the table is as it was.
Processes meet in the file system alone, but for `restart`.
"""

import hashlib
import itertools
import json
import os
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from repa_fast import lock
from repa_fast.data.dataset import Fetched, LatentDataset
from repa_fast.distributed import session
from repa_fast.ledger import Ledger, discard, is_discarded, records, share, wait_until_none
from repa_fast.whole import expect_no_link, parse_json, read_regular, write_whole
from repa_fast.words import note, one_line

AHEAD = 2
"""Batches that are decoded while one is encoded."""
VERIFIED_ROWS = 256
"""Rows that are read again at once."""
CHECKED = ("rows", "crc32", "skipped")
"""What the file of checks keeps of the records."""
WEIGHTS = (".bin", ".json", ".safetensors")
"""Files of a folder of weights."""
ANEW = "give --restart to begin anew"

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
        clean: () removes data files that are not the table's.
        write: (unit) writes its fragments, then its record.
        operation: (records, fragments) -> Lance's operation that commits them all.
    """

    ledger: Ledger

    def run(
        self,
        *,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 4,
        restart: bool = False,
        progress: Callable[[int], None] = lambda done: None,
    ) -> int | None:
        """Write this process's share; every process calls it, and the first gets the rows.

        Args:
            rank, world_size: which process this is, of how many.
            workers: threads that decode images.
            restart: throw away what was begun and not committed.
            progress: called with the rows that are done, of all processes.

        Raises:
            ValueError: a bad image (named), a name that is taken, another recipe than before,
                another launch that works in the same folder, or a data file that is gone.
            Failure: the disk is full; finished units are kept.
        """
        expect_no_link(self.folder, self.uri, self.uri / "data")
        units, sizes = len(self.starts) - 1, np.diff(self.starts)

        def report() -> None:
            progress(int(sizes[self.ledger.done()].sum()))

        with (
            lock.hold(self.folder, rank) as held,
            ThreadPoolExecutor(workers, thread_name_prefix="repa-fast-decode") as self.pool,
        ):
            shared = self._begin(units, rank, world_size, restart)
            if shared is None:
                return None
            self.ledger, left = shared
            self.expect_begun()
            self.ledger.work(left, self.write, report, self.kept)
            if rank:
                return None
            self.ledger.wait_for(units, report, world_size)
            progress(int(self.starts[-1]))
            held.expect()
            return self.commit()

    def outdated(self) -> str:
        """Return "", or that the table is not what it was when it was opened."""
        return ""

    def expect_begun(self) -> None:
        """Raise ValueError if the units that are there from before do not fit."""

    def _begin(
        self, units: int, rank: int, world_size: int, restart: bool
    ) -> tuple[Ledger, list[int]] | None:
        """Clear what cannot be gone on with and return `share`, to the first process first."""
        if rank == 0:
            # a launch that torchrun restarts goes on
            anew = restart and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
            reason, leftover = self.taken() or self.outdated(), self._is_leftover()
            if leftover or (anew and not reason):
                self.clean()
                discard(self.folder)
            if reason:
                raise ValueError(reason)
        if restart and world_size > 1:
            what = f"process {rank} (of {world_size}) waits for the others to begin anew"
            note(what)
            with session() as world:
                world.barrier()
        if rank:
            cleared = f"process 0 (of {world_size}) to remove the leftover {self.folder}"
            wait_until_none(lambda: cleared if self._is_leftover() and not self.taken() else "")
        return share(
            self.folder,
            self.settings,
            units,
            rank,
            world_size,
            self.taken,
            anew=ANEW,
            is_whole=self._is_whole,
        )

    def _is_leftover(self) -> bool:
        """Return whether the folder's work is committed or discarded, and a kill left it there."""
        import lance

        named = {file for record in records(self.folder) for file in _files(record)}
        if not named or not (self.uri / "_versions").exists():
            return is_discarded(self.folder)
        table = lance.dataset(str(self.uri)).get_fragments()
        committed = {file.path for fragment in table for file in fragment.metadata.files}
        return is_discarded(self.folder) or named <= committed

    def _is_whole(self, record: dict) -> bool:
        try:
            complete = record.keys() >= {"rows", "crc32", "fragments"}
            return complete and not lost_file(self.uri, record["fragments"])
        except (KeyError, TypeError, AttributeError):  # JSON, and not as it was written
            return False

    def commit(self) -> int:
        """Commit all units and return their rows."""
        import lance

        made = [self.ledger.read(unit) for unit in range(len(self.starts) - 1)]
        described = [fragment for record in made for fragment in record["fragments"]]
        if lost := lost_file(self.uri, described):
            raise ValueError(
                f"{lost} is damaged or gone, expected it as it was written; nothing is committed: "
                "run the same command again, which makes it again"
            )
        fragments = [lance.FragmentMetadata.from_json(json.dumps(one)) for one in described]
        operation = self.operation(made, fragments)
        checks = [{key: record[key] for key in CHECKED if key in record} for record in made]
        write_whole(self.checks_file, json.dumps(checks, indent=1))
        lance.LanceDataset.commit(str(self.uri), operation, read_version=self.version)
        self.ledger.remove()
        return sum(record["rows"] for record in made)

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


def weights_digest(source: str) -> str:
    """Return a hash of a file of weights, or of those of a folder; "" for what is not local."""
    path, sha = Path(source), hashlib.sha256()
    if not source or not path.exists():
        return ""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    for file in files:
        if file == path or file.suffix in WEIGHTS:
            with open(file, "rb") as opened:
                sha.update(hashlib.file_digest(opened, "sha256").digest())
    return sha.hexdigest()[:16]


def _files(record: dict) -> list[str]:
    """Return the data files that a unit's record names; none if it is not as it was written."""
    try:
        return [str(file["path"]) for one in record["fragments"] for file in one["files"]]
    except (KeyError, TypeError):
        return []


def lost_file(uri: Path, fragments: Iterable[dict]) -> str:
    """Return the first data file of fragments that is damaged, gone or has other rows, or "".

    Fragments are as `to_json` describes them. Of a file its end is read.
    """
    for fragment in fragments:
        for file in fragment["files"]:
            path, elsewhere = uri / "data" / file["path"], file.get("base_id") is not None
            size, rows = file.get("file_size_bytes"), fragment["physical_rows"]
            if not elsewhere and not _is_whole(path, size, rows):
                return str(path)
    return ""


def _is_whole(path: Path, size: int | None, rows: int) -> bool:
    from lance.file import LanceFileReader

    try:
        there = path.stat().st_size
        if there == 0 or there != (size or there):  # Lance's reader panics at an empty file
            return False
        return LanceFileReader(str(path)).num_rows() == rows
    except (OSError, ValueError):
        return False


def read_checks(checks_file: Path, what: str, command: str) -> list[dict]:
    """Read the rows and checksum of each unit; ValueError where they are missing or damaged."""
    if not checks_file.exists():
        raise ValueError(f"{checks_file} is missing: {what} was not written by prepare {command}")
    try:
        checks = parse_json(read_regular(checks_file), checks_file)
        found = [
            check | {"rows": int(check["rows"]), "crc32": int(check["crc32"])} for check in checks
        ]
        if min((check["rows"] for check in found), default=0) < 0:
            raise ValueError("rows below 0")
        return found
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise ValueError(
            f"{checks_file} is damaged ({error!r}), expected what prepare {command} wrote"
        ) from error


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
        ValueError: `checks_file` or a data file is missing or damaged, or rows or a checksum are
            not what they were.
    """
    what, unit, command = names
    checks = read_checks(checks_file, what, command)
    described = (fragment.metadata.to_json() for fragment in table.table.get_fragments())
    if lost := lost_file(Path(table.uri), described):
        raise ValueError(f"{lost} of {table.uri} is damaged or gone, expected it as it was written")
    rows = sum(check["rows"] for check in checks)
    if len(table) != rows:
        raise ValueError(f"{table.uri} has {len(table)} rows, expected {rows}")
    start = 0
    for number, expected in enumerate(checks):
        value, stop = 0, start + expected["rows"]
        for first in range(start, stop, VERIFIED_ROWS):
            last = min(first + VERIFIED_ROWS, stop)
            try:
                for fetched in fetch(np.arange(first, last)):
                    value = checksum(value, parts(fetched))
            except OSError as error:
                reason = one_line(error).partition(", /")[0]  # without the line of Lance's source
                raise ValueError(
                    f"{table.uri}: {what} of rows {first} to {last - 1} cannot be read ({reason})"
                ) from error
            progress(last)
        if value != expected["crc32"]:
            raise ValueError(
                f"{table.uri}: {what} of rows {start} to {stop - 1} ({unit} {number}) has "
                f"checksum {value:08x}, expected {expected['crc32']:08x}"
            )
        start = stop
    return rows
