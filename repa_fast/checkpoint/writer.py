"""The files of a checkpoint: in which order they are written, checked, kept and removed.

Every process writes, syncs and checksums its own files; when all have, the first one writes the
index, the settings and, last, the marker, with the checksum of every other file. A directory
without a marker is what a crash left behind: it is never loaded, and removed at the next start.
"""

import fcntl
import json
import logging
import math
import os
import shutil
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from repa_fast.checkpoint.layout import MARKER, path_of, steps
from repa_fast.checkpoint.reader import INDEX

log = logging.getLogger(__name__)

HEADER_BYTES = 2048
"""What torch.save adds to a tensor's values, at the most."""


class Writer(dcp.FileSystemWriter):
    """torch's writer, with checksums, settings, the marker, and a look at the free space first.

    An error on any process is raised on all of them, by torch's own protocol.

    Args:
        target: directory of the checkpoint; what a crash or damage left in it is removed.
        settings: further files by name, and their text.
        keep_last, keep_every: as for `prune`, once the checkpoint is complete.
    """

    def __init__(self, target: Path, settings: dict[str, str], keep_last: int, keep_every: int):
        super().__init__(target, sync_files=False)  # `seal` does, and everything
        self._settings = settings
        self._keep = (keep_last, keep_every)
        self._folder: int | None = None

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Plan on the first process, when all have made the directory and none has written."""
        self._folder = _locked(self.path)
        (self.path / MARKER).unlink(missing_ok=True)  # first, as in `prune`
        for leftover in self.path.iterdir():
            leftover.unlink()
        expect_space(self.path, sum(_bytes(plan) for plan in plans))
        return super().prepare_global_plan(plans)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future:
        """Write as torch does; the results go with the checksums of this process's files."""
        results = super().write_data(plan, planner).value()
        names = sorted({result.storage_data.relative_path for result in results})
        future: Future = Future()
        future.set_result((results, seal([self.path / name for name in names])))
        return future

    def finish(
        self, metadata: Metadata, results: list[tuple[list[WriteResult], dict[str, int]]]
    ) -> None:
        """Finish on the first process, when all have written."""
        super().finish(metadata, [written for written, _ in results])
        for name, text in self._settings.items():
            (self.path / name).write_text(text)
        sums = seal([self.path / name for name in (INDEX, *self._settings)])
        for _, own in results:
            sums |= own
        write_marker(self.path, sums)
        try:
            prune(self.path.parent, int(self.path.name), *self._keep)
        except OSError as error:
            log.warning("old checkpoints in %s were not removed: %s", self.path.parent, error)

    def close(self) -> None:
        """Let go of the directory; where there is no checkpoint now, nothing stays of it."""
        if self._folder is not None:
            os.close(self._folder)
            if not (self.path / MARKER).exists():
                shutil.rmtree(self.path, ignore_errors=True)


def expect_space(folder: Path, needed: int) -> None:
    """Raise OSError, with both sizes, unless `folder` has `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"{folder} needs {needed / 2**30:.3g} GiB, and the disk has {free / 2**30:.3g} GiB free"
        )


def seal(files: list[Path]) -> dict[str, int]:
    """Sync files, several for the price of one, and return their checksums by name."""
    _of_each(_sync, files)
    return _of_each(_checksum, files)


def write_marker(target: Path, sums: dict[str, int]) -> None:
    """Create the marker, at once and so that it survives a power cut only if all else does."""
    _sync(target)
    partial = target / f"{MARKER}.partial"
    partial.write_text(json.dumps(sums, indent=2))
    _sync(partial)
    partial.replace(target / MARKER)
    for folder in (target, *target.parents[:2]):  # the run's own may be new, too
        _sync(folder)


def prune(folder: Path, newest: int, keep_last: int, keep_every: int) -> None:
    """Remove complete checkpoints but the last K and those of every N steps; 0 for K keeps all.

    Those after step `newest` do not count: a damaged one was passed over and is written again.
    """
    found = [step for step in steps(folder) if step <= newest]
    for step in found[:-keep_last] if keep_last else []:
        if not (keep_every and step % keep_every == 0):
            # The marker first: a crash half-way leaves no checkpoint that looks whole.
            (path_of(folder, step) / MARKER).unlink()
            shutil.rmtree(path_of(folder, step))


def clean(folder: Path) -> list[Path]:
    """Remove directories of steps that have no marker and that no process is writing; says which.

    Whoever writes one holds a lock on it, which ends with the process. Where a file system has no
    locks for directories nothing is removed, until its step is saved again.
    """
    steps_here = [path for path in sorted(folder.glob("*")) if path.name.isdecimal()]
    halves = [
        path
        for path in steps_here
        if path == path_of(folder, int(path.name)) and path.is_dir() and not path.is_symlink()
        if not (path / MARKER).exists() and not _being_written(path)
    ]
    for path in halves:
        shutil.rmtree(path)
    return halves


def damage(path: Path) -> str:
    """Return what differs from the checksums in the marker, "" if nothing does."""
    try:
        expected = json.loads((path / MARKER).read_text())
        found = _of_each(_checksum, [file for file in path.iterdir() if file.name != MARKER])
        missing = sorted(expected.keys() - found.keys())
    except (OSError, ValueError, AttributeError) as error:
        return f"it cannot be read ({error})"
    if missing:
        return f"missing {', '.join(missing)}"
    changed = sorted(name for name, value in expected.items() if found[name] != value)
    return f"wrong checksum of {', '.join(changed)}" if changed else ""


def _bytes(plan: SavePlan) -> int:
    """Return what a process's tensors, or its shards of them, take on disk, at the most."""
    parts = [item.tensor_data for item in plan.items]
    sizes = (math.prod(part.chunk.sizes) * part.properties.dtype.itemsize for part in parts)
    return sum(sizes) + HEADER_BYTES * len(parts)


def _locked(path: Path) -> int:
    """Return a descriptor that holds the lock on a directory, where its file system has locks.

    OSError if another process holds it.
    """
    folder, refused = _try_lock(path)
    if isinstance(refused, BlockingIOError):
        os.close(folder)
        raise OSError(f"{path} is being written by another process") from refused
    return folder


def _being_written(path: Path) -> bool:
    """Return whether a process writes it, or might: no locks here, or it is gone meanwhile."""
    try:
        folder, refused = _try_lock(path)
    except OSError:
        return True
    os.close(folder)
    return refused is not None


def _try_lock(path: Path) -> tuple[int, OSError | None]:
    """Return a descriptor of a directory, and why it does not hold the lock, if it does not."""
    folder = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return folder, error
    return folder, None


def _of_each(work: Callable[[Path], int | None], files: list[Path]) -> dict[str, int | None]:
    """Return what `work` returns of each file, by name; its threads run side by side."""
    with ThreadPoolExecutor() as pool:
        return dict(zip((file.name for file in files), pool.map(work, files), strict=True))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checksum(file: Path) -> int:
    """Return the CRC-32 of a file."""
    value = 0
    with open(file, "rb") as stream:
        while chunk := stream.read(1 << 24):
            value = zlib.crc32(chunk, value)
    return value
