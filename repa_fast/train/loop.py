"""The training loop."""

import dataclasses
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from repa_fast.checkpoint.layout import steps
from repa_fast.checkpoint.writer import clean
from repa_fast.configs.config import TrainConfig
from repa_fast.data.loader import Loader
from repa_fast.data.open import Dataset, open_dataset
from repa_fast.data.order import SampleOrder
from repa_fast.distributed import World, session
from repa_fast.eval.pictures import save_png
from repa_fast.prepare.images import DIGITS_DIR, ensure_digits
from repa_fast.train import graph
from repa_fast.train.checkpoint import Checkpointer
from repa_fast.train.evaluate import Evaluator
from repa_fast.train.memory import budget, choose_micro_batch
from repa_fast.train.preview import can_sample, sample_grid
from repa_fast.train.report import Clock, Reporter, plot_losses
from repa_fast.train.resume import resume, start_from
from repa_fast.train.rollback import Setback, judge, roll_back
from repa_fast.train.state import TrainState, build_state, device_name
from repa_fast.train.track import open_tracker
from repa_fast.train.watch import Watchdog, error_file

LAUNCH = "torchrun-id"
"""File in the run's folder: torchrun's id of the launch that trains it, and where that began."""
STOP_CHECK_STEPS = 8
"""With several processes, steps between agreeing on whether a signal asked to stop."""


def train(config: TrainConfig) -> Path:
    """Run a config to its end, or to a checkpoint when a signal asks for it; returns its folder.

    Raises:
        ValueError: config, dataset or checkpoints do not fit together.
        TrainingDiverged: after `max_bad_steps` consecutive skipped steps, with a checkpoint; or
            after a spike of the loss that no `rollback` is left for.
        CheckpointFailed: three checkpoints in a row could not be written, or the last one.
        DataTimeout: a batch has not come within `data_timeout`.
    """
    run = Path(config.output_dir) / config.exp_name
    logs = run / config.logging_dir
    with (
        session(config.collective_timeout) as world,
        stop_signals() as stopping,
        error_file(logs, world.rank, stopping),
        Watchdog(logs / f"stacks-rank{world.rank}.txt", world.rank, config.watchdog) as watchdog,
    ):
        config = after_restart(config, run, world)
        dataset = run_dataset(config, world)
        state = build_state(config, dataset.metadata, world, dataset.features, encoders_later=True)
        begin(run, state)
        if state.aligns:
            state.load_encoders()
        elif config.align_until:
            state.end_alignment()
        state.optimizer.write_copies()
        if not state.micro_batch or config.micro_batch != "auto":
            state.micro_batch = choose_micro_batch(state)
        order = SampleOrder(len(dataset), config.images_per_step, config.seed)
        total = min(config.max_train_steps, config.epochs * order.steps_per_epoch)
        evaluator = Evaluator(state) if config.eval_every else None
        while train_on(state, dataset, order, run, evaluator, total, stopping, watchdog):
            pass
        if world.is_main and state.step >= total:
            finish(run, state)
    return run


def train_on(
    state: TrainState,
    dataset: Dataset,
    order: SampleOrder,
    run: Path,
    evaluator: Evaluator | None,
    total: int,
    stopping: list[int],
    watchdog: Watchdog,
) -> bool:
    """From the state's step to the end, or until it went back to a checkpoint; whether it did."""
    with ExitStack() as stack:
        saves = Checkpointer(run / "checkpoints", state.world)
        reporter = None
        if state.world.is_main:
            reporter = open_reporter(run, state, total)
            stack.callback(reporter.close)
            saves.announce = reporter.line
        stack.callback(saves.close)

        def next_loader() -> Loader:
            return stack.enter_context(open_loader(state, dataset, order, total))

        try:
            run_steps(
                state, next_loader, run, reporter, evaluator, saves, total, stopping, watchdog
            )
            return False
        except Setback as setback:
            if reporter is not None:
                reporter.line(str(setback))
            watchdog.pause("going back to a checkpoint")
            roll_back(saves.folder, state, setback.source)
            return True


