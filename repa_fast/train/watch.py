"""What a run that hangs or dies leaves behind: stacks of stuck steps, and each process's error."""

import faulthandler
import os
import socket
import statistics
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FACTOR = 20
"""A step is stuck when it takes so many times the median of recent ones, and the floor."""
RECENT_STEPS = 100
FIRST_STEPS = 5
"""Steps that compile; there is no median to speak of before."""
PATIENCE = 10
"""Floors that the first steps, and pauses between steps, may take."""
LOOK_EVERY = 5.0
"""Seconds between two looks at the clock, at most."""
LAST_WORD = 5.0
"""Seconds that a process whose peers failed before it leaves them to be seen as the cause."""


class Watchdog:
    """Appends the stacks of all threads to a file, once for each step that takes far too long.

    It kills nothing; the timeout of collectives does. It looks from a thread of its own, and a step
    costs it a time stamp. A step whose code holds the interpreter's lock stops that thread too:
    then the stacks go to stderr, from a timer that needs no lock.

    Args:
        path: the file, made when there is something to write.
        rank: for the line on stderr.
        floor: seconds that every step may take; 0 never looks.
    """

    def __init__(self, path: Path, rank: int, floor: float) -> None:
        self._path = path
        self._rank = rank
        self._floor = floor
        self._durations: deque[float] = deque(maxlen=RECENT_STEPS)
        self._step = 0
        self._since = time.monotonic()
        self._reported: float | None = None
        self._spent = 0.0
        self._pause = "the start"
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="repa-fast-watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self._floor:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        if self._floor:
            self._thread.join(LOOK_EVERY)

    def step(self, step: int) -> None:
        """Step number `step` starts now, and the one before it ends."""
        now = time.monotonic()
        if not self._pause:
            self._durations.append(now - self._since)
        self._step, self._since, self._pause = step, now, ""

    def pause(self, what: str) -> None:
        """From now on until `resume` goes on what is no part of the step."""
        now = time.monotonic()
        self._spent = 0.0 if self._pause else now - self._since
        self._since, self._pause = now, what

    def resume(self) -> None:
        """The step goes on."""
        self._since, self._pause = time.monotonic() - self._spent, ""

    def compiles(self) -> None:
        """Forget the steps so far: the next ones compile again."""
        self._durations.clear()

    def limit(self) -> float:
        """Seconds that what goes on may take."""
        durations = tuple(self._durations)
        if self._pause or len(durations) < FIRST_STEPS:
            return PATIENCE * self._floor
        return max(self._floor, FACTOR * statistics.median(durations))

    def _watch(self) -> None:
        while not self._stopped.wait(min(LOOK_EVERY, self._floor / 4)):
            since, limit = self._since, self.limit()
            faulthandler.dump_traceback_later(limit + LOOK_EVERY, file=sys.__stderr__)
            taken = time.monotonic() - since
            if taken > limit and since != self._reported:
                self._reported = since
                doing = self._pause or f"step {self._step}"
                self._dump(f"{doing} has taken {taken:.1f} s, expected at most {limit:.1f} s")
        faulthandler.cancel_dump_traceback_later()

    def _dump(self, what: str) -> None:
        what = f"rank {self._rank} on {socket.gethostname()}: {what}"
        print(f"repa-fast: {what}; stacks go to {self._path}", file=sys.stderr, flush=True)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._path, "a") as file:
                print(f"{_now()}  {what}", file=file, flush=True)
                faulthandler.dump_traceback(file)
        except OSError as error:  # a full disk may be what everything waits for
            print(f"repa-fast: {error}; stacks follow here", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(sys.__stderr__)


@contextmanager
def error_file(folder: Path, rank: int, stopping: list[int]) -> Iterator[None]:
    """Append what ends this process to FOLDER/error-rank{k}.txt, and tell torchrun.

    torchrun names as the root cause whoever failed first, by whole seconds. An error that follows
    from another process's (a lost connection) comes a moment after it, so a process that finds an
    error file newer than its own start reports its error only when torchrun, having seen the other
    one's, asks it to stop (`stopping`), or a few seconds later.
    """
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    before = _error_files(folder)
    try:
        yield
    except Exception as error:
        path = folder / f"error-rank{rank}.txt"
        new = dict(_error_files(folder).items() - before.items())
        others = ", ".join(sorted(new.keys() - {path.name}))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        about = f"{_now()}  rank {rank} on {socket.gethostname()}, restart {attempt}"
        if others:
            about += f"; after {others}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with open(path, "a") as file:
                file.write(f"{about}\n{traceback.format_exc()}\n")
        except OSError as unwritable:
            print(f"repa-fast: rank {rank}: {unwritable}", file=sys.stderr, flush=True)
        end = time.monotonic() + LAST_WORD
        while others and not stopping and time.monotonic() < end:
            time.sleep(0.05)
        get_error_handler().record_exception(error)
        raise


def _error_files(folder: Path) -> dict[str, int]:
    """Time of the last change, ns, of every process's file of errors."""
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("error-rank*.txt")}


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")
