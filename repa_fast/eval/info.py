"""What a path is: a run, a checkpoint, a weight file or a dataset."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from repa_fast.checkpoint import formats
from repa_fast.checkpoint.hub import weights_in
from repa_fast.checkpoint.layout import (
    read_native,
    read_settings,
    run_checkpoints,
    steps,
    weights_of,
)
from repa_fast.checkpoint.marker import is_complete, trusted
from repa_fast.contracts import expect_writable
from repa_fast.data.store import is_url
from repa_fast.eval.contents import describe, open_splits, write_sheet
from repa_fast.eval.load import described
from repa_fast.eval.records import describe_records
from repa_fast.words import one_line, some

CLASSES_SHOWN = 10


@dataclass(kw_only=True)
class InfoConfig:
    """Say what a checkpoint, a run, a weight file or a dataset is."""

    path: str = field(metadata={"positional": True})
    """A path, also of a shared folder, or the URL of a dataset; `digits` for the bundled set."""
    sheet: str = ""
    """PNG to write of 25 rows of the dataset, spread over its classes."""
    verify: bool = True
    """Compare checksums of what is read of a checkpoint; otherwise read it as it is."""


def info(config: InfoConfig) -> str:
    """Return a few lines for people about what a path holds.

    ValueError if it is nothing this package reads; says what it is not.
    """
    path = Path(config.path)
    elsewhere = is_url(config.path) or config.path == "digits"
    if not elsewhere and not path.exists():
        raise ValueError(f"{path} does not exist")
    if not elsewhere and (shared := weights_in(path)):
        path = shared
    if elsewhere or (path.is_dir() and not _is_run(path)):
        return _describe_dataset(config)
    if config.sheet:
        raise ValueError(f"sheet is {config.sheet}, but {path} is no dataset whose rows it shows")
    if not path.is_dir():
        return _describe_file(path)
    with trusted(not config.verify):
        return _describe_checkpoint(path) if is_complete(path) else _describe_run(path)


def _is_run(path: Path) -> bool:
    """Return whether a folder is a checkpoint, has some, or belongs to a run that will."""
    saved = is_complete(path) or steps(path) or steps(path / "checkpoints")
    return bool(saved) or (path / "args.json").is_file()


def _describe_run(path: Path) -> str:
    if steps(path) or steps(path / "checkpoints"):
        found = run_checkpoints(path)
        lines = [_describe_checkpoint(found[-1])]
        lines += [f"checkpoints of steps {', '.join(str(int(saved.name)) for saved in found)}"]
    else:
        lines = [f"{path}: run without a complete checkpoint"]
    return "\n".join(lines + describe_records(path))


def _describe_checkpoint(path: Path) -> str:
    settings, weights = read_settings(path), read_native(path, "ema.")
    config, counters = settings.config, settings.counters
    run = (
        f"run {config.exp_name}, data {config.data_dir}, encoders {config.enc_type}, "
        f"written by {counters.get('world_size', '?')} processes"
    )
    return (
        f"{path}: native checkpoint of step {counters['step']}\n{_describe_weights(weights)}\n"
        f"{_describe_sets(path, config.ema_decays)}\n{one_line(run)}"
    )


def _describe_sets(checkpoint: Path, decays: Sequence[float]) -> str:
    """Return which sets of weights a checkpoint has, and the decay of each EMA."""
    sets = weights_of(checkpoint)
    known = dict(zip((name for name in sets if name != "model"), decays))
    listed = (f"{name} (decay {known[name]})" if name in known else name for name in sets)
    return f"weights: {', '.join(listed)}"


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
    return f"{path}: {kind}{step}\n{_describe_weights(weights)}{doubled}{_shared(path)}"


def _shared(path: Path) -> str:
    """Return a line of what is written beside safetensors that are shared; else nothing."""
    if path.suffix != ".safetensors":
        return ""
    _, step, metadata, weights = described(path, "ema")
    if metadata is None:
        return ""
    known = [f"weights {weights}"] * bool(weights) + [f"step {step}"] * (step is not None)
    return "\n" + ", ".join([*known, f"classes {some(metadata.class_names, CLASSES_SHOWN)}"])


def _describe_weights(state: formats.State) -> str:
    count = sum(tensor.numel() for tensor in state.values())
    return f"{formats.shape_of(state)}, {count / 1e6:.1f} M parameters"


def _describe_dataset(config: InfoConfig) -> str:
    if config.sheet:
        expect_writable("sheet", Path(config.sheet), ".png")
    splits = open_splits(config.path)
    labels = [dataset.labels() for dataset in splits]
    lines = [line for given in zip(splits, labels, strict=True) for line in describe(*given)]
    if config.sheet:
        lines.append(write_sheet(splits[0], labels[0], Path(config.sheet)))
    return "\n".join(lines)
