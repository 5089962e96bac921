"""Rows of benchmarks/step/step.py and benchmarks/step/ladder.py for people."""

import json
from pathlib import Path

from benchmarks.step.profile import CATEGORIES

STAMP = ("date", "commit", "python", "torch", "device", "cores")
RIVAL = "a"
FLOOR = {"preset": "sit-xl2-repa", "batch": 32, "rung": RIVAL}
FLOOR_MS = 71.3
"""What rung (a) cannot be faster than on an H200 at 790 TFLOP/s and 4.3 TB/s, from its FLOPs and
bytes: SiT-XL/2 at 256 pixels, 32 images."""

COLOURS = dict(
    zip(
        CATEGORIES,
        ("#1f5fa8", "#e08214", "#2a9d5c", "#9ecae1", "#8856a7", "#c2a35a", "#d9d9d9"),
    )
)
HOW = ("micro_batch", "compile", "precision", "data")


def read(path: Path) -> list[dict]:
    """Rows of a file, the last of each rung and of each way to run a single step, in order.

    Those of another commit were measured on other days and other cards: they stay, apart.
    """
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    commits = list(dict.fromkeys(row["commit"] for row in rows))
    latest = {}
    for row in rows:
        how = () if row["rung"] else tuple(row[name] for name in HOW)
        preset, batch, commit = group(row)
        latest[preset, batch, commits.index(commit), row["rung"], *how] = row
    return [latest[key] for key in sorted(latest)]


def group(row: dict) -> tuple[str, int, str]:
    """What the rows of one table have in common: preset, batch, commit."""
    return row["preset"], row["batch"], row["commit"]


def write(folder: Path) -> None:
    """report.md and shares.png of the rows in `folder`."""
    rows = read(folder / "rows.jsonl")
    ok = [row for row in rows if row["status"] == "ok"]
    if ok:
        draw(ok, folder / "shares.png")
    (folder / "report.md").write_text(markdown(rows, picture=bool(ok)))


def markdown(rows: list[dict], picture: bool = False) -> str:
    """The whole report."""
    parts = ["# Training step", "", *(f"- {name}: {rows[-1][name]}" for name in STAMP), ""]
    if picture:
        parts += ["![milliseconds of a step by category](shares.png)", ""]
    for common in dict.fromkeys(map(group, rows)):
        members = [row for row in rows if group(row) == common]
        parts += section(members)
    return "\n".join(parts)


def section(rows: list[dict]) -> list[str]:
    """Tables of one preset and batch."""
    preset, batch, commit = group(rows[0])
    ok = [row for row in rows if row["status"] == "ok"]
    lines = [f"## {preset}, batch {batch}, commit {commit}", ""]
    if ok:
        lines += [*figures(ok), *shares(ok)]
    if any(row["rung"] for row in ok):
        lines += ladder(ok)
    for row in ok:
        lines += kernels(row)
    lines += [f"- {label(row)}: {'; '.join(row['notes'])}" for row in ok if row["notes"]]
    lines += [f"- ({row['rung']}) no figure: {row['message']}" for row in rows if row not in ok]
    commands = dict.fromkeys(row["command"] for row in rows)
    return [*lines, "", *(f"`{command}`" for command in commands), ""]


def figures(rows: list[dict]) -> list[str]:
    """Time, rate and memory."""
    heads = (
        *("step", "precision", "ms p20", "p50", "p80", "images/s", "GFLOP/image"),
        *("MFU", "of the matrix product measured", "peak GiB", "host ms", "launches", "stall ms"),
        "first step s",
    )
    body = [
        (
            label(row),
            row["precision"],
            *(f"{row[f'ms_p{p}']:.2f}" for p in (20, 50, 80)),
            f"{row['images_per_second']:,.1f}",
            f"{row['gflop_per_image']:,.4g}",
            percent(row["mfu"]),
            f"{percent(row['mfu_of_matmul'])} of {row['matmul_tflop_per_s']:,.3g} TFLOP/s",
            f"{row['peak_memory_gib']:.1f}",
            f"{row['host_ms']:.2f}",
            "none" if row["launches"] is None else f"{row['launches']:,.0f}",
            f"{row['stall_ms']:.2f}",
            f"{row['first_step_seconds']:.1f}",
        )
        for row in rows
    ]
    notes = [
        f"{row['steps']} steps after {row['warmup']} of warm-up"
        for row in {(row["steps"], row["warmup"]): row for row in rows}.values()
    ]
    note = "; ".join(notes) + ". Host ms: until a step returns, the device idle before."
    note += " First step: with all that it compiles; less where a compiler's cache has it."
    if rows[0]["launches"] is None:
        note += " On a CPU the peak is the process's, and the host is what computes."
    return [*grid(heads, body), note, ""]


