"""Kill a run again and again: `python -m benchmarks.faults.chaos --kills 50` (`make chaos`).

An undisturbed run of a tiny model on the digits, on two processes; then runs of the same flags
under `torchrun --max-restarts` that lose one process, both, or torchrun with them to SIGKILL at
seeded random moments: while they train, save, start or resume. Every run has to end by itself with
the tensors and metrics of the undisturbed one, bit for bit. A last run of 6,000 steps and 30
checkpoints shows how memory grows.
"""

import argparse
import contextlib
import dataclasses
import datetime
import json
import random
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.faults.chaos_report import markdown, read
from benchmarks.faults.chaos_run import Broken, Trainer
from benchmarks.harness.environment import RESULTS, stamp
from repa_fast.checkpoint.layout import path_of, read_native, steps
from repa_fast.prepare.images import prepare_digits
from repa_fast.train.report import read_metrics

RANKS = 2
PHASES = ("training", "checkpointing", "resuming")
TARGETS = ("rank 0", "rank 1", "both", "all")
LOG_EVERY, SAVE_EVERY, KEEP_LAST = 2, 5, 3
LONGEST = {"training": 0.2, "checkpointing": 0.2}
"""Seconds from the step or the directory that is waited for to the latest kill."""

TIMED = ("_ms", "_seconds", "_per_second", "mfu")
"""How the names of metrics end that tell of time, and differ from run to run."""

MEMORY_SAVE_EVERY, MEMORY_LOG_EVERY = 200, 20
TINY = {
    "--preset": "digits",
    "--hidden-size": 32,
    "--depth": 3,
    "--num-heads": 2,
    "--projector-dim": 32,
    "--align": "sra",
    "--block-out-s": 1,
    "--block-out-t": 3,
    "--batch-size": 12,
    "--report-to": "none",
    "--sampling-steps": 0,
}
"""SRA, for a start without an encoder's packages; and a wrong average would show in the loss."""


@dataclasses.dataclass(frozen=True)
class Kill:
    """When and whom: `after` steps from where the run begins, then `wait` of the longest delay."""

    phase: str
    target: str
    after: int
    wait: float


def plan(kills: int, reach: int, seed: int) -> list[Kill]:
    """Every phase and every target equally often, in random order."""
    draw = random.Random(seed)
    phases, targets = _rounds(PHASES, draw), _rounds(TARGETS, draw)
    return [
        Kill(next(phases), next(targets), draw.randint(1, reach), draw.random())
        for _ in range(kills)
    ]


def _rounds(values: tuple[str, ...], draw: random.Random) -> Iterator[str]:
    while True:
        yield from draw.sample(values, len(values))


def flags(data: Path, steps: int, save_every: int, log_every: int, more: str = "") -> list[str]:
    """What all runs of a comparison have in common, for train.py."""
    named = TINY | {
        "--data-dir": data,
        "--max-train-steps": steps,
        "--checkpointing-steps": save_every,
        "--log-every": log_every,
    }
    return [str(part) for pair in named.items() for part in pair] + shlex.split(more)


def undisturbed(arguments: list[str], run: Path) -> dict:
    """A run to its end; its seconds, and those from its processes to its first step."""
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
    arguments: list[str], run: Path, kills: list[Kill], start_seconds: float, whole: Path
) -> list[dict]:
    """Rows of a run that suffers `kills` until they or its steps are used up, and of its end.

    Raises:
        Broken: a promise was not kept, or it does not end as the run in `whole` did.
    """
    began = time.monotonic()
    with started(arguments, run) as trainer:
        for number, kill in enumerate(kills, start=1):
            if not moment(trainer, kill, start_seconds):
                break
            trainer.kill(kill.target)
            row = trainer.kills[-1]
            print(
                f"{run.name}, kill {number} of {len(kills)}: {row['target']} while "
                f"{row['phase']}, step {row['reached']}",
                flush=True,
            )
        trainer.finish()
    differing = differences(run, whole)
    if differing:
        raise Broken(f"{run} differs from {whole} in {', '.join(differing)}")
    row = {
        "kind": "run",
        "kills": len(trainer.kills),
        "identical": True,
        "announced": len(trainer.announced),
        "seconds": time.monotonic() - began,
    }
    return [*trainer.kills, row]


