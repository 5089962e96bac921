"""What a path is: a run, a checkpoint, a weight file or a dataset."""

import json
from pathlib import Path

from repa_fast.checkpoint import formats
from repa_fast.checkpoint.layout import MARKER, path_of, read_native, steps
from repa_fast.data.open import open_dataset
from repa_fast.data.store import is_url


def newest_checkpoint(path: Path) -> Path:
    """`path` if it is a complete checkpoint, else the newest one of the run it is.

    Raises:
        ValueError: it is neither.
    """
    if (path / MARKER).exists():
        return path
    for folder in (path, path / "checkpoints"):
        if found := steps(folder):
            return path_of(folder, found[-1])
    raise ValueError(f"{path} is neither a complete checkpoint nor a run that has one")


def describe_path(path: str | Path) -> str:
    """A few lines for people.

    Raises:
        ValueError: it is nothing this package reads; says what it is not.
    """
    if is_url(path):
        return _describe_dataset(path)
    path = Path(path)
    if path.is_file():
        return _describe_file(path)
    if not path.is_dir():
        raise ValueError(f"{path} does not exist")
    if (path / MARKER).exists() or steps(path) or steps(path / "checkpoints"):
        return _describe_checkpoint(newest_checkpoint(path))
    return _describe_dataset(path)


def _describe_checkpoint(path: Path) -> str:
    config = json.loads((path / "config.json").read_text())
    counters = json.loads((path / "counters.json").read_text())
    weights = read_native(path, "ema.")
    return "\n".join(
        [
            f"{path}: native checkpoint of step {counters['step']}",
            _describe_weights(weights),
            f"run {config['exp_name']}, data {config['data_dir']}, encoders {config['enc_type']}, "
            f"written by {counters['world_size']} processes",
        ]
    )


def _describe_file(path: Path) -> str:
    contents = formats.read_file(path)
    parts = [key for key in ("model", "ema", "opt", "args", "steps") if key in contents]
    kind = f"official checkpoint with {', '.join(parts)}" if parts else "bare weights"
    lines = [f"{path}: {kind}"]
    if "steps" in contents:
        lines[0] += f", step {contents['steps']}"
    state = next((contents[k] for k in ("ema", "model") if k in contents), contents)
    doubled = "original SiT or DiT, learned sigma: --init-origin sit or dit"
    try:
        lines.append(_describe_weights(formats.normalise(state)))
    except ValueError as error:
        if "original SiT or DiT" not in str(error):
            raise
        lines.append(f"{_describe_weights(formats.normalise(state, 'dit'))} ({doubled})")
    return "\n".join(lines)


def _describe_weights(state: formats.State) -> str:
    count = sum(tensor.numel() for tensor in state.values())
    return f"{formats.shape_of(state)}, {count / 1e6:.1f} M parameters"


def _describe_dataset(path: str | Path) -> str:
    dataset = open_dataset(path)
    meta = dataset.metadata
    lines = [
        f"{dataset.uri}: dataset of {len(dataset)} rows, images of {meta.resolution} pixels, "
        f"latents {meta.latent_shape} of {meta.vae} (scale {meta.scale}, bias {meta.bias}), "
        f"{len(meta.class_names)} classes"
    ]
    lines += [
        f"features {column.name}: {column.tokens} tokens of width {column.width} by "
        f"{column.encoder}, {column.storage}, {column.bytes_per_image / 1000:.1f} kB per image"
        for column in dataset.features.values()
    ]
    return "\n".join(lines)
