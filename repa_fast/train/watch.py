"""What a run that hangs or dies leaves behind: stacks of stuck steps, and each process's error."""

import faulthandler
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from repa_fast.whole import open_own

FIRST_STEPS = 5
"""Steps that compile."""
PATIENCE = 10
"""Limits that these, and pauses between steps, may take."""
LAST_WORD = 5.0
"""Seconds that a process whose peers failed before it leaves them to be seen as the cause."""


@contextmanager
def watchdog(path: Path, limit: float) -> Iterator[Callable[[int], None]]:
    """Append the stacks of all threads to `path` when something takes too long; kill nothing.

    What is yielded is called when something begins, with the number of limits (seconds) that it
    may take. It is reported once, by a timer of faulthandler's, which needs no lock of the
    interpreter's. A `limit` of 0 is none.
    """
    if not limit:
        yield lambda limits: None
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(open_own(path), "a") as file:

        def begin(limits: int) -> None:
            faulthandler.dump_traceback_later(limits * limit, file=file)

        try:
            begin(PATIENCE)
            yield begin
        finally:
            faulthandler.cancel_dump_traceback_later()
            if not os.fstat(file.fileno()).st_size:
                path.unlink(missing_ok=True)


@contextmanager
def error_file(folder: Path, rank: int, stopping: list[int]) -> Iterator[None]:
    """Append what ends this process to FOLDER/error-rank{k}.txt, and tell torchrun.

    As torch's `record`, but before the process group is left, which may wait for the others.
    torchrun names as the root cause whoever failed first, by whole seconds. An error that follows
    from another process's (a lost connection) comes a moment after it, so a process that finds an
    error file newer than its own start reports its error only when torchrun, having seen the other
    one's, asks it to stop (`stopping`), or a few seconds later.
    """
    before = _error_files(folder)
    try:
        yield
    except Exception as error:
        path = folder / f"error-rank{rank}.txt"
        others = sorted({name for name, _ in _error_files(folder) - before} - {path.name})
        about = f"{time.strftime('%Y-%m-%d %H:%M:%S')}  rank {rank} on {socket.gethostname()}, "
        about += f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        about += f"; after {', '.join(others)}" if others else ""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with open(open_own(path), "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(f"{about}\n{traceback.format_exc()}\n")
        except OSError as unwritable:
            print(f"repa-fast: rank {rank}: {unwritable}", file=sys.stderr, flush=True)
        end = time.monotonic() + LAST_WORD
        while others and not stopping and time.monotonic() < end:
            time.sleep(0.05)
        get_error_handler().record_exception(error)
        raise


def _error_files(folder: Path) -> set[tuple[str, int]]:
    """Return name and time of the last change, ns, of every process's file of errors."""
    return {(path.name, path.stat().st_mtime_ns) for path in folder.glob("error-rank*.txt")}
