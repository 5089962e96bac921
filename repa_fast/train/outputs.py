"""Outputs that a full disk or a closed terminal refuses: counted and said, never a run's end."""

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from repa_fast.whole import open_own

SAID_EVERY = 60.0
"""Seconds between warnings, at the least."""


class Attempts:
    """Tries to write, counts what fails, and says so on stderr, at most once a minute."""

    def __init__(self) -> None:
        self.failed = 0
        self._said = -math.inf

    @contextmanager
    def to_write(self, what: object) -> Iterator[None]:
        """Let an OSError of what is inside pass; `what` names it."""
        try:
            yield
        except OSError as error:
            self.failed += 1
            if time.monotonic() - self._said < SAID_EVERY:
                return
            self._said = time.monotonic()
            say(
                f"warning: {what} could not be written ({error}), nor {self.failed - 1} outputs "
                "before; training goes on",
                sys.stderr,
            )


class Lines:
    """A file that lines are appended to; those that could not be written wait for the next."""

    def __init__(self, path: Path) -> None:
        self._file = open(open_own(path), "ab", buffering=0)  # noqa: SIM115
        self._waiting = b""

    def add(self, line: str) -> None:
        """Append a line, after those that wait; OSError if that fails."""
        self._waiting += line.encode(errors="backslashreplace") + b"\n"
        self.flush()

    def flush(self) -> None:
        """Write the lines that wait; OSError if that fails."""
        while self._waiting:
            self._waiting = self._waiting[self._file.write(self._waiting) :]

    def close(self) -> None:
        try:
            self.flush()
        finally:
            self._file.close()


def say(text: str, stream=None) -> None:
    """Print a line, if anybody still reads it."""
    with suppress(OSError):
        print(text, file=stream or sys.stdout, flush=True)
