"""Runs under torchrun that are killed, stopped and spread over two agents, against one left alone.

Two processes each, and gloo; the results are bit-identical, as they are after any resume.
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

pytest.importorskip("lance")
pytest.importorskip("tyro")

from repa_fast.data.digits import prepare_digits
from repa_fast.train import checkpoint
from tests.train.test_runs import (
    FLAGS,
    STEPS,
    assert_bit_identical,
    descendants,
    start,
)

pytestmark = pytest.mark.usefixtures("torchrun", "heavy")

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
STANDALONE = ["--standalone", "--nproc-per-node=2"]


@pytest.fixture(scope="module")
def digits_dir(tmp_path_factory):
    return prepare_digits(tmp_path_factory.mktemp("data") / "digits")


@pytest.fixture
def training(digits_dir, tmp_path):
    """(torchrun's flags, more of ours) -> a command; without `--resume auto`."""

    def command(launch: list[str], *more: str) -> list[str]:
        flags = [part for pair in FLAGS.items() for part in pair]
        flags += ["--data-dir", str(digits_dir), "--output-dir", str(tmp_path), "--exp-name", "run"]
        return [*TORCHRUN, *launch, "train.py", *flags, *more]

    return command


@pytest.fixture
def launched():
    """Starts a command; whatever it leaves running ends with the test."""
    processes = []

    def launch(arguments: list[str]) -> subprocess.Popen:
        processes.append(start(arguments))
        return processes[-1]

    yield launch
    for process in processes:
        if process.poll() is None:
            for pid in [*descendants(process.pid), process.pid]:
                os.kill(pid, signal.SIGKILL)
            process.wait()


@pytest.fixture(scope="module")
def undisturbed(digits_dir, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed")
    flags = [part for pair in FLAGS.items() for part in pair]
    flags += ["--data-dir", str(digits_dir), "--output-dir", str(output), "--exp-name", "run"]
    process = start([*TORCHRUN, *STANDALONE, "train.py", *flags])
    printed, _ = process.communicate(timeout=240)
    assert process.returncode == 0, printed
    return output / "run"


def workers(pid: int) -> list[int]:
    """The processes below a torchrun that train, by rank."""
    environments = {d: Path(f"/proc/{d}/environ").read_bytes() for d in descendants(pid)}
    found = {d: re.search(rb"\0RANK=(\d+)\0", value) for d, value in environments.items()}
    return sorted((d for d, match in found.items() if match), key=lambda d: int(found[d][1]))


def until(process: subprocess.Popen, line: str) -> None:
    """Read on until a line begins with a pattern."""
    if not any(re.match(line, printed) for printed in process.stdout):
        raise AssertionError(f"it ended without {line}")


def until_step(process: subprocess.Popen, at: int) -> None:
    for line in process.stdout:
        if (match := re.match(r"step (\d+)/", line)) and int(match[1]) >= at:
            return
    raise AssertionError(f"it ended before step {at}")


def test_a_killed_process_is_restarted_and_resumes_by_itself(
    training, launched, undisturbed, tmp_path
):
    process = launched(training([*STANDALONE, "--max-restarts=1"]))
    until(process, r"checkpoint .*/0000015 ")
    os.kill(workers(process.pid)[1], signal.SIGKILL)
    printed, _ = process.communicate(timeout=240)
    assert process.returncode == 0, printed
    assert re.search(r"going on from .*/00000(15|18|21)\n", printed), printed
    assert_bit_identical(tmp_path / "run", undisturbed)


def test_data_is_skipped_once_however_often_torchrun_restarts(
    training, launched, undisturbed, tmp_path
):
    """With the same flags each time: a kill before the first checkpoint, and one after it."""
    source = str(checkpoint.path_of(undisturbed / "checkpoints", 15))
    more = ["--resume", source, "--skip-steps", "3", "--checkpointing-steps", "15"]
    finished(launched([*training(STANDALONE, *more), "--exp-name", "whole"]))
    process = launched(training([*STANDALONE, "--max-restarts=2"], *more))
    for line in (r"step 16/", r"checkpoint .*/0000030 "):
        until(process, line)
        os.kill(workers(process.pid)[1], signal.SIGKILL)
    printed = finished(process)
    assert re.search(r"going on from .*/run/.*/0000030, past the data of 3 steps\n", printed)
    assert_bit_identical(tmp_path / "run", tmp_path / "whole")


def test_a_refused_start_is_refused_after_a_restart_too(training, launched, undisturbed, tmp_path):
    (tmp_path / "run").symlink_to(undisturbed)
    process = launched(training([*STANDALONE, "--max-restarts=1"], "--max-train-steps", "44"))
    printed, _ = process.communicate(timeout=240)
    assert process.returncode == 1
    assert printed.count("go on with --resume auto, or choose another --exp-name") >= 2
    assert checkpoint.steps(undisturbed / "checkpoints")[-1] == STEPS


def test_sigterm_to_every_process_saves_once_and_resumes_exactly(
    training, launched, undisturbed, tmp_path
):
    """Slurm's way: the processes get it from Slurm and again from torchrun."""
    process = launched(training(STANDALONE))
    until_step(process, 8)
    for pid in [*workers(process.pid), process.pid]:
        os.kill(pid, signal.SIGTERM)
    printed, _ = process.communicate(timeout=120)
    stopped = checkpoint.steps(tmp_path / "run" / "checkpoints")[-1]
    assert f"stopped by a signal at step {stopped}; go on with --resume auto" in printed
    finished(launched(training(STANDALONE, "--resume", "auto")))
    assert_bit_identical(tmp_path / "run", undisturbed)


def test_a_warning_ahead_of_time_saves_and_ends_well(training, launched, undisturbed, tmp_path):
    """SIGUSR1 to every process; the shell of docs/launch/train.sbatch has torchrun ignore it."""
    shell = ["bash", "-c", 'trap "" USR1; exec "$@"', "bash"]
    process = launched([*shell, *training(STANDALONE)])
    until_step(process, 8)
    for pid in [*workers(process.pid), process.pid]:
        os.kill(pid, signal.SIGUSR1)
    printed = finished(process)
    assert "stopped by a signal at step" in printed
    assert checkpoint.steps(tmp_path / "run" / "checkpoints")[-1] < STEPS
    finished(launched(training(STANDALONE, "--resume", "auto")))
    assert_bit_identical(tmp_path / "run", undisturbed)


def finished(process: subprocess.Popen) -> str:
    printed, _ = process.communicate(timeout=240)
    assert process.returncode == 0, printed
    return printed


@pytest.fixture
def rendezvous():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=job",
            f"--rdzv-endpoint=127.0.0.1:{port}", "--local-addr=127.0.0.1"]  # fmt: skip


def test_two_agents_equal_one_with_two_processes(
    training, launched, undisturbed, tmp_path, rendezvous
):
    agents = [launched(training(rendezvous)) for _ in range(2)]
    printed = [finished(agent) for agent in agents]
    assert sum("step 40/40" in lines for lines in printed) == 1
    assert_bit_identical(tmp_path / "run", undisturbed)


def test_both_agents_restart_when_a_process_of_one_is_killed(
    training, launched, undisturbed, tmp_path, rendezvous
):
    agents = [launched(training([*rendezvous, "--max-restarts=2"])) for _ in range(2)]
    log = tmp_path / "run" / "log.txt"
    deadline = time.monotonic() + 120
    while not (log.exists() and "step 16/40" in log.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(workers(agents[1].pid)[0], signal.SIGKILL)
    for agent in agents:
        finished(agent)
    assert_bit_identical(tmp_path / "run", undisturbed)
