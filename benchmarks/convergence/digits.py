"""Vanilla SiT against REPA on the digits: `python -m benchmarks.convergence.digits`.

Same seeds, data, noise and number of steps; the vanilla run is the same program with
`--proj-coeff 0`, so its projector stays at its initial weights and its trunk sees no alignment.
Writes scores.json, report.md and curves.png under benchmarks/results/cpu/.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from benchmarks.environment import RESULTS, ROOT, stamp
from repa_fast.eval.digits import evaluate
from repa_fast.models.weights import steps

VARIANTS = {"vanilla": "0", "REPA": "0.5"}
COLOURS = {"vanilla": "#7f7f7f", "REPA": "#1f5fa8"}
MEASURES = {
    "frechet_distance": "Frechet distance",
    "class_accuracy": "class accuracy",
    "alignment_cosine": "held-out alignment cosine",
}


def run_variant(folder: Path, variant: str, seed: int, total: int, every: int) -> list[dict]:
    """Train one variant in its own process and judge each of its checkpoints."""
    name = f"{variant}-{seed}"
    flags = {
        "--preset": "digits",
        "--output-dir": str(folder),
        "--exp-name": name,
        "--seed": str(seed),
        "--proj-coeff": VARIANTS[variant],
        "--max-train-steps": str(total),
        "--checkpointing-steps": str(every),
        "--sampling-steps": "0",
        "--report-to": "none",
    }
    command = [sys.executable, "train.py", *(part for pair in flags.items() for part in pair)]
    with open(folder / f"{name}.log", "w") as log:
        subprocess.run(command, cwd=ROOT, check=True, stdout=log, stderr=log)
    rows = []
    for step in steps(folder / name / "checkpoints"):
        scores = evaluate(folder / name, step=step)
        rows.append({"variant": variant, "seed": seed, **asdict(scores)})
        print(f"{name} step {step}: Frechet distance {scores.frechet_distance:.2f}", flush=True)
    return rows


def report(rows: list[dict]) -> str:
    """Markdown: mean and range over seeds, per variant and step."""
    environment = stamp()
    lines = ["# Digits: vanilla against REPA", ""]
    lines += [f"- {name}: {value}" for name, value in environment.items()]
    first = rows[0]
    lines += [
        f"- samples per figure: {first['samples']}; seeds: {sorted({r['seed'] for r in rows})}",
        f"- held-out real digits: Frechet distance {first['frechet_distance_held_out']:.2f}, "
        f"nearest training digit {first['nearest_neighbour_held_out']:.4f}; "
        f"classifier {100 * first['classifier_accuracy']:.1f} %",
        "",
        "Mean over seeds (lowest to highest). The vanilla projector keeps its initial weights, so",
        "its cosine is that of a random map; it does not measure what the hidden states hold.",
        "",
        "| step | variant | " + " | ".join(MEASURES.values()) + " | nearest training digit |",
        "|---|---|" + "---|" * (len(MEASURES) + 1),
    ]
    for step in sorted({row["step"] for row in rows}):
        for variant in VARIANTS:
            cells = []
            for measure in (*MEASURES, "nearest_neighbour"):
                values = values_of(rows, variant, step, measure)
                cells.append(
                    f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"
                )
            lines.append(f"| {step} | {variant} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", "![curves](curves.png)", ""])


def values_of(rows: list[dict], variant: str, step: int, measure: str) -> list[float]:
    """One value per seed."""
    return [r[measure] for r in rows if r["variant"] == variant and r["step"] == step]


def plot(rows: list[dict], out: Path) -> None:
    """Each measure against the step: a line per variant, a band from lowest to highest seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(MEASURES), 3.6), layout="constrained")
    axes = figure.subplots(1, len(MEASURES))
    points = sorted({row["step"] for row in rows})
    for axis, (measure, title) in zip(axes, MEASURES.items(), strict=True):
        for variant, colour in COLOURS.items():
            columns = [values_of(rows, variant, step, measure) for step in points]
            means = [statistics.mean(column) for column in columns]
            axis.plot(points, means, color=colour, marker="o", markersize=3, label=variant)
            low, high = [min(c) for c in columns], [max(c) for c in columns]
            axis.fill_between(points, low, high, color=colour, alpha=0.15, linewidth=0)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")
    axes[0].legend(frameon=False)
    figure.savefig(out, dpi=120)


def main() -> None:
    """Run all variants and seeds, `--jobs` at a time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--every", type=int, default=250, help="steps between figures")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(arguments.jobs) as pool:
        futures = [
            pool.submit(run_variant, Path(folder), variant, seed, arguments.steps, arguments.every)
            for seed in arguments.seeds
            for variant in VARIANTS
        ]
        rows = [row for future in futures for row in future.result()]
    out = RESULTS / "cpu" / f"{stamp()['date']}_digits-convergence"
    out.mkdir(parents=True, exist_ok=True)
    (out / "scores.json").write_text(
        json.dumps({"environment": stamp(), "rows": rows}, indent=1) + "\n"
    )
    (out / "report.md").write_text(report(rows))
    plot(rows, out / "curves.png")
    print(out / "report.md")


if __name__ == "__main__":
    main()
