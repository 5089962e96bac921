"""What a run that hangs or dies leaves behind, and how it is asked to stop."""

import ctypes
import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist

pytest.importorskip("lance")

from repa_fast.configs.config import TrainConfig
from repa_fast.data.loader import DataTimeout, Loader
from repa_fast.data.open import open_dataset
from repa_fast.data.order import SampleOrder
from repa_fast.distributed import meet
from repa_fast.train import begin, watch
from repa_fast.train import run as runs
from repa_fast.train.watch import PATIENCE, error_file, watchdog
from tests.launching import ROOT
from tests.refusals import refused
from tests.train.conftest import ALONE

LIMIT = 0.2


def hang(seconds: float) -> None:
    time.sleep(seconds)


def reports(path: Path) -> int:
    """How often the stacks were written."""
    return path.read_text().count("Timeout (")


def test_a_stuck_step_leaves_its_stacks_once_and_goes_on(tmp_path):
    """Every stuck step does, and a later run appends."""
    path = tmp_path / "logs" / "stacks-rank3.txt"
    for stuck_for in ((2, 3), (2,)):
        with watchdog(path, LIMIT) as begins:
            for limits in stuck_for:
                begins(1)
                hang(limits * LIMIT)
            begins(1)
            time.sleep(LIMIT / 2)
    assert f'test_watch.py", line {hang.__code__.co_firstlineno + 1} in hang' in path.read_text()
    assert reports(path) == 3


def test_what_is_slow_for_a_reason_is_no_hang(tmp_path):
    """The start, a pause, what comes after a run, and everything where the limit is 0."""
    path = tmp_path / "stacks.txt"
    with watchdog(path, LIMIT) as begins:
        hang(2 * LIMIT)
        begins(PATIENCE)
        hang(2 * LIMIT)
        begins(1)
    hang(2 * LIMIT)
    with watchdog(path, 0) as begins:
        begins(1)
        hang(2 * LIMIT)
    assert not path.exists()


def test_pauses_and_the_start_have_a_limit_of_their_own(tmp_path):
    path, limit = tmp_path / "stacks.txt", 0.02
    with watchdog(path, limit) as begins:
        hang(1.5 * PATIENCE * limit)
        assert reports(path) == 1
        begins(PATIENCE)
        hang(1.5 * PATIENCE * limit)
    assert reports(path) == 2


def test_the_first_steps_and_pauses_of_a_run_have_more_time(train, monkeypatch):
    """Twelve steps, a pause before each; after the alignment's end at 6 they compile again."""
    allowed = []

    @contextmanager
    def recorder(path: Path, limit: float):
        yield allowed.append

    monkeypatch.setattr(runs, "watchdog", recorder)
    train(max_train_steps=12, align_until=6)
    steps = [PATIENCE] * 5 + [1] + [PATIENCE] * 5 + [1]
    assert allowed == [limits for step in steps for limits in (PATIENCE, step)] + [PATIENCE]


def test_a_step_that_holds_the_interpreters_lock_shows_too(tmp_path):
    path = tmp_path / "stacks.txt"

    def holds_the_lock() -> None:
        ctypes.PyDLL(None).usleep(250_000)

    with watchdog(path, 0.1) as begins:
        begins(1)
        holds_the_lock()
    assert "in holds_the_lock" in path.read_text()


def test_no_duration_is_taken_from_a_clock_that_can_jump():
    sources = (ROOT / "repa_fast").rglob("*.py")
    jumping = r"\btime\.time(_ns)?\(|datetime\.(now|utcnow|today)\(|from time import"
    assert [str(path) for path in sources if re.search(jumping, path.read_text())] == []


def failing(message: str, before: Callable[[], object]) -> None:
    before()
    raise RuntimeError(message)


def fail(folder: Path, rank: int, message: str, stopping=(), before=lambda: None) -> float:
    """Seconds from an error inside `error_file` to where it comes out."""
    begun = time.monotonic()
    with pytest.raises(RuntimeError, match=message), error_file(folder, rank, stopping):
        failing(message, before)
    return time.monotonic() - begun


def test_errors_are_kept_by_rank_and_told_to_torchrun(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "reply.json"))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    folder = tmp_path / "run" / "logs"
    with error_file(folder, 1, []):
        pass
    assert not folder.exists()
    fail(folder, 1, "the first")
    fail(folder, 1, "the second")
    written = (folder / "error-rank1.txt").read_text()
    assert written.count("in failing") == 2 and written.count("restart 2") == 2
    assert written.index("the first") < written.index("the second") and "after" not in written
    reply = json.loads((tmp_path / "reply.json").read_text())["message"]
    assert reply["message"] == "RuntimeError: the second"
    assert "in failing" in reply["extraInfo"]["py_callstack"]


