"""Native checkpoints to the files other programs read."""

import argparse
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, get_args

import torch

from repa_fast.checkpoint import formats
from repa_fast.checkpoint.layout import (
    CONFIG,
    Settings,
    expect_weights,
    newest_checkpoint,
    read_native,
    read_settings,
    weights_of,
)
from repa_fast.checkpoint.marker import checksum, trusted
from repa_fast.configs.build import empty_model, model_arguments
from repa_fast.contracts import expect_choice, expect_writable
from repa_fast.failure import Failure
from repa_fast.objective.self_alignment import IMAGENET_IMAGES
from repa_fast.whole import whole_or_not
from repa_fast.words import one_line

Format = Literal["official", "sra", "safetensors"]


@dataclass(kw_only=True)
class ExportConfig:
    """Write a native checkpoint as a file that other programs read."""

    checkpoint: Path = field(metadata={"positional": True})
    """A checkpoint's directory, or a run's."""
    to: Format | None = None
    """Format; by OUT's name, or official, where not given."""
    weights: str = "ema"
    """model (those that are trained), ema, or ema_2 and so on of a run with several EMAs. In
    official and sra files, which hold those that are trained too, they take the place of `ema`."""
    out: Path | None = None
    """File to write; where not given STEP.pt, step-STEP.pt (sra) or STEP.safetensors beside the
    checkpoint, and STEP-WEIGHTS of other weights than ema."""
    verify: bool = True
    """Compare checksums of what is read; otherwise read it as it is."""


def export_checkpoint(config: ExportConfig) -> Path:
    """Export a checkpoint, or a run's newest one; return the file."""
    source = newest_checkpoint(config.checkpoint)
    to = config.to or (format_of(config.out) if config.out else "official")
    with trusted(not config.verify):
        out = config.out or file_beside(source, to, config.weights)
        export(source, to, out, config.weights)
    return out


def export(source: Path, to: str, out: Path, weights: str = "ema") -> None:
    """Write a complete native checkpoint as a file `out`, without a GPU or the encoders.

    "official" is REPA's {model, ema, opt, args, steps}; "sra" adds the epoch, as SRA's code has it;
    both have the chosen `weights` as `ema`. "safetensors" is those weights alone, with their name,
    the model's arguments, its objective and the dataset's metadata in a .json beside. The files
    appear whole or not at all.

    Raises:
        ValueError: unknown format, an incomplete checkpoint, one without these weights or that
            SRA's code has no model for, or a file that exists or cannot be written.
    """
    expect_choice("format", to, get_args(Format))
    expect_writable("out", out, ".safetensors" if to == "safetensors" else "")
    expect_weights(source, weights, weights_of(source))
    if to == "safetensors":
        from safetensors.torch import save_file

        # first the description, without which the weights would be read as another objective's
        model = _model(source, read_settings(source))
        state = _fitting(source, weights, model)
        with (
            whole_or_not(out) as partial,
            whole_or_not(out.with_suffix(".json")) as described,
            writing(out),
        ):
            save_file(state, partial)
            about = description(source) | {"weights": weights, "crc32": checksum(partial)}
            described.write_text(json.dumps(about, indent=2) + "\n", "utf-8")
    else:
        contents = (sra_contents if to == "sra" else official_contents)(source, weights)
        with whole_or_not(out) as partial, writing(out):
            torch.save(contents, partial)


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Raise Failure, with the file, for what torch and safetensors raise where a disk is full."""
    try:
        yield
    except Exception as error:
        raise Failure(f"{out} could not be written: {one_line(error)}") from error


def description(source: Path) -> dict:
    """Return what the weights alone do not say: the model's arguments, its objective, its data."""
    settings = read_settings(source)
    config, metadata = settings.config, settings.metadata
    return {
        "model": model_arguments(config, metadata),
        "objective": {"objective": config.objective, "prediction": config.prediction},
        "dataset": asdict(metadata),
        "step": settings.counters["step"],
    }


def official_contents(source: Path, weights: str = "ema") -> dict:
    """Return what the official trainer would have saved: fp32 tensors on the CPU, official names.

    `ema` is the set `weights`, whichever it is: official programs sample no other. The optimizer
    state is torch AdamW's, by position in the official parameter order; the frozen pos_embed is
    number 0 and has none.
    """
    settings = read_settings(source)
    config, model = settings.config, _model(source, settings)
    trained, average = (_fitting(source, name, model) for name in ("model", weights))
    moments = read_native(source, "optimizer.state.")
    for name, parameter in model.named_parameters():
        shapes = {"step": (), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
        found = [getattr(moments.get(f"{name}.{key}"), "shape", None) for key in shapes]
        if found != [*shapes.values()] and found != [None] * 3:
            raise ValueError(
                f"{source} has another optimizer state of {name} than of {tuple(parameter.shape)}"
            )
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.adam_weight_decay,
    ).state_dict()
    optimizer["state"] = {
        index: {key: moments[f"{name}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
        for index, (name, _) in enumerate(model.named_parameters())
        if f"{name}.step" in moments
    }
    return {
        "model": {name: trained[name] for name in model.state_dict()},
        "ema": {name: average[name] for name in model.state_dict()},
        "opt": optimizer,
        "args": argparse.Namespace(**config.to_dict(), dataset=asdict(settings.metadata)),
        "steps": settings.counters["step"],
    }


def _model(source: Path, settings: Settings) -> torch.nn.Module:
    """Return the model of a checkpoint's settings, without memory; ValueError names a bad one."""
    try:
        return empty_model(settings.config, settings.metadata, "meta")
    except ValueError as error:
        raise ValueError(f"{source / CONFIG}: {error}") from error


def _fitting(source: Path, weights: str, model: torch.nn.Module) -> formats.State:
    """Return a checkpoint's set of weights; ValueError unless they are just the model's."""
    state = read_native(source, f"{weights}.")
    formats.expect_fitting(model, state, f"{source} [{weights}.] by its {CONFIG}")
    return state


def sra_contents(source: Path, weights: str = "ema") -> dict:
    """Return what SRA's trainer would have saved: also the running epoch, as in `align_weight`.

    ValueError if the checkpoint is not of a run with --align sra.
    """
    settings = read_settings(source)
    config = settings.config
    if not model_arguments(config, settings.metadata)["self_align"]:
        raise ValueError(
            f"{source} is of a run with --align {config.align}, expected sra: SRA's code has no "
            "place for projectors"
        )
    epoch = settings.counters["step"] * config.images_per_step // IMAGENET_IMAGES
    return official_contents(source, weights) | {"epoch": epoch}


def format_of(out: Path) -> str:
    """Return the format that a file's name stands for: step-N.pt and epoch-N.pt are SRA's."""
    if out.suffix == ".safetensors":
        return "safetensors"
    return "sra" if re.fullmatch(r"(step|epoch)-\d+(-\w+)?\.pt", out.name) else "official"


def file_beside(source: Path, to: str, weights: str = "ema") -> Path:
    """Return a path beside a checkpoint, with the name that the format's own trainer gives."""
    which = "" if weights == "ema" else f"-{weights}"
    if to == "sra":
        return source.with_name(f"step-{read_settings(source).counters['step']}{which}.pt")
    ending = "pt" if to == "official" else "safetensors"
    return source.with_name(f"{source.name}{which}.{ending}")
