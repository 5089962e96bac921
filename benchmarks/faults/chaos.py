"""Disturb a run again and again: `python -m benchmarks.faults.chaos --faults 100` (`make chaos`).

An undisturbed run of a tiny model on the digits, on two processes; then runs of the same flags
under `torchrun --max-restarts` that lose one process, both, or torchrun with them to SIGKILL at
seeded random moments: while they train, save, start or resume; or that suffer one of the faults of
chaos_faults.py. Every run has to end with the tensors and metrics of the undisturbed one, bit for
bit. They live on a tmpfs, which can be filled up, where a mount namespace of our own can be had. A
last run of 6,000 steps and 30 checkpoints shows how memory grows.
"""

import argparse
import contextlib
import os
import random
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.faults.chaos_faults import FAULTS, FULL_DISK, NEEDED, Fault, suffer
from benchmarks.faults.chaos_report import markdown
from benchmarks.faults.chaos_run import Broken, Trainer
from benchmarks.harness.environment import parser, results_folder, stamp
from benchmarks.harness.rows import append, read
from repa_fast.checkpoint.layout import path_of, read_native, steps
from repa_fast.data.digits import prepare_digits
from repa_fast.train.report import read_metrics

RANKS = 2
PHASES = ("training", "checkpointing", "resuming")
TARGETS = ("rank 0", "rank 1", "both", "all")
LOG_EVERY, SAVE_EVERY, KEEP_LAST = 2, 5, 3
KINDS = (*PHASES, *FAULTS)
LONGEST = 0.2
"""Seconds from the step or the directory that is waited for to the latest fault."""

NAMESPACE, INSIDE = ("unshare", "-rm"), "REPA_FAST_CHAOS_INSIDE"
MOUNT = ("mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs")

TIMED = ("_ms", "_seconds", "_per_second", "mfu")  # ends of metrics that differ from run to run
MEMORY_SAVE_EVERY, MEMORY_LOG_EVERY = 200, 20
TINY = {
    **{"--preset": "digits", "--hidden-size": 32, "--depth": 3, "--num-heads": 2},
    **{"--projector-dim": 32, "--align": "sra", "--block-out-s": 1, "--block-out-t": 3},
    **{"--batch-size": 12, "--report-to": "none", "--sampling-steps": 0},
}
"""SRA, for a start without an encoder's packages; and a wrong EMA would show in the loss."""


def plan(faults: int, reach: int, seed: int, kinds: Sequence[str] = KINDS) -> list[Fault]:
    """Draw every kind, and of kills every target, equally often, in random order."""
    draw = random.Random(seed)

    def rounds(values: Sequence[str]) -> Iterator[str]:
        while True:
            yield from draw.sample(values, len(values))

    targets = rounds(TARGETS)
    drawn = [kind for _, kind in zip(range(faults), rounds(kinds))]
    whom = [next(targets) if kind in PHASES else "" for kind in drawn]
    return [Fault(*pair, draw.randint(1, reach), draw.random()) for pair in zip(drawn, whom)]


def flags(data: Path, steps: int, save_every: int, log_every: int, more: str = "") -> list[str]:
    """Return the flags of train.py that all runs of a comparison have in common."""
    named = TINY | {"--data-dir": data, "--max-train-steps": steps}
    named |= {"--checkpointing-steps": save_every, "--log-every": log_every}
    return [str(part) for pair in named.items() for part in pair] + shlex.split(more)


def undisturbed(arguments: list[str], run: Path) -> dict:
    """Run to the end; return the seconds, and those from the processes to the first step."""
    began = time.monotonic()
    with started(arguments, run) as trainer:
        trainer.until(lambda: len(trainer.workers()) == RANKS, "its processes")
        there = time.monotonic()
        trainer.until(lambda: trainer.began_at is not None, "its beginning")
        start_seconds = time.monotonic() - there
        trainer.finish()
    seconds = time.monotonic() - began
    return {"kind": "undisturbed", "start_seconds": start_seconds, "seconds": seconds}


def disturbed(
    arguments: list[str], run: Path, faults: list[Fault], start_seconds: float, whole: Path
) -> list[dict]:
    """Return rows of a run that suffers `faults` until they or its steps are used up.

    Raise Broken if a promise was not kept, or it does not end as the run in `whole` did.
    """
    began = time.monotonic()
    with started(arguments, run) as trainer:
        for number, fault in enumerate(faults, start=1):
            if not moment(trainer, fault, start_seconds) or not suffer(trainer, fault):
                break
            row = trainer.faults[-1]
            what = f"{fault.target or fault.kind} while {row['phase']}, step {row['reached']}"
            print(f"{run.name}, fault {number} of {len(faults)}: {what}", flush=True)
        trainer.finish()
    if differing := differences(run, whole):
        raise Broken(f"{run} differs from {whole} in {', '.join(differing)}")
    if not trainer.faults:
        raise Broken(f"{run} is too short for {faults[0]}, expected more --steps")
    row = {"kind": "run", "faults": len(trainer.faults), "announced": trainer.announcements}
    row |= {"identical": True, "seconds": time.monotonic() - began}
    return [*trainer.faults, row]


@contextlib.contextmanager
def started(arguments: list[str], run: Path, ranks: int = RANKS) -> Iterator[Trainer]:
    """Start a run that is ended at the latest on leaving."""
    trainer = Trainer(arguments, run, ranks, KEEP_LAST)
    try:
        trainer.launch()
        yield trainer
    finally:
        trainer.stop()


