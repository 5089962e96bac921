"""Rows of benchmarks/data/data.py for people."""

import json
from pathlib import Path

import numpy as np

STAMP = ("date", "commit", "python", "torch", "device", "cores")
RATIOS = (
    ("dali-cpu-224", "pillow-224-threads"),
    ("dali-cpu-224", "pillow-224-processes"),
    ("dali-cpu-224", "dali-224"),
    ("dali-cpu", "official"),
    ("dali-cpu", "torch"),
)


def read(path: Path) -> list[dict]:
    """Rows of a file, the last of each reader, JPEG quality and number of threads."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return list({(row["reader"], run(row)): row for row in rows}.values())


def run(row: dict) -> tuple:
    """What the rows of one table have in common."""
    return row.get("jpeg_quality"), row.get("threads")


def markdown(rows: list[dict]) -> str:
    """A table for each JPEG quality and number of threads, and one for start-up."""
    parts = ["# Data path\n"]
    parts += [f"- {name}: {rows[-1][name]}" for name in STAMP]
    for common in dict.fromkeys(run(row) for row in rows if row["reader"] != "startup"):
        parts += ["", *table([row for row in rows if run(row) == common])]
    for row in rows:
        if row["reader"] == "startup":
            parts += ["", *startup(row)]
    return "\n".join(parts) + "\n"


def table(rows: list[dict]) -> list[str]:
    """Figures of readers that took turns, and ratios round by round."""
    first = rows[0]
    lines = [
        f"## JPEG of quality {first['jpeg_quality']}, {first['threads']} threads",
        "",
        f"{first['rows']} rows of {first['row_bytes']:,} bytes on average, batches of "
        f"{first['batch']}, {first['rounds']} rounds in which the readers took turns; load average "
        f"{first['load_average_before']} before, {first['load_average_after']} after. "
        f"`{first['command']}`",
        "",
        "| reader | images/s p20 | p50 | p80 |",
        "|---|---|---|---|",
    ]
    for row in rows:
        if row["status"] == "ok":
            figures = " | ".join(f"{row[f'images_per_s_p{p}']:,.0f}" for p in (20, 50, 80))
            lines.append(f"| {row['reader']} | {figures} |")
        else:
            lines.append(f"| {row['reader']} | {row['status']}: {row['message']} | | |")
    figures = {
        row["reader"]: np.array(row["images_per_s"]) for row in rows if "images_per_s" in row
    }
    lines += ["", "| ratio | p20 | p50 | p80 |", "|---|---|---|---|"]
    for ours, rival in RATIOS:
        if ours in figures and rival in figures:
            ratios = np.percentile(figures[ours] / figures[rival], (20, 50, 80))
            values = " | ".join(f"{value:.2f}" for value in ratios)
            lines.append(f"| {ours} to {rival} | {values} |")
    return lines


def startup(row: dict) -> list[str]:
    """The start-up figures as a list."""
    return [
        "## Start-up",
        "",
        f"{row['rows']:,} rows of {row['row_bytes']} bytes, built in {row['built_s']} s; medians "
        f"of {len(row['starts'])} processes; load average {row['load_average_after']}. "
        f"`{row['command']}`",
        "",
        f"- first shuffled batch of {row['batch']}, from opening the dataset: "
        f"{row['since_open_s_p50']:.2f} s",
        f"- from the start of the process, imports included: {row['since_process_s_p50']:.2f} s",
        f"- peak memory of the process: {row['peak_gib_p50']:.2f} GiB",
    ]
