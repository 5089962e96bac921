"""A training run from its config: set up, handed to the loop, and taken down."""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from repa_fast.configs.config import TrainConfig
from repa_fast.configs.file import ARGS
from repa_fast.configs.flags import Asked, asked_outright, parse
from repa_fast.configs.model import ModelConfig
from repa_fast.configs.presets import fitting
from repa_fast.data.loader import DataTimeout, Loader
from repa_fast.data.open import Dataset, open_dataset
from repa_fast.data.order import SampleOrder
from repa_fast.distributed import World, session
from repa_fast.eval.pictures import plot_losses
from repa_fast.lock import Lock
from repa_fast.train import graph
from repa_fast.train.begin import begin, hold_together, settle
from repa_fast.train.checkpoint import Checkpointer
from repa_fast.train.evaluate import Evaluator
from repa_fast.train.loop import SAMPLES, Run, loop
from repa_fast.train.memory import budget, choose_micro_batch, describe
from repa_fast.train.optim import ema_warnings
from repa_fast.train.outputs import say
from repa_fast.train.report import Clock, Mute, Reporter, open_tracker, read_metrics
from repa_fast.train.state import TrainState, build_state, device_name
from repa_fast.train.watch import error_file, watchdog
from repa_fast.whole import write_whole


def main(argv: Sequence[str]) -> None:
    """Train with the flags of TrainConfig, over a preset's values; raises as `train`."""
    asked = parse(argv)
    if asked.config.dry_run:
        print(describe(asked.config))
        return
    try:
        train(asked)
    except DataTimeout as error:
        print(f"repa-fast: {error}", file=sys.stderr, flush=True)
        os._exit(1)  # leaving as usual would join the threads that hang


def train(asked: Asked | TrainConfig) -> Path:
    """Run a config to its end, or to a checkpoint when a signal asks for it; return its folder.

    A run that is resumed keeps its own values where no flag says others, as of `inherit`; a config
    alone says all of its own.

    Raises:
        ValueError: config, dataset or checkpoints do not fit together, or another process trains
            this run.
        TrainingDiverged: after `max_bad_steps` consecutive skipped steps, with a checkpoint; or
            after a spike of the loss, with `stop_on_spike`.
        CheckpointFailed: three checkpoints in a row could not be written, or the last one.
        DataTimeout: a batch has not come within `data_timeout`.
    """
    asked = asked_outright(asked) if isinstance(asked, TrainConfig) else asked
    config = asked.config
    folder = Path(config.output_dir) / config.exp_name
    logs = folder / config.logging_dir
    with (
        session(config.collective_timeout) as world,
        hold_together(folder, logs, world) as lock,
        stop_signals() as stopping,
        error_file(logs, world.rank, stopping),
        watchdog(logs / f"stacks-rank{world.rank}.txt", config.watchdog) as begins,
    ):
        source, config, differ = settle(asked, folder, world)
        dataset = run_dataset(config.data_dir, world)
        order = SampleOrder(len(dataset), config.images_per_step, config.seed)
        state = restore(config, dataset, source, folder, world)
        state.notes = [*differ, *state.notes, *hints(config, dataset)]
        with open_run(folder, state, dataset, order, stopping, begins, lock) as run:
            loop(run)
            if world.is_main and run.done:
                finish(run)
    return folder


def restore(
    config: TrainConfig, dataset: Dataset, source: Path | None, folder: Path, world: World
) -> TrainState:
    """Build the run's state, as it is in the checkpoint `source` if there is one, ready to step.

    ValueError as for `build_state` and `begin`.
    """
    state = build_state(config, dataset.metadata, world, dataset.features, encoders_later=True)
    state.rows = len(dataset)
    begin(source, folder, state)
    state.expect_same_weights()
    if state.aligns:
        state.load_encoders()
    elif config.align_until:
        state.end_alignment()
    if not state.micro_batch or config.micro_batch != "auto":
        state.micro_batch = choose_micro_batch(state)
    return state


@contextmanager
def open_run(
    folder: Path,
    state: TrainState,
    dataset: Dataset,
    order: SampleOrder,
    stopping: list[int],
    begins: Callable[[int], None],
    lock: Lock,
) -> Iterator[Run]:
    """Yield a run with everything it needs open; close it all, also after an error."""
    config, world = state.config, state.world
    total = min(config.max_train_steps, config.epochs * order.steps_per_epoch)
    evaluator = Evaluator(state) if config.eval_every else None
    flops, name = budget(config, state.metadata).train_flops, device_name(world.device)
    with ExitStack() as stack:
        saves = Checkpointer(folder / "checkpoints", world, lock)
        reporter = open_reporter(folder, state, total) if world.is_main else Mute()
        stack.callback(reporter.close)
        saves.announce = reporter.line
        stack.callback(saves.close)
        run = Run(
            folder=folder,
            state=state,
            total=total,
            open_loader=partial(open_loader, state, dataset, order, total),
            saves=saves,
            reporter=reporter,
            evaluator=evaluator,
            clock=Clock(config.images_per_step, flops, name, world.size),
            seen=world.on_first(lambda: seen(folder, state.step)),
            stopping=stopping,
            begins=begins,
        )
        stack.callback(run.close)
        yield run


