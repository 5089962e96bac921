"""Files and folders that appear whole or not at all."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_whole(path: Path, content: str | memoryview) -> None:
    """Write a file that appears whole or not at all, also after a power cut.

    A failure leaves nothing behind, a kill at most one file beside it.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(partial, "wb") as file:
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

    ValueError if there is something already, unless it may be replaced.
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
        if partial.is_file():
            partial.chmod(mode)
            with open(partial, "rb") as file:
                os.fsync(file.fileno())
        os.rename(partial, out)
    except BaseException:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)
        raise


def is_disk_full(error: Exception) -> bool:
    """Return whether the operating system, or Lance in its words, says that no space is left."""
    text = str(error).lower()
    return "no space left" in text or "errno 28" in text
