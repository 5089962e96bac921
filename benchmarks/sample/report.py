"""Rows of benchmarks/sample/sample.py for people."""

from pathlib import Path

import numpy as np

from benchmarks.harness.rows import facts, grid, latest, percent, read

RIVAL = "official"


def rewrite(folder: Path) -> None:
    """Write report.md of the rows in `folder`."""
    (folder / "report.md").write_text(markdown(read(folder / "rows.jsonl")))


def run(row: dict) -> tuple:
    """Return what the rows of one table have in common."""
    return row["model"], row["guidance"], row["batch"], row["num_steps"]


def markdown(rows: list[dict]) -> str:
    """Return a table for each model, guidance and size; a provider's last row counts."""
    rows = latest(rows, lambda row: (row["provider"], run(row)))
    parts = ["# Sampling", "", *facts(rows[-1:]), ""]
    for common in dict.fromkeys(map(run, rows)):
        parts += table([row for row in rows if run(row) == common])
    return "\n".join(parts)


def table(rows: list[dict]) -> list[str]:
    """Return figures of one model and guidance, and ratios to the rival."""
    first = rows[0]
    ok = {row["provider"]: row for row in rows if row["status"] == "ok"}
    work = next(iter(ok.values()), None)
    flops = f", {work['gflop_per_image']:,.1f} GFLOP per image" if work else ""
    heads = ("provider", "images/s p20", "p50", "p80", "decoded, images/s", "ms per step")
    heads += ("of the matrix product measured", "of the datasheet", "peak GiB")
    lines = [
        f"## {first['model']}, guidance {first['guidance']}",
        "",
        f"SDE of {first['num_steps']} evaluations, batch {first['batch']}{flops}. Figures of "
        f"{first['rounds']} rounds of {first['measured_steps']} steps.",
        "",
        *grid(heads, map(line, rows)),
    ]
    ratios = [ratio(row, ok[RIVAL]) for name, row in ok.items() if name != RIVAL and RIVAL in ok]
    lines += grid((f"times {RIVAL}", "p20", "p50", "p80"), ratios) if ratios else []
    commands = dict.fromkeys(row["command"] for row in rows)
    return [*lines, *(f"`{command}`" for command in commands), ""]


def line(row: dict) -> tuple[str, ...]:
    """Return the cells of a row."""
    if row["status"] != "ok":
        return row["provider"], f"{row['status']}: {row['message']}", *[""] * 7
    decoded, memory = row.get("images_per_s_decoded"), row["peak_reserved_gib"]
    return (
        row["provider"],
        *(f"{row[f'images_per_s_p{p}']:,.2f}" for p in (20, 50, 80)),
        f"{decoded:,.2f}" if decoded else row["decode_skipped"],
        f"{row['ms_per_step']:.2f}",
        f"{percent(row['share_of_floor'])} of {row['matmul_tflop_per_s']:,.3g} TFLOP/s",
        percent(row["share_of_datasheet"]),
        f"{memory:.1f}" if memory else "",
    )


def ratio(row: dict, rival: dict) -> tuple[str, ...]:
    """Compare round by round rows that took turns in one process, others by their medians."""
    if row["command"] == rival["command"] and row["rounds"] == rival["rounds"]:
        rounds = np.array(row["images_per_s"]) / np.array(rival["images_per_s"])
        return row["provider"], *(f"{value:.2f}" for value in np.percentile(rounds, (20, 50, 80)))
    return row["provider"], "", f"{row['images_per_s_p50'] / rival['images_per_s_p50']:.2f}", ""
