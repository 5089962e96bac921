"""The real training step: `python -m benchmarks.step.step --preset sit-xl2-repa --compile`.

Encoder online with random weights (its speed does not depend on them), forward, losses, backward,
clip, optimizer, EMA. The batch is synthetic and lies in the host's memory, or batches come from
the real pipeline (`--data photographs`, or a dataset's folder), with the time a step waits for one.
Prints a report, appends a JSON row and writes report.md and shares.png beside it.
`python -m benchmarks.step.ladder` measures the same step one change at a time, from a rival up.
"""

import argparse
import dataclasses
import itertools
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks.data.data import METADATA as PHOTOGRAPHS
from benchmarks.data.data import photographs
from benchmarks.harness import environment, rows
from benchmarks.harness.environment import at_least, results_folder, stamp
from benchmarks.harness.timing import Marks, matmul_rate, spread, synchronise
from benchmarks.step import profile as step_profile
from benchmarks.step import report as step_report
from benchmarks.step.baseline import Baseline
from repa_fast.configs import presets
from repa_fast.configs.build import expected_metadata, fit_to_data
from repa_fast.data.dataset import write
from repa_fast.data.loader import Batch, Loader
from repa_fast.data.open import open_dataset
from repa_fast.data.order import SampleOrder
from repa_fast.diffusion.draws import Draws
from repa_fast.distributed import World
from repa_fast.models.flops import peak_flops
from repa_fast.testing import random_encoder_weights
from repa_fast.train.graph import stepper
from repa_fast.train.memory import budget
from repa_fast.train.state import TrainState, build_state, device_name
from repa_fast.train.step import losses, other_weights, synthetic_batch

PHOTOGRAPH_ROWS, QUALITY = 4096, 95
PROFILED, HOST_STEPS = 3, 10  # steps under the profiler, and those whose host time is taken


class Ours:
    """The project's own step."""

    def __init__(self, state: TrainState) -> None:
        self.state, self.config, self.metadata = state, state.config, state.metadata
        self.world, self.micro_batch = state.world, state.micro_batch
        self.precision, self.take_step = state.autocast_dtype, stepper(state)

    def step(self, batch: Batch) -> None:
        """Take one optimizer step."""
        self.take_step(batch)

    def loss_of(self, batch: Batch, draws: Draws) -> float:
        """Return the loss of these draws, without a step but with gradients, as it compiles."""
        denoise, others = losses(self.state, self.state.model, batch, draws)
        weighted = zip(other_weights(self.state), others)
        return (denoise.mean() + sum(weight * other.mean() for weight, other in weighted)).item()

    def check(self) -> None:
        """Raise RuntimeError if a step since the last check was skipped."""
        reading = self.state.metrics.read(self.world)
        if reading["loss"] is None or reading["skipped"]:
            raise RuntimeError(f"{reading['skipped']} steps were skipped; no figure")

    def name_ranges(self) -> None:
        """Let the profiler see encoders (or SRA's teacher) and the gradients' norm as ranges."""
        state, named = self.state, step_profile.named
        alignment = state.alignment
        alignment.encoders = {n: named("encoder", one) for n, one in alignment.encoders.items()}
        state.optimizer.gradient_norm = named("optimizer", state.optimizer.gradient_norm)
        if alignment.teacher_depth:
            state.ema.hidden = named("encoder", state.ema.hidden)


Stepper = Ours | Baseline


def build(arguments: argparse.Namespace, folder: Path, **changes) -> TrainState:
    """Return the state of a preset with `changes` of its config, ready to step."""
    columns = changes.pop("columns", None)
    config = dataclasses.replace(
        presets.get(arguments.preset), batch_size=arguments.batch, report_to="none", **changes
    )
    metadata = expected_metadata(config)
    config = fit_to_data(config, metadata)
    if "dinov2" in config.enc_type and not config.features:
        files = random_encoder_weights(config.enc_type, config.resolution, folder)
        config = dataclasses.replace(config, enc_weights=files)
    world = World(rank=0, size=1, device=torch.device(arguments.device))
    with world.device:  # where drawing the initial weights takes no time
        state = build_state(config, metadata, world, columns, encoders_later=True)
    state.load_encoders()
    state.micro_batch = arguments.micro_batch or state.local_batch
    return state


