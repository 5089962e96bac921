"""Where a run resumes from: its own checkpoints, another run's, or an official file.

One whose loss spikes says how to resume past the data that did it, as PaLM was (arXiv 2204.02311,
section 5.1). Order of samples and noise are functions of (seed, step): to skip data is to shift
that step, by an offset that is saved with the checkpoint.
"""

import dataclasses
import itertools
import logging
import os
import shlex
import statistics
import sys
from pathlib import Path

from repa_fast.checkpoint import formats, marker, writer
from repa_fast.checkpoint.adamw import optimizer_state
from repa_fast.checkpoint.layout import path_of, read_settings, steps
from repa_fast.checkpoint.marker import trusted
from repa_fast.configs.config import TrainConfig
from repa_fast.configs.flags import flags_of
from repa_fast.configs.run import RunConfig
from repa_fast.distributed import World
from repa_fast.models.sit import SiT
from repa_fast.train import checkpoint
from repa_fast.train.checkpoint import Checkpointer, CheckpointFailed
from repa_fast.train.inherit import OF_ONE_START
from repa_fast.train.spikes import TrainingDiverged, is_spike
from repa_fast.train.state import TrainState

log = logging.getLogger(__name__)


def find(folder: Path, config: RunConfig, world: World) -> Path | None:
    """Return the checkpoint that a config asks to resume; None at the start of a run.

    `folder` holds the run's own. `--resume auto` takes the newest that is whole; a damaged one is
    passed over with a warning, and moved aside. Anything else is asked for by name.

    ValueError if the run has checkpoints and the config does not ask to resume; or if what it asks
    for is not there, or damaged.
    """
    own = candidates(folder)
    wanted = str(config.resume_step) if config.resume_step else config.resume
    source = None
    if wanted == "never" and own:
        raise ValueError(
            f"{folder} has checkpoints (newest: {own[0].name}); go on with --resume auto, "
            "or choose another --exp-name"
        )
    if wanted == "auto":
        source = newest_whole(own, config, world)
        if own and source is None:
            raise ValueError(f"all checkpoints in {folder} are damaged")
        passed = itertools.takewhile(lambda path: path != source, own)
        # --keep-last shall not count them
        world.on_first(lambda: [writer.set_aside(path) for path in passed if path.is_dir()])
    elif wanted != "never":
        source = named(folder, wanted)
        if damaged := world.on_first(lambda: damage(source, config)):
            raise ValueError(f"{source} is damaged: {damaged} (--no-verify reads it as it is)")
    return source


def resume(source: Path | None, folder: Path, state: TrainState) -> None:
    """Load what `find` has found into `state`; `folder` holds the run's own checkpoints.

    `--skip-steps` counts once, where the run begins: its own checkpoints carry the offset.

    ValueError if it is of another model or run than the config's, or data shall be skipped after
    the run began.
    """
    config = state.config
    if source is not None:
        with trusted():  # by the first process, which has looked at every file
            (checkpoint.load if source.is_dir() else load_official)(source, state)
    if source is None or source.parent.resolve() != folder.resolve():
        state.history.skipped += config.skip_steps
    elif state.history.skipped < config.skip_steps:
        raise ValueError(
            f"skip_steps is {config.skip_steps}, expected 0 for a run that began without: go on "
            f"past the data in a new run (--resume {source} --exp-name NEW)"
        )


def candidates(folder: Path) -> list[Path]:
    """Return complete native checkpoints and official %07d.pt files in `folder`, newest first."""
    native = {step: path_of(folder, step) for step in steps(folder)}
    files = (path for path in folder.glob("*.pt") if path.stem.isdecimal() and path.is_file())
    official = {int(path.stem): path for path in files}
    return [path for _, path in sorted((official | native).items(), reverse=True)]


def newest_whole(found: list[Path], config: RunConfig, world: World) -> Path | None:
    """Return the first of `found` that is not damaged; the first process warns of those before.

    OSError if one cannot be read: it may be whole, and to go on from an older one would lose it.
    """

    def search() -> str:
        for path in found:
            if not (damaged := damage(path, config)):
                return str(path)
            log.warning("passing over %s: %s", path, damaged)
        return ""

    whole = world.on_first(search)
    return Path(whole) if whole else None


def damage(path: Path, config: RunConfig) -> str:
    """Return what is wrong with a native checkpoint's files; "" if nothing, or if it is a file."""
    return marker.damage(path) if path.is_dir() and config.verify else ""


def named(folder: Path, wanted: str) -> Path:
    """Find the checkpoint of a step, a directory, or a file; ValueError if there is none."""
    if wanted.isdecimal():
        for path in (path_of(folder, int(wanted)), folder / f"{int(wanted):07d}.pt"):
            if path in candidates(folder):
                return path
        found = ", ".join(path.name for path in candidates(folder)) or "none"
        raise ValueError(f"no complete checkpoint of step {wanted} in {folder} (found: {found})")
    path = Path(wanted)
    if path.is_file() or marker.is_complete(path):
        return path
    for inside in (path, path / "checkpoints"):
        if found := candidates(inside):
            return found[0]
    raise ValueError(f"resume is {wanted!r}, expected auto, never, a step, a checkpoint or a run")


