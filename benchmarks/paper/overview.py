"""The README's picture, from committed rows: `python -m benchmarks.paper.overview`.

On the left the measured step of SiT-XL/2 with REPA, on the right what alignment does on the digits.
"""

import json
from pathlib import Path

from benchmarks.convergence.digits import COLOURS, curve
from benchmarks.harness.rows import read
from benchmarks.step.report import COLOURS as PARTS
from benchmarks.step.report import bars

ROOT = Path(__file__).parents[2]
STEPS = ROOT / "benchmarks/results/nvidia-h200/2026-11-27_ladder/rows.jsonl"
DIGITS = ROOT / "benchmarks/results/cpu/2026-11-21_digits-convergence/scores.json"
PICTURE = ROOT / "docs/images/overview.png"
SESSION, BATCH = "fc77fe5", 32
SHOWN = {
    "released": "REPA's released code",
    "recipe": "the paper's recipe, plain PyTorch",
    "one-pass": "repa-fast, no CUDA graph",
    "graph": "repa-fast, step in one CUDA graph",
    "joint-adaln": "the same, one adaLN matmul",
}
"""Configurations of the ladder, all of one session on one card, by their names here."""


def rows_of(commit: str) -> dict[str, dict]:
    """Return the rows of a session, which is named by its commit, by their configurations."""
    rows = read(STEPS)
    return {row["rung"]: row for row in rows if (row["commit"], row["batch"]) == (commit, BATCH)}


def steps() -> list[dict]:
    """Return the rows of SHOWN, in its order."""
    found = rows_of(SESSION)
    return [found[name] for name in SHOWN]


def draw(path: Path) -> None:
    """Draw the picture as a PNG."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(12, 3.3), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.7, 1))
    rows = steps()
    bars(left, rows)
    left.set_yticks(range(len(rows)), list(SHOWN.values()), fontsize=9)
    left.set(xlabel="ms", title=f"a training step of SiT-XL/2 + REPA, {BATCH} images, one H200")
    handles = [Patch(color=colour, label=name) for name, colour in PARTS.items()]
    left.legend(handles=handles, loc="lower right", fontsize=8, frameon=False)
    scores = json.loads(DIGITS.read_text())["rows"]
    for variant in ("vanilla", "REPA"):
        curve(right, scores, variant, "frechet_distance", COLOURS[variant])
    right.set(xlabel="step", yscale="log", title="Frechet distance, digits (lower: better)")
    right.grid(alpha=0.3)
    right.legend(frameon=False)
    figure.savefig(path, dpi=120, metadata={"Software": None})


if __name__ == "__main__":
    draw(PICTURE)
    print(PICTURE.relative_to(ROOT))
