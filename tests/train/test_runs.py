"""Whole runs in processes of their own: killed, stopped, resumed, and on two ranks."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("lance")
pytest.importorskip("tyro")

from repa_fast.checkpoint import layout as weights
from repa_fast.configs.build import build_model
from repa_fast.configs.config import from_saved
from repa_fast.data.digits import digits_metadata, prepare_digits
from repa_fast.train import checkpoint
from repa_fast.train.report import read_metrics

pytestmark = pytest.mark.usefixtures("torchrun")

ROOT = Path(__file__).parents[2]
STEPS = 40
TIMED = ("images_per_second", "eta_seconds", "mfu", "stall_ms")
FLAGS = {
    "--preset": "digits",
    "--hidden-size": "32",
    "--depth": "3",
    "--num-heads": "2",
    "--encoder-depth": "2",
    "--projector-dim": "32",
    "--batch-size": "12",
    "--report-to": "none",
    "--sampling-steps": "0",
    "--log-every": "4",
    "--checkpointing-steps": "3",
    "--max-train-steps": str(STEPS),
}


@pytest.fixture(scope="module")
def digits_dir(tmp_path_factory):
    return prepare_digits(tmp_path_factory.mktemp("data") / "digits")


def command(digits_dir: Path, output: Path, ranks: int = 1, extra: list[str] | None = None):
    flags = [part for pair in FLAGS.items() for part in pair]
    flags += ["--data-dir", str(digits_dir), "--output-dir", str(output), "--exp-name", "run"]
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [*launcher, "train.py", *flags, *(extra or [])]


def start(arguments: list[str]) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        arguments, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip


def finish(arguments: list[str]) -> str:
    process = start(arguments)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    return output


def descendants(pid: int) -> list[int]:
    """Processes below `pid`: torchrun's workers are in sessions of their own."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children] + [d for c in children for d in descendants(int(c))]


def interrupt(arguments: list[str], at: int, number: int, delay: float) -> int:
    """Signal all processes `delay` s after the first line of a step >= `at`; returns the status."""
    process = start(arguments)
    for line in process.stdout:
        if line.startswith("step ") and int(line.split()[1].split("/")[0]) >= at:
            time.sleep(delay)
            for pid in [process.pid, *descendants(process.pid)]:
                os.kill(pid, number)
            break
    process.communicate(timeout=120)
    return process.returncode


def curve(run: Path) -> list[dict]:
    return [
        {name: value for name, value in line.items() if name not in TIMED}
        for line in read_metrics(run / "metrics.jsonl")
    ]


def averaged_weights(run: Path) -> dict[str, torch.Tensor]:
    target = checkpoint.path_of(run / "checkpoints", STEPS)
    config = from_saved(json.loads((target / "config.json").read_text()))
    model = build_model(config, digits_metadata())
    weights.load_ema(target, model)
    return model.state_dict()


@pytest.fixture(scope="module")
def undisturbed(digits_dir, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed")
    finish(command(digits_dir, output))
    return output / "run"


def assert_bit_identical(run: Path, undisturbed: Path) -> None:
    assert curve(run) == curve(undisturbed)
    expected = averaged_weights(undisturbed)
    for name, value in averaged_weights(run).items():
        assert torch.equal(value, expected[name]), name


def killed_and_resumed(arguments: list[str], moments: list[tuple[int, float]]) -> None:
    arguments = [*arguments, "--resume", "auto"]
    for at, delay in moments:
        assert interrupt(arguments, at, signal.SIGKILL, delay) == -signal.SIGKILL
    finish(arguments)


@pytest.mark.usefixtures("heavy")
def test_killed_and_resumed_run_is_bit_identical(digits_dir, undisturbed, tmp_path):
    killed_and_resumed(command(digits_dir, tmp_path), [(8, 0.01), (24, 0.0)])
    assert_bit_identical(tmp_path / "run", undisturbed)


@pytest.mark.usefixtures("heavy")
@pytest.mark.parametrize("ranks, extra", [(1, []), (2, ["--compile"])])
def test_five_kills_at_random_moments(digits_dir, tmp_path, ranks, extra):
    finish(command(digits_dir, tmp_path / "undisturbed", ranks, extra))
    draw = random.Random(0)
    moments = [(at, draw.uniform(0, 0.1)) for at in (4, 12, 16, 24, 32)]
    killed_and_resumed(command(digits_dir, tmp_path, ranks, extra), moments)
    assert_bit_identical(tmp_path / "run", tmp_path / "undisturbed" / "run")


def test_sigterm_saves_exits_0_and_resumes_exactly(digits_dir, undisturbed, tmp_path):
    arguments = command(digits_dir, tmp_path, extra=["--resume", "auto"])
    assert interrupt(arguments, 8, signal.SIGTERM, 0.0) == 0
    stopped = checkpoint.steps(tmp_path / "run" / "checkpoints")[-1]
    assert 8 <= stopped < STEPS
    finish(arguments)
    assert_bit_identical(tmp_path / "run", undisturbed)


def assert_close_curves(run: Path, undisturbed: Path) -> None:
    ours, theirs = curve(run), curve(undisturbed)
    assert len(ours) == len(theirs) == STEPS // 4
    for a, b in zip(ours, theirs, strict=True):
        assert a["step"] == b["step"]
        for name in ("loss", "denoise", "grad_norm", "align/digits-vit"):
            assert a[name] == pytest.approx(b[name], abs=1e-6, rel=1e-6)


@pytest.mark.usefixtures("heavy")
def test_two_ranks_equal_one_process(digits_dir, undisturbed, tmp_path):
    finish(command(digits_dir, tmp_path, ranks=2))
    assert_close_curves(tmp_path / "run", undisturbed)
    assert checkpoint.steps(tmp_path / "run" / "checkpoints")[-1] == STEPS


@pytest.mark.usefixtures("heavy")
def test_two_ranks_compiled(digits_dir, undisturbed, tmp_path):
    finish(command(digits_dir, tmp_path, ranks=2, extra=["--compile"]))
    ours, theirs = curve(tmp_path / "run"), curve(undisturbed)
    for a, b in zip(ours, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