def open_loader(state: TrainState, dataset: Dataset, order: SampleOrder, total: int) -> Loader:
    """The batches from the next step to the last one, with what the alignment still needs."""
    config, world = state.config, state.world
    return Loader(
        dataset,
        order,
        start=state.data_step,
        stop=total + state.history.skipped,
        rank=world.rank,
        world_size=world.size,
        images=bool(state.encoders),
        features=[column.name for column in state.features],
        num_workers=config.num_workers,
        pin_memory=world.device.type == "cuda",
        skip_bad=config.on_bad_sample == "skip",
        decode=config.decode,
        device=world.device,
        timeout=config.data_timeout,
    )


def run_steps(
    state: TrainState,
    next_loader: Callable[[], Loader],
    run: Path,
    reporter: Reporter | None,
    evaluator: Evaluator | None,
    saves: Checkpointer,
    total: int,
    stopping: list[int],
    watchdog: Watchdog,
) -> None:
    """The loop: status, snapshot, checkpoint, done?, and then a step.

    Raises:
        Setback, TrainingDiverged: as for `judge`.
    """
    config, world = state.config, state.world
    estimate = budget(config, state.metadata)
    clock = Clock(
        config.images_per_step, estimate.train_flops, device_name(world.device), world.size
    )
    start, last_read = state.step, state.step
    loader = next_loader()
    batches = iter(loader)
    take_step = graph.stepper(state)
    while True:
        step, new = state.step, state.step > start
        saves.poll()
        agree = world.size == 1 or step % STOP_CHECK_STEPS == 0
        stop_now = agree and world.any(bool(stopping))
        again = agree and world.any(saves.failing)
        done = step >= total
        if new and (step % config.log_every == 0 or done):
            values = read_metrics(state, loader) | clock.read(step - last_read, total - step)
            if reporter is not None:
                reporter.metrics(step, values)
            last_read = step
            judge(saves, state, values)
        paused = time.perf_counter()
        watchdog.pause(f"sampling, judging or saving at step {step}")
        if new and config.sampling_steps and (step % config.sampling_steps == 0 or done):
            snapshot(state, run, reporter)
        if new and evaluator is not None and (step % config.eval_every == 0 or done):
            scores = evaluator(state)
            if reporter is not None:
                reporter.scores(step, scores)
        if (new and step % config.checkpointing_steps == 0) or done or stop_now or again:
            saves.save(state, wait=done or stop_now)
        watchdog.resume()
        clock.pause(paused)
        if stop_now and reporter is not None and not done:
            reporter.line(f"stopped by a signal at step {step}; go on with --resume auto")
        if done or stop_now:
            return
        if new and step == config.align_until:
            loader.close()
            state.end_alignment()
            loader = next_loader()
            batches = iter(loader)
            take_step = graph.stepper(state)
            watchdog.compiles()
        watchdog.step(step + 1)
        waited = time.perf_counter()
        batch = next(batches)
        clock.stall(waited)
        take_step(batch)
        if reporter is not None:
            reporter.advance(state.step)