@pytest.mark.parametrize("asked_to_stop", [False, True])
def test_an_error_after_anothers_is_reported_after_it(tmp_path, monkeypatch, asked_to_stop):
    monkeypatch.setattr(watch, "LAST_WORD", 0.5)
    (tmp_path / "error-rank4.txt").write_text("of an earlier attempt")
    stopping = [signal.SIGTERM] if asked_to_stop else []
    first = tmp_path / "error-rank1.txt"
    taken = fail(tmp_path, 0, "peer", stopping, before=lambda: first.write_text("lost a GPU"))
    assert (taken > 0.5) is not asked_to_stop
    assert "; after error-rank1.txt\n" in (tmp_path / "error-rank0.txt").read_text()
    fail(tmp_path, 2, "on its own")
    assert "after" not in (tmp_path / "error-rank2.txt").read_text()


def test_an_error_that_cannot_be_written_is_still_the_error(tmp_path, capsys):
    (tmp_path / "logs").write_text("a file, not a folder")
    fail(tmp_path / "logs", 0, "what matters")
    assert "repa-fast: rank 0: " in capsys.readouterr().err


@pytest.fixture
def usual_signals():
    """Also where a shell in the background has SIGINT ignored, or nohup SIGHUP."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    previous = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in previous.items():
        signal.signal(number, handler)


def test_a_hangup_that_nohup_has_ignored_stays_so():
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with runs.stop_signals() as received:
            signal.raise_signal(signal.SIGHUP)
            assert received == []
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_signals_are_noted_twice_but_for_ctrl_c(usual_signals):
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT)
    handlers = [signal.getsignal(n) for n in numbers]
    with runs.stop_signals() as received:
        for number in (signal.SIGTERM, *numbers):
            os.kill(os.getpid(), number)
        assert received == [signal.SIGTERM, *numbers]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert handlers == [signal.getsignal(n) for n in numbers]


def test_a_batch_that_does_not_come_is_an_error(digits_dir, monkeypatch):
    """The loader can be left while its thread hangs; without a limit it would wait for it."""
    digits = open_dataset(digits_dir)
    released, fetch = threading.Event(), type(digits).fetch

    def hanging(self, indices: np.ndarray, **options):
        if indices[0] == second:
            released.wait(30)
        return fetch(self, indices, **options)

    order = SampleOrder(len(digits), 8, seed=0)
    second = order.rows(1)[0]
    monkeypatch.setattr(type(digits), "fetch", hanging)
    begun = time.monotonic()
    with Loader(digits, order, start=0, stop=4, timeout=0.5) as loader:
        batches = iter(loader)
        assert len(next(batches)["index"]) == 8
        with pytest.raises(DataTimeout, match=r"digits.* within 0\.5 s \(--data-timeout\)"):
            next(batches)
    assert 0.5 < time.monotonic() - begun < 5
    released.set()


def meeting(store: dist.Store, ranks: range, size: int, timeout: float) -> list[str]:
    """What each of the processes `ranks` of `size` agrees on."""
    with ThreadPoolExecutor(size) as pool:
        agreed = [pool.submit(meet, store, rank, size, timeout) for rank in ranks]
        return [word.result() for word in reversed(agreed)]


def test_processes_do_not_meet_those_before_them():
    """Of three, two came, of which one died before it heard; then all start again, twice."""
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=0.2))
    with pytest.raises(dist.DistStoreError):
        meet(store, 1, 3, 0.2)
    with pytest.raises(TimeoutError, match=r"processes \[2\] did not come within 0\.2 s"):
        meeting(store, range(2), 3, 0.2)
    store.set_timeout(timedelta(seconds=10))
    words = [meeting(store, range(3), 3, 10.0) for _ in range(2)]
    assert [len(set(word)) for word in words] == [1, 1] and words[0] != words[1]


@pytest.mark.parametrize(
    "differs",
    [{}, {"restarts": "0"}, {"saved": False}]
    + [{"launch": launch} for launch in ("other 0", "none 0", "job 4", "", "job ")],
)
def test_a_restart_goes_on_from_what_its_own_launch_saved(tmp_path, monkeypatch, differs):
    """`other`: a start that was refused because of another launch's checkpoints; `job 4`: a launch
    that went on from step 4 by name, and has saved nothing since."""
    given = {"restarts": "1", "launch": "job 0", "saved": True} | differs
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", given["restarts"])
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none" if given["launch"] == "none 0" else "job")
    (tmp_path / begin.LAUNCH).write_text(given["launch"])
    if given["saved"]:
        (tmp_path / "checkpoints" / "0000004").mkdir(parents=True)
        (tmp_path / "checkpoints" / "0000004" / "COMPLETE").touch()
    config = TrainConfig(resume="last.pt", resume_step=3)
    found = begin.after_restart(config, tmp_path, ALONE)
    assert (found.resume, found.resume_step) == (("last.pt", 3) if differs else ("auto", 0))


def test_limits_are_checked():
    wrong = {"skip_steps": -1, "watchdog": -1.0, "data_timeout": -1.0, "collective_timeout": 0.0}
    for name, value in wrong.items():
        refused(partial(TrainConfig, **{name: value}), f"{name} is {value}, expected ")
