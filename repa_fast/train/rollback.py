"""Going back to the last good checkpoint when the loss spikes, and past the data that did it.

PaLM (arXiv 2204.02311, section 5.1) restarts from a checkpoint about 100 steps before a spike and
skips some hundred batches; the same data with other weights does no harm. Order of samples and
noise are functions of (seed, step), so data is skipped by an offset of that step, which is saved
with the checkpoint: a run that is resumed after a rollback is the same run.
"""

import statistics
from pathlib import Path

from repa_fast.checkpoint.layout import path_of, steps
from repa_fast.checkpoint.writer import remove
from repa_fast.train import checkpoint
from repa_fast.train.checkpoint import Checkpointer, CheckpointFailed
from repa_fast.train.resume import damage
from repa_fast.train.spikes import is_spike
from repa_fast.train.state import TrainState


class TrainingDiverged(RuntimeError):
    """The loss spiked, or steps were not finite, and the run does not go back (any more)."""


class Setback(Exception):
    """What went wrong since the last reading; the run can go back to the checkpoint `source`."""

    def __init__(self, what: str, source: Path) -> None:
        super().__init__(f"{what}; going back to {source}")
        self.source = source


def judge(saves: Checkpointer, state: TrainState, values: dict) -> None:
    """Look at one reading of the metrics; all processes come to the same conclusion.

    `saves` writes the run's checkpoints; one in flight is waited for before the run goes back. A
    spike is only looked for with `--rollback`; before there is a checkpoint the run goes on.

    Raises:
        Setback: the run is to go back.
        TrainingDiverged: it would have to, but may not; after non-finite steps, which leave weights
            and optimizer as they were, a checkpoint is written.
    """
    config, step, history = state.config, state.step, state.history
    bad_run, loss = int(state.metrics.bad_run), values["denoise"]
    left = config.rollback - history.rollbacks
    if bad_run >= config.max_bad_steps:
        what = (
            f"{bad_run} consecutive steps up to step {step} had a non-finite loss or gradient "
            f"(--max-bad-steps {config.max_bad_steps})"
        )
        if left > 0 and (source := last_good(saves, state)):
            raise Setback(what, source)
        raise TrainingDiverged(
            f"{what}; weights and optimizer were left as before them; {save_diverged(saves, state)}"
        )
    spiked = config.rollback and loss is not None and is_spike(loss, history.losses)
    if config.rollback and state.world.any(bool(spiked)):
        median = statistics.median(history.losses)
        what = f"the loss of denoising is {loss:.4g} at step {step}, after a median of {median:.4g}"
        if left <= 0:
            raise TrainingDiverged(f"{what}, after {history.rollbacks} rollbacks (--rollback)")
        if source := last_good(saves, state):
            raise Setback(what, source)
        saves.announce(f"WARNING: {what}; there is no good checkpoint to go back to")
        history.losses = []  # what follows is compared with itself
    elif loss is not None and not values["skipped"]:
        history.add(step, loss)


def save_diverged(saves: Checkpointer, state: TrainState) -> str:
    """Save what there was before training diverged, whose cause matters more than a full disk."""
    try:
        return f"saved to {saves.save(state, wait=True)}"
    except CheckpointFailed as error:
        return str(error)


def last_good(saves: Checkpointer, state: TrainState) -> Path | None:
    """The newest whole checkpoint with a good reading after it, if there is one.

    A reading at a checkpoint's own step is of losses before that step's update. The checkpoint of a
    rollback has none yet, so that a spike that comes back at once leads further back. There is none
    before `--align-until` once that is past, since encoders are gone then.
    """
    until = state.config.align_until
    first = until if state.step > until else 0
    last, folder = state.history.good_step, saves.folder
    saves.settle()
    found = ""
    if state.world.is_main:
        found = ",".join(str(s) for s in reversed(steps(folder)) if first <= s < last)
    for step in state.world.broadcast(found).split(","):
        if step and not damage(path_of(folder, int(step)), state):
            return path_of(folder, int(step))
    return None


def roll_back(folder: Path, state: TrainState, source: Path) -> None:
    """Load `source` into `state`, remove what was saved after it, and skip the data since then.

    A crash in between leaves a checkpoint as the newest from which the same follows again.
    """
    next_data, rollbacks = state.data_step, state.history.rollbacks
    checkpoint.load(source, state)
    if state.world.is_main:
        for step in reversed(steps(folder)):
            if step > int(source.name):
                remove(path_of(folder, step))
    state.world.barrier()
    state.optimizer.write_copies()
    state.history.rollbacks = rollbacks + 1
    state.history.skipped = next_data - state.step
