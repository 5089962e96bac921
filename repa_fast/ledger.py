"""Work cut into numbered units that is resumed after a kill: one small file per finished unit."""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path


class Ledger:
    """A folder with the recipe of the work and the records of its finished units.

    Any number of processes share it; each unit is one process's. It is there from the beginning of
    the work until what was made of it is committed. ValueError if it was begun with another recipe.
    """

    def __init__(self, folder: Path, recipe: dict) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        stored = folder / "recipe.json"
        if not stored.exists():
            write_whole(stored, json.dumps(recipe, indent=2))
        self._expect_same(json.loads(stored.read_text()), json.loads(json.dumps(recipe)))

    def _expect_same(self, begun: dict, now: dict) -> None:
        changed = [f"{k}: {begun.get(k)!r}, now {now[k]!r}" for k in now if now[k] != begun.get(k)]
        if changed:
            raise ValueError(
                f"{self.folder} was begun with another recipe ({'; '.join(changed)}); go on with "
                "the same, or remove it"
            )

    def done(self) -> list[int]:
        """Return the finished units, in order."""
        return sorted(int(path.stem) for path in self.folder.glob("[0-9]*.json"))

    def left(self, units: int, rank: int, world_size: int) -> list[int]:
        """Return the unfinished units of `rank`: it has every WORLD_SIZE-th of 0..units - 1."""
        done = set(self.done())
        return [unit for unit in range(rank, units, world_size) if unit not in done]

    def work(
        self,
        units: Iterable[int],
        finish: Callable[[int], None],
        report: Callable[[], None],
        kept: str,
    ) -> None:
        """Call `finish` for each unit, which also writes its record, and `report` after each.

        RuntimeError if the disk is full says how many units are `kept`, such as "fragments".
        """
        for unit in units:
            try:
                finish(unit)
            except (OSError, RuntimeError) as error:
                if not is_disk_full(error):
                    raise
                raise RuntimeError(
                    f"the disk of {self.folder.parent} is full; {len(self.done())} {kept} are "
                    "written and kept: make room and run the same command again"
                ) from error
            report()

    def wait_for(self, units: int, meanwhile: Callable[[], None]) -> None:
        """Call `meanwhile` and sleep until so many units are finished, by any process."""
        while len(self.done()) < units:
            meanwhile()
            time.sleep(0.5)

    def write(self, unit: int, record: dict) -> None:
        """Write the record of a unit, which is finished with it."""
        write_whole(self._file(unit), json.dumps(record))

    def read(self, unit: int) -> dict:
        """Read the record of a finished unit."""
        return json.loads(self._file(unit).read_text())

    def remove(self) -> None:
        """Remove the folder, once the work is committed."""
        shutil.rmtree(self.folder)

    def _file(self, unit: int) -> Path:
        return self.folder / f"{unit:06d}.json"


def share(
    folder: Path,
    recipe: dict,
    units: int,
    rank: int,
    world_size: int,
    committed: Callable[[], bool],
) -> tuple[Ledger, list[int]] | None:
    """Return the ledger and the unfinished units of a process's share, or None if committed.

    A process that starts late may find nothing to do and the work committed by the first, which
    commits before it removes the folder; so `committed` (is what the work makes there?) is asked
    again after the records are listed. Whether the name was taken before the work began is for the
    first process to say, which never asks. ValueError as of `Ledger`.
    """
    if rank and committed():
        return None
    try:
        ledger = Ledger(folder, recipe)
        left = ledger.left(units, rank, world_size)
    except FileNotFoundError:  # removed by the first process at this moment
        if rank and committed():
            return None
        raise
    if rank and committed():
        shutil.rmtree(folder, ignore_errors=True)
        return None
    return ledger, left


def write_whole(path: Path, content: str | memoryview) -> None:
    """Write a file that appears whole or not at all, also after a power cut."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with open(partial, "w" if isinstance(content, str) else "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def is_disk_full(error: Exception) -> bool:
    """Return whether the operating system, or Lance in its words, says that no space is left."""
    text = str(error).lower()
    return "no space left" in text or "errno 28" in text