@contextmanager
def open_batches(
    state: TrainState, arguments: argparse.Namespace, folder: Path
) -> Iterator[Iterator[Batch]]:
    """Open the batches of all steps."""
    if not arguments.data:
        batch, _ = synthetic_batch(state, state.local_batch)
        yield repeated(batch)
        return
    where = Path(arguments.data)
    if arguments.data == "photographs":
        where = folder / "train.lance"
        write(where, photographs(max(PHOTOGRAPH_ROWS, arguments.batch), QUALITY), PHOTOGRAPHS)
    dataset = open_dataset(where)
    stop = 1 + arguments.warmup + arguments.steps + HOST_STEPS + PROFILED + 1
    options = {"images": bool(state.alignment.encoders), "num_workers": arguments.threads}
    options |= {"pin_memory": state.world.device.type == "cuda", "device": state.world.device}
    order = SampleOrder(len(dataset), arguments.batch, 0)
    with Loader(dataset, order, start=0, stop=stop, **options) as loader:
        yield iter(loader)


class Feed:
    """The batches, and the seconds that were waited for them."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self.batches, self.waited = batches, 0.0

    def __call__(self) -> Batch:
        before = time.perf_counter()
        batch = next(self.batches)
        self.waited += time.perf_counter() - before
        return batch


def repeated(batch: Batch) -> Iterator[Batch]:
    """Repeat a batch for ever, where a loader would leave it: on the host."""
    host = {name: tensor.cpu() for name, tensor in batch.items()}
    if torch.cuda.is_available():
        host = {name: tensor.pin_memory() for name, tensor in host.items()}
    return itertools.repeat(host)


def first_step(stepper: Stepper, feed: Feed) -> float:
    """Return the seconds of a step that compiles what is not compiled yet."""
    before = time.perf_counter()
    stepper.step(feed())
    synchronise(stepper.world.device)
    return time.perf_counter() - before


def step_times(
    stepper: Stepper, feed: Feed, warmup: int, steps: int
) -> tuple[list[float], float, float]:
    """Return ms of each step after the warm-up, their wall-clock mean, and the mean waiting."""
    for _ in range(warmup):
        stepper.step(feed())
    synchronise(stepper.world.device)
    marks = Marks(stepper.world.device)
    marks.mark()
    feed.waited, started = 0.0, time.perf_counter()
    for _ in range(steps):
        stepper.step(feed())
        marks.mark()
    times = marks.milliseconds()
    return times, 1e3 * (time.perf_counter() - started) / steps, 1e3 * feed.waited / steps


def host_time(stepper: Stepper, feed: Feed, steps: int) -> float:
    """Return the median ms until a step returns to the host, the device idle before."""
    times = []
    for _ in range(steps):
        batch = feed()
        torch.cuda.synchronize()
        before = time.perf_counter()
        stepper.step(batch)
        times.append(1e3 * (time.perf_counter() - before))
    torch.cuda.synchronize()
    return statistics.median(times)


def peak_memory(device: torch.device) -> float:
    """Return GiB allocated on the GPU since the last reset, or of this process since it began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def figures(stepper: Stepper, feed: Feed, arguments: argparse.Namespace, trace: Path) -> dict:
    """Return what a row says about a step; its Chrome trace is written to `trace`."""
    where, cuda = stepper.world.device, stepper.world.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    times, wall, waited = step_times(stepper, feed, arguments.warmup, arguments.steps)
    stepper.check()
    memory, middle = peak_memory(where), statistics.median(times)
    # on a CPU the host computes
    host = host_time(stepper, feed, min(HOST_STEPS, arguments.steps)) if cuda else middle
    stepper.name_ranges()
    profiled = min(PROFILED, arguments.steps)
    parts = step_profile.run(lambda: stepper.step(feed()), profiled, where, trace)
    dtype = torch.bfloat16 if cuda else torch.float32
    rate = 1e3 * arguments.batch / middle
    flops = budget(stepper.config, stepper.metadata).train_flops
    row = {**spread("ms", times), "ms_wall": wall, "stall_ms": waited}
    row |= {"images_per_second": rate, "gflop_per_image": flops / 1e9}
    row |= utilisation(rate * flops, peak_flops(device_name(where)), matmul_rate(dtype, where))
    row |= {"peak_memory_gib": memory, "host_ms": host, "launches": parts.launches}
    row |= {"profiled_ms": parts.window_ms, "kernels": parts.kernels, "gaps": parts.gaps}
    return row | {"ms_by_category": parts.milliseconds(middle if cuda else parts.window_ms)}


