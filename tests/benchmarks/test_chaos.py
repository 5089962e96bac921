"""The onlooker notices every promise that is broken, and says what it saw."""

import json
import re
import shutil
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from benchmarks.faults import chaos, chaos_report
from benchmarks.faults.chaos_faults import FAULTS
from benchmarks.faults.chaos_run import Broken, Trainer
from benchmarks.harness.environment import RESULTS, ROOT
from benchmarks.harness.rows import read
from repa_fast.checkpoint.layout import path_of
from repa_fast.checkpoint.marker import MARKER
from tests.refusals import refused
from tests.sealing import reseal

BEGINS = "runs/run: 2 x cpu, fp32, 12 images per step in micro-batches of 6, from step {} to 40"


def complete(folder: Path, *steps: int) -> None:
    for step in steps:
        path_of(folder, step).mkdir(parents=True)
        (path_of(folder, step) / MARKER).touch()


@pytest.fixture
def trainer(tmp_path):
    """Of a run of 40 steps that has begun, keeps 2 checkpoints and has announced one of step 5."""
    trainer = Trainer([], tmp_path / "run", ranks=2, keep_last=2)
    trainer.see(BEGINS.format(0))
    complete(trainer.checkpoints, 5)
    trainer.see(f"checkpoint {path_of(trainer.checkpoints, 5)}")
    return trainer


def go_on(trainer: Trainer, step: int) -> None:
    trainer.see(f"going on from {path_of(trainer.checkpoints, step)}")
    trainer.see(BEGINS.format(step))


broken = partial(refused, error=Broken)


def test_a_run_that_keeps_its_promises_passes(trainer):
    """Also where a save's line says more, and where newer checkpoints pushed announced ones out."""
    trainer.see("step 8/40  loss 1.0")
    assert (trainer.reached, trainer.announced, trainer.finished) == (8, {5}, False)
    complete(trainer.checkpoints, 10, 15)
    trainer.see(f"checkpoint {path_of(trainer.checkpoints, 10)} paused the run 3 ms")
    shutil.rmtree(path_of(trainer.checkpoints, 5))
    go_on(trainer, 15)
    assert (trainer.began_at, trainer.reached) == (15, None)
    complete(trainer.checkpoints, 40)
    trainer.see(f"checkpoint {path_of(trainer.checkpoints, 40)}")
    assert trainer.finished


def test_a_start_from_an_older_or_no_checkpoint_and_a_lost_one_are_noticed(trainer):
    complete(trainer.checkpoints, 10)
    broken(partial(go_on, trainer, 5), r"began at step 5 from 5, complete were \[5, 10\]")
    broken(partial(trainer.see, BEGINS.format(0)), "began at step 0")
    shutil.rmtree(path_of(trainer.checkpoints, 5))
    broken(partial(go_on, trainer, 10), r"announced .* no marker: \[5\], complete are \[10\]")


def test_a_half_written_checkpoint_is_noticed(trainer):
    path_of(trainer.checkpoints, 10).mkdir()
    broken(partial(go_on, trainer, 10), r"went on from .*0000010, which is not whole")
    announced = partial(trainer.see, f"checkpoint {path_of(trainer.checkpoints, 10)}")
    broken(announced, r"announced .* no marker: \[10\], complete are \[5\]")


def test_a_flipped_byte_has_to_be_named_passed_over_and_kept(trainer):
    complete(trainer.checkpoints, 10)
    path = path_of(trainer.checkpoints, 10)
    trainer.see(f"checkpoint {path}")
    trainer.damage(path)
    assert (trainer.complete(), trainer.announced, trainer.announcements) == ([5], {5}, 2)
    broken(partial(go_on, trainer, 10), r"went on from .*0000010, which is not whole")
    broken(partial(go_on, trainer, 5), r"did not say that .*0000010 is damaged")
    trainer._errors.write(f"passing over {path}: wrong checksum of config.json\n".encode())
    trainer._errors.flush()
    broken(partial(go_on, trainer, 5), "0000010 was damaged, and was not moved aside")
    path.rename(path.with_name("0000010.damaged"))
    go_on(trainer, 5)
    complete(trainer.checkpoints, 10)
    trainer.see(f"checkpoint {path}")
    assert (trainer.complete(), trainer.announced) == ([5, 10], {5, 10})


def test_the_phase_is_what_lines_and_folders_say(tmp_path):
    trainer = Trainer([], tmp_path / "run", ranks=2, keep_last=2)
    phases = [trainer.phase()]
    complete(trainer.checkpoints, 5)
    phases.append(trainer.phase())
    path_of(trainer.checkpoints, 10).mkdir()
    go_on(trainer, 5)
    for moved in (1, -2):  # the folder is of before the run began, and of later
        trainer._began_wall += moved
        phases.append(trainer.phase())
    assert phases == ["starting", "resuming", "training", "checkpointing"]


