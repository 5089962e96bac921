"""`repa-fast probe`: how well a linear layer tells the classes apart, by layer and by time."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from repa_fast import encoders
from repa_fast.analysis.gather import (
    AnalysisConfig,
    chosen_rows,
    gather,
    layers_of,
    open_splits,
    split_rows,
)
from repa_fast.analysis.linear import PAPER, SMALL, Accuracy, fit_probes
from repa_fast.data.processes import own_device
from repa_fast.eval.load import Loaded, load, run_config
from repa_fast.ledger import write_whole

RECIPES = {"paper": PAPER, "small": SMALL}


@dataclass(kw_only=True)
class ProbeConfig(AnalysisConfig):
    """`repa-fast probe`: linear probing of a model's hidden states, and of encoders beside it."""

    recipe: Literal["paper", "small"] = "small"
    """paper: 90 epochs of batches of 16,384; small: of 256, for a few thousand rows."""
    train_rows: int = 0
    """Rows to learn from, chosen by SEED; all if 0."""
    val_rows: int = 0
    """Rows to judge on; all if 0."""


def probe(config: ProbeConfig) -> str:
    """Fit the probes, write probe.json and probe.png; returns a table.

    Raises:
        ValueError: weights, dataset or layers that do not fit.
    """
    device = own_device()
    loaded = load(config.ckpt, device, origin=config.origin)
    data_dir, names = run_defaults(config, loaded)
    train, val, apart = open_splits(data_dir)
    if apart:
        rows = chosen_rows(len(train), config.train_rows, config.seed)
        held_out = chosen_rows(len(val), config.val_rows, config.seed)
    else:
        counts = config.train_rows, config.val_rows
        rows, held_out = split_rows(len(train), *counts, config.seed)
    learnt = gather(loaded, train, rows, names, config, device)
    judged = gather(loaded, val, held_out, names, config, device)
    labels = (learnt.label, judged.label)
    classes = len(train.metadata.class_names)
    of_times = [
        _fit((learnt.hidden[t], judged.hidden[t]), labels, classes, config, device)
        for t in range(len(config.times))
    ]
    of_encoders = {
        name: _fit(
            (learnt.tokens[name][None], judged.tokens[name][None]), labels, classes, config, device
        )
        for name in names
    }
    results = {
        "model": {"source": str(loaded.source), "step": loaded.step, "digest": loaded.digest},
        "layers": layers_of(config, loaded),
        "times": list(config.times),
        "top1": [accuracy.top1.tolist() for accuracy in of_times],
        "top5": [_listed(accuracy.top5) for accuracy in of_times],
        "encoders": {
            name: {"top1": a.top1.item(), "top5": (_listed(a.top5) or [None])[0]}
            for name, a in of_encoders.items()
        },
        "rows": {"train": len(rows), "val": len(held_out)},
        "settings": asdict(config),
    }
    out = output_folder(config, loaded, "probe")
    write_whole(out / "probe.json", json.dumps(results, indent=2) + "\n")
    plot(results, out / "probe.png")
    return f"{table(results)}\n\n{out / 'probe.png'}"


def run_defaults(config: AnalysisConfig, loaded: Loaded) -> tuple[str, list[str]]:
    """Dataset and encoders: those asked for, or the run's.

    Raises:
        ValueError: no dataset is asked for and the weights are no run's.
    """
    run = run_config(loaded.source) if loaded.source.is_dir() else None
    data_dir = config.data_dir or (run.data_dir if run else "")
    if not data_dir:
        raise ValueError(f"{loaded.source} does not say its dataset, expected --data-dir")
    wanted = config.encoders or (run.enc_type if run else "none")
    return data_dir, [spec.name for spec in encoders.specs(wanted)]


def output_folder(config: AnalysisConfig, loaded: Loaded, name: str) -> Path:
    """Where results go: as asked for, or into a folder beside the checkpoints; made here."""
    parent = loaded.source.parent
    run = parent.parent if parent.name == "checkpoints" else parent
    step = "" if loaded.step is None else f"-{loaded.step:07d}"
    out = Path(config.out) if config.out else run / f"{name}{step}"
    out.mkdir(parents=True, exist_ok=True)
    return out


def _fit(
    features: tuple[torch.Tensor, torch.Tensor],
    labels: tuple[torch.Tensor, torch.Tensor],
    classes: int,
    config: ProbeConfig,
    device: torch.device,
) -> Accuracy:
    """Probes of features (L, N, D), learnt from the first set and judged on the second."""
    return fit_probes(
        features[0],
        labels[0],
        features[1],
        labels[1],
        classes,
        RECIPES[config.recipe],
        seed=config.seed,
        device=device,
    )


def _listed(values: torch.Tensor | None) -> list[float] | None:
    return None if values is None else values.tolist()


def table(results: dict) -> str:
    """Top-1 accuracy in percent, a row for each layer, as Markdown."""
    times = results["times"]
    lines = [
        f"| layer | {' | '.join(f't = {t:g}' for t in times)} |",
        "|---" * (len(times) + 1) + "|",
    ]
    for number, layer in enumerate(results["layers"]):
        cells = (f"{100 * of_time[number]:.1f}" for of_time in results["top1"])
        lines.append(f"| {layer} | {' | '.join(cells)} |")
    empty = " |" * (len(times) - 1)
    lines += [f"| {n} | {100 * e['top1']:.1f} |{empty}" for n, e in results["encoders"].items()]
    rows = results["rows"]
    lines += ["", f"top-1, %; learnt from {rows['train']} rows, judged on {rows['val']}"]
    return "\n".join(lines)


def plot(results: dict, out: Path) -> None:
    """Accuracy over layers, a line for each time, and over times at the best layer."""
    from repa_fast.eval.plots import by_layer_and_time

    percent = 100 * np.array(results["top1"])
    baselines = {name: 100 * e["top1"] for name, e in results["encoders"].items()}
    by_layer_and_time(
        percent, results["layers"], results["times"], "top-1 accuracy, %", baselines, out
    )