def utilisation(rate: float, peak: float | None, matmul: float) -> dict:
    """Return the model's FLOP/s as shares of the datasheet's peak and of a large matmul's."""
    return {
        "mfu": rate / peak if peak else None,
        "matmul_tflop_per_s": matmul / 1e12,
        "mfu_of_matmul": rate / matmul,
    }


def settings(stepper: Stepper, arguments: argparse.Namespace) -> dict:
    """Return what a row says about how the step was run."""
    precision = str(stepper.precision or torch.float32).removeprefix("torch.")
    row = {name: getattr(arguments, name) for name in ("preset", "batch", "steps", "warmup")}
    row |= {"micro_batch": stepper.micro_batch, "compile": stepper.config.compile}
    return row | {"precision": precision, "data": arguments.data or "made up"}


def measure(arguments: argparse.Namespace) -> dict:
    """Return one result row."""
    with tempfile.TemporaryDirectory() as folder:
        precision = arguments.precision
        state = build(arguments, Path(folder), compile=arguments.compile, mixed_precision=precision)
        stepper = Ours(state)
        with open_batches(state, arguments, Path(folder)) as batches:
            trace = arguments.trace or Path(folder) / "trace.json"
            feed = Feed(batches)
            start = {"first_step_seconds": first_step(stepper, feed)}
            found = figures(stepper, feed, arguments, trace)
    row = {"rung": "", "status": "ok", **settings(stepper, arguments), **start, **found}
    return {**row, "notes": state.notes, **stamp()}


def append(folder: Path, row: dict) -> None:
    """Append a row, and write the report of all rows there."""
    rows.append(folder / "rows.jsonl", row)
    step_report.write(folder)


def parser(description: str, preset: str) -> argparse.ArgumentParser:
    """Return the flags that a single step and the ladder have in common."""
    found = environment.parser(description)
    found.add_argument("--preset", default=preset, choices=presets.PRESETS)
    found.add_argument("--batch", type=at_least(1), default=32, help="images per step")
    found.add_argument("--steps", type=at_least(1), default=50, help="steps that are measured")
    warmup = 10 if torch.cuda.is_available() else 2
    found.add_argument("--warmup", type=at_least(0), default=warmup, help="steps before them")
    return found


def main(argv: list[str] | None = None) -> int:
    """Measure one configuration."""
    flags = parser(__doc__.splitlines()[0], "sit-xl2-repa")
    flags.add_argument("--micro-batch", type=at_least(0), default=0, help="0: the whole batch")
    flags.add_argument("--precision", default="auto", choices=("auto", "no", "bf16", "fp16"))
    flags.add_argument("--compile", action="store_true")
    flags.add_argument("--data", default="", help="photographs, or a dataset's folder")
    flags.add_argument("--threads", type=int, default=4, help="that decode images")
    flags.add_argument("--trace", type=Path, help="file for a Chrome trace of some steps")
    arguments = flags.parse_args(argv)
    row = measure(arguments)
    print(step_report.markdown([row]))
    folder = arguments.out or results_folder("step", arguments.device)
    append(folder, row)
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
