"""Plots of the analyses."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np


def by_layer_and_time(
    values: np.ndarray,
    layers: Sequence[int],
    times: Sequence[float],
    quantity: str,
    baselines: Mapping[str, float],
    out: Path,
) -> None:
    """A PNG of values (times, layers): over layers by time, over times by the best layers.

    `baselines` are drawn as horizontal lines.
    """
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    over_layers, over_times = figure.subplots(1, 2, sharey=True)
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(times)))
    for colour, t, line in zip(colours, times, values, strict=True):
        over_layers.plot(layers, line, marker="o", markersize=3, color=colour, label=f"t = {t:g}")
    figure.suptitle(quantity)
    over_layers.set(xlabel="block")
    over_layers.legend(fontsize="small")
    best = np.argsort(-values.max(0), kind="stable")[:4]
    for column in sorted(best):
        over_times.plot(times, values[:, column], marker="o", label=f"block {layers[column]}")
    over_times.set(xlabel="t (0 data, 1 noise)")
    for name, value in baselines.items():
        for axis in (over_layers, over_times):
            axis.axhline(value, color="grey", linestyle="--", linewidth=1)
        over_times.annotate(name, (times[0], value), fontsize="small", va="bottom")
    over_times.legend(fontsize="small")
    for axis in (over_layers, over_times):
        axis.grid(alpha=0.3)
    figure.savefig(out, dpi=120)


def over_points(
    lines: Mapping[str, Sequence[tuple[float, float]]], varied: str, quantity: str, out: Path
) -> None:
    """A PNG of (varied, quantity) points, a line for each name."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 4), layout="constrained")
    axis = figure.subplots()
    for name, points in lines.items():
        axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
    axis.set(xlabel=varied, ylabel=quantity)
    axis.grid(alpha=0.3)
    if len(lines) > 1:
        axis.legend(fontsize="small")
    figure.savefig(out, dpi=120)
