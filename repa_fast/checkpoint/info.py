"""What a path is: a run, a checkpoint, a weight file or a dataset."""

from dataclasses import dataclass, field
from pathlib import Path

from repa_fast.checkpoint import formats
from repa_fast.checkpoint.layout import newest_checkpoint, read_native, read_settings, steps
from repa_fast.checkpoint.marker import is_complete, trusted
from repa_fast.data.open import open_dataset
from repa_fast.data.store import is_url
from repa_fast.words import one_line


@dataclass(kw_only=True)
class InfoConfig:
    """Say what a checkpoint, a run, a weight file or a dataset is."""

    path: str = field(metadata={"positional": True})
    """A path, or the URL of a dataset."""
    verify: bool = True
    """Compare checksums of what is read of a checkpoint; otherwise read it as it is."""


def info(config: InfoConfig) -> str:
    """Return a few lines for people about what a path holds.

    ValueError if it is nothing this package reads; says what it is not.
    """
    if is_url(config.path):
        return _describe_dataset(config.path)
    path = Path(config.path)
    if path.is_file():
        return _describe_file(path)
    if not path.is_dir():
        raise ValueError(f"{path} does not exist")
    if is_complete(path) or steps(path) or steps(path / "checkpoints"):
        with trusted(not config.verify):
            return _describe_checkpoint(newest_checkpoint(path))
    return _describe_dataset(path)


def _describe_checkpoint(path: Path) -> str:
    settings, weights = read_settings(path), read_native(path, "ema.")
    config, counters = settings.config, settings.counters
    run = (
        f"run {config.exp_name}, data {config.data_dir}, encoders {config.enc_type}, "
        f"written by {counters.get('world_size', '?')} processes"
    )
    return (
        f"{path}: native checkpoint of step {counters['step']}\n{_describe_weights(weights)}\n"
        f"{one_line(run)}"
    )


def _describe_file(path: Path) -> str:
    contents = formats.read_file(path)
    parts = [key for key in ("model", "ema", "opt", "args", "steps") if key in contents]
    kind = f"official checkpoint with {', '.join(parts)}" if parts else "bare weights"
    step = f", step {contents['steps']}" if "steps" in contents else ""
    doubled = ""
    try:
        state = formats.weights_in(contents)
        weights = formats.normalise(state)
    except ValueError as error:
        if "original SiT or DiT" not in str(error):
            raise ValueError(f"{path}: {error}") from error
        weights = formats.normalise(state, "dit")
        doubled = " (original SiT or DiT, learned sigma: --init-origin sit or dit)"
    return f"{path}: {kind}{step}\n{_describe_weights(weights)}{doubled}"


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
