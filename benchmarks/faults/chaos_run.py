"""A training run under torchrun as an onlooker sees it: its lines, processes and checkpoints.

Nothing here reads the trainer's memory. What a run says is held against what lies on the disk at
that moment, and a promise that does not hold raises Broken.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.harness.environment import ROOT
from repa_fast.checkpoint.layout import MARKER, steps

RESTARTS = 1000
PATIENCE = 240.0
"""Seconds without a line, or without an end that is due, after which a run counts as hanging."""

GOING_ON = re.compile(r"going on from (\S+)$")
BEGINS = re.compile(r", from step (\d+) to (\d+)$")
STEP = re.compile(r"step (\d+)/\d+ ")
ANNOUNCED = re.compile(r"checkpoint (\S+)( |$)")


class Broken(RuntimeError):
    """A run did not keep a promise; says which and what was seen."""


class Trainer:
    """One run of `ranks` processes in the folder `run`, through all its restarts.

    `flags` are train.py's, without those of resuming and of the run's place.
    """

    def __init__(self, flags: list[str], run: Path, ranks: int, keep_last: int) -> None:
        self.run, self.ranks, self.keep_last = run, ranks, keep_last
        self.announced: set[int] = set()  # steps of checkpoints that the run said were written
        self.reached: int | None = None  # the last step it reported since it last began
        self.began_at: int | None = None  # the step it began at, None while it starts
        self.finished = False  # whether the checkpoint of the last step was announced
        self.kills: list[dict] = []  # a row for each, complete once the run has begun again
        self.watch_memory = False
        self.rss: list[dict[int, int]] = []  # bytes of each rank at every step, if watched
        self._began_wall = self._killed = 0.0
        self._source: int | None = None
        self._complete: list[int] | None = None
        self._total = sys.maxsize
        self._rest = b""
        self._place = ["--output-dir", str(run.parent), "--exp-name", run.name]
        self._flags = [*flags, "--keep-last", str(keep_last), "--resume", "auto"]
        self._errors = run.with_name(f"{run.name}.errors.txt")
        run.parent.mkdir(parents=True, exist_ok=True)

    @property
    def checkpoints(self) -> Path:
        return self.run / "checkpoints"

    def launch(self) -> None:
        """Start torchrun, as a scheduler would after it lost the node."""
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        launcher += [f"--nproc-per-node={self.ranks}", f"--max-restarts={RESTARTS}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with open(self._errors, "a") as errors:
            self.process = subprocess.Popen(
                [*launcher, "train.py", *self._flags, *self._place], cwd=ROOT, env=environment,
                stdout=subprocess.PIPE, stderr=errors,
            )  # fmt: skip
        os.set_blocking(self.process.stdout.fileno(), False)
        self._rest = b""

    def until(self, ready: Callable[[], bool], what: str) -> bool:
        """Read lines until `ready()`; return False if the last checkpoint or the end comes first.

        Raise Broken if nothing is heard of the run for PATIENCE, or it ends badly.
        """
        deadline = time.monotonic() + PATIENCE
        while not ready():
            if self.finished:
                return False
            status = self.process.poll()
            if self.read():
                deadline = time.monotonic() + PATIENCE
            if status is not None and not self.finished:
                raise Broken(f"the run ended with status {status} before {what}{self._complaint()}")
            if time.monotonic() > deadline:
                raise Broken(f"waited {PATIENCE:.0f} s in vain for {what}{self._complaint()}")
            time.sleep(0.002)
        return True

    def pause(self, seconds: float) -> None:
        """Let it run on for so long."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.read()
            time.sleep(0.002)

    def finish(self) -> None:
        """Wait for the end; raise Broken if it is not good or announced checkpoints are gone."""
        self.until(lambda: self.finished, "its end")
        try:
            status = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise Broken(f"did not end after its last checkpoint{self._complaint()}") from None
        self.process.stdout.close()
        if status:
            raise Broken(f"ended with status {status} after its last checkpoint")
        self._expect_announced(steps(self.checkpoints))

    def read(self) -> bool:
        """Take in the lines that are there; say whether there were any."""
        heard = False
        while chunk := self.process.stdout.read(65536):
            *lines, self._rest = (self._rest + chunk).split(b"\n")
            for line in lines:
                self.see(line.decode(errors="replace"))
                heard = True
        return heard

    def phase(self) -> str:
        """Return what the run is doing: starting, resuming, checkpointing or training."""
        complete = steps(self.checkpoints)
        if self.began_at is None:
            return "resuming" if complete else "starting"
        return "checkpointing" if self.saving() else "training"

    def saving(self) -> bool:
        """Say whether a directory without the marker was touched since the run last began."""
        if self.began_at is None or not self.checkpoints.is_dir():
            return False
        for folder in self.checkpoints.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if folder.stat().st_mtime >= self._began_wall and not (folder / MARKER).exists():
                    return True
        return False

    def workers(self) -> dict[int, int]:
        """Return the process of each rank that runs."""
        found = {}
        for pid in descendants(self.process.pid):
            with contextlib.suppress(OSError):
                environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                ranks = [int(item[5:]) for item in environment if item.startswith(b"RANK=")]
                found.update(dict.fromkeys(ranks[:1], pid))
        return found

    def kill(self, target: str) -> None:
        """Kill "rank N", "both" ranks or "all", which is torchrun too, and wait for their end.

        After "all" the run is started again. Raise Broken if the other ranks do not end.
        """
        workers = self.workers()
        victims = [pid for rank, pid in workers.items() if target in (f"rank {rank}", "both")]
        if target == "all":
            victims = [self.process.pid, *descendants(self.process.pid)]
        phase, self._killed = self.phase(), time.monotonic()
        kill(victims)
        if target == "all":
            self.process.wait()
        while any(alive(pid) for pid in workers.values()):
            if time.monotonic() > self._killed + PATIENCE:
                raise Broken(f"a rank outlives the end of {target}{self._complaint()}")
            time.sleep(0.002)
        self.read()
        self._complete = steps(self.checkpoints)
        row = {"kind": "kill", "phase": phase, "target": target, "reached": self.reached}
        row |= {"half_written": self.saving(), "resumed_at": None, "lost_steps": 0}
        self.kills.append(row | {"recovery_seconds": None})
        self.began_at = self.reached = self._source = None
        self.finished = False
        if target == "all":
            self.process.stdout.close()
            self.launch()

    def stop(self) -> None:
        """End everything, when the onlooker gives up."""
        if self.process.poll() is None:
            kill([self.process.pid, *descendants(self.process.pid)])
            self.process.wait()

    def see(self, line: str) -> None:
        """Take in a line; raise Broken if what it says is not so, or must not be."""
        if match := GOING_ON.search(line):
            self._source = int(Path(match[1]).name)
            if self._source not in self._complete_when_it_looked():
                raise Broken(f"went on from {match[1]}, which has no marker")
        elif match := BEGINS.search(line):
            self._begin(int(match[1]))
            self._total = int(match[2])
        elif match := STEP.match(line):
            self.reached = int(match[1])
            if self.watch_memory:
                self.rss.append({rank: resident(pid) for rank, pid in self.workers().items()})
        elif match := ANNOUNCED.match(line):
            step = int(Path(match[1]).name)
            self.announced.add(step)
            self._expect_announced(steps(self.checkpoints))
            self.finished = step >= self._total

    def _complete_when_it_looked(self) -> list[int]:
        """Return what the last kill left; without one, what there is now, which nobody added to."""
        return steps(self.checkpoints) if self._complete is None else self._complete

    def _begin(self, step: int) -> None:
        complete = self._complete_when_it_looked()
        newest = complete[-1] if complete else 0
        if step != newest or (self._source or 0) != step:
            raise Broken(f"began at step {step} from {self._source}, complete were {complete}")
        self._expect_announced(complete)
        self._complete = None
        self.began_at, self.reached, self._began_wall = step, None, time.time()
        for row in self.kills:
            if row["resumed_at"] is None:
                row["resumed_at"] = step
                row["lost_steps"] = max(0, (row["reached"] or 0) - step)
                last = row is self.kills[-1]
                row["recovery_seconds"] = time.monotonic() - self._killed if last else None

    def _expect_announced(self, complete: list[int]) -> None:
        """Expect every announced checkpoint to be complete, or pruned after newer ones."""
        gone = self.announced - set(complete)
        lost = [one for one in gone if sum(step > one for step in complete) < self.keep_last]
        if lost:
            raise Broken(f"announced checkpoints have no marker: {lost}, complete are {complete}")

    def _complaint(self) -> str:
        tail = self._errors.read_text(errors="replace").splitlines()[-15:]
        return "\n".join([f"; {self._errors} ends:", *tail])


def descendants(pid: int) -> list[int]:
    """Return the processes below `pid`, in whatever session."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [int(child) for child in children] + [d for c in children for d in descendants(int(c))]


def kill(pids: list[int]) -> None:
    """Kill those that are still there."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def alive(pid: int) -> bool:
    """Say whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def resident(pid: int) -> int:
    """Return the resident bytes of a process, 0 if it has ended."""
    try:
        pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
    except OSError:
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
