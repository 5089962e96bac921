"""What a run of benchmarks/faults/chaos.py suffers besides kills, and what has to come of it."""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import BinaryIO

from benchmarks.faults.chaos_run import Broken, Trainer, alive, descendants, kill
from benchmarks.harness.environment import ROOT
from repa_fast.checkpoint.layout import path_of
from repa_fast.checkpoint.marker import MARKER

FULL_DISK, OUTAGE = "full disk", 8.0
"""The kind, and the most seconds for which a disk stays full after it has ended a run."""
NEEDED = {"flip": 2, "second run": 1, "torchrun": 1}
"""Whole checkpoints that have to be there: with all damaged a run does not start, and without any a
second one would train."""


@dataclass(frozen=True)
class Fault:
    """What happens, and when."""

    kind: str  # one of FAULTS, or the phase in which to kill
    target: str  # whom to kill, else ""
    after: int  # steps from where the run begins
    wait: float  # of the longest delay


def suffer(trainer: Trainer, fault: Fault) -> bool:
    """Let a run suffer what is due; return False, without a row, if it ended before that.

    Raise Broken if a promise was not kept.
    """
    if fault.kind not in FAULTS:
        trainer.kill(fault.target)
        return True
    row = trainer.note("fault", fault=fault.kind)
    if FAULTS[fault.kind](trainer, fault, row):
        return True
    trainer.faults.pop()
    return False


def flip(trainer: Trainer, fault: Fault, row: dict) -> bool:
    """Kill everything, flip bits of a random byte of the newest checkpoint, and start again.

    The trainer sees to it that the run names it and goes on from the one before.
    """
    workers = trainer.workers()
    trainer.stop()
    trainer.interrupted(workers.values())
    draw, path = random.Random(fault.wait), path_of(trainer.checkpoints, trainer.complete()[-1])
    files = [file for file in sorted(path.iterdir()) if file.name != MARKER and file.stat().st_size]
    file = draw.choice(files)
    content = bytearray(file.read_bytes())
    content[draw.randrange(len(content))] ^= draw.randint(1, 255)
    file.write_bytes(content)
    trainer.damage(path)
    row["file"] = file.name
    trainer.launch()
    return True


def full_disk(trainer: Trainer, fault: Fault, row: dict) -> bool:
    """Leave no space until a save fails, or until the failures end the run; then give it back."""
    filler, first = trainer.run.parent / "filler", trainer.workers().get(0, 0)
    begins, unwritten = trainer.begins, trainer.unwritten
    try:
        with open(filler, "wb", buffering=0) as stream:

            def failed() -> bool:
                fill(stream)
                return not alive(first) or (trainer.unwritten > unwritten and fault.wait < 0.5)

            if not trainer.until(failed, "a save that fails"):
                return False
            row["also"] = not alive(first)
            if row["also"]:
                fill(stream)
                trainer.pause(fault.wait * OUTAGE)
    finally:
        filler.unlink()
    trainer.since, said = time.monotonic(), trainer.announcements

    def goes_on() -> bool:
        return trainer.begins > begins or (alive(first) and trainer.announcements > said)

    trainer.until(goes_on, "training with space")
    if row["resumed_at"] is None:
        row["resumed_at"] = trainer.reached
    return True


def second_run(trainer: Trainer, fault: Fault, row: dict) -> bool:
    """Start a second run in the folder: it has to name the first, which goes on undisturbed."""
    first, begins, reached = trainer.workers().get(0, 0), trainer.begins, trainer.reached
    said = intrude(trainer)
    if trainer.finished:
        return False
    if f" is in use by process {first} on " not in said:
        raise Broken(f"a second run did not name process {first}: {said}")
    trainer.until(
        lambda: trainer.begins > begins or trainer.reached > reached, "a step beside a second run"
    )
    if trainer.begins != begins:
        raise Broken("a run began again because of a second one")
    row["resumed_at"] = trainer.reached
    return True


def torchrun(trainer: Trainer, fault: Fault, row: dict) -> bool:
    """Kill torchrun alone: while its processes live, a second run has to name one of them."""
    first, orphans = trainer.workers().get(0, 0), descendants(trainer.process.pid)
    kill([trainer.process.pid])
    try:
        said = intrude(trainer)
        row["also"] = alive(first) and not trainer.finished
    finally:
        kill(orphans)
    if row["also"] and f" is in use by process {first} on " not in said:
        raise Broken(f"a second run did not name process {first}, which has no torchrun: {said}")
    trainer.since = time.monotonic()
    trainer.interrupted(orphans)
    trainer.launch()
    return True


def hang_up(trainer: Trainer, fault: Fault, row: dict) -> bool:
    """Send SIGHUP to torchrun: the run has to save all that it reported, and to end."""
    workers = trainer.workers()
    trainer.process.send_signal(signal.SIGHUP)
    trainer.until(lambda: trainer.process.poll() is not None, "the end", anyway=True)
    trainer.interrupted(workers.values())
    newest = trainer.complete()[-1:]
    if not newest or newest[0] < row["reached"]:
        raise Broken(f"SIGHUP lost steps: {row['reached']} was reported, {newest} saved")
    trainer.launch()
    return True


FAULTS = {
    "flip": flip,
    FULL_DISK: full_disk,
    "second run": second_run,
    "torchrun": torchrun,
    "SIGHUP": hang_up,
}


def fill(stream: BinaryIO) -> None:
    """Write until nothing is free: large pieces first, then what is left of a page."""
    for size in (1 << 20, 1 << 12, 1):
        try:
            while True:
                stream.write(bytes(size))
        except OSError:
            continue


def intrude(trainer: Trainer) -> str:
    """Start a new run of one process in the folder of one; return what it says as it is refused."""
    command = [sys.executable, "train.py", *trainer.flags, "--resume", "never"]
    with tempfile.TemporaryFile() as said:
        second = subprocess.Popen(
            command, cwd=ROOT, env=trainer.environment, stdout=subprocess.DEVNULL, stderr=said
        )
        try:
            trainer.until(lambda: second.poll() is not None, "a second run's end", anyway=True)
        finally:
            kill([second.pid])
            second.wait()
        trainer.read()
        words = os.pread(said.fileno(), 1 << 20, 0).decode(errors="replace")
    if second.returncode != 2:
        raise Broken(f"a second run ended with status {second.returncode}, expected 2: {words}")
    return words
