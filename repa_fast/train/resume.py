"""Where a run goes on from: its own checkpoints, another run's, or an official file."""

import logging
from pathlib import Path

import torch

from repa_fast.checkpoint import formats, writer
from repa_fast.checkpoint.layout import MARKER, path_of, steps
from repa_fast.distributed import shard_like
from repa_fast.models.sit import SiT
from repa_fast.train import checkpoint
from repa_fast.train.state import TrainState

log = logging.getLogger(__name__)


def resume(folder: Path, state: TrainState) -> Path | None:
    """Load what the config asks for into `state`; `folder` holds the run's own checkpoints.

    `--resume auto` takes the newest checkpoint that is whole; a damaged one is passed over with a
    warning. Anything else that is asked for by name is loaded or refused.

    Returns:
        The checkpoint gone on from, or None at the start of a run.

    Raises:
        ValueError: the run has checkpoints and the config does not ask to resume; or what it asks
            for is not there, damaged, or of another model.
    """
    config = state.config
    wanted = str(config.resume_step) if config.resume_step else config.resume
    own = candidates(folder)
    if wanted == "never":
        if own:
            raise ValueError(
                f"{folder} has checkpoints (newest: {own[0].name}); go on with --resume auto, "
                "or choose another --exp-name"
            )
        return None
    if wanted == "auto":
        source = newest_whole(own, state)
    else:
        source = named(folder, wanted)
        if damaged := damage(source, state):
            raise ValueError(f"{source} is damaged: {damaged}")
    if source is not None:
        load(source, state)
    return source


def candidates(folder: Path) -> list[Path]:
    """Complete native checkpoints and official %07d.pt files in `folder`, newest first."""
    native = {step: path_of(folder, step) for step in steps(folder)}
    official = {int(p.stem): p for p in folder.glob("*.pt") if p.stem.isdecimal()}
    return [path for _, path in sorted((official | native).items(), reverse=True)]


def newest_whole(found: list[Path], state: TrainState) -> Path | None:
    """The first of `found` that is not damaged; warns of those passed over.

    Raises:
        ValueError: there are checkpoints and all are damaged.
    """
    for path in found:
        damaged = damage(path, state)
        if not damaged:
            return path
        log.warning("passing over %s: %s", path, damaged)
    if found:
        raise ValueError(f"all checkpoints in {found[0].parent} are damaged")
    return None


def damage(path: Path, state: TrainState) -> str:
    """What is wrong with a checkpoint's files, "" if nothing; the first process looks for all."""
    found = ""
    if state.world.is_main:
        found = writer.damage(path) if path.is_dir() else ""
    return state.world.broadcast(found)


def named(folder: Path, wanted: str) -> Path:
    """The checkpoint of a step, a directory, or a file.

    Raises:
        ValueError: there is none.
    """
    if wanted.isdecimal():
        for path in (path_of(folder, int(wanted)), folder / f"{int(wanted):07d}.pt"):
            if path in candidates(folder):
                return path
        found = ", ".join(path.name for path in candidates(folder)) or "none"
        raise ValueError(f"no complete checkpoint of step {wanted} in {folder} (found: {found})")
    path = Path(wanted)
    if path.is_file() or (path / MARKER).exists():
        return path
    for inside in (path, path / "checkpoints"):
        if found := candidates(inside):
            return found[0]
    raise ValueError(f"resume is {wanted!r}, expected auto, never, a step, a checkpoint or a run")


def load(source: Path, state: TrainState) -> None:
    """Read a native checkpoint directory or an official file into `state`."""
    if source.is_dir():
        checkpoint.load(source, state)
    else:
        load_official(source, state)


def load_official(source: Path, state: TrainState) -> None:
    """Go on from an official {model, ema, opt, args, steps} file, mid-run.

    Raises:
        ValueError: it is not such a file, or of another model.
    """
    contents = formats.read_file(source)
    missing = [key for key in ("model", "ema", "opt", "steps") if key not in contents]
    if missing:
        raise ValueError(
            f"{source} has no {', '.join(missing)}: it cannot be gone on from; start a new run "
            "from its weights with --init-from"
        )
    averages = [(average, "ema") for average in (state.ema, *state.more_emas)]
    for model, key in ((state.model, "model"), *averages):
        weights = formats.normalise(contents[key], **_kept(model))
        formats.load_exactly(model, weights, f"{source} [{key}]")
    names = [name for name, _ in state.model.named_parameters()]
    load_optimizer(state.optimizer, names, list(weights), contents["opt"])
    state.step = contents["steps"]


def _kept(model: SiT) -> dict[str, bool]:
    """What of a file's weights this model has a place for."""
    return {
        "with_head": model.ap_head is not None,
        "learn_sigma": model.out_channels != model.in_channels,
    }


def load_optimizer(
    optimizer: torch.optim.Optimizer, names: list[str], saved_names: list[str], saved: dict
) -> None:
    """torch AdamW's state, by position in `saved_names`; hyperparameters stay the config's.

    `names` are the model's parameters in their order, `saved_names` those of the file's weights,
    which are in the order of the parameters of whoever wrote it.
    """
    own = optimizer.state_dict()
    counts = [sum(len(g["params"]) for g in d["param_groups"]) for d in (own, saved)]
    if counts[0] != counts[1]:
        raise ValueError(f"the optimizer state has {counts[1]} parameters, expected {counts[0]}")
    position = {name: number for number, name in enumerate(names)}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {}
    for number, values in saved["state"].items():
        own_number = position[saved_names[number]]
        like = parameters[own_number]
        moments = {key: shard_like(values[key], like) for key in ("exp_avg", "exp_avg_sq")}
        state[own_number] = {"step": values["step"], **moments}
    optimizer.load_state_dict({"state": state, "param_groups": own["param_groups"]})


def start_from(source: Path, origin: str, state: TrainState) -> list[str]:
    """Begin a new run with the weights of `source` in model and average; says what was not taken.

    Raises:
        ValueError: unreadable, or of a model that does not fit.
    """
    weights = formats.read_weights(
        source, origin, prediction=state.config.prediction, **_kept(state.model)
    )
    notes = formats.initialise_from(state.model, weights, str(source))
    for average in (state.ema, *state.more_emas):
        average.load_state_dict(state.model.state_dict())
    return notes
