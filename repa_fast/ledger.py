"""Work cut into numbered units that is resumed after a kill: one small file per finished unit."""

import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from repa_fast.failure import Failure
from repa_fast.whole import is_disk_full, parse_json, read_regular, write_whole
from repa_fast.words import note, short

RECIPE = "recipe.json"
DISCARDED = "null"
"""Recipe of a beginning that is being thrown away."""
PATIENCE, REPEAT = 10.0, 60.0
"""Seconds of waiting until it is said what for, and until it is said again."""


class Ledger:
    """A folder with the recipe of the work and the records of its finished units.

    Any number of processes share it; each unit is one process's. It is there from the beginning of
    the work until what was made of it is committed.

    Args:
        anew: how to begin anew, for messages.
        is_whole: record -> whether what the unit has written is still there; it is asked once a
            record, and a unit whose record is damaged or not whole is unfinished.

    Raises:
        ValueError: it was begun with another recipe, or its recipe is damaged.
    """

    def __init__(
        self,
        folder: Path,
        recipe: dict,
        *,
        anew: str = "remove it",
        is_whole: Callable[[dict], bool] = lambda record: True,
    ) -> None:
        self.folder, self._is_whole, self._done = folder, is_whole, set()
        folder.mkdir(parents=True, exist_ok=True)
        stored = folder / RECIPE
        if not stored.exists():
            write_whole(stored, json.dumps(recipe, indent=2))
        try:
            begun = read_dict(stored)
        except ValueError as error:
            raise ValueError(f"{error}; {anew}") from error
        self._expect_same(begun, json.loads(json.dumps(recipe)), anew)

    def _expect_same(self, begun: dict, now: dict, anew: str) -> None:
        if changed := list(_differences(begun, now)):
            raise ValueError(
                f"{self.folder} was begun with another recipe ({'; '.join(changed)}); go on with "
                f"the same, or {anew}"
            )

    def done(self) -> list[int]:
        """Return the finished units, in order."""
        for path in self.folder.glob("[0-9]*.json"):
            unit = int(path.stem)
            if unit not in self._done:
                with suppress(ValueError, FileNotFoundError):  # damaged; removed at this moment
                    if self._is_whole(read_dict(path)):
                        self._done.add(unit)
        return sorted(self._done)

    def left(self, units: int, rank: int, world_size: int) -> list[int]:
        """Return the unfinished units of `rank`: it has every WORLD_SIZE-th of 0..units - 1."""
        done = set(self.done())
        left = [unit for unit in range(rank, units, world_size) if unit not in done]
        if damaged := [unit for unit in left if self._file(unit).exists()]:
            note(
                f"{self.folder}: {len(damaged)} of {units} finished blocks are damaged or have "
                "lost their files, and are made again"
            )
        return left

    def work(
        self,
        units: Iterable[int],
        finish: Callable[[int], None],
        report: Callable[[], None],
        kept: str,
    ) -> None:
        """Call `finish` for each unit, which also writes its record, and `report` after each.

        Failure if the disk is full says how many units are `kept`, such as "fragments".
        """
        for unit in units:
            try:
                finish(unit)
            except (OSError, RuntimeError) as error:
                if not is_disk_full(error):
                    raise
                raise Failure(
                    f"the disk of {self.folder.parent} is full; {len(self.done())} {kept} are "
                    "written and kept: make room and run the same command again"
                ) from error
            report()

    def wait_for(self, units: int, meanwhile: Callable[[], None], world_size: int = 1) -> None:
        """Call `meanwhile` and sleep until so many units are finished, by any process."""

        def awaited() -> str:
            meanwhile()
            missing = set(range(units)).difference(self.done())
            if not missing:
                return ""
            owners = sorted({unit % world_size for unit in missing})
            whose = f"{'es' * (len(owners) > 1)} {', '.join(map(str, owners))} (of {world_size})"
            of = f" of process{whose}" if world_size > 1 else ""
            return f"{len(missing)} of {units} blocks{of}: {self.folder}"

        wait_until_none(awaited)

    def write(self, unit: int, record: dict) -> None:
        """Write the record of a unit, which is finished with it."""
        write_whole(self._file(unit), json.dumps(record))

    def read(self, unit: int) -> dict:
        """Read the record of a finished unit."""
        return read_dict(self._file(unit))

    def remove(self) -> None:
        """Remove the folder, once the work is committed; some file systems keep an open lock."""
        write_whole(self.folder / RECIPE, DISCARDED)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, unit: int) -> Path:
        return self.folder / f"{unit:06d}.json"


def _differences(begun: dict, now: dict, prefix: str = "") -> Iterator[str]:
    """Yield what is another in `now`, by name; what only `begun` has makes no difference."""
    for name, value in now.items():
        if isinstance(value, dict) and isinstance(begun.get(name), dict):
            yield from _differences(begun[name], value, f"{prefix}{name}.")
        elif name not in begun:
            yield f"{prefix}{name}: not recorded, now {short(value)}"
        elif begun[name] != value:
            yield f"{prefix}{name}: {short(begun[name])}, now {short(value)}"


def share(
    folder: Path,
    recipe: dict,
    units: int,
    rank: int,
    world_size: int,
    committed: Callable[[], bool],
    **options: object,
) -> tuple[Ledger, list[int]] | None:
    """Return the ledger and the unfinished units of a process's share, or None if committed.

    A process that starts late may find nothing to do and the work committed by the first, which
    commits before it removes the folder; so `committed` (is what the work makes there?) is asked
    again after the records are listed. Whether the name was taken before the work began is for the
    first process to say, which never asks. Options and ValueError as of `Ledger`.
    """
    if rank and committed():
        return None
    try:
        ledger = Ledger(folder, recipe, **options)
        left = ledger.left(units, rank, world_size)
    except (FileNotFoundError, ValueError):  # removed by the first process at this moment
        if rank and committed():
            return None
        raise
    if rank and committed():
        shutil.rmtree(folder, ignore_errors=True)
        return None
    return ledger, left


def discard(folder: Path) -> None:
    """Throw away what was begun in a folder, but not its lock; `is_discarded` until all is gone."""
    recipe = folder / RECIPE
    write_whole(recipe, DISCARDED)
    for path in folder.glob("*.json*"):
        if path != recipe:
            path.unlink()
    recipe.unlink()


def is_discarded(folder: Path) -> bool:
    """Return whether a beginning is being thrown away, or was when a kill came."""
    try:
        return (folder / RECIPE).read_bytes() == DISCARDED.encode()
    except FileNotFoundError:
        return False


def records(folder: Path) -> Iterator[dict]:
    """Yield the records of a folder that can be read, whatever the recipe."""
    for path in folder.glob("[0-9]*.json"):
        with suppress(ValueError, FileNotFoundError):
            yield read_dict(path)


def wait_until_none(awaited: Callable[[], str]) -> None:
    """Sleep until `awaited` returns "", and say on stderr what it returns if that does not change.

    It is said PATIENCE seconds after the last change, and every REPEAT seconds from then on.
    """
    before, say_at = "", 0.0
    while now := awaited():
        if now != before:
            before, say_at = now, time.monotonic() + PATIENCE
        elif time.monotonic() >= say_at:
            note(f"waiting for {now}")
            say_at = time.monotonic() + REPEAT
        time.sleep(0.5)


def read_dict(path: Path) -> dict:
    """Read a JSON file that holds a dict; ValueError names a damaged one."""
    content = parse_json(read_regular(path), path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: {short(content)}, expected a dict")
    return content
