"""`repa-fast cknna`: how alike a model's hidden states and an encoder see the same images."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from repa_fast.analysis.cknna import NORMALIZES, alignment, cka, neighbourhood
from repa_fast.analysis.gather import (
    AnalysisConfig,
    chosen_rows,
    gather,
    layers_of,
    open_splits,
    output_folder,
    run_defaults,
)
from repa_fast.analysis.hidden import Features
from repa_fast.checkpoint.layout import run_checkpoints
from repa_fast.contracts import expect_choice
from repa_fast.distributed import own_device
from repa_fast.eval.load import Loaded, load
from repa_fast.eval.pictures import by_layer_and_time, layer_table, over_points
from repa_fast.ledger import write_whole

VARIANTS = {
    f"{definition}{', normalised' if normalize else ''}": (definition, normalize)
    for definition in NORMALIZES
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
    """Compute all values, write cknna.json and cknna.png; return a table.

    Raises:
        ValueError: weights, dataset, layers or encoders that do not fit.
    """
    expect_choice("plotted", config.plotted, (*VARIANTS, "cka"))
    found, run = [], Path(config.ckpt)
    for source in run_checkpoints(run) if config.all_steps else [run]:
        loaded = load(source, own_device(), origin=config.origin)
        found.append(_of_checkpoint(config, loaded))
    results = {
        "layers": layers_of(config, loaded),
        "times": list(config.times),
        "k": config.k,
        "checkpoints": found,
        "settings": asdict(config),
    }
    out = output_folder(config, loaded, "cknna")
    write_whole(out / "cknna.json", json.dumps(results, indent=2) + "\n")
    _plot(results, config.plotted, out)
    return f"{table(results, config.plotted)}\n\n{out / 'cknna.png'}"


def _of_checkpoint(config: SimilarityConfig, loaded: Loaded) -> dict:
    device, layers = own_device(), layers_of(config, loaded)
    data_dir, names = run_defaults(config, loaded)
    if not names:
        raise ValueError("there is no encoder to compare with, expected --encoders")
    _, val, _ = open_splits(data_dir)
    rows = chosen_rows(len(val), config.count, config.seed)
    features = gather(loaded, val, rows, names, config, device)
    return {
        "source": str(loaded.source),
        "step": loaded.step,
        "digest": loaded.digest,
        "images": len(rows),
        "values": {name: compare(features, name, layers, config.k, device) for name in names},
    }


def compare(
    features: Features, name: str, layers: Sequence[int], k: int, device: torch.device
) -> dict[str, list[list[float]]]:
    """Compute every variant of CKNNA, and CKA, between an encoder and each hidden state.

    Args:
        name: of the encoder.
        layers: of the hidden states, counted from 1, for messages.

    Returns:
        Lists [time][layer] by variant.
    """
    tokens = features.tokens[name].to(device)
    near = {n: neighbourhood(name, tokens, k, normalize=n) for n in (False, True)}
    values = {variant: [] for variant in (*VARIANTS, "cka")}
    for of_time in features.hidden:
        for of_layers in values.values():
            of_layers.append([])
        for layer, hidden in zip(layers, of_time, strict=True):
            hidden = hidden.to(device)
            own = {n: neighbourhood(f"layer {layer}", hidden, k, normalize=n) for n in near}
            for variant, (definition, normalize) in VARIANTS.items():
                found = alignment(own[normalize], near[normalize], definition)
                values[variant][-1].append(found)
            values["cka"][-1].append(cka(hidden, tokens))
    return values


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