def shares(rows: list[dict]) -> list[str]:
    """Milliseconds and share of each category."""
    body = []
    for row in rows:
        parts = row["ms_by_category"]
        total = sum(parts.values())
        cells = (f"{parts[name]:.2f} ({percent(parts[name] / total)})" for name in CATEGORIES)
        body.append((label(row), *cells, f"{total:.2f}", f"{row['profiled_ms']:.2f}"))
    heads = ("ms by category", *CATEGORIES, "sum", "under the profiler")
    return grid(heads, body)


def ladder(rows: list[dict]) -> list[str]:
    """Each rung against the first and against the one that it changes, by medians."""
    rungs = {row["rung"]: row for row in rows if row["rung"]}
    body = []
    for row in rungs.values():
        base = next((rungs[name] for name in row["bases"] if name in rungs), None)
        ratios = (times(other, row) for other in (rungs.get(RIVAL), base))
        body.append((f"({row['rung']}) {row['what']}", f"{row['ms_p50']:.2f}", *ratios))
    lines = grid(("rung", "ms p50", f"times ({RIVAL})", "times the one it changes"), body)
    for row in rungs.values():
        on_gpu = row["launches"] is not None
        if on_gpu and all(row[name] == value for name, value in FLOOR.items()):
            lines += [
                f"Rung ({RIVAL}): {row['launches']:,.0f} launches, {row['ms_p50']:.1f} ms. Its "
                f"floor, counted from FLOPs and bytes at an H200's measured rates, is "
                f"{FLOOR_MS} ms.",
                "",
            ]
    return lines


def kernels(row: dict) -> list[str]:
    """The kernels that take most of a step, and the longest gaps between them; none on a CPU."""
    if not row.get("kernels"):
        return []
    heads = (f"{label(row)}: kernels", "category", "calls", "ms of a step", "us a call")
    body = [
        (
            f"`{kernel['name']}`",
            kernel["category"],
            f"{kernel['calls']:.4g}",
            f"{kernel['ms']:.3f}",
            f"{1e3 * kernel['ms'] / kernel['calls']:.1f}",
        )
        for kernel in row["kernels"]
    ]
    longest = [f"{gap['us']} us before `{gap['after']}`" for gap in row["gaps"]]
    return [*grid(heads, body), f"Longest gaps: {'; '.join(longest) or 'none'}.", ""]


def times(other: dict | None, row: dict) -> str:
    """How many times as fast as `other`."""
    return "" if other is None else f"{other['ms_p50'] / row['ms_p50']:.2f}"


def label(row: dict) -> str:
    """A row's name in tables and pictures."""
    if row["rung"]:
        return f"({row['rung']}) {row['what']}"
    parts = ["compiled" if row["compile"] else "eager"]
    if row["data"] != "made up":
        parts.append(f"data {row['data']}")
    if row["micro_batch"] != row["batch"]:
        parts.append(f"micro-batch {row['micro_batch']}")
    return ", ".join(parts)


def percent(share: float | None) -> str:
    return "unknown" if share is None else f"{100 * share:.1f} %"


def grid(heads: tuple[str, ...], body: list[tuple[str, ...]]) -> list[str]:
    """A Markdown table and an empty line."""
    rows = [heads, ("---",) * len(heads), *body]
    return [*("| " + " | ".join(cells) + " |" for cells in rows), ""]


def draw(rows: list[dict], path: Path) -> None:
    """Stacked bars of milliseconds by category, a panel for each preset and batch."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    groups = list(dict.fromkeys(map(group, rows)))
    members = [[row for row in rows if group(row) == common] for common in groups]
    heights = [0.8 + 0.45 * len(some) for some in members]
    figure = Figure(figsize=(11, sum(heights) + 1.0), layout="constrained")
    panels = figure.subplots(len(groups), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, common, some in zip(panels, groups, members):
        bars(panel, some)
        title = f"{common[0]}, batch {common[1]}, commit {common[2]}"
        panel.set_title(title, fontsize=10, loc="left")
    handles = [Patch(color=colour, label=name) for name, colour in COLOURS.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), fontsize=8)
    where = f"{rows[-1]['device']}, commit {rows[-1]['commit']}, {rows[-1]['date']}"
    figure.supxlabel(f"ms of a step, profiled; {where}", fontsize=9)
    figure.savefig(path, dpi=110)


def bars(panel, rows: list[dict]) -> None:
    """A bar for each row, from the top down."""
    for position, row in enumerate(rows):
        left = 0.0
        for name in CATEGORIES:
            width = row["ms_by_category"][name]
            panel.barh(position, width, left=left, color=COLOURS[name], height=0.7)
            left += width
        text = f" {left:.1f} ms, {row['images_per_second']:,.4g} images/s"
        panel.text(left, position, text, va="center", fontsize=8)
    panel.set_yticks(range(len(rows)), [label(row) for row in rows], fontsize=8)
    panel.invert_yaxis()
    panel.set_xlim(0, 1.25 * max(sum(row["ms_by_category"].values()) for row in rows))
    panel.spines[["top", "right"]].set_visible(False)
