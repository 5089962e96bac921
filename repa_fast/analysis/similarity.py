"""`repa-fast cknna`: how alike a model's hidden states and an encoder see the same images."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from repa_fast.analysis.cknna import DEFINITIONS, alignment, cka, neighbourhood
from repa_fast.analysis.gather import AnalysisConfig, chosen_rows, gather, open_splits
from repa_fast.analysis.hidden import Features
from repa_fast.checkpoint.layout import run_checkpoints
from repa_fast.contracts import expect_choice
from repa_fast.distributed import own_device
from repa_fast.eval.load import Loaded
from repa_fast.eval.pictures import by_layer_and_time, layer_table, over_points
from repa_fast.whole import write_whole

VARIANTS = {
    f"{definition}{', normalised' if normalize else ''}": (definition, normalize)
    for definition in DEFINITIONS
    for normalize in (False, True)
}
"""Names of CKNNA's two definitions, each without and with rows scaled to length 1."""


@dataclass(kw_only=True)
class SimilarityConfig(AnalysisConfig):
    """`repa-fast cknna`: CKNNA and CKA between a model's hidden states and encoders."""

    count: int = 10_000
    """Images, chosen by SEED, of the val split where there is one."""
    k: int = 10
    """Neighbours."""
    all_steps: bool = False
    """Every checkpoint of the run CKPT, and a plot over training steps."""
    plotted: str = "paper, normalised"
    """What the plots show: cka, or paper or platonic, each with or without ", normalised"."""


def similarity(config: SimilarityConfig) -> str:
    """Compute all values, write cknna.json and cknna.png; return a table."""
    expect_choice("plotted", config.plotted, (*VARIANTS, "cka"))
    found, run = [], Path(config.ckpt)
    for source in run_checkpoints(run) if config.all_steps else [run]:
        loaded = replace(config, ckpt=str(source)).load(own_device())
        out = config.output_folder(loaded, "cknna")
        found.append(_of_checkpoint(config, loaded))
    results = {
        "layers": config.layers_of(loaded),
        "times": list(config.times),
        "k": config.k,
        "checkpoints": found,
        "settings": asdict(config),
    }
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "cknna.json", json.dumps(results, indent=2) + "\n")
    _plot(results, config.plotted, out)
    return f"{table(results, config.plotted)}\n\n{out / 'cknna.png'}"


def _of_checkpoint(config: SimilarityConfig, loaded: Loaded) -> dict:
    device, layers = own_device(), config.layers_of(loaded)
    data_dir, names = config.run_defaults(loaded)
    if not names:
        raise ValueError("there is no encoder to compare with, expected --encoders")
    _, val, _ = open_splits(data_dir)
    rows = chosen_rows(len(val), config.count, config.seed)
    features = gather(loaded, val, rows, names, config, device)
    return {
        "source": str(loaded.source),
        "step": loaded.step,
        "weights": loaded.weights,
        "digest": loaded.digest,
        "images": len(rows),
        "values": {name: compare(features, name, layers, config.k, device) for name in names},
    }


def compare(
    features: Features, name: str, layers: Sequence[int], k: int, device: torch.device
) -> dict[str, list[list[float]]]:
    """Compute CKNNA's variants and CKA between encoder `name` and each hidden state.

    `layers` are what messages call the hidden states. Returns lists [time][layer] by variant.
    """
    tokens = features.tokens[name].to(device)
    near = {n: neighbourhood(name, tokens, k, normalize=n) for n in (False, True)}

    def of_layer(layer: int, hidden: torch.Tensor) -> dict[str, float]:
        hidden = hidden.to(device)
        own = {n: neighbourhood(f"layer {layer}", hidden, k, normalize=n) for n in near}
        found = {v: alignment(own[n], near[n], how) for v, (how, n) in VARIANTS.items()}
        return found | {"cka": cka(hidden, tokens)}

    found = [list(map(of_layer, layers, of_time)) for of_time in features.hidden]
    return {v: [[of[v] for of in of_time] for of_time in found] for v in (*VARIANTS, "cka")}


def table(results: dict, variant: str) -> str:
    """Return the values of the last checkpoint, a row for each layer, as Markdown."""
    last = results["checkpoints"][-1]
    lines = []
    for name, values in last["values"].items():
        lines += [f"{variant}, with {name}, {last['images']} images, k = {results['k']}:", ""]
        lines += layer_table(results, values[variant], ".3f")
        best = ", ".join(f"{v} {np.max(found):.3f}" for v, found in values.items())
        lines += ["", f"largest over layers and times: {best}", ""]
    return "\n".join(lines[:-1])


def _plot(results: dict, variant: str, out: Path) -> None:
    checkpoints, names = results["checkpoints"], list(results["checkpoints"][-1]["values"])
    quantity = "CKA" if variant == "cka" else f"CKNNA ({variant}), k = {results['k']}"
    for number, name in enumerate(names):
        values = np.array(checkpoints[-1]["values"][name][variant])
        file = out / (f"cknna-{name}.png" if number else "cknna.png")
        layers, times = results["layers"], results["times"]
        by_layer_and_time(values, layers, times, f"{quantity}, with {name}", {}, file)
    if len(checkpoints) > 1:
        lines = {
            name: [(of["step"], float(np.max(of["values"][name][variant]))) for of in checkpoints]
            for name in names
        }
        over_points(lines, "step", f"largest {quantity}", out / "cknna-steps.png")