def read_metrics(state: TrainState, loader: Loader) -> dict:
    """Metrics since the last reading, over all processes; waits for the device."""
    values = state.metrics.read(state.world)
    values["bad_samples"] = int(state.world.sum(torch.tensor(len(loader.skipped))))
    if state.world.device.type == "cuda":
        values["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return values


def snapshot(state: TrainState, run: Path, reporter: Reporter | None) -> None:
    """Write a sample grid of the moving average, on the first process; all processes call it."""
    average = state.whole_average(everywhere=False)
    if reporter is None or not can_sample(state, reporter.line):
        return
    picture = sample_grid(state, average)
    save_png(picture, run / "samples" / f"{state.step:07d}.png")
    reporter.image("samples", state.step, picture)


def finish(run: Path, state: TrainState) -> None:
    """Write samples.png and loss.png of a finished run and say where they are."""
    plot_losses(run / "metrics.jsonl", run / "loss.png")
    print(f"loss curve: {run / 'loss.png'}")
    grid = run / "samples" / f"{state.step:07d}.png"
    if grid.exists():
        shutil.copyfile(grid, run / "samples.png")
        print(f"samples: {run / 'samples.png'}")


def run_dataset(config: TrainConfig, world: World) -> Dataset:
    """The run's dataset; the first process goes ahead and writes what is made on first use."""
    bundled = config.data_dir == "digits"
    path = DIGITS_DIR if bundled else config.data_dir
    if not world.is_main:
        world.barrier()
    elif bundled:
        ensure_digits()
    dataset = open_dataset(path)
    if world.is_main:
        world.barrier()
    return dataset


def after_restart(config: TrainConfig, run: Path, world: World) -> TrainConfig:
    """The config to go on with: once torchrun restarts its processes, from what they had saved.

    Only checkpoints of the same launch count, which torchrun's id of it tells from others' (without
    `--rdzv-id` or `--standalone` it has none): a start that was refused is refused again.
    """
    launch = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if not world.any(restarts > 0) or launch == "none":  # each node counts its own
        return config
    ours = False
    if world.is_main and (run / LAUNCH).exists():
        known, began = (run / LAUNCH).read_text().rsplit(maxsplit=1)
        ours = known == launch and max(steps(run / "checkpoints"), default=0) > int(began)
    if world.any(ours):
        return dataclasses.replace(config, resume="auto", resume_step=0)
    return config


def begin(run: Path, state: TrainState) -> None:
    """Go on from a checkpoint, or start anew, from given weights if the config names any.

    Raises:
        ValueError: as for `resume`, or going on from an older step than the run's newest: the two
            ways to go on would share a folder.
    """
    config, folder = state.config, run / "checkpoints"
    source = resume(folder, state)
    newer = [step for step in steps(folder) if step > state.step]
    if newer and (config.resume_step or config.resume not in ("auto", "never")):
        raise ValueError(
            f"{folder} has checkpoints up to step {newer[-1]}, later than {source}: go on from it "
            f"in a new run (--resume {source} --exp-name NEW), or remove the later ones"
        )
    notes = []
    if state.world.is_main:
        notes = [f"removed {half}, which was not complete" for half in clean(folder)]
    if source is not None:
        notes.append(f"going on from {source}")
    elif config.init_from:
        notes += start_from(Path(config.init_from), config.init_origin, state)
        notes.append(f"starting from the weights in {config.init_from}")
    if state.world.is_main:
        for note in notes:
            print(note, flush=True)
        launch, file = os.environ.get("TORCHELASTIC_RUN_ID"), run / LAUNCH
        if launch and not (file.exists() and file.read_text().startswith(f"{launch} ")):
            run.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{launch} {state.step}")


def open_reporter(run: Path, state: TrainState, total: int) -> Reporter:
    """The run's reporter; also writes args.json, the resolved config."""
    run.mkdir(parents=True, exist_ok=True)
    config = state.config
    (run / "args.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n")
    reporter = Reporter(run, total, state.step, open_tracker(config, run, state.step))
    precision = {None: "fp32"}.get(state.autocast_dtype, str(state.autocast_dtype))
    reporter.line(
        f"{run}: {state.world.size} x {device_name(state.world.device)}, {precision}, "
        f"{config.images_per_step} images per step in micro-batches of {state.micro_batch}, "
        f"from step {state.step} to {total}"
    )
    for note in (*state.notes, graph.describe(state)):
        reporter.line(note)
    return reporter


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that SIGTERM, SIGUSR1 and SIGINT append their number to; a second SIGINT interrupts.

    SIGTERM comes twice where Slurm sends it to all processes of a job and torchrun passes its own
    on; SIGUSR1 is what Slurm can send ahead of a time limit (docs/launch.md).
    """
    received: list[int] = []
    previous = {}

    def note(number: int, _: object) -> None:
        received.append(number)
        if number == signal.SIGINT:
            signal.signal(number, previous[number])

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        previous[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
