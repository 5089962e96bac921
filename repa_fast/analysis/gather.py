"""Features for the analyses: hidden states of a model and tokens of encoders, on the same images.

They are kept in a cache, since a pass over the images costs more than what is made of them.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from repa_fast import encoders
from repa_fast.analysis.hidden import collect, encoder_features
from repa_fast.data.loader import Loader
from repa_fast.data.official import OfficialFolder
from repa_fast.data.open import Dataset, open_dataset
from repa_fast.data.order import Consecutive
from repa_fast.data.processes import progress_bar
from repa_fast.data.store import is_url
from repa_fast.eval.load import Loaded
from repa_fast.prepare.images import ensure_digits

CACHE = Path.home() / ".cache" / "repa-fast" / "features"
HELD_OUT = 0.1
"""Share of a table without val split that is held out."""


@dataclass(kw_only=True)
class AnalysisConfig:
    """What `repa-fast probe` and `repa-fast cknna` look at."""

    ckpt: str
    """A run's folder, a native checkpoint, an official .pt file, bare weights or safetensors."""
    data_dir: str = ""
    """The dataset; that of the run where empty."""
    times: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    """Times t at which the hidden states are taken; 0 is data, 1 is noise."""
    layers: tuple[int, ...] = ()
    """Blocks, counted from 1; all where none is given."""
    encoders: str = ""
    """As --enc-type; those of the run where empty, none for none."""
    enc_weights: str = ""
    """A weights file for each of them, comma separated; its own source where empty."""
    batch_size: int = 64
    """Images at a time."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """Of the model; encoders compute in fp32."""
    num_workers: int = 4
    """Threads that decode images."""
    seed: int = 0
    """Of noise, of the images chosen, and of what is fitted."""
    cache: str = str(CACHE)
    """Folder of computed features; none where empty."""
    out: str = ""
    """Folder for the results; beside the checkpoints where empty."""
    origin: Literal["repa", "sit", "dit"] = "repa"
    """Whose weights CKPT holds: REPA's or ours, or the original SiT's or DiT's."""


@dataclass(frozen=True)
class Gathered:
    """Features of N images.

    Attributes:
        hidden: fp32 (times, layers, N, D), patch averages for the null label.
        tokens: fp32 (N, width) by encoder, patch averages.
        label: int64 (N).
    """

    hidden: torch.Tensor
    tokens: dict[str, torch.Tensor]
    label: torch.Tensor


def open_splits(data_dir: str) -> tuple[Dataset, Dataset, bool]:
    """The tables to learn from and to judge on, and whether they are two.

    A table without val split, at a URL, or an official folder, is both.
    """
    root = ensure_digits() if data_dir == "digits" else data_dir
    train = open_dataset(root)
    if isinstance(train, OfficialFolder) or not (Path(root) / "val.lance").exists():
        return train, train, False
    return train, open_dataset(root, "val"), True


def layers_of(config: AnalysisConfig, loaded: Loaded) -> list[int]:
    """The blocks asked for, or all, counted from 1."""
    return list(config.layers or range(1, len(loaded.model.blocks) + 1))


def chosen_rows(rows: int, count: int, seed: int) -> np.ndarray:
    """`count` of `rows` row numbers, all if 0 or too many, a function of the seed; ascending."""
    order = np.random.default_rng(seed).permutation(rows)
    return np.sort(order[: count or rows])


def split_rows(
    rows: int, train_count: int, val_count: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers to learn from and held out, of a table that is both; counts as `chosen_rows`."""
    order = np.random.default_rng(seed).permutation(rows)
    held_out, rest = np.split(order, [max(1, round(HELD_OUT * rows))])
    return np.sort(rest[: train_count or None]), np.sort(held_out[: val_count or None])


def gather(
    loaded: Loaded,
    dataset: Dataset,
    rows: np.ndarray,
    names: Sequence[str],
    config: AnalysisConfig,
    device: torch.device,
) -> Gathered:
    """Features of the rows, from the cache where they are in it.

    Args:
        names: of encoders.

    Raises:
        ValueError: a layer or encoder that is not there, or a bad image.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    files = encoders.weight_files(",".join(names) or "none", config.enc_weights)
    described = {
        "model": loaded.digest,
        "path": [loaded.objective, loaded.path_type],
        "data": [*_identity(dataset), len(dataset), hashlib.sha256(rows.tobytes()).hexdigest()],
        "encoders": [list(names), files],
        "times": list(config.times),
        "layers": list(config.layers),
        "precision": config.mixed_precision,
        "seed": config.seed,
    }
    key = hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]
    cached = Path(config.cache) / f"{key}.safetensors" if config.cache else None
    if cached is not None and cached.exists():
        with safe_open(cached, "pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    else:
        tensors = _compute(loaded, dataset, rows, dict(zip(names, files)), config, device)
        if cached is not None:
            cached.parent.mkdir(parents=True, exist_ok=True)
            partial = cached.with_suffix(f".{os.getpid()}")
            save_file(tensors, partial)
            partial.replace(cached)
    return Gathered(
        hidden=tensors["hidden"],
        tokens={name: tensors[f"tokens/{name}"] for name in names},
        label=tensors["label"],
    )


def _identity(dataset: Dataset) -> list[str]:
    """Where the dataset is, and what changes when it is written again in the same place."""
    if isinstance(dataset, OfficialFolder):
        changed = [file.stat().st_mtime_ns for file in dataset.root.glob("*/dataset.json")]
        return [str(dataset.root.resolve()), str(max(changed))]
    place = dataset.uri if is_url(dataset.uri) else str(Path(dataset.uri).resolve())
    return [place, str(dataset.table.versions()[-1]["timestamp"])]


def _compute(
    loaded: Loaded,
    dataset: Dataset,
    rows: np.ndarray,
    files: dict[str, str],
    config: AnalysisConfig,
    device: torch.device,
) -> dict[str, torch.Tensor]:
    resolution = dataset.metadata.resolution
    frozen = {n: encoders.load(n, resolution, device, file) for n, file in files.items()}
    tokens: dict[str, list[torch.Tensor]] = {name: [] for name in frozen}
    order = Consecutive(rows, config.batch_size)
    with (
        progress_bar(str(dataset.uri), True) as progress,
        Loader(
            dataset,
            order,
            start=0,
            stop=order.steps,
            images=bool(frozen),
            num_workers=config.num_workers,
        ) as loader,
        _precision(config, device),
    ):
        advance = progress(len(rows))

        def watched():
            done = 0
            for batch in loader:
                for name, encoder in frozen.items():
                    with torch.autocast(device.type, enabled=False):
                        found = encoder_features(encoder, batch["image"].to(device))
                    tokens[name].append(found.cpu())
                yield batch
                done += len(batch["index"])
                advance(done)

        found = collect(
            loaded.model,
            watched(),
            config.times,
            count=len(rows),
            metadata=dataset.metadata,
            path=loaded.path,
            seed=config.seed,
            blocks=config.layers or None,
        )
    return {
        "hidden": found.hidden,
        "label": found.label,
        **{f"tokens/{name}": torch.cat(parts) for name, parts in tokens.items()},
    }


def _precision(config: AnalysisConfig, device: torch.device):
    if config.mixed_precision == "no":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)