@contextlib.contextmanager
def started(arguments: list[str], run: Path, ranks: int = RANKS) -> Iterator[Trainer]:
    """A run that is ended at the latest on leaving."""
    trainer = Trainer(arguments, run, ranks, KEEP_LAST)
    try:
        trainer.launch()
        yield trainer
    finally:
        trainer.stop()


def moment(trainer: Trainer, kill: Kill, start_seconds: float) -> bool:
    """Let the run go on until it shall be killed; False if it ends before."""
    if kill.phase == "resuming":
        there = trainer.until(lambda: len(trainer.workers()) == RANKS, "its processes")
        if there and trainer.began_at is None:
            trainer.pause(kill.wait * start_seconds)
        return not trainer.finished
    if not trainer.until(lambda: trainer.began_at is not None, "its beginning"):
        return False
    first = trainer.began_at + kill.after
    if not trainer.until(lambda: (trainer.reached or 0) >= first, f"step {first}"):
        return False
    if kill.phase == "checkpointing" and not trainer.until(trainer.saving, "a save"):
        return False
    trainer.pause(kill.wait * LONGEST[kill.phase])
    return not trainer.finished


def differences(run: Path, whole: Path) -> list[str]:
    """Tensors of the last checkpoint, and readings of the metrics, that are not bit-equal."""
    ours, theirs = last_tensors(run), last_tensors(whole)
    differing = sorted(ours.keys() ^ theirs.keys())
    differing += [
        name for name in ours.keys() & theirs.keys() if not torch.equal(ours[name], theirs[name])
    ]
    if readings(run) != readings(whole):
        differing.append("metrics.jsonl")
    return differing


def last_tensors(run: Path) -> dict[str, torch.Tensor]:
    """Parameters, averages and optimizer state of a run's last checkpoint."""
    folder = run / "checkpoints"
    return read_native(path_of(folder, steps(folder)[-1]), "")


def readings(run: Path) -> list[dict]:
    """A run's metrics without those that tell of time."""
    return [
        {name: value for name, value in line.items() if not name.endswith(TIMED)}
        for line in read_metrics(run / "metrics.jsonl")
    ]


def memory(data: Path, run: Path, count: int, more: str) -> dict:
    """Resident memory of both processes over `count` steps: readings, and means of two tenths."""
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
    """Rows of the undisturbed run, of kills and their runs, and of memory."""
    data = prepare_digits(work / "digits")
    common = {**stamp(), "flags": options.flags, "ranks": RANKS}
    if options.kills:
        arguments = flags(data, options.steps, SAVE_EVERY, LOG_EVERY, options.flags)
        whole = undisturbed(arguments, work / "undisturbed")
        yield {**common, "steps": options.steps, **whole}
        reach = max(1, min(2 * options.steps // options.kills_per_run, options.steps // 2))
        left = plan(options.kills, reach, options.seed)
        number = 0
        while left:
            number += 1
            share = left[: options.kills_per_run]
            run = work / f"run{number}"
            rows = disturbed(arguments, run, share, whole["start_seconds"], work / "undisturbed")
            left = left[rows[-1]["kills"] :]
            yield from ({**common, "run": number, "seed": options.seed, **row} for row in rows)
    if options.memory_steps:
        yield common | memory(data, work / "memory", options.memory_steps, options.flags)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="0 for none")
    parser.add_argument("--kills-per-run", type=int, default=13)
    parser.add_argument("--steps", type=int, default=240, help="of each run")
    parser.add_argument("--memory-steps", type=int, default=6000, help="0 for no such run")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--flags", default="", help='more flags of train.py: "--parallel fsdp"')
    parser.add_argument("--work", type=Path, help="folder of the runs, kept; a temporary one")
    parser.add_argument("--out", type=Path, help="file to append the rows to")
    return parser.parse_args()


def main() -> int:
    """Kill, compare, append the rows, and write their report."""
    options = parse()
    name = f"{datetime.date.today().isoformat()}_chaos"
    out = options.out or RESULTS / "cpu" / name / "rows.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack, open(out, "a", buffering=1) as file:
        work = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for row in chaos(options, work):
            file.write(json.dumps(row) + "\n")
    out.with_name("report.md").write_text(markdown(read(out)))
    print(out.with_name("report.md").read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