def finished(run: Path, *, loss: float = 1.0, weight: float = 1.0, rate: float = 9.0) -> Path:
    """A run's folder with a last checkpoint and metrics."""
    target = path_of(run / "checkpoints", 40)
    tensors = {"model": {"w": torch.full((3,), weight)}, "ema": {"w": torch.ones(3)}}
    dcp.save(tensors, checkpoint_id=target, no_dist=True)
    reseal(target)
    line = {"step": 40, "loss": loss, "images_per_second": rate, "eta_seconds": rate, "mfu": None}
    (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    return run


def test_one_bit_is_a_difference_and_the_time_taken_is_none(tmp_path):
    whole = finished(tmp_path / "whole")
    assert chaos.differences(finished(tmp_path / "same", rate=5.0), whole) == []
    assert chaos.differences(finished(tmp_path / "bit", weight=1 + 2**-23), whole) == ["model.w"]
    assert chaos.differences(finished(tmp_path / "loss", loss=1.5), whole) == ["metrics.jsonl"]


def test_the_plan_shares_faults_and_targets_out_evenly_and_repeats():
    faults = chaos.plan(64, 20, seed=3)
    assert faults == chaos.plan(64, 20, seed=3) != chaos.plan(64, 20, seed=4)
    assert Counter(fault.kind for fault in faults) == dict.fromkeys(chaos.KINDS, 8)
    whom = Counter(fault.target for fault in faults)
    assert whom == dict.fromkeys(chaos.TARGETS, 6) | {"": 40}
    assert all((fault.target == "") == (fault.kind in FAULTS) for fault in faults)
    assert {fault.after for fault in faults} <= set(range(1, 21))
    assert {fault.kind for fault in chaos.plan(9, 20, 3, ["flip", "SIGHUP"])} == {"flip", "SIGHUP"}


FLIP = {"kind": "fault", "fault": "flip", "phase": "training", "half_written": False}
FLIP |= {"resumed_at": 5, "lost_steps": 7, "recovery_seconds": 8.5}
HELD = FLIP | {"fault": "torchrun", "lost_steps": 3, "recovery_seconds": 9.5, "also": True}
KILL = FLIP | {"kind": "kill", "target": "all", "lost_steps": 1, "recovery_seconds": None}
RUN = {"kind": "run", "identical": True, "announced": 9}
WHOLE = {"kind": "undisturbed", "steps": 40, "ranks": 2, "start_seconds": 4.0}


def test_the_report_has_a_line_of_the_table_for_every_kind_and_says_what_was_checked():
    kill = {name: value for name, value in KILL.items() if name != "fault"}
    common = {"flags": "", "command": "python"}
    rows = [FLIP, HELD, HELD | {"also": False, "lost_steps": 5}, kill, RUN, WHOLE]
    text = chaos_report.markdown([common | row for row in rows])
    for line in (
        "4 faults in 1 run of 40 steps on 2 processes. Training resumed after 4 of them. 1 of 1 ",
        "9 checkpoints were announced; none was lost but the 1 in which a byte was flipped. 0 ",
        "- 1 times all processes were killed and a byte of the newest checkpoint was flipped. ",
        "- 2 times torchrun alone was killed. 1 of these times its processes lived on, ",
        "| training | 1 | 0 | 0 | 0 | 1 | 0 | 1 | 1 |  |  |",
        "| flip | 1 | 0 | 0 | 0 | 0 | 0 | 7 | 7 | 8.5 | 8.5 |",
        "| torchrun | 2 | 0 | 0 | 0 | 0 | 0 | 4 | 5 | 9.5 | 9.5 |",
        "| all | 4 | 0 | 0 | 0 | 1 | 0 | 4 | 7 | 9.5 | 9.5 |",
    ):
        assert line in text
    assert "SIGHUP" not in text
    assert set(chaos_report.CHECKED) == set(FAULTS)


def test_the_page_shows_the_committed_rows_and_every_test_that_it_names_is_there():
    """docs/reliability.md is what benchmarks.faults.chaos_report makes of the newest rows."""
    rows = sorted((RESULTS / "cpu").glob("*_chaos/rows.jsonl"))[-1]
    page = chaos_report.PAGE.read_text()
    assert chaos_report.filled(page, read(rows)) == page
    named = re.findall(r"(tests/\S+\.py)::(\w+)", page)
    assert len(named) >= 18
    assert not [name for file, name in named if f"def {name}(" not in (ROOT / file).read_text()]
