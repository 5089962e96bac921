"""Runs under torchrun that are killed, stopped and spread over two agents, against one left alone.

Two processes each, and gloo; the results are bit-identical, as they are after any resume. Restarts
go on by themselves, without the `--resume auto` of the other tests here.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("tyro")

from benchmarks.faults.chaos import differences
from benchmarks.faults.chaos_run import descendants, kill
from repa_fast.checkpoint.layout import path_of, steps
from tests.faults.conftest import STEPS
from tests.train.runs import ended, start, until

pytestmark = pytest.mark.usefixtures("torchrun", "heavy")

STANDALONE = ["--standalone", "--nproc-per-node=2"]
IGNORING = ["bash", "-c", 'trap "" USR1; exec "$@"', "bash"]
"""The shell of docs/launch/train.sbatch, which has torchrun ignore the signal."""


@pytest.fixture
def launched(whole, tmp_path):
    """(torchrun's flags, more of train.py's) -> the process, which ends with the test."""
    processes = []

    def launch(flags: list[str], *more: str, shell: tuple[str, ...] = ()) -> subprocess.Popen:
        torchrun = [sys.executable, "-m", "torch.distributed.run", *flags, "train.py"]
        place = ["--output-dir", str(tmp_path), "--exp-name", "run"]
        processes.append(start([*shell, *torchrun, *whole.flags, *place, *more]))
        return processes[-1]

    yield launch
    for process in processes:
        if process.poll() is None:
            kill([process.pid, *descendants(process.pid)])
            process.wait()


def workers(pid: int) -> list[int]:
    """The processes below a torchrun that train, by rank."""
    environments = {d: Path(f"/proc/{d}/environ").read_bytes() for d in descendants(pid)}
    found = {d: re.search(rb"\0RANK=(\d+)\0", value) for d, value in environments.items()}
    return sorted((d for d, match in found.items() if match), key=lambda d: int(found[d][1]))


def test_data_is_skipped_once_however_often_torchrun_restarts(launched, whole, tmp_path):
    """With the same flags each time: a kill before the first checkpoint, and one after it."""
    more = ["--resume", str(path_of(whole.run / "checkpoints", 30)), "--skip-steps", "3"]
    ended(launched(STANDALONE, *more, "--exp-name", "skipped"))
    process = launched([*STANDALONE, "--max-restarts=2"], *more)
    for line in (r"step 32/", r"checkpoint .*/0000035 "):
        until(process, line)
        os.kill(workers(process.pid)[1], signal.SIGKILL)
    going_on = r"going on from .*/run/.*/0000035, past the data of 3 steps\n"
    assert re.search(going_on, ended(process))
    assert differences(tmp_path / "run", tmp_path / "skipped") == []


def test_a_refused_start_is_refused_after_a_restart_too(launched, whole, tmp_path):
    (tmp_path / "run").symlink_to(whole.run)
    process = launched([*STANDALONE, "--max-restarts=1"], "--max-train-steps", "44")
    refusal = "go on with --resume auto, or choose another --exp-name"
    assert ended(process, status=1).count(refusal) >= 2
    assert steps(whole.run / "checkpoints")[-1] == STEPS


@pytest.mark.parametrize(
    "number, shell, status", [(signal.SIGTERM, (), 1), (signal.SIGUSR1, IGNORING, 0)]
)
def test_a_signal_to_every_process_saves_once_and_resumes_exactly(
    launched, whole, tmp_path, number, shell, status
):
    """Slurm's way: processes get SIGTERM from it and from torchrun; SIGUSR1 warns ahead of time."""
    process = launched(STANDALONE, shell=shell)
    until(process, r"step (8|9|\d\d)/")
    for pid in [*workers(process.pid), process.pid]:
        os.kill(pid, number)
    printed = ended(process, status)
    stopped = steps(tmp_path / "run" / "checkpoints")[-1]
    assert stopped < STEPS
    assert f"stopped by a signal at step {stopped}; go on with --resume auto" in printed
    ended(launched(STANDALONE, "--resume", "auto"))
    assert differences(tmp_path / "run", whole.run) == []


def test_both_of_two_agents_restart_when_a_process_of_one_is_killed(launched, whole, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rendezvous = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=job"]
    rendezvous += [f"--rdzv-endpoint=127.0.0.1:{port}", "--local-addr=127.0.0.1"]
    agents = [launched([*rendezvous, "--max-restarts=2"]) for _ in range(2)]
    log = tmp_path / "run" / "log.txt"
    deadline = time.monotonic() + 120
    while not (log.exists() and f"step 16/{STEPS}" in log.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(workers(agents[1].pid)[0], signal.SIGKILL)
    printed = [ended(agent) for agent in agents]
    assert sum(f"step {STEPS}/{STEPS}" in lines for lines in printed) == 1
    assert differences(tmp_path / "run", whole.run) == []
