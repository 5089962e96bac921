"""The picture of benchmarks/paper/scaling.py."""

from pathlib import Path

from benchmarks.paper.scaling_model import MODES, Step

COLOURS = dict(zip(MODES, ("#7f7f7f", "#1f5fa8", "#1f5fa8", "#d9534f", "#d9534f")))
PARTS = {
    "matmul": ("matmuls", "#1f5fa8"),
    "elementwise": ("elementwise kernels", "#7fb2e5"),
    "copies": ("casts and copies of weights", "#a9cf9f"),
    "optimizer": ("optimizer and EMA", "#3f8f4f"),
    "launches": ("waiting for launches", "#c9c9c9"),
    "communication": ("exposed communication", "#d9534f"),
    "stragglers": ("stragglers", "#f0ad4e"),
    "files": ("waiting for data", "#7b5ea7"),
}
STACKED = "hsdp"

Steps = dict[int, dict[str, Step]]  # GPUs -> mode -> step


def draw(
    path: Path, weak: Steps, strong: Steps, batch: int, whole: int, rows: list[dict], title: str
) -> None:
    """Draw every mode above, the parts of a step of STACKED below; measured `rows` as stars."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(12.5, 8.6), layout="constrained")
    (rates, times), below = figure.subplots(2, 2)
    for name, colour in COLOURS.items():
        style = {"color": colour, "label": name, "marker": "o", "markersize": 3}
        style["linestyle"] = "--" if MODES[name].reduce_bytes == 2 else "-"
        rates.plot(list(weak), [batch / s[name].seconds for s in weak.values()], **style)
        times.plot(list(strong), [1e3 * s[name].seconds for s in strong.values()], **style)
    alone = 1e3 * strong[1]["ddp"].seconds
    ideal = {"color": "black", "linestyle": ":", "linewidth": 1, "label": "one GPU's time / GPUs"}
    times.plot(list(strong), [alone / gpus for gpus in strong], **ideal)
    same = [row for row in rows if row["batch"] == batch * row["gpus"]]
    _measured(rates, [(row["gpus"], 1e3 * batch / row["ms_p50"]) for row in same])
    _measured(times, [(row["gpus"], row["ms_p50"]) for row in rows if row["batch"] == whole])
    rates.set(title=f"{batch} images per GPU", ylabel="images/s per GPU", ylim=(0, None))
    times.set(title=f"{whole} images in all", ylabel="step, ms", yscale="log")
    for axis, steps in ((rates, weak), (times, strong)):
        axis.set_xscale("log", base=2)
        axis.set_xticks(list(steps), [f"{gpus:,}" for gpus in steps])
        axis.minorticks_off()
        axis.legend(frameon=False, fontsize=9)
        axis.grid(alpha=0.3)
    ticks = (2, 5, 10, 20, 50, 100, 200, 400)
    times.set_yticks(ticks, list(map(str, ticks)))
    for axis, steps in zip(below, (weak, strong)):
        _stack(axis, steps)
    for axis in (rates, times, *below):
        axis.spines[["top", "right"]].set_visible(False)
    handles = [Patch(color=colour, label=label) for label, colour in PARTS.values()]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.suptitle(f"{title}: calculated{'; stars are measured' if rows else ', not measured'}")
    figure.savefig(path, dpi=110)


def _measured(axis, points: list[tuple[int, float]]) -> None:
    if points:
        style = {"marker": "*", "color": "black", "s": 110, "zorder": 5, "label": "measured"}
        axis.scatter(*zip(*points), **style)


def _stack(axis, steps: Steps) -> None:
    """Draw shares of the step's time by part."""
    names = [f"{gpus:,}" for gpus in steps]
    found = [each[STACKED] for each in steps.values()]
    below = [0.0] * len(found)
    for part, (_, colour) in PARTS.items():
        heights = [100 * getattr(each, part) / each.seconds for each in found]
        axis.bar(names, heights, bottom=below, color=colour, width=0.8)
        below = [a + b for a, b in zip(below, heights)]
    for x, each in enumerate(found):
        axis.text(x, 101, f"{1e3 * each.seconds:.0f}", ha="center", fontsize=8)
    axis.set(ylabel=f"% of the step with {STACKED}", xlabel="GPUs (above: ms)", ylim=(0, 108))
