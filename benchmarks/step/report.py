"""Rows of benchmarks/step/step.py and benchmarks/step/ladder.py for people."""

from functools import partial
from pathlib import Path

from benchmarks.harness import rows as files
from benchmarks.harness.rows import facts, percent
from benchmarks.step.profile import CATEGORIES

RIVAL = "recipe"
FLOOR = {"preset": "sit-xl2-repa", "batch": 32, "rung": RIVAL}
FLOOR_MS = 71.3
"""What the recipe cannot be faster than on an H200 at 790 TFLOP/s and 4.3 TB/s, from its FLOPs and
bytes: SiT-XL/2 at 256 pixels, 32 images."""

SHADES = ("#1f5fa8", "#e08214", "#2a9d5c", "#9ecae1", "#8856a7", "#c2a35a", "#d9d9d9")
COLOURS = dict(zip(CATEGORIES, SHADES))
grid = partial(files.grid, rule=" --- ")
HOW = ("micro_batch", "compile", "precision", "data")


def read(path: Path) -> list[dict]:
    """Return the last row of each configuration and of each way to run a single step.

    What changes least of the rival comes first. Those of another commit were measured on other days
    and other cards: they stay, apart.
    """
    rows = files.read(path)
    commits = list(dict.fromkeys(row["commit"] for row in rows))
    latest = {}
    for row in rows:
        how = () if row["rung"] else tuple(row[name] for name in HOW)
        preset, batch, commit = group(row)
        changes = len(row.get("bases", ()))
        latest[preset, batch, commits.index(commit), changes, row["rung"], *how] = row
    return [latest[key] for key in sorted(latest)]


def group(row: dict) -> tuple[str, int, str]:
    """Return what the rows of one table have in common: preset, batch, commit."""
    return row["preset"], row["batch"], row["commit"]


def write(folder: Path) -> None:
    """Write report.md and shares.png of the rows in `folder`."""
    rows = read(folder / "rows.jsonl")
    ok = [row for row in rows if row["status"] == "ok"]
    if ok:
        draw(ok, folder / "shares.png")
    (folder / "report.md").write_text(markdown(rows, picture=bool(ok)))


def markdown(rows: list[dict], picture: bool = False) -> str:
    """Return the whole report."""
    parts = ["# Training step", "", *facts(rows[-1:]), ""]
    if picture:
        parts += ["![milliseconds of a step by category](shares.png)", ""]
    for common in dict.fromkeys(map(group, rows)):
        parts += section([row for row in rows if group(row) == common])
    return "\n".join(parts)


def section(rows: list[dict]) -> list[str]:
    """Return the tables of one preset and batch."""
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
    lines += [f"- {row['rung']} has no figure: {row['message']}" for row in rows if row not in ok]
    commands = dict.fromkeys(row["command"] for row in rows)
    return [*lines, "", *(f"`{command}`" for command in commands), ""]


FIGURES = {
    "images/s": lambda row: f"{row['images_per_second']:,.1f}",
    "GFLOP/image": lambda row: f"{row['gflop_per_image']:,.4g}",
    "MFU": lambda row: percent(row["mfu"]),
    "of the matrix product measured": lambda row: (
        f"{percent(row['mfu_of_matmul'])} of {row['matmul_tflop_per_s']:,.3g} TFLOP/s"
    ),
    "peak GiB": lambda row: f"{row['peak_memory_gib']:.1f}",
    "host ms": lambda row: f"{row['host_ms']:.2f}",
    "launches": lambda row: "none" if row["launches"] is None else f"{row['launches']:,.0f}",
    "stall ms": lambda row: f"{row['stall_ms']:.2f}",
    "first step s": lambda row: f"{row['first_step_seconds']:.1f}",
}


def figures(rows: list[dict]) -> list[str]:
    """Return time, rate and memory."""
    body = []
    for row in rows:
        times = (f"{row[f'ms_p{p}']:.2f}" for p in (20, 50, 80))
        others = (show(row) for show in FIGURES.values())
        body.append((label(row), row["precision"], *times, *others))
    heads = ("step", "precision", "ms p20", "p50", "p80", *FIGURES)
    counts = dict.fromkeys((row["steps"], row["warmup"]) for row in rows)
    notes = (f"{steps} steps after {warmup} of warm-up" for steps, warmup in counts)
    note = "; ".join(notes) + ". Host ms: until a step returns, the device idle before."
    note += " First step: with all that it compiles; less where a compiler's cache has it."
    if rows[0]["launches"] is None:
        note += " On a CPU the peak is the process's, and the host is what computes."
    return [*grid(heads, body), note, ""]


