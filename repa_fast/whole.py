"""Files that are ours to write, and appear whole or not at all; others' files, read with care."""

import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO


def read_regular(path: Path) -> bytes:
    """Read a file; OSError if it is none, such as a pipe that nobody writes to, or a device."""
    with open_regular(path) as file:
        return file.read()


def open_regular(path: Path) -> BinaryIO:
    """Open a file to read it; OSError if it is none, such as a pipe or a device."""
    return open(path, "rb", opener=lambda name, _: _open(name, os.O_RDONLY))


def open_own(path: Path, flags: int = os.O_WRONLY | os.O_APPEND) -> int:
    """Open a file to write it, which is made if it is not there, and return its descriptor.

    OSError for a link, which would lead somebody's file into another's hands, or for no file.
    """
    return _open(path, flags | os.O_CREAT | os.O_NOFOLLOW)


def _open(path: Path | str, flags: int) -> int:
    descriptor = os.open(path, flags | os.O_NONBLOCK, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path} is not a regular file")
    return descriptor


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give an OSError of writing, which names nothing, the name of the file."""
    try:
        yield
    except OSError as error:
        if error.errno and error.filename is None:
            error.filename = str(path)
        raise


def expect_no_link(*paths: Path) -> None:
    """Raise ValueError if one is a link: what is written or removed there would be another's."""
    for path in paths:
        if path.is_symlink():
            raise ValueError(f"{path} is a link, expected a file or folder of its own")


def parse_json(data: bytes | str, name: object) -> Any:
    """Return what JSON says; ValueError with the name of what it is of if it is none."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is damaged ({error}), expected JSON") from error


def write_whole(path: Path, content: str | memoryview) -> None:
    """Write a file that appears whole or not at all, also after a power cut.

    A failure leaves nothing behind, a kill at most one file beside it.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with suppress(FileNotFoundError):
            os.unlink(partial)  # of a process of that number that was killed
        with naming(path), open(open_own(partial, os.O_WRONLY | os.O_EXCL), "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def whole_or_not(out: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a path for a file or a folder that takes the name `out` at the end, or vanishes.

    ValueError if there is something already, or at the end, unless it may be replaced.
    """
    if out.exists() and not replace:
        raise ValueError(f"{out} exists already; remove it first")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}-{secrets.token_hex(4)}")
    try:
        partial.touch()  # to learn what the umask says: safetensors' own files are 0600
        mode = partial.stat().st_mode
        partial.unlink()
        yield partial
        for file in (partial, *partial.rglob("*")):
            if file.is_file():
                file.chmod(mode)
        if partial.is_file():
            with open(partial, "rb") as file:
                os.fsync(file.fileno())
        if replace or partial.is_dir():
            os.rename(partial, out)
        else:
            _take_name(partial, out)
    except BaseException:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)
        raise


def _take_name(partial: Path, out: Path) -> None:
    """Rename a file unless there is one of that name; ValueError if there is."""
    try:
        os.link(partial, out)
    except FileExistsError as error:
        raise ValueError(f"{out} exists already; remove it first") from error
    except OSError:  # a file system without hard links
        os.rename(partial, out)
    else:
        partial.unlink()


def is_disk_full(error: Exception) -> bool:
    """Return whether the operating system, or Lance in its words, says that no space is left."""
    text = str(error).lower()
    return "no space left" in text or "errno 28" in text
