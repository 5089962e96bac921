"""Rows of benchmarks/faults/chaos.py for people.

`python -m benchmarks.faults.chaos_report ROWS` puts them between the marks of
docs/reliability.md.
"""

import statistics
import sys
from pathlib import Path

from benchmarks.harness import rows as harness
from benchmarks.harness.environment import ROOT
from benchmarks.harness.rows import STAMP, facts, grid, read

PAGE = ROOT / "docs" / "reliability.md"
PHASES = ("starting", "resuming", "training", "checkpointing")
FORMER, NOW = "-m benchmarks.chaos ", "-m benchmarks.faults.chaos "  # what older rows name
TARGETS = {"rank 0": "rank 0", "rank 1": "rank 1", "both": "both", "all": "torchrun too"}


def markdown(rows: list[dict]) -> str:
    """Return a report of its own."""
    return "\n".join(["# Kills", "", *facts(rows[-1:]), "", *figures(rows)]) + "\n"


def filled(page: str, rows: list[dict]) -> str:
    """Return a page with the figures of `rows` between its marks."""
    stamp = ", ".join(f"{name} {rows[-1][name]}" for name in STAMP)
    return harness.filled(page, "figures", "\n".join([*figures(rows), f"On: {stamp}."]))


def figures(rows: list[dict]) -> list[str]:
    """Return kills and memory of each set of flags, and the commands."""
    lines = []
    for flags in dict.fromkeys(row["flags"] for row in rows):
        same = [row for row in rows if row["flags"] == flags]
        kills, runs, whole, memory = (
            [row for row in same if row["kind"] == kind]
            for kind in ("kill", "run", "undisturbed", "memory")
        )
        lines += [f"`train.py {flags}`:" if flags else "With the default flags:", ""]
        lines += killed(kills, runs, whole[-1]) if runs else []
        lines += grown(memory[-1]) if memory else []
    commands = [row["command"].replace(FORMER, NOW) for row in rows]
    return [*lines, *(f"`{command}`" for command in dict.fromkeys(commands)), ""]


def killed(kills: list[dict], runs: list[dict], whole: dict) -> list[str]:
    """Return a sentence and a table of kills by phase."""
    identical = sum(row["identical"] for row in runs)
    halves = sum(row["half_written"] for row in kills)
    again = sum(row["resumed_at"] is not None for row in kills)
    heads = ("phase", "kills", *TARGETS.values(), "half-written directories left")
    heads += ("steps lost, median", "most", "seconds until training goes on, median", "most")
    parts = [(phase, [row for row in kills if row["phase"] == phase]) for phase in PHASES]
    table = [(name, *cells(part)) for name, part in (*parts, ("all", kills)) if part]
    return [
        f"{len(kills)} kills in {len(runs)} runs of {whole['steps']} steps on {whole['ranks']} "
        f"processes; {again} times training went on by itself. {identical} of {len(runs)} runs "
        "ended with the parameters, averages, optimizer state and metrics of the undisturbed run, "
        f"bit for bit. {sum(row['announced'] for row in runs)} checkpoints were announced, none "
        f"was lost; {halves} half-written directories were left, none was loaded. A start without "
        f"a kill takes {whole['start_seconds']:.1f} s on this machine.",
        "",
        *grid(heads, table),
    ]


def cells(kills: list[dict]) -> list:
    """Return the number of kills, that of each target, and what was lost."""
    counts = [sum(row["target"] == target for row in kills) for target in TARGETS]
    halves = sum(row["half_written"] for row in kills)
    lost = [row["lost_steps"] for row in kills]
    seconds = [row["recovery_seconds"] for row in kills if row["recovery_seconds"] is not None]
    spans = [f"{statistics.median(lost):g}", max(lost)]
    spans += [f"{statistics.median(seconds):.1f}", f"{max(seconds):.1f}"] if seconds else ["", ""]
    return [len(kills), *counts, halves, *spans]


def grown(row: dict) -> list[str]:
    """Return the memory of each process."""
    heads = ("process", "second tenth, MiB", "last tenth, MiB", "growth, MiB")
    heads += ("of these in the last third", "most, MiB")
    lines = []
    for rank in range(row["ranks"]):
        early, late, peak = (row[f"rank{rank}_{name}_mib"] for name in ("early", "late", "peak"))
        curve = row[f"rank{rank}_mib"]
        lately = curve[-1] - curve[2 * len(curve) // 3]
        spans = f"{late - early:+.1f}", f"{lately:+.1f}"
        lines.append((rank, f"{early:.1f}", f"{late:.1f}", *spans, f"{peak:.1f}"))
    return [
        f"Resident memory over {row['steps']:,} steps with {row['saves']} checkpoints, means of "
        "the second tenth of the steps and of the last:",
        "",
        *grid(heads, lines),
    ]


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(), read(Path(sys.argv[1]))))
