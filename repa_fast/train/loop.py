"""The training loop."""

import json
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from repa_fast.configs.config import TrainConfig
from repa_fast.data.loader import Loader
from repa_fast.data.open import Dataset, open_dataset
from repa_fast.data.order import SampleOrder
from repa_fast.data.prepare import DIGITS_DIR, ensure_digits
from repa_fast.distributed import World, session
from repa_fast.eval.pictures import save_png
from repa_fast.train.checkpoint import Checkpointer, CheckpointFailed
from repa_fast.train.evaluate import Evaluator
from repa_fast.train.memory import budget, choose_micro_batch
from repa_fast.train.preview import can_sample, sample_grid
from repa_fast.train.report import Clock, Reporter, plot_losses
from repa_fast.train.resume import resume, start_from
from repa_fast.train.state import TrainState, build_state, device_name
from repa_fast.train.step import train_step
from repa_fast.train.track import open_tracker
from repa_fast.train.writer import clean

STOP_CHECK_STEPS = 8
"""With several processes, steps between agreeing on whether a signal asked to stop."""


class TrainingDiverged(RuntimeError):
    """Too many consecutive steps had a non-finite loss or gradient."""


def train(config: TrainConfig) -> Path:
    """Run a config to its end, or to a checkpoint on SIGTERM or SIGINT; returns the run's folder.

    Raises:
        ValueError: config, dataset or checkpoints do not fit together.
        TrainingDiverged: after `max_bad_steps` consecutive skipped steps; a checkpoint is written.
        CheckpointFailed: two checkpoints in a row could not be written, or the last one.
    """
    with session() as world, stop_signals() as stopping:
        dataset = run_dataset(config, world)
        state = build_state(config, dataset.metadata, world, dataset.features, encoders_later=True)
        run = Path(config.output_dir) / config.exp_name
        begin(run / "checkpoints", state)
        if state.aligns:
            state.load_encoders()
        elif config.align_until:
            state.end_alignment()
        state.optimizer.write_copies()
        if not state.micro_batch or config.micro_batch != "auto":
            state.micro_batch = choose_micro_batch(state)
        order = SampleOrder(len(dataset), config.images_per_step, config.seed)
        total = min(config.max_train_steps, config.epochs * order.steps_per_epoch)
        with ExitStack() as stack:
            reporter = None
            if world.is_main:
                reporter = open_reporter(run, state, total)
                stack.callback(reporter.close)

            def next_loader() -> Loader:
                return stack.enter_context(open_loader(state, dataset, order, total))

            announce = reporter.line if reporter is not None else None
            saves = Checkpointer(run / "checkpoints", world, announce)
            stack.callback(saves.close)
            evaluator = Evaluator(state) if config.eval_every else None
            run_steps(state, next_loader, run, reporter, evaluator, saves, total, stopping)
        if world.is_main and state.step >= total:
            finish(run, state)
    return run


def open_loader(state: TrainState, dataset: Dataset, order: SampleOrder, total: int) -> Loader:
    """The batches from the next step to the last one, with what the alignment still needs."""
    config, world = state.config, state.world
    return Loader(
        dataset,
        order,
        start=state.step,
        stop=total,
        rank=world.rank,
        world_size=world.size,
        images=bool(state.encoders),
        features=[column.name for column in state.features],
        num_workers=config.num_workers,
        pin_memory=world.device.type == "cuda",
        skip_bad=config.on_bad_sample == "skip",
        decode=config.decode,
        device=world.device,
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
) -> None:
    """The loop: status, snapshot, checkpoint, done?, and then a step."""
    config, world = state.config, state.world
    estimate = budget(config, state.metadata)
    clock = Clock(
        config.images_per_step, estimate.train_flops, device_name(world.device), world.size
    )
    start, last_read = state.step, state.step
    loader = next_loader()
    batches = iter(loader)
    while True:
        step, new = state.step, state.step > start
        saves.poll()
        asked = bool(stopping) or saves.failing
        stop_now = (world.size == 1 or step % STOP_CHECK_STEPS == 0) and world.any(asked)
        done = step >= total
        if new and (step % config.log_every == 0 or done):
            values = read_metrics(state, loader) | clock.read(step - last_read, total - step)
            if reporter is not None:
                reporter.metrics(step, values)
            last_read, bad_run = step, int(state.metrics.bad_run)
            if bad_run >= config.max_bad_steps:
                raise TrainingDiverged(
                    f"{bad_run} consecutive steps up to step {step} had a non-finite loss or "
                    f"gradient (--max-bad-steps {config.max_bad_steps}); weights and optimizer "
                    f"were left as before them; {save_diverged(saves, state)}"
                )
        paused = time.perf_counter()
        if new and config.sampling_steps and (step % config.sampling_steps == 0 or done):
            snapshot(state, run, reporter)
        if new and evaluator is not None and (step % config.eval_every == 0 or done):
            scores = evaluator(state)
            if reporter is not None:
                reporter.scores(step, scores)
        if (new and step % config.checkpointing_steps == 0) or done or stop_now:
            saves.save(state, wait=done or stop_now)
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
        waited = time.perf_counter()
        batch = next(batches)
        clock.stall(waited)
        train_step(state, {k: v.to(world.device, non_blocking=True) for k, v in batch.items()})
        if reporter is not None:
            reporter.advance(state.step)


def save_diverged(saves: Checkpointer, state: TrainState) -> str:
    """Save what there was before training diverged, whose cause matters more than a full disk."""
    try:
        return f"saved to {saves.save(state, wait=True)}"
    except CheckpointFailed as error:
        return str(error)


def read_metrics(state: TrainState, loader: Loader) -> dict:
    """Metrics since the last reading, over all processes; waits for the device."""
    values = state.metrics.read(state.world)
    values["bad_samples"] = int(state.world.sum(torch.tensor(len(loader.skipped))))
    if state.world.device.type == "cuda":
        values["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return values


def snapshot(state: TrainState, run: Path, reporter: Reporter | None) -> None:
    """Write a sample grid of the moving average, on the first process."""
    if reporter is None or not can_sample(state, reporter.line):
        return
    picture = sample_grid(state)
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


def begin(folder: Path, state: TrainState) -> None:
    """Go on from a checkpoint, or start anew, from given weights if the config names any."""
    config = state.config
    source = resume(folder, state)
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
    for note in state.notes:
        reporter.line(note)
    return reporter


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that SIGTERM and SIGINT append their number to; a second one acts as usual."""
    received: list[int] = []
    previous = {}

    def note(number: int, _: object) -> None:
        received.append(number)
        signal.signal(number, previous[number])

    for number in (signal.SIGTERM, signal.SIGINT):
        previous[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
