"""Two processes that are told to stop, whose clock jumps, or that come back as one or three."""

import shutil
import signal
import subprocess

import pytest

from benchmarks.faults import chaos
from benchmarks.faults.chaos_run import PATIENCE
from repa_fast.checkpoint.layout import path_of, steps
from tests.faults.conftest import STEPS

pytestmark = pytest.mark.usefixtures("torchrun", "heavy")

CLOCK = r"""
#include <errno.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static long jump(void) {
    int before = errno;
    const char *jumped = getenv("JUMPED"), *seconds = getenv("JUMP_SECONDS");
    long found = jumped && seconds && access(jumped, F_OK) == 0 ? atol(seconds) : 0;
    errno = before;
    return found;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    int status = syscall(SYS_clock_gettime, clock, now);
    if (clock == CLOCK_REALTIME) now->tv_sec += jump();
    return status;
}

int gettimeofday(struct timeval *now, void *zone) {
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    now->tv_sec = exact.tv_sec;
    now->tv_usec = exact.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *out) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out) *out = now.tv_sec;
    return now.tv_sec;
}
"""
"""The wall clock of a process, which jumps by JUMP_SECONDS once the file JUMPED is there."""


@pytest.fixture
def clock(tmp_path, monkeypatch):
    """(seconds) -> makes the wall clock of processes started from here on jump by so much."""
    if shutil.which("cc") is None:
        pytest.skip("needs cc, for a library that moves the clock")
    source, library, jumped = (tmp_path / name for name in ("clock.c", "clock.so", "jumped"))
    source.write_text(CLOCK)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    monkeypatch.setenv("LD_PRELOAD", str(library))
    monkeypatch.setenv("JUMPED", str(jumped))

    def arrange(seconds: int):
        monkeypatch.setenv("JUMP_SECONDS", str(seconds))
        return jumped

    return arrange


def test_sigterm_during_a_save_leaves_only_whole_checkpoints(whole, tmp_path):
    """torchrun passes it on; the run saves where it is, exits, and goes on from there exactly."""
    run = tmp_path / "run"
    with chaos.started(whole.flags, run) as trainer:
        trainer.until(lambda: (trainer.reached or 0) >= 10, "step 10")
        assert trainer.until(trainer.saving, "a save")
        saved_before = steps(trainer.checkpoints)
        trainer.process.send_signal(signal.SIGTERM)
        trainer.process.wait(PATIENCE)
    saved = steps(run / "checkpoints")
    assert STEPS > saved[-1] > saved_before[-1]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        path_of(run, step).name for step in saved
    ]
    with chaos.started(whole.flags, run) as trainer:
        trainer.until(lambda: trainer.began_at is not None, "its beginning")
        assert trainer.began_at == saved[-1]
        trainer.finish()
    assert chaos.differences(run, whole.run) == []


@pytest.mark.parametrize("seconds", [-86400, 86400])
def test_a_jump_of_the_clock_changes_nothing(whole, tmp_path, clock, seconds):
    """A day back or ahead in the middle of the run, and then a restart."""
    jumped = clock(seconds)
    run = tmp_path / "run"
    with chaos.started(whole.flags, run) as trainer:
        trainer.until(lambda: (trainer.reached or 0) >= 12, "step 12")
        jumped.touch()
        trainer.until(lambda: trainer.reached >= 18, "step 18")
        trainer.kill("both")
        trainer.finish()
        assert trainer.faults[0]["resumed_at"] >= 10
    assert chaos.differences(run, whole.run) == []
    assert len({line[:10] for line in (run / "log.txt").read_text().splitlines()}) == 2


@pytest.mark.parametrize("processes", [1, 3])
def test_another_number_of_processes_goes_on_with_the_same_run(whole, tmp_path, processes):
    """What two processes had saved at step 30, to 1e-6."""
    run = tmp_path / "run"
    shutil.copytree(whole.run, run)
    for step in steps(run / "checkpoints")[1:]:
        shutil.rmtree(path_of(run / "checkpoints", step))
    with chaos.started(whole.flags, run, processes) as trainer:
        trainer.finish()
        assert trainer.began_at == STEPS - 2 * chaos.SAVE_EVERY
    ours, theirs = chaos.readings(run), chaos.readings(whole.run)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for mine, other in zip(ours, theirs):
        for name in ("loss", "denoise", "align/sra", "grad_norm"):
            assert mine[name] == pytest.approx(other[name], rel=1e-6, abs=1e-6), mine["step"]