def shares(rows: list[dict]) -> list[str]:
    """Return milliseconds and share of each category."""
    body = []
    for row in rows:
        parts = row["ms_by_category"]
        total = sum(parts.values())
        cells = (f"{parts[name]:.2f} ({percent(parts[name] / total)})" for name in CATEGORIES)
        body.append((label(row), *cells, f"{total:.2f}", f"{row['profiled_ms']:.2f}"))
    heads = ("ms by category", *CATEGORIES, "sum", "under the profiler")
    return grid(heads, body)


def ladder(rows: list[dict]) -> list[str]:
    """Compare each configuration with the rival and with the one that it changes, by medians."""
    rungs = {row["rung"]: row for row in rows if row["rung"]}
    body = []
    for row in rungs.values():
        base = next((rungs[name] for name in row["bases"] if name in rungs), None)
        ratios = (
            "" if other is None else f"{other['ms_p50'] / row['ms_p50']:.2f}"
            for other in (rungs.get(RIVAL), base)
        )
        body.append((row["rung"], row["what"], f"{row['ms_p50']:.2f}", *ratios))
    heads = ("configuration", "what it is", "ms p50", f"times the {RIVAL}", "times what it changes")
    lines = grid(heads, body)
    for row in rungs.values():
        on_gpu = row["launches"] is not None
        if on_gpu and all(row[name] == value for name, value in FLOOR.items()):
            text = f"The {RIVAL}: {row['launches']:,.0f} launches, {row['ms_p50']:.1f} ms. Its "
            text += "floor, counted from FLOPs and bytes at an H200's measured rates, is "
            lines += [f"{text}{FLOOR_MS} ms.", ""]
    return lines


def kernels(row: dict) -> list[str]:
    """Return the kernels that take most of a step, and the longest gaps; none on a CPU."""
    if not row.get("kernels"):
        return []
    heads = (f"{label(row)} by kernel", "category", "calls", "ms of a step", "us a call")
    body = []
    for kernel in row["kernels"]:
        calls, ms = kernel["calls"], kernel["ms"]
        counted = (f"{calls:.4g}", f"{ms:.3f}", f"{1e3 * ms / calls:.1f}")
        body.append((f"`{kernel['name']}`", kernel["category"], *counted))
    longest = [f"{gap['us']} us before `{gap['after']}`" for gap in row["gaps"]]
    return [*grid(heads, body), f"Longest gaps: {'; '.join(longest) or 'none'}.", ""]


def label(row: dict) -> str:
    """Return a row's name in tables and pictures."""
    if row["rung"]:
        return row["rung"]
    parts = ["compiled" if row["compile"] else "eager"]
    if row["data"] != "made up":
        parts.append(f"data {row['data']}")
    if row["micro_batch"] != row["batch"]:
        parts.append(f"micro-batch {row['micro_batch']}")
    return ", ".join(parts)


def draw(rows: list[dict], path: Path) -> None:
    """Draw stacked bars of milliseconds by category, a panel for each preset and batch."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    groups = {common: [] for common in map(group, rows)}
    for row in rows:
        groups[group(row)].append(row)
    heights = [0.8 + 0.45 * len(members) for members in groups.values()]
    figure = Figure(figsize=(11, sum(heights) + 1.0), layout="constrained")
    panels = figure.subplots(len(groups), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, ((preset, batch, commit), members) in zip(panels, groups.items()):
        bars(panel, members)
        title = f"{preset}, batch {batch}, commit {commit}"
        panel.set_title(title, fontsize=10, loc="left")
    handles = [Patch(color=colour, label=name) for name, colour in COLOURS.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), fontsize=8)
    where = f"{rows[-1]['device']}, commit {rows[-1]['commit']}, {rows[-1]['date']}"
    figure.supxlabel(f"ms of a step, profiled; {where}", fontsize=9)
    figure.savefig(path, dpi=110)


def bars(panel, rows: list[dict]) -> None:
    """Draw a bar for each row, from the top down."""
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
