"""One launch at a time writes into a folder, by flock or by a lease."""

import errno
import fcntl
import json
import os
import subprocess
import sys
import time

import pytest

from repa_fast import lock
from repa_fast.lock import Lock, LockLost, hold
from tests.refusals import refused

OTHER = {"token": "other", "host": "node7", "process": 4711, "launch": "", "since": "noon"}


@pytest.fixture(params=["flock", "lease"])
def folder(request, tmp_path, monkeypatch):
    """A folder on a file system with or without locks."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setattr(lock, "SETTLED", 0.0)
    if request.param == "lease":

        def no_locks(*_):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "flock", no_locks)
    return tmp_path / "run"


def test_who_comes_second_is_refused_until_the_first_is_done(folder):
    with hold(folder) as held:
        words = (rf"{folder} is in use by process {os.getpid()} on \S+, since", "expected no other")
        refused(lambda: Lock(folder), *words)
        held.expect()
    assert not folder.exists()
    with hold(folder):
        (folder / "result").touch()
    assert [path.name for path in folder.iterdir()] == ["result"]


def test_other_processes_of_a_launch_hold_nothing(folder):
    with hold(folder), hold(folder, rank=1) as other:
        other.expect()
    with hold(folder, rank=1):
        assert not (folder / lock.NAME).exists()


def test_a_restart_of_the_same_launch_takes_over_at_once(folder, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # no launch's
    with hold(folder):
        refused(lambda: Lock(folder), "in use")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job5")
    with hold(folder) as first, hold(folder) as second:
        second.expect()
        with pytest.raises(LockLost, match=r"taken over by process .*, launch job5"):
            first.expect()
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job6")
        refused(lambda: Lock(folder), "launch job5")
        first.release()
        second.expect()  # what the first left alone


def test_a_file_that_is_gone_or_anothers_is_a_lock_that_is_lost(folder):
    """Whoever lets a lock go removes its file: others may have been there meanwhile."""
    with hold(folder) as held:
        (folder / lock.NAME).unlink()
        with pytest.raises(LockLost, match="lock is gone"):
            held.expect()
        (folder / lock.NAME).write_text(json.dumps(OTHER))
        with pytest.raises(LockLost, match="process 4711 on node7"):
            held.expect()
    assert (folder / lock.NAME).exists()  # the other's


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"token": "x"}', json.dumps(OTHER)])
def test_what_a_dead_process_left_is_in_nobodys_way(folder, content):
    """Its flock ended with it; a lease has to grow old."""
    folder.mkdir()
    file = folder / lock.NAME
    file.write_text(content)
    os.utime(file, (time.time() - lock.STALE - 5,) * 2)
    with hold(folder) as held:
        held.expect()


def test_a_lease_is_refreshed_and_its_age_counts(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setattr(lock, "SETTLED", 0.0)
    monkeypatch.setattr(lock, "REFRESH", 0.01)
    folder = tmp_path / "run"
    with hold(folder):
        file = folder / lock.NAME
        long_ago = time.time() - 200
        os.utime(file, (long_ago, long_ago))
        end = time.monotonic() + 10
        while file.stat().st_mtime < long_ago + 100 and time.monotonic() < end:
            time.sleep(0.01)
        assert file.stat().st_mtime > long_ago + 100
    folder.mkdir()
    (folder / lock.NAME).write_text(json.dumps(OTHER))
    os.utime(folder / lock.NAME, (long_ago, long_ago))
    refused(lambda: Lock(folder), "node7", r"comes back in (99|100|9\d) s if it has died")


def test_other_faults_of_flock_are_not_taken_for_a_lease(tmp_path, monkeypatch):
    def fails(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", fails)
    with pytest.raises(OSError, match="Input/output"):
        Lock(tmp_path)


HOLDS = """
import os, sys, time
from pathlib import Path
from repa_fast.lock import Lock
held = Lock(Path(sys.argv[1]))
if os.fork() == 0:
    print("held", flush=True)
time.sleep(60)
"""


def test_it_ends_with_the_process_also_beside_its_children(tmp_path):
    """A child that was forked while it was held lives on."""
    command = [sys.executable, "-c", HOLDS, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as process:
        try:
            assert process.stdout.readline() == b"held\n"
            refused(lambda: Lock(tmp_path), f"process {process.pid} on")
            process.kill()
            process.wait()
            with hold(tmp_path) as held:
                held.expect()
        finally:
            os.killpg(process.pid, 9)
