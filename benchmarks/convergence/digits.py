"""The objectives against each other on the digits: `python -m benchmarks.convergence.digits`.

Same seeds, data and noise; each variant is its preset, with the preset's steps and sampler.
The vanilla run is REPA's with `--proj-coeff 0`, so its projector stays at its initial weights and
its trunk sees no alignment. Rows go to scores.jsonl under benchmarks/results/cpu/ as runs end, and
runs that are there already are not repeated; report.md and curves.png follow at the end.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from benchmarks.harness.environment import ROOT, results_folder, stamp
from benchmarks.harness.rows import WITH_COMMAND, append, facts, grid, read
from repa_fast.checkpoint.layout import steps
from repa_fast.configs import presets
from repa_fast.eval.digits import evaluate

VARIANTS = {
    "vanilla": ("digits", "--proj-coeff", "0"),
    "REPA": ("digits",),
    "SRA": ("digits-sra",),
    "DiT": ("digits-dit",),
    "DiT + REPA": ("digits-dit-repa",),
}
"""Name -> preset and further flags."""
COLOURS = dict(zip(VARIANTS, ("#7f7f7f", "#1f5fa8", "#2a9d5c", "#d08a2e", "#a83232")))
MEASURES = {
    "frechet_distance": "Frechet distance",
    "class_accuracy": "class accuracy",
    "alignment_cosine": "held-out alignment cosine",
}


def run_variant(folder: Path, variant: str, seed: int, points: int) -> list[dict]:
    """Train a variant in its own process and evaluate it at `points` even parts of its steps."""
    name = f"{variant.replace(' ', '')}-{seed}"
    preset, *further = VARIANTS[variant]
    every = presets.get(preset).max_train_steps // points
    flags = {"--preset": preset, "--output-dir": folder, "--exp-name": name, "--seed": seed}
    flags |= {"--checkpointing-steps": every, "--sampling-steps": 0, "--report-to": "none"}
    arguments = [*(str(part) for pair in flags.items() for part in pair), *further]
    with open(folder / f"{name}.log", "w") as log:
        command = [sys.executable, "train.py", *arguments]
        subprocess.run(command, cwd=ROOT, check=True, stdout=log, stderr=log)
    rows = []
    for step in steps(folder / name / "checkpoints"):
        scores = evaluate(folder / name, step=step)
        rows.append({"variant": variant, "seed": seed, **asdict(scores), **stamp()})
        print(f"{name} step {step}: Frechet distance {scores.frechet_distance:.2f}", flush=True)
    return rows


def report(rows: list[dict]) -> str:
    """Return Markdown: mean and range over seeds, per variant and step."""
    first = rows[0]
    lines = [
        "# Digits: the objectives against each other",
        "",
        *facts(rows, WITH_COMMAND),
        f"- samples per figure: {first['samples']}; seeds: {sorted({r['seed'] for r in rows})}",
        f"- held-out real digits: Frechet distance {first['frechet_distance_held_out']:.2f}, "
        f"nearest training digit {first['nearest_neighbour_held_out']:.4f}; "
        f"classifier {100 * first['classifier_accuracy']:.1f} %",
        "",
        "Mean over seeds (lowest to highest). The vanilla projector keeps its initial weights, so",
        "its cosine is that of a random map; it does not measure what the hidden states hold.",
        "",
    ]
    body = []
    for variant in VARIANTS:
        for step in steps_of(rows, variant):
            cells = []
            for measure in (*MEASURES, "nearest_neighbour"):
                found = values_of(rows, variant, step, measure)
                spread = found and (statistics.mean(found), min(found), max(found))
                cells.append("{:.3f} ({:.3f} to {:.3f})".format(*spread) if found else "")
            seeds = len(values_of(rows, variant, step, "step"))
            body.append((variant, step, seeds, *cells))
    heads = ("variant", "step", "seeds", *MEASURES.values(), "nearest training digit")
    return "\n".join([*lines, *grid(heads, body), "![curves](curves.png)", ""])


def steps_of(rows: list[dict], variant: str) -> list[int]:
    """Return the steps at which a variant was evaluated, ascending."""
    return sorted({row["step"] for row in rows if row["variant"] == variant})


def values_of(rows: list[dict], variant: str, step: int, measure: str) -> list[float]:
    """Return one value per seed; none if the variant has no such measure."""
    found = [r[measure] for r in rows if r["variant"] == variant and r["step"] == step]
    return [value for value in found if value is not None]


def plot(rows: list[dict], out: Path) -> None:
    """Plot each measure over steps: a line per variant, a band from lowest to highest seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(MEASURES), 3.6), layout="constrained")
    axes = figure.subplots(1, len(MEASURES))
    for axis, (measure, title) in zip(axes, MEASURES.items(), strict=True):
        for variant, colour in COLOURS.items():
            curve(axis, rows, variant, measure, colour)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")
    axes[0].legend(frameon=False)
    figure.savefig(out, dpi=120)


def curve(axis, rows: list[dict], variant: str, measure: str, colour: str) -> None:
    """Draw the mean of a variant's measure over its seeds, and a band from lowest to highest."""
    points = steps_of(rows, variant)
    columns = [values_of(rows, variant, step, measure) for step in points]
    if not points or not all(columns):
        return
    means = [statistics.mean(column) for column in columns]
    axis.plot(points, means, color=colour, marker="o", markersize=3, label=variant)
    low, high = [min(c) for c in columns], [max(c) for c in columns]
    axis.fill_between(points, low, high, color=colour, alpha=0.15, linewidth=0)


def main() -> None:
    """Run all variants and seeds that are missing, `--jobs` at a time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--points", type=int, default=4, help="figures per run")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    arguments = parser.parse_args()
    out = results_folder("digits-objectives", "cpu")
    rows = read(out / "scores.jsonl")
    done = {(row["variant"], row["seed"]) for row in rows}
    missing = [(v, s) for s in arguments.seeds for v in VARIANTS if (v, s) not in done]
    with tempfile.TemporaryDirectory() as folder:

        def run(variant: str, seed: int) -> None:
            found = run_variant(Path(folder), variant, seed, arguments.points)
            append(out / "scores.jsonl", *found)
            rows.extend(found)

        with ThreadPoolExecutor(arguments.jobs) as pool:
            for future in [pool.submit(run, *pair) for pair in missing]:
                future.result()
    (out / "report.md").write_text(report(rows))
    plot(rows, out / "curves.png")
    print(out / "report.md")


if __name__ == "__main__":
    main()
