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
    Gathered,
    chosen_rows,
    gather,
    layers_of,
    open_splits,
)
from repa_fast.analysis.probe import output_folder, run_defaults
from repa_fast.data.processes import own_device
from repa_fast.eval.load import Loaded, load
from repa_fast.eval.plots import by_layer_and_time, over_points
from repa_fast.eval.strip import run_checkpoints
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
    """Compute all values, write cknna.json and cknna.png; returns a table.

    Raises:
        ValueError: weights, dataset, layers or encoders that do not fit.
    """
    if config.plotted not in (*VARIANTS, "cka"):
        raise ValueError(
            f"plotted is {config.plotted!r}, expected one of {', '.join((*VARIANTS, 'cka'))}"
        )
    device = own_device()
    found = []
    run = Path(config.ckpt)
    for source in run_checkpoints(run) if config.all_steps else [run]:
        loaded = load(source, device, origin=config.origin)
        found.append(_of_checkpoint(config, loaded, device))
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


def _of_checkpoint(config: SimilarityConfig, loaded: Loaded, device: torch.device) -> dict:
    data_dir, names = run_defaults(config, loaded)
    if not names:
        raise ValueError("there is no encoder to compare with, expected --encoders")
    _, val, _ = open_splits(data_dir)
    rows = chosen_rows(len(val), config.count, config.seed)
    gathered = gather(loaded, val, rows, names, config, device)
    layers = layers_of(config, loaded)
    return {
        "source": str(loaded.source),
        "step": loaded.step,
        "digest": loaded.digest,
        "images": len(rows),
        "values": {name: compare(gathered, name, layers, config.k, device) for name in names},
    }


def compare(
    gathered: Gathered, name: str, layers: Sequence[int], k: int, device: torch.device
) -> dict[str, list[list[float]]]:
    """Every variant of CKNNA, and CKA, between an encoder and each hidden state.

    Args:
        name: of the encoder.
        layers: of the hidden states, counted from 1, for messages.

    Returns:
        Lists [time][layer] by variant.
    """
    tokens = gathered.tokens[name].to(device)
    near = {n: neighbourhood(name, tokens, k, normalize=n) for n in (False, True)}
    values = {variant: [] for variant in (*VARIANTS, "cka")}
    for of_time in gathered.hidden:
        row = {variant: [] for variant in values}
        for layer, hidden in zip(layers, of_time, strict=True):
            hidden = hidden.to(device)
            own = {n: neighbourhood(f"layer {layer}", hidden, k, normalize=n) for n in near}
            for variant, (definition, normalize) in VARIANTS.items():
                row[variant].append(alignment(own[normalize], near[normalize], definition))
            row["cka"].append(cka(hidden, tokens))
        for variant, of_layers in row.items():
            values[variant].append(of_layers)
    return values


def table(results: dict, variant: str) -> str:
    """The values of the last checkpoint, a row for each layer, as Markdown."""
    times, last = results["times"], results["checkpoints"][-1]
    lines = []
    for name, values in last["values"].items():
        lines += [f"{variant}, with {name}, {last['images']} images, k = {results['k']}:", ""]
        lines.append(f"| layer | {' | '.join(f't = {t:g}' for t in times)} |")
        lines.append("|---" * (len(times) + 1) + "|")
        for number, layer in enumerate(results["layers"]):
            cells = (f"{of_time[number]:.3f}" for of_time in values[variant])
            lines.append(f"| {layer} | {' | '.join(cells)} |")
        best = ", ".join(f"{v} {np.max(found):.3f}" for v, found in values.items())
        lines += ["", f"largest over layers and times: {best}", ""]
    return "\n".join(lines[:-1])


def _plot(results: dict, variant: str, out: Path) -> None:
    last = results["checkpoints"][-1]
    quantity = "CKA" if variant == "cka" else f"CKNNA ({variant}), k = {results['k']}"
    for number, (name, values) in enumerate(last["values"].items()):
        file = out / ("cknna.png" if number == 0 else f"cknna-{name}.png")
        by_layer_and_time(
            np.array(values[variant]), results["layers"], results["times"],
            f"{quantity}, with {name}", {}, file,
        )  # fmt: skip
    if len(results["checkpoints"]) > 1:
        lines = {
            name: [
                (of["step"], float(np.max(of["values"][name][variant])))
                for of in results["checkpoints"]
            ]
            for name in last["values"]
        }
        over_points(lines, "step", f"largest {quantity}", out / "cknna-steps.png")
