"""The marker of a complete checkpoint: the CRC-32 of every other file, checked when these are read.

Damaged is a file whose content is not what was written. A file that cannot be read, because of its
permissions or of a disk that fails for a moment, is not: that raises OSError.
"""

import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from repa_fast.whole import open_regular, parse_json, read_regular

MARKER = "COMPLETE"

_trusted = ContextVar("trusted", default=False)
_intact: set[tuple] = set()
"""(file, inode, size, time of the last change) of what this process has found to be intact."""


def is_complete(checkpoint: Path) -> bool:
    """Return whether a directory has the marker; OSError if that cannot be found out."""
    try:
        (checkpoint / MARKER).stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


@contextmanager
def trusted(trust: bool = True) -> Iterator[None]:
    """Read without comparing checksums: they were compared before, or somebody insists."""
    token = _trusted.set(trust or _trusted.get())
    try:
        yield
    finally:
        _trusted.reset(token)


def expect_intact(checkpoint: Path, names: Iterable[str]) -> None:
    """Raise ValueError unless files of a checkpoint are what was written, by the marker.

    Each process reads a file for that once. OSError if one cannot be read.
    """
    if not is_complete(checkpoint):
        raise ValueError(f"{checkpoint} is not a complete checkpoint (it has no file {MARKER})")
    if _trusted.get():
        return
    found = {name: _identity(checkpoint / name) for name in names}
    left = [name for name, identity in found.items() if identity not in _intact]
    if damaged := damage(checkpoint, left):
        raise ValueError(f"{checkpoint} is damaged: {damaged} (--no-verify reads it as it is)")
    _intact.update(found[name] for name in left)


def damage(checkpoint: Path, names: Iterable[str] | None = None) -> str:
    """Return what differs from the marker, "" if nothing does; of some files, or of all it names.

    OSError if one cannot be read.
    """
    try:
        expected = parse_json(read_regular(checkpoint / MARKER), MARKER)
        named = {Path(name).name == name for name in expected}
    except (ValueError, TypeError) as error:
        return f"its file {MARKER} cannot be read ({error})"
    if not isinstance(expected, dict) or named - {True}:
        return f"its file {MARKER} cannot be read (expected checksums by file name)"
    names = sorted(expected if names is None else names)
    if unknown := [name for name in names if name not in expected]:
        return f"its file {MARKER} does not know {', '.join(unknown)}"
    found = of_each(_checksum_or_none, [checkpoint / name for name in names])
    if missing := [name for name, value in found.items() if value is None]:
        return f"missing {', '.join(missing)}"
    changed = [name for name, value in found.items() if value != expected[name]]
    return f"wrong checksum of {', '.join(changed)}" if changed else ""


def of_each(work: Callable[[Path], int | None], files: list[Path]) -> dict[str, int | None]:
    """Return what `work` returns of each file, by name; its threads run side by side."""
    with ThreadPoolExecutor() as pool:
        return dict(zip((file.name for file in files), pool.map(work, files), strict=True))


def checksum(file: Path) -> int:
    """Return the CRC-32 of a file."""
    value = 0
    with open_regular(file) as stream:
        while chunk := stream.read(1 << 24):
            value = zlib.crc32(chunk, value)
    return value


def _checksum_or_none(file: Path) -> int | None:
    try:
        return checksum(file)
    except FileNotFoundError:
        return None


def _identity(file: Path) -> tuple:
    try:
        status = file.stat()
    except FileNotFoundError:
        return (file,)
    return (file.resolve(), status.st_ino, status.st_size, status.st_mtime_ns)
