"""One launch at a time writes into a folder: a lock that ends with its holder, however that ends.

FOLDER/lock says who holds it, and is held by flock, which the system lets go of when a process
ends. Where a file system has no locks, the file is a lease: a thread touches it every REFRESH
seconds, and without that it is stale after STALE. A launch of torchrun that restarts its processes
takes the lock over from those before, even if they seem to live (on a node that is cut off): it
puts a new file there. So whoever holds the lock looks, before a result counts, whether its own file
is still the one.
"""

import errno
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from repa_fast.failure import Failure
from repa_fast.whole import naming, open_own, parse_json, read_regular

NAME = "lock"
REFRESH, STALE = 30.0, 300.0
"""Seconds between touches of a lease, and until one without them is anybody's."""
ATTEMPTS = 100
"""To open a file that another process may be removing."""
SETTLED = 0.5
"""Seconds after which two who take a lease at the same moment look who was the last."""
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EBADF, errno.EOPNOTSUPP)
"""What flock says on file systems without locks."""

_open: set[int] = set()


def _close_in_child() -> None:
    """Close what a forked process got of its parent's locks: it would hold them after its end."""
    for descriptor in _open:
        os.close(descriptor)
    _open.clear()


os.register_at_fork(after_in_child=_close_in_child)


class LockLost(Failure):
    """Another launch holds the lock now."""


@contextmanager
def hold(folder: Path, rank: int = 0) -> Iterator["Lock"]:
    """Hold the lock of a folder, which is made; processes other than the first hold nothing.

    Raises:
        ValueError: another launch holds it; names host, process and launch.
    """
    held = Lock(folder, rank)
    try:
        yield held
    finally:
        held.release()


class Lock:
    """The lock of a folder, held from construction to `release` by the first process of a launch.

    Raises:
        ValueError: as for `hold`.
    """

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self.path, self.ours = folder / NAME, rank == 0
        self._descriptor: int | None = None
        self._over = threading.Event()  # of the lease
        self._holder = {
            "host": socket.gethostname(),
            "process": os.getpid(),
            "launch": own_launch(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "token": secrets.token_hex(8),
        }
        if self.ours:
            self._acquire()

    def expect(self) -> None:
        """Raise LockLost if another launch has taken the lock over, or may have had it since.

        Whoever lets it go removes the file, so that a missing one says that others were there.
        """
        holder = read_holder(self.path) if self.ours else self._holder
        if holder is None:
            raise LockLost(f"{self.path} is gone: {self.path.parent} was removed, or taken over")
        if holder.get("token") != self._holder["token"]:
            raise LockLost(f"{self.path.parent} was taken over by {described(holder)}")

    def release(self) -> None:
        """Let the lock go, if it is still held, and the folder, if it is empty; harmless again."""
        holder = read_holder(self.path) if self.ours else None
        if holder and holder.get("token") == self._holder["token"]:
            with suppress(OSError):
                self.path.unlink()
                self.path.parent.rmdir()
        self._close()
        self.ours = False

    def _acquire(self) -> None:
        for _ in range(ATTEMPTS):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                descriptor = open_own(self.path, os.O_RDWR)
            except FileNotFoundError:  # a holder has just removed the folder, its work done
                continue
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(descriptor)
                if error.errno in NO_LOCKS:
                    return self._lease()
                if not isinstance(error, BlockingIOError):
                    raise
                self._expect_own_launch()
                return self._replace(locks=True)
            with suppress(FileNotFoundError):  # released, and removed, between the two calls
                if os.path.samestat(os.fstat(descriptor), os.stat(self.path)):
                    self._keep(descriptor)
                    self._write()
                    return None
            os.close(descriptor)
        raise OSError(f"{self.path} cannot be opened: it vanishes again and again")

    def _lease(self) -> None:
        """Take the file without a lock, if its time is over, and touch it from now on."""
        with suppress(FileNotFoundError):
            there = os.stat(self.path)
            probe = self.path.with_name(f".{NAME}.{self._holder['token']}.now")
            probe.touch()  # by the clock of the file system
            age = probe.stat().st_mtime - there.st_mtime
            probe.unlink()
            if there.st_size and age < STALE:
                self._expect_own_launch(f", or comes back in {STALE - age:.0f} s if it has died")
        self._replace(locks=False)
        time.sleep(SETTLED)
        self._expect_own_launch()
        self._over = threading.Event()
        refresh = threading.Thread(target=self._refresh, args=(self._over,), daemon=True)
        refresh.start()

    def _refresh(self, over: threading.Event) -> None:
        while not over.wait(REFRESH):
            with suppress(OSError):
                if (read_holder(self.path) or {}).get("token") != self._holder["token"]:
                    return
                os.utime(self.path)

    def _replace(self, *, locks: bool) -> None:
        """Put a file of this process in the place of what is there."""
        partial = self.path.with_name(f".{NAME}.{self._holder['token']}")
        self._keep(open_own(partial, os.O_RDWR | os.O_EXCL))
        if locks:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        self._write()
        partial.replace(self.path)

    def _write(self) -> None:
        with naming(self.path):
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, json.dumps(self._holder).encode(), 0)

    def _expect_own_launch(self, otherwise: str = "") -> None:
        holder, own = read_holder(self.path) or {}, self._holder
        same = own["launch"] and holder.get("launch") == own["launch"]
        if not same and holder.get("token") != own["token"]:
            raise ValueError(
                f"{self.path.parent} is in use by {described(holder)}, expected no other process "
                f"to write there: wait until it ends, or end it{otherwise}"
            )

    def _keep(self, descriptor: int) -> None:
        self._descriptor = descriptor
        _open.add(descriptor)

    def _close(self) -> None:
        self._over.set()
        if self._descriptor in _open:  # not in a forked process
            _open.discard(self._descriptor)
            os.close(self._descriptor)
        self._descriptor = None


def own_launch() -> str:
    """Return torchrun's id of this launch; "" without torchrun, or where it has none."""
    launch = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return "" if launch == "none" else launch


def read_holder(path: Path) -> dict | None:
    """Return what a lock's file says; None if there is none, nothing while it is being written."""
    try:
        holder = parse_json(read_regular(path), path)
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def described(holder: dict) -> str:
    """Return words for who holds a lock."""
    if not holder.get("token"):
        return "another process"
    process, host, launch, since = map(holder.get, ("process", "host", "launch", "since"))
    of_launch = f", launch {launch}" if launch else ""
    return f"process {process} on {host}{of_launch}, since {since}"
