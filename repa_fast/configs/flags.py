"""The command line of a training run: `--preset` and the flags of TrainConfig, part by part."""

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Annotated

from repa_fast import command, objective
from repa_fast.configs import presets
from repa_fast.configs.config import PARTS, TrainConfig


def parse_config(argv: Sequence[str]) -> TrainConfig:
    """Return the config of `--preset NAME` (default: TrainConfig's own values) with flags over it.

    ValueError for an unknown preset, flags that do not go together, or a run without a name.
    """
    import tyro

    chooser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    chooser.add_argument("--preset", default="")
    preset = chooser.parse_known_args(argv)[0].preset
    default = presets.get(preset) if preset else None
    parsed = tyro.cli(
        grouped(default),
        args=argv,
        prog="train.py",
        description="Train a SiT with representation alignment; flags win over a preset's values.",
    )
    values = {}
    for part in PARTS:
        values |= vars(getattr(parsed, part))
    if default and values["align"] != default.align and values["enc_type"] == default.enc_type:
        values["enc_type"] = None  # a preset's encoders are not for another alignment
    config = TrainConfig(**values)
    if not config.exp_name:
        raise ValueError("exp_name is empty, expected --exp-name NAME (or a --preset)")
    return config


def grouped(default: TrainConfig | None) -> type:
    """Return a dataclass of the parts, whose flags have no prefixes; defaults as of `mirror`."""
    import tyro

    known, seen, groups = objective.choices(), set(), []
    for title, part in PARTS.items():
        names = [field.name for field in dataclasses.fields(part) if field.name not in seen]
        seen |= set(names)
        group = command.mirror(part, default, names, known)
        hint = tyro.conf.OmitArgPrefixes[group]
        groups.append((title, hint, dataclasses.field(default_factory=group)))
    text = f"Values to start from: {', '.join(presets.PRESETS)}. `repa-fast presets` says more."
    preset = Annotated[str, tyro.conf.arg(help=text, metavar="NAME")]
    return dataclasses.make_dataclass("Flags", [("preset", preset, ""), *groups])


def flags_of(config: TrainConfig) -> list[str]:
    """Return the flags that `parse_config` makes `config` of."""
    default, flags = TrainConfig().to_dict(), []
    for name, value in config.to_dict().items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flag = f"--{flag}" if value else f"--no-{flag}"
        else:
            flag = f"--{flag}={value}"
        flags += [flag] if value != default[name] else []
    return flags
