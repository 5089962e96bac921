"""`repa-fast probe`: how well a linear layer tells the classes apart, by layer and by time."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from repa_fast.analysis.gather import AnalysisConfig, chosen_rows, gather, open_splits, split_rows
from repa_fast.analysis.linear import PAPER, SMALL, Accuracy, fit_probes
from repa_fast.distributed import own_device
from repa_fast.eval.pictures import by_layer_and_time, layer_table
from repa_fast.whole import write_whole

RECIPES = {"paper": PAPER, "small": SMALL}


@dataclass(kw_only=True)
class ProbeConfig(AnalysisConfig):
    """`repa-fast probe`: linear probing of a model's hidden states, and of encoders beside it."""

    recipe: Literal["paper", "small"] = "small"
    """paper: 90 epochs of batches of 16,384; small: of 256, for a few thousand rows."""
    train_rows: int = 0
    """Rows to learn from, chosen by SEED; all if 0."""
    val_rows: int = 0
    """Rows to evaluate on; all if 0."""


def probe(config: ProbeConfig) -> str:
    """Fit the probes, write probe.json and probe.png; return a table."""
    device = own_device()
    loaded = config.load(device)
    out = config.output_folder(loaded, "probe")
    data_dir, names = config.run_defaults(loaded)
    train, val, apart = open_splits(data_dir)
    if apart:
        rows = chosen_rows(len(train), config.train_rows, config.seed)
        held_out = chosen_rows(len(val), config.val_rows, config.seed)
    else:
        counts = config.train_rows, config.val_rows
        rows, held_out = split_rows(len(train), *counts, config.seed)
    learnt = gather(loaded, train, rows, names, config, device)
    unseen = gather(loaded, val, held_out, names, config, device)
    recipe, classes = RECIPES[config.recipe], len(train.metadata.class_names)

    def fit(features: torch.Tensor, of_unseen: torch.Tensor) -> Accuracy:
        data = (features, learnt.label, of_unseen, unseen.label)  # features (L, N, D)
        return fit_probes(*data, classes, recipe, seed=config.seed, device=device)

    of_times = [fit(*features) for features in zip(learnt.hidden, unseen.hidden, strict=True)]
    of_encoders = {
        name: fit(learnt.tokens[name][None], unseen.tokens[name][None]) for name in names
    }
    results = {
        "model": {
            "source": str(loaded.source),
            "step": loaded.step,
            "weights": loaded.weights,
            "digest": loaded.digest,
        },
        "layers": config.layers_of(loaded),
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
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "probe.json", json.dumps(results, indent=2) + "\n")
    plot(results, out / "probe.png")
    return f"{table(results)}\n\n{out / 'probe.png'}"


def _listed(values: torch.Tensor | None) -> list[float] | None:
    return None if values is None else values.tolist()


def table(results: dict) -> str:
    """Return top-1 accuracy in percent, a row for each layer, as Markdown."""
    lines = layer_table(results, 100 * np.array(results["top1"]), ".1f")
    empty = " |" * (len(results["times"]) - 1)
    lines += [f"| {n} | {100 * e['top1']:.1f} |{empty}" for n, e in results["encoders"].items()]
    rows = results["rows"]
    lines += ["", f"top-1, %; learnt from {rows['train']} rows, judged on {rows['val']}"]
    return "\n".join(lines)


def plot(results: dict, out: Path) -> None:
    """Plot accuracy over layers, a line for each time, and over times at the best layer."""
    percent = 100 * np.array(results["top1"])
    baselines = {name: 100 * e["top1"] for name, e in results["encoders"].items()}
    layers, times = results["layers"], results["times"]
    by_layer_and_time(percent, layers, times, "top-1 accuracy, %", baselines, out)
