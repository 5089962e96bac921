"""How a run begins: alone in its folder, with its config, from what it resumes or starts with."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from repa_fast.checkpoint.layout import steps
from repa_fast.checkpoint.writer import clean
from repa_fast.configs.config import TrainConfig
from repa_fast.configs.file import ARGS
from repa_fast.configs.flags import Asked
from repa_fast.distributed import World
from repa_fast.failure import Failure
from repa_fast.lock import Lock, own_launch
from repa_fast.train.inherit import inherit
from repa_fast.train.loop import SAMPLES
from repa_fast.train.outputs import say
from repa_fast.train.resume import find, resume, start_from
from repa_fast.train.state import TrainState
from repa_fast.whole import expect_no_link, write_whole

LAUNCH = "torchrun-id"
"""File in the run's folder: torchrun's id of the launch that trains it, and where that began."""


@contextmanager
def hold_together(folder: Path, logs: Path, world: World) -> Iterator[Lock]:
    """Hold the lock of the run's folder on the first process; what refuses it is raised on all.

    A new run that is refused within leaves no folder.

    ValueError if another process holds it, or what is written to in it is a link: to another run's,
    or from a stranger's run to anything.
    """
    held: list[Lock] = []
    new = world.on_first(lambda: [p for p in (folder, *folder.parents) if not p.exists()])

    def take() -> None:
        expect_no_link(folder / "checkpoints", logs, folder / SAMPLES)
        held.append(Lock(folder))

    world.on_first(take)
    lock = held[0] if held else Lock(folder, world.rank)
    try:
        yield lock
    except (ValueError, Failure):
        if folder in new and not (folder / ARGS).exists():
            remove(new)
        raise
    finally:
        lock.release()


def remove(new: list[Path]) -> None:
    """Remove the folder of a run that was refused before it began, and what was made above it."""
    shutil.rmtree(new[0], ignore_errors=True)  # the lock, and the error
    with suppress(OSError):
        for path in new[1:]:
            path.rmdir()


def settle(asked: Asked, folder: Path, world: World) -> tuple[Path | None, TrainConfig, list[str]]:
    """Return what a run resumes from, None where it starts, its config, and what differs in that.

    ValueError as for `find` and `inherit`.
    """
    config = after_restart(asked.config, folder, world)
    source = find(folder / "checkpoints", config, world)
    if source is None or source.is_file():
        return source, config, []
    config, differ = inherit(replace(asked, config=config), source)
    expect_no_link(folder / config.logging_dir)
    return source, config, differ


def after_restart(config: TrainConfig, folder: Path, world: World) -> TrainConfig:
    """Return the config to resume with: once torchrun restarts its processes, from what they saved.

    Only checkpoints of the same launch count, which torchrun's id of it tells from others' (without
    `--rdzv-id` or `--standalone` it has none): a start that was refused is refused again.
    """
    launch, restarts = own_launch(), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if not world.any(restarts > 0) or not launch:  # each node counts its own
        return config
    ours = False
    if world.is_main and (folder / LAUNCH).exists():
        began = (folder / LAUNCH).read_text("utf-8", "replace").removeprefix(f"{launch} ")
        newest = max(steps(folder / "checkpoints"), default=0)
        ours = began.isdecimal() and newest > int(began)
    if world.any(ours):
        return replace(config, resume="auto", resume_step=0)
    return config


def begin(source: Path | None, folder: Path, state: TrainState) -> None:
    """Resume from the checkpoint `source`, or start anew, from weights that the config may name.

    ValueError as for `resume`, or if an older step than the run's newest is resumed: two
    continuations would share a folder.
    """
    config, saved = state.config, folder / "checkpoints"
    resume(source, saved, state)
    newer = [step for step in steps(saved) if step > state.step]
    if newer and (config.resume_step or config.resume not in ("auto", "never")):
        raise ValueError(
            f"{saved} has checkpoints up to step {newer[-1]}, later than {source}: go on from the "
            f"newest (--resume auto), or from this one in a new run (--resume {source} --exp-name "
            "NEW)"
        )
    notes = []
    if state.world.is_main:
        notes = [f"removed {half}, which was not complete" for half in clean(saved)]
    if source is not None:
        skipped = state.history.skipped
        ahead = f", past the data of {skipped} steps" if skipped else ""
        notes.append(f"going on from {source}{ahead}")
    elif config.init_from:
        notes += start_from(Path(config.init_from), config.init_origin, state)
        notes.append(f"starting from the weights in {config.init_from}")
    if state.world.is_main:
        for note in notes:
            say(note)
        launch, file = own_launch(), folder / LAUNCH
        known = file.read_text("utf-8", "replace") if file.exists() else ""
        if launch and not known.startswith(f"{launch} "):
            write_whole(file, f"{launch} {state.step}")
