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
    "flip": "{} times all processes were killed and a byte of the newest checkpoint was flipped. "
    "The next start named the damaged checkpoint, moved it aside without removing it, and resumed "
    "from the one before.",
    "full disk": "{} times the disk was full until a save failed, {} of these times until that had "
    "ended the run. Training resumed once there was space again.",
    "second run": "{} times a second process was started for the same run. It ended with status 2 "
    "and named the first one, which continued to train.",
    "torchrun": "{} times torchrun alone was killed. {} of these times its processes lived on, and "
    "a second launch was refused meanwhile. The run resumed after they were ended and it was "
    "launched again.",
    "SIGHUP": "{} times torchrun got SIGHUP. The run saved and ended, and no step that it had "
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
    return harness.filled(page, "figures", "\n".join([*figures(rows), f"Newest rows: {stamp}."]))


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
    return [*lines, "Commands:", "", *(f"- `{c}`" for c in dict.fromkeys(commands)), ""]


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
    word, whom = ("fault", "phase of the kill, or fault") if checked else ("kill", "phase")
    but = f" but the {len(parts['flip'])} in which a byte was flipped" if parts["flip"] else ""
    identical = sum(row["identical"] for row in runs)
    halves = sum(row["half_written"] for row in faults)
    again = sum(row["resumed_at"] is not None for row in faults)
    heads = (whom, f"{word}s", *TARGETS.values(), "half-written directories left")
    heads += ("steps lost, median", "most", "seconds until training resumes, median", "most")
    table = [(name, *cells(part)) for name, part in (parts | {"all": faults}).items() if part]
    checked += [""] if checked else []
    return [
        f"{counted(faults, word)} in {counted(runs, 'run')} of {whole['steps']} steps on "
        f"{whole['ranks']} processes. Training resumed after {again} of them. {identical} of "
        f"{counted(runs, 'run')} ended with the parameters, EMA, optimizer state and metrics of "
        f"the undisturbed run, bit for bit. {sum(row['announced'] for row in runs)} checkpoints "
        f"were announced; none was lost{but}. {halves} half-written directories were left; none "
        f"was loaded. A start without a {word} takes {whole['start_seconds']:.1f} s on this "
        "machine.",
        "",
        *checked,
        *grid(heads, table),
    ]


def counted(rows: list[dict], what: str) -> str:
    """Return how many rows there are, and of what, in one or several."""
    return f"{len(rows)} {what}{'s' * (len(rows) != 1)}"


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
    heads += ("growth in the last third, MiB", "most, MiB")
    lines = []
    for rank in range(row["ranks"]):
        early, late, peak = (row[f"rank{rank}_{name}_mib"] for name in ("early", "late", "peak"))
        curve = row[f"rank{rank}_mib"]
        lately = curve[-1] - curve[2 * len(curve) // 3]
        spans = f"{late - early:+.1f}", f"{lately:+.1f}"
        lines.append((rank, f"{early:.1f}", f"{late:.1f}", *spans, f"{peak:.1f}"))
    return [
        f"Resident memory over {row['steps']:,} steps with {row['saves']} checkpoints: its mean "
        "over the second tenth of the steps, and over the last tenth.",
        "",
        *grid(heads, lines),
    ]


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(), read(Path(sys.argv[1]))))
