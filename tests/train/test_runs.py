"""Whole runs in processes of their own: killed, stopped, resumed, and on two ranks."""

import os
import random
import signal
import time

import pytest

pytest.importorskip("lance")
pytest.importorskip("tyro")

from benchmarks.faults import chaos
from repa_fast.train import checkpoint
from repa_fast.train.run import main
from tests.train.runs import (
    STEPS,
    assert_bit_identical,
    command,
    descendants,
    finish,
    flags,
    start,
)

pytestmark = pytest.mark.usefixtures("torchrun")

ONCE = ["--checkpointing-steps", str(STEPS)]


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


@pytest.fixture(scope="module")
def undisturbed(digits_dir, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed")
    main(flags(digits_dir, output, *ONCE))
    return output / "run"


@pytest.mark.parametrize(
    "number, status, more, least", [(signal.SIGTERM, 0, ONCE, 8), (signal.SIGKILL, -9, [], 3)]
)
def test_a_signal_ends_a_run_that_resumes_exactly(
    digits_dir, undisturbed, tmp_path, number, status, more, least
):
    """SIGTERM saves first, and exits with 0; after SIGKILL there is what had been saved."""
    own = flags(digits_dir, tmp_path, *more, "--resume", "auto")
    assert interrupt(command(own), 8, number, 0.0) == status
    assert least <= checkpoint.steps(tmp_path / "run" / "checkpoints")[-1] < STEPS
    main(own)
    assert_bit_identical(tmp_path / "run", undisturbed)


@pytest.mark.usefixtures("heavy")
@pytest.mark.parametrize(
    "ranks, more, kills", [(1, [], (4, 8, 12, 16, 20)), (2, ["--compile"], (8, 16))]
)
def test_killed_and_resumed_run_is_bit_identical(
    digits_dir, undisturbed, tmp_path, ranks, more, kills
):
    """Kills at random moments after some steps."""
    if ranks > 1:
        finish(command(flags(digits_dir, tmp_path / "undisturbed", *more), ranks))
        undisturbed = tmp_path / "undisturbed" / "run"
    arguments = command(flags(digits_dir, tmp_path, "--resume", "auto", *more), ranks)
    draw = random.Random(0)
    for at in kills:
        delay = draw.uniform(0, 0.1)
        assert interrupt(arguments, at, signal.SIGKILL, delay) == -signal.SIGKILL
    finish(arguments)
    assert_bit_identical(tmp_path / "run", undisturbed)


@pytest.mark.usefixtures("heavy")
@pytest.mark.parametrize(
    "more, names, tolerance",
    [
        ([], ("loss", "denoise", "grad_norm", "align/digits-vit"), {"abs": 1e-6, "rel": 1e-6}),
        (["--compile"], ("loss",), {"rel": 1e-3}),
    ],
)
def test_two_ranks_equal_one_process(digits_dir, undisturbed, tmp_path, more, names, tolerance):
    finish(command(flags(digits_dir, tmp_path, *more), ranks=2))
    ours, theirs = chaos.readings(tmp_path / "run"), chaos.readings(undisturbed)
    assert len(ours) == STEPS // 4
    for a, b in zip(ours, theirs, strict=True):
        assert a["step"] == b["step"]
        for name in names:
            assert a[name] == pytest.approx(b[name], **tolerance)
    assert checkpoint.steps(tmp_path / "run" / "checkpoints")[-1] == STEPS
