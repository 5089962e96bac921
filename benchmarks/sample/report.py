"""Rows of benchmarks/sample/sample.py for people."""

import json
from pathlib import Path

import numpy as np

STAMP = ("date", "commit", "python", "torch", "device", "cores")
RIVAL = "official"


def read(path: Path) -> list[dict]:
    """Rows of a file, the last of each provider, guidance and size."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return list({(row["provider"], run(row)): row for row in rows}.values())


def rewrite(folder: Path) -> None:
    """Write report.md of the rows in `folder`."""
    (folder / "report.md").write_text(markdown(read(folder / "rows.jsonl")))


def run(row: dict) -> tuple:
    """What the rows of one table have in common."""
    return row["model"], row["guidance"], row["batch"], row["num_steps"]


def markdown(rows: list[dict]) -> str:
    """A table for each model and guidance."""
    parts = ["# Sampling", "", *(f"- {name}: {rows[-1][name]}" for name in STAMP)]
    for common in dict.fromkeys(map(run, rows)):
        parts += ["", *table([row for row in rows if run(row) == common])]
    return "\n".join(parts) + "\n"


def table(rows: list[dict]) -> list[str]:
    """Figures of one model and guidance, and ratios to the rival."""
    first = rows[0]
    work = next((row for row in rows if row["status"] == "ok"), None)
    flops = f", {work['gflop_per_image']:,.1f} GFLOP per image" if work else ""
    lines = [
        f"## {first['model']}, guidance {first['guidance']}",
        "",
        f"SDE of {first['num_steps']} evaluations, batch {first['batch']}{flops}. Figures of "
        f"{first['rounds']} rounds of {first['measured_steps']} steps.",
        "",
        "| provider | images/s p20 | p50 | p80 | decoded, images/s | ms per step | of the matrix "
        "product measured | of the datasheet | peak GiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [line(row) for row in rows]
    ok = {row["provider"]: row for row in rows if row["status"] == "ok"}
    ratios = [ratio(row, ok[RIVAL]) for name, row in ok.items() if name != RIVAL and RIVAL in ok]
    if ratios:
        lines += ["", f"| times {RIVAL} | p20 | p50 | p80 |", "|---|---|---|---|", *ratios]
    commands = dict.fromkeys(row["command"] for row in rows)
    return [*lines, "", *(f"`{command}`" for command in commands)]


def line(row: dict) -> str:
    """A row of the table."""
    if row["status"] != "ok":
        return f"| {row['provider']} | {row['status']}: {row['message']} |" + " |" * 7
    rates = " | ".join(f"{row[f'images_per_s_p{p}']:,.2f}" for p in (20, 50, 80))
    decoded = row.get("images_per_s_decoded")
    sheet, memory = row["share_of_datasheet"], row["peak_reserved_gib"]
    cells = [
        f"{decoded:,.2f}" if decoded else row["decode_skipped"],
        f"{row['ms_per_step']:.2f}",
        f"{100 * row['share_of_floor']:.1f} % of {row['matmul_tflop_per_s']:,.3g} TFLOP/s",
        f"{100 * sheet:.1f} %" if sheet else "unknown",
        f"{memory:.1f}" if memory else "",
    ]
    return f"| {row['provider']} | {rates} | " + " | ".join(cells) + " |"


def ratio(row: dict, rival: dict) -> str:
    """Round by round where both took turns in one process, of the medians elsewhere."""
    if row["command"] == rival["command"] and row["rounds"] == rival["rounds"]:
        rounds = np.array(row["images_per_s"]) / np.array(rival["images_per_s"])
        values = " | ".join(f"{value:.2f}" for value in np.percentile(rounds, (20, 50, 80)))
        return f"| {row['provider']} | {values} |"
    value = row["images_per_s_p50"] / rival["images_per_s_p50"]
    return f"| {row['provider']} | | {value:.2f} | |"
