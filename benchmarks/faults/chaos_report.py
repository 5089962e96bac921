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
CHECKED = {
    "flip": "{} times everything was killed and a byte of the newest checkpoint flipped: the next "
    "start named it and went on from the one before, and it was moved aside, not removed.",
    "full disk": "{} times the disk was full until a save failed, {} of these until that had ended "
    "the run: with space again it went on by itself.",
    "second run": "{} times a second process was started for the same run: it ended with status 2 "
    "and named the first, which trained on.",
    "torchrun": "{} times torchrun alone was killed: {} times its processes lived on and kept a "
    "second one out. Ended, and launched again, the run went on.",
    "SIGHUP": "{} times torchrun got SIGHUP: the run saved and ended, and no step that it had "
    "reported was trained again.",
}
"""What is said of the faults that are no kills: how many, and how many with `also` in the row."""
TARGETS = {"rank 0": "rank 0", "rank 1": "rank 1", "both": "both", "all": "torchrun too"}


def markdown(rows: list[dict]) -> str:
    """Return a report of its own."""
    return "\n".join(["# Faults", "", *facts(rows[-1:]), "", *figures(rows)]) + "\n"


def filled(page: str, rows: list[dict]) -> str:
    """Return a page with the figures of `rows` between its marks."""
    stamp = ", ".join(f"{name} {rows[-1][name]}" for name in STAMP)
    return harness.filled(page, "figures", "\n".join([*figures(rows), f"On: {stamp}."]))


def figures(rows: list[dict]) -> list[str]:
    """Return faults and memory of each set of flags, and the commands."""
    lines = []
    for flags in dict.fromkeys(row["flags"] for row in rows):
        same = [row for row in rows if row["flags"] == flags]
        faults, runs, whole, memory = (
            [row for row in same if row["kind"] in kinds]
            for kinds in (("kill", "fault"), ("run",), ("undisturbed",), ("memory",))
        )
        lines += [f"`train.py {flags}`:" if flags else "With the default flags:", ""]
        lines += suffered(faults, runs, whole[-1]) if runs else []
        lines += grown(memory[-1]) if memory else []
    commands = [row["command"].replace(FORMER, NOW) for row in rows]
    return [*lines, *(f"`{command}`" for command in dict.fromkeys(commands)), ""]


def suffered(faults: list[dict], runs: list[dict], whole: dict) -> list[str]:
    """Return sentences, and a table of kills by phase and of other faults by kind."""
    parts = {name: [] for name in (*PHASES, *CHECKED)}
    for row in faults:
        parts[row.get("fault", row["phase"])].append(row)
    checked = [
        "- " + text.format(len(part), sum(row.get("also", False) for row in part))
        for name, text in CHECKED.items()
        if (part := parts[name])
    ]
    words, whom = ("faults", "kill's phase, or fault") if checked else ("kills", "phase")
    but = f" but the {len(parts['flip'])} with a flipped byte" if parts["flip"] else ""
    identical = sum(row["identical"] for row in runs)
    halves = sum(row["half_written"] for row in faults)
    again = sum(row["resumed_at"] is not None for row in faults)
    heads = (whom, words, *TARGETS.values(), "half-written directories left")
    heads += ("steps lost, median", "most", "seconds until training goes on, median", "most")
    table = [(name, *cells(part)) for name, part in (parts | {"all": faults}).items() if part]
    checked += [""] if checked else []
    return [
        f"{len(faults)} {words} in {len(runs)} runs of {whole['steps']} steps on {whole['ranks']} "
        f"processes; {again} times training went on by itself. {identical} of {len(runs)} runs "
        "ended with the parameters, averages, optimizer state and metrics of the undisturbed run, "
        f"bit for bit. {sum(row['announced'] for row in runs)} checkpoints were announced, none "
        f"was lost{but}; {halves} half-written directories were left, none was loaded. A start "
        f"without a kill takes {whole['start_seconds']:.1f} s on this machine.",
        "",
        *checked,
        *grid(heads, table),
    ]


def cells(faults: list[dict]) -> list:
    """Return the number of faults, that of each target of kills, and what was lost."""
    counts = [sum(row.get("target") == target for row in faults) for target in TARGETS]
    halves = sum(row["half_written"] for row in faults)
    lost = [row["lost_steps"] for row in faults]
    seconds = [row["recovery_seconds"] for row in faults if row["recovery_seconds"] is not None]
    spans = [f"{statistics.median(lost):g}", max(lost)]
    spans += [f"{statistics.median(seconds):.1f}", f"{max(seconds):.1f}"] if seconds else ["", ""]
    return [len(faults), *counts, halves, *spans]


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
