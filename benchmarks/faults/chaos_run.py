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
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks.harness.environment import ROOT
from repa_fast.checkpoint.layout import path_of, steps
from repa_fast.checkpoint.marker import MARKER

RESTARTS = 1000
PATIENCE = 240.0
"""Seconds without a line, or without an end that is due, after which a run counts as hanging."""

GOING_ON = re.compile(r"going on from (\S+)$")
BEGINS = re.compile(r", from step (\d+) to (\d+)$")
STEP = re.compile(r"step (\d+)/\d+ ")
ANNOUNCED = re.compile(r"checkpoint (\S+)( |$)")
UNWRITTEN = re.compile(r"WARNING: checkpoint \S+ was not written: ")


class Broken(RuntimeError):
    """A run did not keep a promise; says which and what was seen."""


class Trainer:
    """One run of `ranks` processes in the folder `run`, through all its restarts.

    `flags` are train.py's, without those of resuming and of the run's place.
    """

    def __init__(self, flags: list[str], run: Path, ranks: int, keep_last: int) -> None:
        self.run, self.ranks, self.keep_last = run, ranks, keep_last
        self.announced: set[int] = set()  # steps of checkpoints that the run said were written
        self.announcements = 0
        self.reached: int | None = None  # the last step it reported since it last began
        self.began_at: int | None = None  # the step it began at, None while it starts
        self.finished = False  # whether the checkpoint of the last step was announced
        self.begins = self.unwritten = 0  # how often it began, and said that a save failed
        self.faults: list[dict] = []  # a row for each, complete once training goes on
        self.flipped: dict[Path, int] = {}  # inodes of checkpoints with a flipped byte
        self.unnamed: dict[Path, int] = {}  # those that a run has to name, after so much on stderr
        self.process: subprocess.Popen | None = None
        self.watch_memory = False
        self.rss: list[dict[int, int]] = []  # bytes of each rank at every step, if watched
        self.since = 0.0  # when the last fault came, or was over
        self._began_wall = 0.0
        self._source: int | None = None
        self._complete: list[int] | None = None
        self._total = sys.maxsize
        self._rest = b""
        self._heard = 0  # bytes on stderr when it was last interrupted
        self.flags = [*flags, "--output-dir", str(run.parent), "--exp-name", run.name]
        self.flags += ["--keep-last", str(keep_last)]
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (not on the run's disk)
        run.parent.mkdir(parents=True, exist_ok=True)

    @property
    def checkpoints(self) -> Path:
        return self.run / "checkpoints"

    def launch(self) -> None:
        """Start torchrun, as a scheduler would after it lost the node."""
        if self.process is not None:
            self.process.wait(PATIENCE)
            self.process.stdout.close()
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        launcher += [f"--nproc-per-node={self.ranks}", f"--max-restarts={RESTARTS}"]
        self.process = subprocess.Popen(
            [*launcher, "train.py", *self.flags, "--resume", "auto"], cwd=ROOT,
            env=self.environment, stdout=subprocess.PIPE, stderr=self._errors,
        )  # fmt: skip
        os.set_blocking(self.process.stdout.fileno(), False)
        self._rest = b""

    def until(self, ready: Callable[[], bool], what: str, *, anyway: bool = False) -> bool:
        """Read lines until `ready()`; return False if the last checkpoint or the end comes first.

        Raise Broken if nothing is heard of the run for PATIENCE, or it ends badly; with `anyway` it
        may end, as it likes.
        """
        deadline = time.monotonic() + PATIENCE
        while not ready():
            if self.finished and not anyway:
                return False
            status = self.process.poll()
            if self.read():
                deadline = time.monotonic() + PATIENCE
            if status is not None and not (self.finished or anyway):
                raise Broken(f"the run ended with status {status} before {what}{self._complaint()}")
            if time.monotonic() > deadline:
                raise Broken(f"waited {PATIENCE:.0f} s in vain for {what}{self._complaint()}")
            time.sleep(0.002)
        return True

    def pause(self, seconds: float) -> None:
        """Let it run on for so long."""
        over = time.monotonic() + seconds
        self.until(lambda: time.monotonic() >= over, "the time", anyway=True)

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
        self._expect_announced(self.complete())

    def read(self) -> bool:
        """Take in the lines that are there; say whether there were any."""
        heard = False
        while chunk := self.process.stdout.read(65536):
            *lines, self._rest = (self._rest + chunk).split(b"\n")
            for line in lines:
                self.see(line.decode(errors="replace"))
                heard = True
        return heard

    def stderr(self, since: int = 0) -> str:
        """Return what the run wrote there, after so many bytes."""
        return os.pread(self._errors.fileno(), 1 << 28, since).decode(errors="replace")

    def complete(self) -> list[int]:
        """Return the steps of complete checkpoints, without those that have a flipped byte."""
        found = steps(self.checkpoints)
        return [step for step in found if not self._is_flipped(path_of(self.checkpoints, step))]

    def phase(self) -> str:
        """Return what the run is doing: starting, resuming, checkpointing or training."""
        if self.began_at is None:
            return "resuming" if self.complete() else "starting"
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
        self.note("kill", target=target)
        workers = self.workers()
        if target == "all":
            self.stop()
        kill([pid for rank, pid in workers.items() if target in (f"rank {rank}", "both")])
        self.interrupted(workers.values())
        if target == "all":
            self.launch()

    def note(self, kind: str, **more: str) -> dict:
        """Add the row of a fault that comes now, and return it."""
        self.since = time.monotonic()
        row = {"kind": kind, **more, "phase": self.phase(), "reached": self.reached}
        row |= {"half_written": False, "resumed_at": None, "lost_steps": 0}
        self.faults.append(row | {"recovery_seconds": None})
        return self.faults[-1]

    def interrupted(self, pids: Iterable[int]) -> None:
        """Wait for the end of these processes, and see what the next ones have to go on from."""
        self.until(lambda: not any(map(alive, pids)), "the other ranks' end", anyway=True)
        self.read()
        self.faults[-1] |= {"reached": self.reached, "half_written": self.saving()}
        self._complete = self.complete()
        self._heard = os.fstat(self._errors.fileno()).st_size
        self.began_at = self.reached = self._source = None
        self.finished = False

    def damage(self, path: Path) -> None:
        """Take note that a byte of a checkpoint was flipped, while no process runs."""
        self._expect_announced(self.complete())
        self.flipped[path] = inode(path)
        self.unnamed[path] = self._heard
        self._complete = self.complete()
        self.announced &= set(self._complete)  # it had pushed out others while it was whole

    def stop(self) -> None:
        """Kill everything: torchrun and what is below it."""
        if self.process.poll() is None:
            kill([self.process.pid, *descendants(self.process.pid)])
            self.process.wait()

    def see(self, line: str) -> None:
        """Take in a line; raise Broken if what it says is not so, or must not be."""
        if match := GOING_ON.search(line):
            self._source = int(Path(match[1]).name)
            if self._source not in self._complete_when_it_looked():
                raise Broken(f"went on from {match[1]}, which is not whole")
        elif match := BEGINS.search(line):
            self._begin(int(match[1]))
            self._total = int(match[2])
        elif match := STEP.match(line):
            self.reached = int(match[1])
            if self.watch_memory:
                self.rss.append({rank: resident(pid) for rank, pid in self.workers().items()})
        elif match := ANNOUNCED.match(line):
            step = int(Path(match[1]).name)
            self.announcements += step not in self.announced
            self.announced.add(step)
            self._expect_announced(self.complete())
            self.finished = step >= self._total
        elif UNWRITTEN.match(line):
            self.unwritten += 1

    def _complete_when_it_looked(self) -> list[int]:
        """Return what the last kill left; without one, what there is now, which nobody added to."""
        return self.complete() if self._complete is None else self._complete

    def _begin(self, step: int) -> None:
        complete = self._complete_when_it_looked()
        newest = complete[-1] if complete else 0
        if step != newest or (self._source or 0) != step:
            raise Broken(f"began at step {step} from {self._source}, complete were {complete}")
        self._expect_announced(complete)
        self._expect_named(step)
        for row in self.faults:
            if row["resumed_at"] is None:
                row["resumed_at"] = step
                row["lost_steps"] = max(0, (self.reached or row["reached"] or 0) - step)
                last = row is self.faults[-1]
                row["recovery_seconds"] = time.monotonic() - self.since if last else None
        self._complete = self._source = None
        self.begins += 1
        self.began_at, self.reached, self._began_wall = step, None, time.time()

    def _expect_named(self, step: int) -> None:
        """Expect the run to have named the damaged checkpoints, and to have moved them aside."""
        for path, start in self.unnamed.items():
            if f"passing over {path}: wrong checksum of " not in self.stderr(start):
                raise Broken(f"began at step {step}, and did not say that {path} is damaged")
            if self.flipped[path] not in map(inode, path.parent.glob(f"{path.name}.damaged*")):
                raise Broken(f"{path} was damaged, and was not moved aside")
        self.unnamed = {}

    def _is_flipped(self, path: Path) -> bool:
        return self.flipped.get(path) == inode(path)

    def _expect_announced(self, complete: list[int]) -> None:
        """Expect every announced checkpoint to be complete, or pruned after newer ones."""
        gone = self.announced - set(complete)
        lost = [one for one in gone if sum(step > one for step in complete) < self.keep_last]
        if lost:
            raise Broken(f"announced checkpoints have no marker: {lost}, complete are {complete}")

    def _complaint(self) -> str:
        return "\n".join(["; its stderr ends:", *self.stderr().splitlines()[-30:]])


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


def inode(path: Path) -> int:
    """Return the number that a file or folder keeps when it is renamed; 0 if there is none."""
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return 0


def resident(pid: int) -> int:
    """Return the resident bytes of a process, 0 if it has ended."""
    try:
        pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
    except OSError:
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
