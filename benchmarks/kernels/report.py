"""Rows of kernel measurements for people: a table, a Markdown report and a picture."""

import itertools
from collections.abc import Iterable
from pathlib import Path

from benchmarks.harness import rows as files
from benchmarks.harness.rows import facts, grid, values
from benchmarks.kernels.measure import Row
from benchmarks.kernels.ops import CASES, MODES

HEADINGS = ("op", "shape", "dtype", "mode", "provider", "p50 ms", "GB/s", "% of copy", "x compile")
COLOURS = {"ours": "tab:blue", "compile": "tab:orange", "eager": "tab:gray"}
OTHER_COLOURS = (
    "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:olive", "tab:cyan",
    "lightgreen", "salmon", "plum", "tan", "gold", "navy",
)  # fmt: skip
ABOUT = """\
GB/s counts the necessary bytes only: each tensor read once and written once. "% of copy" is the
time of `tensor.copy_` of as many bytes, in the same process, over the time of the op; "x compile"
is the time of torch.compile of the reference over it, above 1 where the op is faster. Times are
medians over rounds; `rows.jsonl` has the 20th and 80th percentiles, the method, the memory and all
else.
"""


def read(path: Path) -> list[Row]:
    """Return the rows of a file, the last of each op, provider, mode, shape and dtype.

    A row of mode "all" says that there are no figures. It replaces older ones, as they replace it.
    """
    latest = {}
    for row in files.read(path):
        replaced = MODES if row["mode"] == "all" else ("all",) if row["mode"] in MODES else ()
        for mode in replaced:
            latest.pop(key({**row, "mode": mode}), None)
        latest[key(row)] = row
    return list(latest.values())


def key(row: Row) -> tuple:
    return row["op"], tuple(row["shape"]), row["dtype"], row["mode"], row["provider"]


def timed(rows: Iterable[Row]) -> list[Row]:
    """Return rows with a time: ops and modes in the registry's order, fastest provider first."""
    ops = list(CASES)

    def order(row: Row) -> tuple:
        place = ops.index(row["op"]), row["shape"], row["dtype"], MODES.index(row["mode"])
        return *place, row["ms_p50"]

    return sorted((r for r in rows if r["status"] == "ok" and "ms_p50" in r), key=order)


def cells(row: Row, rows: list[Row]) -> tuple[str, ...]:
    """Return a row's cells under HEADINGS; `rows` are where its rival is looked for."""
    return (
        row["op"],
        shape_of(row),
        row["dtype"],
        row["mode"],
        row["provider"] + (" (*)" if row["note"] else ""),
        f"{row['ms_p50']:.4f}",
        f"{row['gb_per_s']:.0f}",
        f"{100 * row['share_of_copy']:.0f}",
        ratio_to_compile(row, rows),
    )


def ratio_to_compile(row: Row, rows: list[Row]) -> str:
    """Return the time of torch.compile over that of `row`, or "" without one."""
    rival = (*key(row)[:-1], "compile")
    found = (f"{other['ms_p50'] / row['ms_p50']:.2f}" for other in rows if key(other) == rival)
    return next(found, "")


def shape_of(row: Row) -> str:
    return "x".join(map(str, row["shape"]))


def table(rows: list[Row]) -> str:
    """Return the terminal's table."""
    rows = timed(rows)
    return "\n".join(grid(HEADINGS, [cells(row, rows) for row in rows]))


def write(folder: Path, rows: list[Row]) -> None:
    """Write report.md and shares.png into `folder`."""
    times = timed(rows)
    if times:
        draw(times, folder / "shares.png")
    (folder / "report.md").write_text(markdown(rows, picture=bool(times)))


