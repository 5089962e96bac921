"""The training loop: the story of a run, from where it begins to where it ends."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from repa_fast.data.loader import Batch, Loader
from repa_fast.train import graph
from repa_fast.train.checkpoint import Checkpointer
from repa_fast.train.evaluate import Evaluator, can_sample, sample_grid
from repa_fast.train.optim import learning_rate
from repa_fast.train.report import Clock, Mute, Reporter
from repa_fast.train.resume import stop_if_diverged
from repa_fast.train.state import TrainState
from repa_fast.train.watch import FIRST_STEPS, PATIENCE
from repa_fast.words import one_line

SAMPLES = "samples"
"""Folder of sample grids, STEP.png, in the run's."""
STOP_CHECK_STEPS = 8
"""With several processes, steps between agreeing on whether a signal asked to stop."""


@dataclass
class Run:
    """A run as the loop finds it; repa_fast/train/run.py sets it up and takes it down.

    Attributes:
        folder: what it writes goes there.
        total: steps at which it is done.
        open_loader: opens the batches from the state's step to the last one.
        reporter: of the first process; the others' say nothing.
        evaluator: None where nothing is evaluated.
        seen: the last steps with a sample grid and with an evaluation: a run that was stopped after
            it saved such a step does it first.
        stopping: signals received so far that ask to stop.
        begins: tells the watchdog that something begins, and how many limits it may take.
    """

    folder: Path
    state: TrainState
    total: int
    open_loader: Callable[[], Loader]
    saves: Checkpointer
    reporter: Reporter | Mute
    evaluator: Evaluator | None
    clock: Clock
    seen: dict[str, int]
    stopping: list[int]
    begins: Callable[[int], None]

    def __post_init__(self) -> None:
        self.last_read = self.last_saved = self.state.step
        self.open()

    def open(self) -> None:
        """Open the batches that follow; the steps on them compile first."""
        self.take_step = graph.stepper(self.state, self.saves.settle)
        self.loader = self.open_loader()
        self.batches: Iterator[Batch] = iter(self.loader)
        self.opened = self.state.step

    def close(self) -> None:
        """Close the batches, and free the graph that their steps became."""
        self.loader.close()
        if isinstance(self.take_step, graph.GraphedStep):
            self.take_step.close()

    @property
    def done(self) -> bool:
        """Whether the last step has been taken."""
        return self.state.step >= self.total

    def due(self, every: int, last: int) -> bool:
        """Return whether what happens every so many steps (0 never), and at the end, is due.

        `last` is the step at which it happened last, or at which the run began.
        """
        step = self.state.step
        return bool(every) and step > last and (step % every == 0 or self.done)

    def agree(self, flag: bool) -> bool:
        """Return whether any process has raised a flag, asked every few steps."""
        world = self.state.world
        asked = world.size == 1 or self.state.step % STOP_CHECK_STEPS == 0
        return asked and world.any(flag)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let the clock stand still; the watchdog is patient meanwhile."""
        since = time.perf_counter()
        self.begins(PATIENCE)
        yield
        self.clock.pause(since)


def loop(run: Run) -> None:
    """Log, save, sample, evaluate, stop: what is due after the steps so far; and then take a step.

    TrainingDiverged as for `stop_if_diverged`; CheckpointFailed, LockLost and DataTimeout as for
    `Checkpointer.save` and `Loader`.
    """
    state, config = run.state, run.state.config
    while True:
        run.saves.poll()
        stop, failing = run.agree(bool(run.stopping)), run.agree(run.saves.failing)
        if run.due(config.log_every, run.last_read):
            log(run)
        with run.paused():
            if run.due(config.checkpointing_steps, run.last_saved) or run.done or stop or failing:
                run.reporter.flush()  # the metrics that a checkpoint goes on from come first
                run.saves.save(state, wait=run.done or stop)
                run.last_saved = state.step
            if run.due(config.sampling_steps, run.seen["samples"]) and not stop:
                snapshot(run)
            if run.due(config.eval_every, run.seen["evals"]) and not stop:
                evaluate(run)
        if run.done:
            return
        if stop:
            run.reporter.line(f"stopped by a signal at step {state.step}; go on with --resume auto")
            return
        if state.step > run.opened and state.step == config.align_until:
            run.close()
            state.end_alignment()
            run.open()
        take_step(run)


def take_step(run: Run) -> None:
    """Wait for a batch and train on it."""
    run.begins(PATIENCE if run.state.step < run.opened + FIRST_STEPS else 1)
    waited = time.perf_counter()
    batch = next(run.batches)
    run.clock.stall(waited)
    run.take_step(batch)
    run.reporter.advance(run.state.step)


def log(run: Run) -> None:
    """Read and report the metrics since the last time, over all processes; wait for the device.

    TrainingDiverged as for `stop_if_diverged`.
    """
    state = run.state
    values = state.metrics.read(state.world)
    values["learning_rate"] = learning_rate(state.config, state.step - 1)  # of the last step
    values["bad_samples"] = int(state.world.sum(torch.tensor(len(run.loader.skipped))))
    if state.world.device.type == "cuda":
        values["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    values |= run.clock.read(state.step - run.last_read, run.total - state.step)
    run.reporter.metrics(state.step, values)
    run.last_read = state.step
    stop_if_diverged(run.saves, state, values)


def snapshot(run: Run) -> None:
    """Write a sample grid of the EMA, on the first process; all processes call it."""
    state = run.state
    run.seen["samples"] = state.step
    average = state.whole_average(everywhere=False)
    if state.world.is_main and can_sample(state, run.reporter.line):
        run.reporter.image(SAMPLES, state.step, sample_grid(state, average))


def evaluate(run: Run) -> None:
    """Evaluate the EMA, or say why that fails, on all processes alike; training goes on."""
    state, scores, failure = run.state, {}, ""
    run.seen["evals"] = state.step
    try:
        scores = run.evaluator(state)
    except (ValueError, RuntimeError, OSError) as error:
        failure = one_line(f"{type(error).__name__}: {error}")
    if state.world.any(bool(failure)):
        scores, failure = {}, failure or "it failed on another process"
    run.reporter.scores(state.step, scores, failure)
