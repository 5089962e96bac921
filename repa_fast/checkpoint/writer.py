"""The files of a checkpoint: in which order they are written, checked, kept and removed.

Every process writes, syncs and checksums its own files; when all have, the first one writes the
index, the settings and, last, the marker, with the checksum of every other file. A directory
without a marker is what a crash left behind: it is never loaded, and removed at the next start.
"""

import json
import logging
import math
import os
import pickle
import re
import shutil
from itertools import count
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from repa_fast.checkpoint.index import INDEX, PICKLED, describe
from repa_fast.checkpoint.layout import path_of, step_folders, steps
from repa_fast.checkpoint.marker import MARKER, checksum, is_complete, of_each
from repa_fast.lock import Lock

log = logging.getLogger(__name__)

OURS = re.compile(
    r"__\d+_\d+\.distcp|\.metadata(\.tmp)?|(index|config|counters|dataset)\.json|COMPLETE\.partial"
)
"""Names of what a save writes before its marker."""
HEADER_BYTES = 2048
"""What torch.save adds to a tensor's values, at the most."""


class Writer(dcp.FileSystemWriter):
    """torch's writer, with checksums, settings, the marker, and a look at the free space first.

    An error on any process is raised on all of them, by torch's own protocol.

    Args:
        target: directory of the checkpoint; what a crash left in it is removed.
        settings: further files by name, and their text.
        keep_last, keep_every: as for `prune`, once the checkpoint is complete.
        lock: the run's, without which no checkpoint of it becomes complete.
    """

    def __init__(
        self,
        target: Path,
        settings: dict[str, str],
        keep_last: int,
        keep_every: int,
        lock: Lock | None = None,
    ) -> None:
        super().__init__(target, sync_files=False)  # `seal` does, and everything
        self._settings = settings
        self._keep = (keep_last, keep_every)
        self._lock = lock
        self._begun = False

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Plan on the first process, when all have made the directory and none has written."""
        make_room(self.path)
        self._begun = True
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
        places = {one.index: one.storage_data for written, _ in results for one in written}
        described = describe(metadata, places)
        # written by this process a moment ago, and read at the speed of C beside training
        torchs = pickle.loads((self.path / PICKLED).read_bytes())
        if describe(torchs, torchs.storage_data) != described:
            raise RuntimeError(f"{self.path / PICKLED} does not say what was written")
        texts = self._settings | {INDEX: json.dumps(described)}
        for name, text in texts.items():
            (self.path / name).write_text(text, encoding="utf-8")
        sums = seal([self.path / name for name in (PICKLED, *texts)])
        for _, own in results:
            sums |= own
        if self._lock is not None:
            self._lock.expect()
        write_marker(self.path, sums)
        try:
            prune(self.path.parent, int(self.path.name), *self._keep)
        except OSError as error:
            log.warning("old checkpoints in %s were not removed: %s", self.path.parent, error)

    def close(self) -> None:
        """Leave nothing of what did not become a checkpoint."""
        if self._begun and not is_complete(self.path):
            shutil.rmtree(self.path, ignore_errors=True)


def make_room(target: Path) -> None:
    """Make an empty directory: what was half written goes, all else is moved aside.

    That is a checkpoint that is damaged or cannot be read, a link, or what is not ours.
    """
    if _is_half_written(target):
        if any(target.iterdir()):
            shutil.rmtree(target)
    elif os.path.lexists(target):
        set_aside(target)
    target.mkdir(parents=True, exist_ok=True)


def set_aside(damaged: Path) -> None:
    """Rename a damaged checkpoint to `NAME.damaged`, `NAME.damaged1` and so on."""
    numbered = (f"{damaged.name}.damaged{n or ''}" for n in count())
    aside = next(p for p in map(damaged.with_name, numbered) if not os.path.lexists(p))
    log.warning("%s is damaged: moved to %s", damaged, aside.name)
    damaged.rename(aside)


def expect_space(folder: Path, needed: int) -> None:
    """Raise OSError, with both sizes, unless `folder` has `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"{folder} needs {needed / 2**30:.3g} GiB, and the disk has {free / 2**30:.3g} GiB free"
        )


def seal(files: list[Path]) -> dict[str, int]:
    """Sync files, several for the price of one, and return their checksums by name."""
    of_each(_sync, files)
    return of_each(checksum, files)


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

    Those after step `newest` do not count: they are another's, or of a run that was cut off.
    """
    found = [step for step in steps(folder) if step <= newest]
    for step in found[:-keep_last] if keep_last else []:
        if not (keep_every and step % keep_every == 0):
            path = path_of(folder, step)
            if path.is_symlink():  # of what is not this run's
                path.unlink()
                continue
            # The marker first: a crash half-way leaves no checkpoint that looks whole.
            (path / MARKER).unlink()
            shutil.rmtree(path)


def clean(folder: Path) -> list[Path]:
    """Remove what a crash left of checkpoints, where nobody else writes; says which folders.

    A folder with anything else in it than a save writes is somebody's, and stays.
    """
    halves = [path for _, path in step_folders(folder) if _is_half_written(path)]
    for path in halves:
        shutil.rmtree(path)
    return halves


def _is_half_written(path: Path) -> bool:
    if path.is_symlink() or not path.is_dir() or is_complete(path):
        return False
    return all(OURS.fullmatch(name) for name in os.listdir(path))


def _bytes(plan: SavePlan) -> int:
    """Return what a process's tensors, or its shards of them, take on disk, at the most."""
    parts = [item.tensor_data for item in plan.items]
    sizes = (math.prod(part.chunk.sizes) * part.properties.dtype.itemsize for part in parts)
    return sum(sizes) + HEADER_BYTES * len(parts)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
