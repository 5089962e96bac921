"""A run of two processes that nothing disturbs, for the disturbed ones to be compared with."""

from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("lance")

from benchmarks.faults import chaos
from repa_fast.data.digits import prepare_digits

STEPS = 40


@dataclass(frozen=True)
class Whole:
    """Its folder, the flags to repeat it with, and the seconds its processes took to start."""

    run: Path
    flags: list[str]
    start_seconds: float


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory):
    return prepare_digits(tmp_path_factory.mktemp("data") / "digits")


@pytest.fixture(scope="session")
def whole(digits_dir, tmp_path_factory):
    run = tmp_path_factory.mktemp("whole") / "run"
    flags = chaos.flags(digits_dir, STEPS, chaos.SAVE_EVERY, chaos.LOG_EVERY, "--parallel fsdp")
    return Whole(run, flags, chaos.undisturbed(flags, run)["start_seconds"])
