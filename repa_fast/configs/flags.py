"""The command line of a training run: `--preset`, `--config` and the flags of TrainConfig."""

import argparse
import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal

from repa_fast import command, objective
from repa_fast.configs import file, presets
from repa_fast.configs.config import PARTS, TrainConfig

FLAG = "flag"


@dataclass(frozen=True)
class Asked:
    """What a run is asked for.

    Attributes:
        config: flags over the values of --config, over those of --preset, over the defaults.
        by: the fields that were not left to the defaults, and who says them: FLAG, or the file or
            preset as it was given.
    """

    config: TrainConfig
    by: Mapping[str, str]


def asked_outright(config: TrainConfig) -> Asked:
    """Return that a config is asked for, with every value that is not None."""
    return Asked(config, {k: FLAG for k, v in config.to_dict().items() if v is not None})


def parse(argv: Sequence[str]) -> Asked:
    """Return what a command line asks for.

    ValueError for an unknown preset, a file that is no config, flags that do not go together, or a
    run without a name.
    """
    import tyro

    chooser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    chooser.add_argument("--preset", default="")
    chooser.add_argument("--config", default="")
    chosen, _ = chooser.parse_known_args(argv)
    values = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    by: dict[str, str] = {}
    if chosen.preset:
        settings = presets.values_of(chosen.preset)
        values |= settings
        by |= dict.fromkeys(settings, f"--preset {chosen.preset}")
    if chosen.config:
        settings = file.read(Path(chosen.config))
        values |= settings
        by |= dict.fromkeys(settings, f"--config {chosen.config}")
    parsed = tyro.cli(
        grouped(SimpleNamespace(**values)),
        args=argv,
        prog="repa-fast train",
        description="Train a SiT with representation alignment; flags win over a file's values, "
        "those over a preset's.",
    )
    align, given = values["align"], explicit(argv)
    for part in PARTS:
        values |= vars(getattr(parsed, part))
    if values["align"] != align and "enc_type" not in given:
        values["enc_type"] = None  # a preset's encoders are not for another alignment
    config = TrainConfig(**values)
    if not config.exp_name:
        raise ValueError(
            "exp_name is empty, expected --exp-name NAME (or a --preset)"
            f"{presets.proposal(config.data_dir)}"
        )
    return Asked(config, by | dict.fromkeys(given, FLAG))


def parse_config(argv: Sequence[str]) -> TrainConfig:
    """Return the config that a command line asks for; raises as `parse`."""
    return parse(argv).config


def explicit(argv: Sequence[str]) -> Collection[str]:
    """Return the fields of TrainConfig that words of a command line name."""
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    flags = (word[2:].partition("=")[0].replace("-", "_") for word in argv if word[:2] == "--")
    return known.intersection(name for flag in flags for name in (flag, flag.removeprefix("no_")))


def grouped(default: object) -> type:
    """Return a dataclass of the parts, whose flags have no prefixes; defaults as of `mirror`."""
    import tyro

    known, seen, groups = objective.choices(), set(), []
    for title, part in PARTS.items():
        names = [field.name for field in dataclasses.fields(part) if field.name not in seen]
        seen |= set(names)
        group = command.mirror(part, default, names, known)
        hint = tyro.conf.OmitArgPrefixes[group]
        groups.append((title, hint, dataclasses.field(default_factory=group)))
    names = ", ".join(presets.PRESETS)
    text = f"Values to start from: {names}. `repa-fast presets` says more."
    preset = Literal[("", *presets.PRESETS)]  # for completion: `parse` has refused others
    preset = Annotated[preset, tyro.conf.arg(help=text, metavar="NAME")]
    text = "Values over the preset's: a YAML file with lines `flag: value`, or a run's args.json."
    config = Annotated[str, tyro.conf.arg(help=text, metavar="FILE")]
    first = [("preset", preset, ""), ("config", config, "")]
    return dataclasses.make_dataclass("Flags", [*first, *groups])


def flags_of(config: TrainConfig, default: TrainConfig | None = None) -> list[str]:
    """Return the flags that make `config` of a default (that of all flags where None)."""
    return command.flags(config.to_dict(), (default or TrainConfig()).to_dict())
