"""A run of two processes that nothing disturbs, for the disturbed ones to be compared with."""

from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("lance")

from benchmarks.faults import chaos
from tests.train.watch_ranks import train_by_flags

STEPS = 40


@dataclass(frozen=True)
class Whole:
    """Its folder, and the flags to repeat it with."""

    run: Path
    flags: list[str]


@pytest.fixture(scope="session")
def whole(ranks, digits_dir, tmp_path_factory):
    """Such a run, by the processes that are there already."""
    run = tmp_path_factory.mktemp("whole") / "run"
    flags = chaos.flags(digits_dir, STEPS, chaos.SAVE_EVERY, chaos.LOG_EVERY, "--parallel fsdp")
    place = ["--output-dir", str(run.parent), "--exp-name", run.name]
    kept = ["--keep-last", str(chaos.KEEP_LAST)]
    assert ranks(train_by_flags, [*flags, *place, *kept]) == [0, 0]
    return Whole(run, flags)
