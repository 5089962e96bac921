"""`repa-fast COMMAND ...`: a table of commands; each says what it takes with --help.

The Tab key completes commands, flags and what flags may be in a shell that has read tyro's script:

    repa-fast --tyro-print-completion bash > ~/.local/share/bash-completion/completions/repa-fast
    repa-fast --tyro-print-completion zsh > ~/.zfunc/_repa-fast  # a folder that is in fpath

fish and tcsh have theirs too; that of tcsh needs the package shtab.
"""

import contextlib
import dataclasses
import importlib
import os
import sys
import typing
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from repa_fast import __version__, command
from repa_fast.words import nearest

COMPLETION = "--tyro-print-completion"
SHELLS = ("bash", "zsh", "fish", "tcsh")
SPINS = "30000"
"""Turns for which an idle OpenMP thread of torch's looks for work before it sleeps.
By itself it looks for ten times as long, and beside other programs a step on a CPU then waits for
threads that do nothing (docs/LOG.md has figures)."""


class Command(NamedTuple):
    """A command: one line for `repa-fast --help`, and "module:function" that runs it.

    The function takes a config, whose class its annotation names, or the words after the command.
    """

    summary: str
    function: str


COMMANDS = {
    "train": Command("train a model; flags win over a preset's values", ".train.run:main"),
    "presets": Command("list the presets as a table", ".configs.presets:show"),
    "prepare images": Command(
        "write a dataset of images and their latents, on one or several processes",
        ".prepare.images:prepare_images",
    ),
    "prepare features": Command(
        "add an encoder's features to a dataset as a column", ".prepare.features:prepare_features"
    ),
    "prepare digits": Command(
        "write scikit-learn's bundled scans of digits as a dataset",
        ".prepare.official:write_digits",
    ),
    "prepare import-official": Command(
        "copy an images/ + vae-sd/ folder into a dataset", ".prepare.official:import_folder"
    ),
    "prepare export-official": Command(
        "write a dataset as an images/ + vae-sd/ folder", ".prepare.official:export_folder"
    ),
    "sample": Command("draw a picture of a checkpoint's samples", ".eval.sample:draw_sample"),
    "generate": Command("write many images of a checkpoint to one .npz", ".eval.generate:generate"),
    "eval": Command(
        "compare generated images with real ones: FID and so on", ".eval.metrics:evaluate"
    ),
    "sweep": Command("score a run over steps, guidance scales and intervals", ".eval.sweep:sweep"),
    "strip": Command(
        "draw the same noise through every checkpoint of a run", ".eval.sample:draw_strip"
    ),
    "probe": Command("probe hidden states linearly", ".analysis.probe:probe"),
    "cknna": Command("compare hidden states with encoders", ".analysis.similarity:similarity"),
    "pca": Command("draw hidden states", ".analysis.pca:pca"),
    "export": Command(
        "write a checkpoint as a file that other programs read",
        ".checkpoint.export:export_checkpoint",
    ),
    "share": Command(
        "write weights with a model card, for diffusers and the Hugging Face hub",
        ".share.pretrained:share",
    ),
    "info": Command(
        "say what a checkpoint, a run, a weight file or a dataset is", ".eval.info:info"
    ),
    "doctor": Command(
        "say what is installed and what a run would choose, for an issue", ".doctor:doctor"
    ),
    "bench": Command("measure the training step (in a checkout)", "benchmarks.step.step:main"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status, as of `command.main`."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)  # read when torch is loaded
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv == ["--version"]:
        print(__version__)
        return 0
    if COMPLETION in argv:
        return command.main(complete, argv[argv.index(COMPLETION) :])
    name = next((name for name in COMMANDS if argv[: len(name.split())] == name.split()), "")
    if name:
        return command.main(lambda words: run(name, words), argv[len(name.split()) :])
    groups = ("", *(name.split()[0] for name in COMMANDS if " " in name))
    group = argv[0] if len(argv) > 1 else ""
    if not argv or (argv[-1] in ("-h", "--help") and group in groups):
        return command.main(lambda _: usage(group), []) or 2 * (not argv)
    print(f"repa-fast: {unknown(argv)}", file=sys.stderr)
    return 2


def run(name: str, argv: Sequence[str]) -> Any:
    """Run one command of the table and return what its function does."""
    call, config = load(name)
    return call(command.parse(config, argv, f"repa-fast {name}") if config else argv)


def load(name: str) -> tuple[Callable[[Any], Any], type | None]:
    """Return a command's function and the class of its config, None where it takes words."""
    module, function = COMMANDS[name].function.split(":")
    try:
        call = getattr(importlib.import_module(module, "repa_fast"), function)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):
            raise
        raise ValueError(
            f"{name}: no {error.name} here, expected `python -m repa_fast {name}` in a checkout's "
            "root"
        ) from error
    taken = next(iter(typing.get_type_hints(call).values()), None)
    return call, taken if dataclasses.is_dataclass(taken) else None


def complete(words: Sequence[str]) -> None:
    """Print tyro's script that completes the whole table in a shell, and exit.

    The words are COMPLETION and the shell. ValueError for no such shell, or where tcsh's package is
    not installed.
    """
    import tyro

    from repa_fast.configs.config import TrainConfig
    from repa_fast.configs.flags import grouped
    from repa_fast.contracts import expect_choice

    expect_choice("shell", "".join(words[1:2]), SHELLS)
    app = tyro.extras.SubcommandApp()
    groups = {"": app}
    for name, entry in COMMANDS.items():
        group, _, last = name.rpartition(" ")
        if group not in groups:
            groups[group] = app.command(tyro.extras.SubcommandApp(), name=group)
        config = None if entry.function.startswith("benchmarks") else load(name)[1]
        flags = grouped(TrainConfig()) if name == "train" else command.mirror(config or NoFlags)
        groups[group].command(name=last)(flags)
    try:
        with contextlib.suppress(BrokenPipeError):  # `| head` has seen enough
            app.cli(prog="repa-fast", args=words)
    except ImportError as error:
        raise ValueError(f"shell is tcsh, which needs the package shtab: {error}") from error


@dataclasses.dataclass
class NoFlags:
    """What takes none, or says itself which."""


def usage(group: str) -> str:
    """Return a line for every command, or for those of a group."""
    shown = {name: entry for name, entry in COMMANDS.items() if name.startswith(group)}
    width = max(map(len, shown))
    lines = [f"  {name:<{width}}  {entry.summary}" for name, entry in shown.items()]
    return "\n".join(
        [
            "usage: repa-fast COMMAND ... (--help or --debug after it; --version; "
            "--tyro-print-completion SHELL)",
            *lines,
        ]
    )


def unknown(argv: Sequence[str]) -> str:
    """Return what is said about words that are no command, with the nearest one."""
    group = f"{argv[0]} "
    inside = [name.removeprefix(group) for name in COMMANDS if name.startswith(group)]
    word = "".join(argv[1:2]) if inside else argv[0]
    known = inside or list(dict.fromkeys(name.split()[0] for name in COMMANDS))
    near = nearest(word, known)
    hint = f"; did you mean {near!r}?" if near else ""
    where = f"{argv[0]}: " if inside else ""
    return f"{where}the command is {word!r}, expected one of {', '.join(known)}{hint}"