def markdown(rows: list[Row], picture: bool = False) -> str:
    """Return the report."""
    lines = [f"# Kernels on {values(rows, 'device')}", ""]
    lines += [*facts(rows, ("date", "commit", "torch", "triton", "command")), "", ABOUT]
    if picture:
        lines += ["![share of the copy's bandwidth](shares.png)", ""]
    if times := timed(rows):
        lines += ["## Time on the device", "", *grid(HEADINGS, [cells(r, times) for r in times])]
        notes = {f"(*) {row['provider']}: {row['note']}" for row in times if row["note"]}
        lines += [*sorted(notes), ""]
    if hosts := [row for row in rows if "host_us_p50" in row]:
        heads = ("op", "provider", "passes", "us of host time per call")
        body = [(r["op"], r["provider"], r["call"], f"{r['host_us_p50']:.1f}") for r in hosts]
        lines += ["## Host time per call, tensors of a few elements", "", *grid(heads, body)]
    if missing := without_figure(rows):
        heads = ("op", "provider", "status", "reason", "where")
        lines += ["## Without a figure", "", *grid(heads, missing)]
    return "\n".join(lines)


def without_figure(rows: list[Row]) -> list[tuple[str, ...]]:
    """Return (op, provider, status, reason, where): failures with their shapes, absences once."""
    found = {}
    for row in rows:
        if row["status"] != "ok":
            head = tuple(row[name] for name in ("op", "provider", "status", "message"))
            places = found.setdefault(head, [])
            if row["status"] == "failed":
                places.append(f"{shape_of(row)} {row['dtype']} {row['mode']}")
    return [(*head, ", ".join(places)) for head, places in found.items()]


def draw(rows: list[Row], path: Path) -> None:
    """Draw bars: % of the copy's bandwidth by op, mode, shape, dtype and provider."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    names = [op for op in CASES if any(row["op"] == op for row in rows)]
    modes = [mode for mode in MODES if any(row["mode"] == mode for row in rows)]
    cells = {
        (op, mode): [row for row in rows if (row["op"], row["mode"]) == (op, mode)]
        for op in names
        for mode in modes
    }
    heights = [0.7 + 0.17 * max(len(cells[op, mode]) for mode in modes) for op in names]
    figure = Figure(figsize=(5.5 * len(modes), sum(heights) + 0.8), layout="constrained")
    axes = figure.subplots(len(names), len(modes), squeeze=False, height_ratios=heights)
    present = {row["provider"] for row in rows}
    colours = {name: colour for name, colour in COLOURS.items() if name in present}
    colours |= zip(sorted(present - colours.keys()), itertools.cycle(OTHER_COLOURS))
    for line, op in zip(axes, names):
        for axis, mode in zip(line, modes):
            _bars(axis, f"{op}, {mode}", cells[op, mode], colours)
    handles = [Patch(color=colour, label=name) for name, colour in colours.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(8, len(colours)))
    where = f"{values(rows, 'device')}, commit {values(rows, 'commit')}"
    figure.supxlabel(f"% of the bandwidth of a copy of the necessary bytes; {where}", fontsize=10)
    figure.savefig(path, dpi=110)


def _bars(axis, title: str, rows: list[Row], colours: dict[str, str]) -> None:
    """Draw horizontal bars of one op and mode, grouped by shape and dtype."""
    if not rows:
        axis.set_axis_off()
        return
    axis.set_title(title, fontsize=10)
    groups = sorted({(tuple(row["shape"]), row["dtype"]) for row in rows})
    position, ticks = 0.0, []
    for shape, dtype in groups:
        members = [r for r in rows if (tuple(r["shape"]), r["dtype"]) == (shape, dtype)]
        members.sort(key=lambda row: list(colours).index(row["provider"]))
        for row in members:
            share = 100 * row["share_of_copy"]
            axis.barh(position, share, color=colours[row["provider"]])
            axis.text(share, position, f" {share:.0f}", va="center", fontsize=7)
            position += 1
        ticks.append(position - (len(members) + 1) / 2)
        position += 1
    labels = [f"{'x'.join(map(str, shape))}\n{dtype}" for shape, dtype in groups]
    axis.set_yticks(ticks, labels, fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.12)
    axis.set_xlim(left=0)
    axis.spines[["top", "right"]].set_visible(False)