def open_loader(state: TrainState, dataset: Dataset, order: SampleOrder, total: int) -> Loader:
    """Open the batches from the next step to the last one, with what the alignment still needs."""
    config, world = state.config, state.world
    return Loader(
        dataset,
        order,
        start=state.data_step,
        stop=total + state.history.skipped,
        rank=world.rank,
        world_size=world.size,
        images=bool(state.alignment.encoders),
        features=[column.name for column in state.alignment.features],
        num_workers=config.num_workers,
        pin_memory=world.device.type == "cuda",
        skip_bad=config.on_bad_sample == "skip",
        decode=config.decode,
        device=world.device,
        timeout=config.data_timeout,
    )


def hints(config: TrainConfig, dataset: Dataset) -> list[str]:
    """Return a line that proposes a preset where a few images meet the model of the defaults."""
    preset = fitting(dataset) if config.model == ModelConfig.model else ""
    rows = f"{len(dataset)} images with {config.model}, which is made for millions"
    return [f"{rows}: --preset {preset} fits them"] if preset else []


def run_dataset(path: str, world: World) -> Dataset:
    """Open the run's dataset; the first process goes ahead and writes what is made on first use."""
    first: list[Dataset] = []
    world.on_first(lambda: first.append(open_dataset(path)))
    return first[0] if first else open_dataset(path)


def open_reporter(folder: Path, state: TrainState, total: int) -> Reporter:
    """Open the run's reporter; also write args.json, the resolved config."""
    config = state.config
    tracker = open_tracker(config, folder, state.step)
    write_whole(folder / ARGS, json.dumps(config.to_dict(), indent=2) + "\n")
    reporter = Reporter(folder, total, state.step, tracker)
    precision = {None: "fp32"}.get(state.autocast_dtype, str(state.autocast_dtype))
    reporter.line(
        f"{folder}: {state.world.size} x {device_name(state.world.device)}, {precision}, "
        f"{config.images_per_step} images per step in micro-batches of {state.micro_batch}, "
        f"from step {state.step} to {total}"
    )
    if state.step >= total:
        reporter.line(f"step {total} is the last one already: --max-train-steps takes more")
    for note in (*state.notes, graph.describe(state), *ema_warnings(config, total)):
        reporter.line(note)
    return reporter


def finish(run: Run) -> None:
    """Write samples.png and loss.png of a finished run and say where they are."""
    folder, attempts = run.folder, run.reporter.attempts
    with attempts.to_write(folder / "loss.png"):
        plot_losses(read_metrics(folder / "metrics.jsonl"), folder / "loss.png")
        say(f"loss curve: {folder / 'loss.png'}")
    grid = folder / SAMPLES / f"{run.state.step:07d}.png"
    if grid.exists():
        with attempts.to_write(folder / "samples.png"):
            write_whole(folder / "samples.png", grid.read_bytes())
            scale = run.state.config.cfg_scale
            say(f"samples: {folder / 'samples.png'} (guidance {scale:g}, weights ema)")


def seen(folder: Path, step: int) -> dict[str, int]:
    """Return the last steps up to `step` with a sample grid and with an evaluation; 0 for none."""
    grids = [int(p.stem) for p in (folder / SAMPLES).glob("*.png") if p.stem.isdecimal()]
    evals = folder / "evals.jsonl"
    evaluated = [line["step"] for line in read_metrics(evals)] if evals.exists() else []
    found = {"samples": grids, "evals": evaluated}
    return {k: max((s for s in steps if s <= step), default=0) for k, steps in found.items()}


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Yield a list that SIGTERM, SIGHUP, SIGUSR1 and SIGINT append to; a second SIGINT interrupts.

    SIGTERM comes twice where Slurm sends it to all processes of a job and torchrun passes its own
    on; SIGUSR1 is what Slurm can send ahead of a time limit (docs/clusters.md); SIGHUP what comes
    when a terminal is closed, unless nohup has it ignored.
    """
    received: list[int] = []
    previous = {}

    def note(number: int, _: object) -> None:
        received.append(number)
        if number == signal.SIGINT:
            signal.signal(number, previous[number])

    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT):
        if signal.getsignal(number) is not signal.SIG_IGN or number != signal.SIGHUP:
            previous[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
