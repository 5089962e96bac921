"""Features for the analyses: hidden states of a model and tokens of encoders, on the same images.

They are kept in a cache, since a pass over the images costs more than what is made of them.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from repa_fast import encoders
from repa_fast.analysis.hidden import Features, collect
from repa_fast.checkpoint.layout import read_settings, run_folder
from repa_fast.checkpoint.marker import trusted
from repa_fast.contracts import expect_writable
from repa_fast.data.loader import Batch, Loader
from repa_fast.data.official import OfficialFolder
from repa_fast.data.open import Dataset, open_dataset
from repa_fast.data.order import Consecutive
from repa_fast.data.store import is_url
from repa_fast.distributed import progress_bar
from repa_fast.eval.inception import mean_patch_tokens
from repa_fast.eval.load import Loaded, WeightsConfig
from repa_fast.whole import whole_or_not

CACHE = Path.home() / ".cache" / "repa-fast" / "features"
HELD_OUT = 0.1
"""Share of a table without val split that is held out."""


@dataclass(kw_only=True)
class AnalysisConfig(WeightsConfig):
    """What `repa-fast probe` and `repa-fast cknna` look at."""

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
    """Folder for the results; in the run's folder, or beside the weights, where empty."""

    def run_defaults(self, loaded: Loaded) -> tuple[str, list[str]]:
        """Return dataset and encoders: those asked for, or the run's.

        A run's dataset at a URL is not opened unless it is asked for: whoever wrote the run's
        config.json would choose what is read there, with the user's credentials.

        Raises:
            ValueError: no dataset is asked for, and the weights are no run's or the run's is a URL.
        """
        with trusted(not self.verify):
            run = read_settings(loaded.source).config if loaded.source.is_dir() else None
        data_dir = self.data_dir or (run.data_dir if run else "")
        if not data_dir:
            raise ValueError(f"{loaded.source} does not say its dataset, expected --data-dir")
        if not self.data_dir and is_url(data_dir):
            raise ValueError(
                f"the run's dataset is {data_dir!r}, expected --data-dir with that URL to open it"
            )
        wanted = self.encoders or (run.enc_type if run else "none")
        return data_dir, [spec.name for spec in encoders.specs(wanted)]

    def layers_of(self, loaded: Loaded) -> list[int]:
        """Return the blocks asked for, or all, counted from 1."""
        return list(self.layers or range(1, len(loaded.model.blocks) + 1))

    def output_folder(self, loaded: Loaded, name: str) -> Path:
        """Return the folder of the results: as asked for, or in the run's, or the current one.

        ValueError if it cannot be written to.
        """
        run = run_folder(loaded.source) or Path()
        place = "" if loaded.step is None else f"-{loaded.place}"
        out = Path(self.out) if self.out else run / f"{name}{place}"
        expect_writable("out", out, folder=True)
        return out


def open_splits(data_dir: str) -> tuple[Dataset, Dataset, bool]:
    """Return the train and validation datasets, and whether a separate validation split exists.

    A table without val split, at a URL, or an official folder, is both.
    """
    train = open_dataset(data_dir)
    is_alone = isinstance(train, OfficialFolder) or Path(train.uri) == Path(data_dir)
    if is_alone or not Path(train.uri).with_name("val.lance").exists():
        return train, train, False
    return train, open_dataset(data_dir, "val"), True


def chosen_rows(rows: int, count: int, seed: int) -> np.ndarray:
    """Choose `count` of `rows` row numbers by the seed, all if 0 or too many; ascending."""
    order = np.random.default_rng(seed).permutation(rows)
    return np.sort(order[: count or rows])


def split_rows(
    rows: int, train_count: int, val_count: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Choose rows to train on and to hold out of a table that is both; counts as `chosen_rows`."""
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
) -> Features:
    """Return the features of the rows, with encoders `names`, from the cache if it has them."""
    from safetensors.torch import save_file

    files = encoders.weight_files(",".join(names) or "none", config.enc_weights)
    described = {
        "model": (loaded.digest, loaded.model.blocks[0].attn.num_heads),
        "path": (loaded.objective.name, loaded.objective.path_type),
        "data": (*_identity(dataset), len(dataset), hashlib.sha256(rows.tobytes()).hexdigest()),
        "encoders": (names, files),
        "times": config.times,
        "layers": config.layers,
        "precision": config.mixed_precision,
        "seed": config.seed,
    }
    key = hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]
    cached = Path(config.cache) / f"{key}.safetensors"
    tensors = _kept(cached, loaded, rows, names, config) if config.cache else None
    if tensors is None:
        if config.cache:
            expect_writable("cache", cached.parent, folder=True)
        tensors = _compute(loaded, dataset, rows, dict(zip(names, files)), config, device)
        if config.cache:
            with whole_or_not(cached, replace=True) as partial:
                save_file(tensors, partial)
    tokens = {name: tensors[f"tokens/{name}"] for name in names}
    return Features(tensors["hidden"], tensors["label"], tokens)


def _kept(
    cached: Path, loaded: Loaded, rows: np.ndarray, names: Sequence[str], config: AnalysisConfig
) -> dict[str, torch.Tensor] | None:
    """Return the features in a file of the cache, None if it is not there or not what was kept."""
    from safetensors.torch import load_file

    try:
        tensors = load_file(cached) if cached.is_file() else {}
    except Exception:  # safetensors has its own; a file cut short is computed again
        return None
    width, count = loaded.model.pos_embed.shape[-1], len(rows)
    shape = len(config.times), len(config.layers_of(loaded)), count, width
    kept = {"hidden": (torch.float32, shape), "label": (torch.int64, (count,))}
    for name in names:
        kept[f"tokens/{name}"] = torch.float32, (count, encoders.spec(name).width)
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    return tensors if found == kept else None


def _identity(dataset: Dataset) -> tuple[str, str]:
    """Return where the dataset is, and what changes when it is written again there."""
    if isinstance(dataset, OfficialFolder):
        changed = [file.stat().st_mtime_ns for file in dataset.root.glob("*/dataset.json")]
        return str(dataset.root.resolve()), str(max(changed))
    place = dataset.uri if is_url(dataset.uri) else str(Path(dataset.uri).resolve())
    return place, str(dataset.table.versions()[-1]["timestamp"])


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
    tokens: dict[str, list[torch.Tensor]] = {f"tokens/{name}": [] for name in frozen}
    order = Consecutive(rows, config.batch_size)
    options = {"images": bool(frozen), "num_workers": config.num_workers}
    with (
        progress_bar(str(dataset.uri), True) as progress,
        Loader(dataset, order, start=0, stop=order.steps, **options) as loader,
        torch.autocast(device.type, torch.bfloat16, enabled=config.mixed_precision == "bf16"),
    ):
        advance = progress(len(rows))

        def with_tokens() -> Iterator[Batch]:
            for step, batch in enumerate(loader, 1):
                for name, encoder in frozen.items():
                    with torch.autocast(device.type, enabled=False):
                        found = mean_patch_tokens(encoder, batch["image"].to(device))
                    tokens[f"tokens/{name}"].append(found.cpu())
                yield batch
                advance(min(step * config.batch_size, len(rows)))

        features = collect(
            loaded.model,
            with_tokens(),
            config.times,
            count=len(rows),
            metadata=dataset.metadata,
            path=loaded.objective.path,
            seed=config.seed,
            blocks=config.layers,
        )
    joined = {name: torch.cat(parts) for name, parts in tokens.items()}
    return {"hidden": features.hidden, "label": features.label, **joined}
