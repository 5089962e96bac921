"""Rows of benchmarks/data/data.py for people."""

import numpy as np

from benchmarks.harness.rows import facts, grid, latest

RATIOS = (
    ("dali-cpu-224", "pillow-224-threads"),
    ("dali-cpu-224", "pillow-224-processes"),
    ("dali-cpu-224", "dali-224"),
    ("dali-cpu", "official"),
    ("dali-cpu", "torch"),
)


def run(row: dict) -> tuple:
    """Return what the rows of one table have in common."""
    return row.get("jpeg_quality"), row.get("threads")


def markdown(rows: list[dict]) -> str:
    """Return a table of the last rows per JPEG quality and number of threads, and start-up."""
    rows = latest(rows, lambda row: (row["reader"], run(row)))
    parts = ["# Data path\n", *facts(rows[-1:]), ""]
    for common in dict.fromkeys(run(row) for row in rows if row["reader"] != "startup"):
        parts += table([row for row in rows if run(row) == common])
    for row in rows:
        if row["reader"] == "startup":
            parts += startup(row)
    return "\n".join(parts)


def table(rows: list[dict]) -> list[str]:
    """Return figures of readers that took turns, and ratios round by round."""
    first = rows[0]
    lines = [
        f"## JPEG of quality {first['jpeg_quality']}, {first['threads']} threads",
        "",
        f"{first['rows']} rows of {first['row_bytes']:,} bytes on average, batches of "
        f"{first['batch']}, {first['rounds']} rounds in which the readers took turns; load average "
        f"{first['load_average_before']} before, {first['load_average_after']} after. "
        f"`{first['command']}`",
        "",
    ]
    cells = []
    for row in rows:
        figures = f"{row['status']}: {row.get('message')}", "", ""
        if row["status"] == "ok":
            figures = (f"{row[f'images_per_s_p{p}']:,.0f}" for p in (20, 50, 80))
        cells.append((row["reader"], *figures))
    rates = {r["reader"]: np.array(r["images_per_s"]) for r in rows if "images_per_s" in r}
    ratios = [
        (f"{ours} to {rival}", *(f"{value:.2f}" for value in quotient))
        for ours, rival in RATIOS
        if ours in rates and rival in rates
        for quotient in [np.percentile(rates[ours] / rates[rival], (20, 50, 80))]
    ]
    lines += grid(("reader", "images/s p20", "p50", "p80"), cells)
    return lines + grid(("ratio", "p20", "p50", "p80"), ratios)


def startup(row: dict) -> list[str]:
    """Return the start-up figures as a list."""
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
        "",
    ]
