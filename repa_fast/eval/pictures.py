"""Grids of images, plots of the analyses, and tables of both."""

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from repa_fast.whole import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN_PIXELS = 48
"""Images smaller than this are enlarged by a whole factor, for people to see them."""
GAP = 4
GAP_GREY = 64
TITLE_PIXELS = 14
MOST_PANELS = 8
"""Of a plot of losses."""


def arrange(
    pixels: torch.Tensor, columns: int, titles: Sequence[str] = (), shown: int = SHOWN_PIXELS
) -> np.ndarray:
    """Arrange uint8 images (B, 3, R, R) in one picture (H, W, 3), row by row.

    GAP grey pixels lie between neighbours, and grey fills what is left of the last row.

    Args:
        titles: one for each image, written above them, cut off where they are too long.
        shown: pixels of a side that smaller images are enlarged to.
    """
    factor = max(1, round(shown / pixels.shape[-1]))
    pixels = pixels.cpu().repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    above = TITLE_PIXELS if titles else 0
    pixels = F.pad(pixels, (0, GAP, above, GAP), value=GAP_GREY)
    count, channels, height, width = pixels.shape
    rows = -(-count // columns)
    canvas = pixels.new_full((rows * columns, channels, height, width), GAP_GREY)
    canvas[:count] = pixels
    grid = canvas.view(rows, columns, channels, height, width).permute(0, 3, 1, 4, 2)
    picture = grid.reshape(rows * height, columns * width, channels)[:-GAP, :-GAP].numpy()
    return _titled(picture, titles, columns, height, width) if titles else picture


def squarest(options: Iterable[int], count: int) -> int:
    """Return the number of columns that makes the grid of `count` images nearest to square.

    Of two that are as near the larger one.
    """

    def length(columns: int) -> tuple[float, int]:
        rows = count // columns
        return max(rows, columns) / min(rows, columns), -columns

    return min(options, key=length)


def _titled(
    picture: np.ndarray, titles: Sequence[str], columns: int, height: int, width: int
) -> np.ndarray:
    from PIL import Image, ImageDraw, ImageFont

    image, font = Image.fromarray(picture), ImageFont.load_default(TITLE_PIXELS - 3)
    draw = ImageDraw.Draw(image)
    for number, title in enumerate(" ".join(title.split()) for title in titles):
        while title and draw.textlength(title, font) > width - GAP:
            title = title[:-1]
        draw.text((number % columns * width, number // columns * height), title, "white", font)
    return np.asarray(image)


def save_png(picture: np.ndarray, path: Path) -> None:
    """Write uint8 (H, W, 3) as PNG, whole or not at all."""
    from PIL import Image

    encoded = io.BytesIO()
    Image.fromarray(picture).save(encoded, "PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, encoded.getbuffer())


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a plot as PNG, whole or not at all."""
    encoded = io.BytesIO()
    figure.savefig(encoded, dpi=120)
    write_whole(path, encoded.getbuffer())


def by_layer_and_time(
    values: np.ndarray,
    layers: Sequence[int],
    times: Sequence[float],
    quantity: str,
    baselines: Mapping[str, float],
    out: Path,
) -> None:
    """Plot values (times, layers) as PNG: over layers by time, over times by the best layers.

    `baselines` are drawn as horizontal lines.
    """
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    over_layers, over_times = figure.subplots(1, 2, sharey=True)
    figure.suptitle(quantity)
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(times)))
    for colour, t, line in zip(colours, times, values, strict=True):
        over_layers.plot(layers, line, marker="o", markersize=3, color=colour, label=f"t = {t:g}")
    best = np.argsort(-values.max(0), kind="stable")[:4]
    for column in sorted(best):
        over_times.plot(times, values[:, column], marker="o", label=f"block {layers[column]}")
    for name, value in baselines.items():
        over_times.annotate(name, (times[0], value), fontsize="small", va="bottom")
    for axis, varied in ((over_layers, "block"), (over_times, "t (0 data, 1 noise)")):
        for value in baselines.values():
            axis.axhline(value, color="grey", linestyle="--", linewidth=1)
        axis.set(xlabel=varied)
        axis.legend(fontsize="small")
        axis.grid(alpha=0.3)
    save_figure(figure, out)


def over_points(
    lines: Mapping[str, Sequence[tuple[float, float]]], varied: str, quantity: str, out: Path
) -> None:
    """Plot (varied, quantity) points as PNG, a line for each name."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 4), layout="constrained")
    axis = figure.subplots()
    for name, points in lines.items():
        axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
    axis.set(xlabel=varied, ylabel=quantity)
    axis.grid(alpha=0.3)
    if len(lines) > 1:
        axis.legend(fontsize="small")
    save_figure(figure, out)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a table."""
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return [lines[0], "|---" * len(head) + "|", *lines[1:]]


def layer_table(results: dict, values: Sequence[Sequence[float]], form: str) -> list[str]:
    """Return the lines of a table of values (times, layers), a row for each of the layers."""
    head = ["layer", *(f"t = {t:g}" for t in results["times"])]
    rows = zip(results["layers"], *values, strict=True)
    return markdown(head, ([str(layer), *(format(v, form) for v in of)] for layer, *of in rows))


def plot_losses(readings: Sequence[Mapping], out: Path) -> None:
    """Plot velocity loss and alignment losses, if any, of a run's `readings` against the step."""
    from matplotlib.figure import Figure

    aligned = sorted({name for line in readings for name in line if name.startswith("align/")})
    aligned = aligned[:MOST_PANELS]
    panels = [("denoise", "velocity loss"), *((n, f"alignment loss, {n[6:]}") for n in aligned)]
    figure = Figure(figsize=(5.5 * len(panels), 3.6), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (name, title) in zip(axes, panels, strict=True):
        found = [(line["step"], line.get(name)) for line in readings]
        points = [point for point in found if isinstance(point[1], (int, float))]
        axis.plot(*zip(*points, strict=True) if points else ([], []), color="#1f5fa8")
        axis.set(title=title.replace("$", "\\$"), xlabel="step")
        axis.grid(alpha=0.3)
    save_figure(figure, out)