def load_official(source: Path, state: TrainState) -> None:
    """Resume from an official {model, ema, opt, args, steps} file, mid-run.

    Nothing is loaded unless all of it can be: ValueError if it is not such a file, or of another
    model, or holds what no training leaves.
    """
    contents = formats.read_file(source)
    missing = [key for key in ("model", "ema", "opt", "steps") if key not in contents]
    if missing:
        raise ValueError(
            f"{source} has no {', '.join(missing)}: it cannot be gone on from; start a new run "
            "from its weights with --init-from"
        )
    weights, key = {}, ""
    try:
        for key in ("model", "ema"):
            weights[key] = formats.normalise(contents[key], **_kept(state.model))
            formats.expect_fitting(state.model, weights[key], "it")
        key, began = "opt", contents["steps"] == 0
        optimizer = optimizer_state(state.model, [*weights["ema"]], contents["opt"], began)
    except ValueError as error:
        raise ValueError(f"{source} [{key}]: {error}") from error
    emas = dict.fromkeys((state.ema, *state.more_emas), "ema")
    for model, key in ({state.model: "model"} | emas).items():
        formats.load_exactly(model, weights[key], f"{source} [{key}]")
    groups = state.optimizer.state_dict()["param_groups"]
    state.optimizer.load_state_dict({"state": optimizer, "param_groups": groups})
    state.step = contents["steps"]


def _kept(model: SiT) -> dict[str, bool]:
    """Return what of a file's weights this model has a place for."""
    return {
        "with_head": model.ap_head is not None,
        "learn_sigma": model.out_channels != model.in_channels,
    }


def start_from(source: Path, origin: str, state: TrainState) -> list[str]:
    """Begin a new run with the weights of `source` in model and EMA; return what was not taken.

    ValueError if they are unreadable, or of a model that does not fit.
    """
    kept = {"prediction": state.config.prediction, **_kept(state.model)}
    with trusted(not state.config.verify):
        weights = formats.read_weights(source, origin, **kept)
    notes = formats.initialise_from(state.model, weights, str(source))
    for average in (state.ema, *state.more_emas):
        average.load_state_dict(state.model.state_dict())
    return notes


def stop_if_diverged(saves: Checkpointer, state: TrainState, values: dict) -> None:
    """Look at one reading of the metrics; all processes come to the same conclusion.

    A spike is only looked for with `--stop-on-spike`. After non-finite steps, which leave weights
    and optimizer as they were, a checkpoint is written.

    TrainingDiverged has the command that resumes from the last good checkpoint in a new run, past
    the data that this one has seen since.
    """
    config, history, step = state.config, state.history, state.step
    bad_run, loss = int(state.metrics.bad_run), values["denoise"]
    spiked = loss is not None and is_spike(loss, history.losses)
    if bad_run >= config.max_bad_steps:
        try:
            saved = f"saved to {saves.save(state, wait=True)}"
        except CheckpointFailed as error:
            saved = str(error)
        what = (
            f"{bad_run} consecutive steps up to step {step} had a non-finite loss or gradient "
            f"(--max-bad-steps {config.max_bad_steps}); weights and optimizer were left as before "
            f"them; {saved}"
        )
    elif config.stop_on_spike and state.world.any(spiked):
        median = statistics.median(history.losses)
        what = f"the loss of denoising is {loss:.4g} at step {step}, after a median of {median:.4g}"
    else:
        if loss is not None and not values["skipped"]:
            history.add(step, loss)
        return
    saves.settle()
    source = last_good(saves.folder, state)
    if source is None:
        raise TrainingDiverged(f"{what}; there is no good checkpoint to go on from")
    raise TrainingDiverged(
        f"{what}; the last good checkpoint is {source}, from which a new run goes on past the data "
        f"since then with\n{command_past(source, state)}"
    )


def last_good(folder: Path, state: TrainState) -> Path | None:
    """Return the newest whole checkpoint with a good reading after it, if there is one.

    A reading at a checkpoint's own step is of losses before that step's update. There is none
    before `--align-until` once that is past.
    """
    until, end = state.config.align_until, state.history.good_step
    first = until if state.step > until else 0
    good = [path_of(folder, step) for step in steps(folder) if first <= step < end]
    return newest_whole(good[::-1], state.config, state.world)


def command_past(source: Path, state: TrainState) -> str:
    """Return the command of a new run that resumes from `source`, past the data seen since."""
    config, size = state.config, state.world.size
    counters = read_settings(source).counters
    seen = counters["step"] + counters.get("history", {}).get("skipped", 0)
    name = f"{config.exp_name}-from-{counters['step']}"
    while (Path(config.output_dir) / name).exists():
        name += "-again"
    new = dataclasses.replace(
        config, exp_name=name, resume=str(source), resume_step=0, skip_steps=state.data_step - seen
    )
    launcher = [sys.executable]
    if size > 1:
        local = os.environ.get("LOCAL_WORLD_SIZE", size)
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={local}"]
    own = {name: getattr(TrainConfig(), name) for name in OF_ONE_START}
    left_out = dataclasses.replace(read_settings(source).config, **own)  # what it would inherit
    return shlex.join([*launcher, "-m", "repa_fast", "train", *flags_of(new, left_out)])