def moment(trainer: Trainer, fault: Fault, start_seconds: float) -> bool:
    """Let the run go on until the fault is due; return False if it ends before."""
    if fault.kind == "resuming":
        there = trainer.until(lambda: len(trainer.workers()) == RANKS, "its processes")
        if there and trainer.began_at is None:
            trainer.pause(fault.wait * start_seconds)
        return not trainer.finished
    if not trainer.until(lambda: trainer.began_at is not None, "its beginning"):
        return False
    first = trainer.began_at + fault.after
    if not trainer.until(lambda: (trainer.reached or 0) >= first, f"step {first}"):
        return False
    needed = NEEDED.get(fault.kind, 0)
    if not trainer.until(lambda: len(trainer.complete()) >= needed, f"{needed} checkpoints"):
        return False
    if fault.kind == "checkpointing" and not trainer.until(trainer.saving, "a save"):
        return False
    trainer.pause(fault.wait * LONGEST)
    return not trainer.finished


def differences(run: Path, whole: Path) -> list[str]:
    """Return tensors of the last checkpoint, and metrics.jsonl, that are not bit-equal."""
    folders = run / "checkpoints", whole / "checkpoints"
    ours, theirs = (read_native(path_of(folder, steps(folder)[-1]), "") for folder in folders)
    both = ours.keys() & theirs.keys()
    differing = sorted(ours.keys() ^ theirs.keys())
    differing += [name for name in both if not torch.equal(ours[name], theirs[name])]
    return differing + ["metrics.jsonl"] * (readings(run) != readings(whole))


def readings(run: Path) -> list[dict]:
    """Return a run's metrics without those that tell of time."""
    return [
        {name: value for name, value in line.items() if not name.endswith(TIMED)}
        for line in read_metrics(run / "metrics.jsonl")
    ]


def memory(data: Path, run: Path, count: int, more: str) -> dict:
    """Return both processes' resident memory over `count` steps, and means of two tenths."""
    arguments = flags(data, count, MEMORY_SAVE_EVERY, MEMORY_LOG_EVERY, more)
    with started(arguments, run) as trainer:
        trainer.watch_memory = True
        trainer.finish()
    tenth = len(trainer.rss) // 10
    row = {"kind": "memory", "steps": count, "saves": count // MEMORY_SAVE_EVERY}
    for rank in range(RANKS):
        mib = [sample[rank] / 2**20 for sample in trainer.rss if sample.get(rank)]
        early, late = statistics.mean(mib[tenth : 2 * tenth]), statistics.mean(mib[-tenth:])
        row |= {f"rank{rank}_early_mib": early, f"rank{rank}_late_mib": late}
        row |= {f"rank{rank}_peak_mib": max(mib), f"rank{rank}_mib": [round(m, 1) for m in mib]}
    return row


def chaos(options: argparse.Namespace, work: Path) -> Iterator[dict]:
    """Return rows of the undisturbed run, of faults and their runs, and of memory."""
    data = prepare_digits(work / "digits")
    common = {**stamp(), "flags": options.flags, "ranks": RANKS}
    if options.faults:
        arguments = flags(data, options.steps, SAVE_EVERY, LOG_EVERY, options.flags)
        whole = undisturbed(arguments, work / "undisturbed")
        yield {**common, "steps": options.steps, **whole}
        reach = max(1, min(2 * options.steps // options.faults_per_run, options.steps // 2))
        left = plan(options.faults, reach, options.seed, options.kinds)
        number = 0
        while left:
            number += 1
            share, run = left[: options.faults_per_run], work / f"run{number}"
            rows = disturbed(arguments, run, share, whole["start_seconds"], work / "undisturbed")
            left = left[rows[-1]["faults"] :]
            yield from ({**common, "run": number, "seed": options.seed, **row} for row in rows)
    if options.memory_steps:
        yield common | memory(data, work / "memory", options.memory_steps, options.flags)


def own_disk() -> bool:
    """Return whether a tmpfs can be mounted that ends with us: start again where it can."""
    if os.environ.get(INSIDE):
        return True
    with tempfile.TemporaryDirectory() as trial:
        mount = [*NAMESPACE, *MOUNT, trial]
        if not shutil.which(mount[0]) or subprocess.run(mount, capture_output=True).returncode:
            print(f"no disk is filled up: `{shlex.join(mount)}` does not work here", flush=True)
            return False
    os.environ[INSIDE] = "1"
    os.execvp(NAMESPACE[0], [*NAMESPACE, sys.executable, *sys.orig_argv[1:]])


def main() -> int:
    """Disturb, compare, append the rows, and write their report."""
    arguments = parser(__doc__.splitlines()[0], "file to append the rows to", device=False)
    arguments.add_argument("--faults", "--kills", type=int, default=100, help="0 for none")
    arguments.add_argument("--faults-per-run", type=int, default=13)
    arguments.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, metavar="KIND")
    arguments.add_argument("--steps", type=int, default=400, help="of each run")
    arguments.add_argument("--memory-steps", type=int, default=6000, help="0 for no such run")
    arguments.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments.add_argument("--flags", default="", help='more flags of train.py: "--parallel fsdp"')
    arguments.add_argument("--work", type=Path, help="folder that the runs are copied to")
    options = arguments.parse_args()
    out = options.out or results_folder("chaos", "cpu") / "rows.jsonl"
    mounts = own_disk()
    options.kinds = [kind for kind in options.kinds if mounts or kind != FULL_DISK]
    options.faults *= bool(options.kinds)
    with contextlib.ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if mounts:
            subprocess.run([*MOUNT, work], check=True)
            stack.callback(subprocess.run, ["umount", work], check=True)
        if options.work:
            stack.callback(shutil.copytree, work, options.work, dirs_exist_ok=True)
        for row in chaos(options, work):
            append(out, row)
    text = markdown(read(out))
    out.with_name("report.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
