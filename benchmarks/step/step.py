"""The real training step: `python -m benchmarks.step.step --preset sit-xl2-repa --compile`.

Encoder online with random weights (its speed does not depend on them), forward, losses, backward,
clip, optimizer, average. The batch is made up and lies in the host's memory, or batches come from
the real pipeline (`--data photographs`, or a dataset's folder), with the time a step waits for one.
Prints a report, appends a JSON row and writes report.md and shares.png beside it.
`python -m benchmarks.step.ladder` measures the same step one change at a time, from a rival up.
"""

import argparse
import dataclasses
import itertools
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch

from benchmarks.data.data import METADATA as PHOTOGRAPHS
from benchmarks.data.data import photographs
from benchmarks.harness.environment import results_folder, stamp
from benchmarks.harness.timing import matmul_rate, percentiles
from benchmarks.step import profile as step_profile
from benchmarks.step import report as step_report
from repa_fast.cli import expected_metadata
from repa_fast.configs import presets
from repa_fast.configs.config import TrainConfig
from repa_fast.data.dataset import Metadata, write
from repa_fast.data.loader import Batch, Loader
from repa_fast.data.open import open_dataset
from repa_fast.data.order import SampleOrder
from repa_fast.diffusion.draws import Draws
from repa_fast.distributed import World
from repa_fast.testing import random_encoder_weights
from repa_fast.train.graph import stepper
from repa_fast.train.memory import budget, peak_flops
from repa_fast.train.state import TrainState, build_state, device_name
from repa_fast.train.step import losses, other_weights, synthetic_batch

PHOTOGRAPH_ROWS, QUALITY = 4096, 95
PROFILED, HOST_STEPS = 3, 10
"""Steps under the profiler, and steps whose host time is taken, at most."""


class Stepper(Protocol):
    """What is measured: a training step with all that it needs."""

    config: TrainConfig
    metadata: Metadata
    world: World
    micro_batch: int
    precision: torch.dtype | None

    def step(self, batch: Batch) -> None:
        """One optimizer step."""

    def loss_of(self, batch: Batch, draws: Draws) -> float:
        """The loss of these draws, without a step; with gradients, so that it compiles the same."""

    def check(self) -> None:
        """RuntimeError if a step was skipped or its loss is not finite."""

    def name_ranges(self) -> None:
        """Let the profiler see the encoder and the optimizer, in the steps that follow."""


class Ours:
    """The project's own step."""

    def __init__(self, state: TrainState) -> None:
        self.state, self.config, self.metadata = state, state.config, state.metadata
        self.world, self.micro_batch, self.precision = (
            state.world,
            state.micro_batch,
            state.autocast_dtype,
        )
        self.take_step = stepper(state)

    def step(self, batch: Batch) -> None:
        """One optimizer step."""
        self.take_step(batch)

    def loss_of(self, batch: Batch, draws: Draws) -> float:
        """The loss of these draws, without a step."""
        denoise, others = losses(self.state, self.state.model, batch, draws)
        weighted = zip(other_weights(self.state), others)
        return (denoise.mean() + sum(weight * other.mean() for weight, other in weighted)).item()

    def check(self) -> None:
        """RuntimeError if a step since the last check was skipped."""
        reading = self.state.metrics.read(self.world)
        if reading["loss"] is None or reading["skipped"]:
            raise RuntimeError(f"{reading['skipped']} steps were skipped; no figure")

    def name_ranges(self) -> None:
        """Let the profiler see encoders (or SRA's teacher) and the gradients' norm as ranges."""
        state, named = self.state, step_profile.named
        state.encoders = {name: named("encoder", one) for name, one in state.encoders.items()}
        state.optimizer.gradient_norm = named("optimizer", state.optimizer.gradient_norm)
        if self.config.align == "sra":
            state.ema.hidden = named("encoder", state.ema.hidden)


def build(arguments: argparse.Namespace, folder: Path, **changes) -> TrainState:
    """The state of a preset at the asked batch, ready to step; `changes` are of the config."""
    columns = changes.pop("columns", None)
    config = dataclasses.replace(
        presets.get(arguments.preset), batch_size=arguments.batch, report_to="none", **changes
    )
    if "dinov2" in config.enc_type and not config.features:
        files = random_encoder_weights(config.enc_type, config.resolution, folder)
        config = dataclasses.replace(config, enc_weights=files)
    world = World(rank=0, size=1, device=torch.device(arguments.device))
    with world.device:  # where drawing the initial weights takes no time
        metadata = expected_metadata(config)
        state = build_state(config, metadata, world, columns, encoders_later=True)
    state.load_encoders()
    state.micro_batch = arguments.micro_batch or state.local_batch
    return state


@contextmanager
def open_batches(
    state: TrainState, arguments: argparse.Namespace, folder: Path
) -> Iterator[Iterator[Batch]]:
    """The batches of all steps."""
    if not arguments.data:
        batch, _ = synthetic_batch(state, state.local_batch)
        yield repeated(batch)
        return
    where = Path(arguments.data)
    if arguments.data == "photographs":
        where = folder / "train.lance"
        write(where, photographs(max(PHOTOGRAPH_ROWS, arguments.batch), QUALITY), PHOTOGRAPHS)
    dataset = open_dataset(where)
    with Loader(
        dataset,
        SampleOrder(len(dataset), arguments.batch, 0),
        start=0,
        stop=1 + arguments.warmup + arguments.steps + HOST_STEPS + PROFILED + 1,
        images=bool(state.encoders),
        num_workers=arguments.threads,
        pin_memory=state.world.device.type == "cuda",
        device=state.world.device,
    ) as loader:
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
    """The same batch for ever, where a loader would leave it: on the host."""
    host = {name: tensor.cpu() for name, tensor in batch.items()}
    if torch.cuda.is_available():
        host = {name: tensor.pin_memory() for name, tensor in host.items()}
    return itertools.repeat(host)


def first_step(stepper: Stepper, feed: Feed) -> float:
    """Seconds of a step that compiles what is not compiled yet."""
    before = time.perf_counter()
    stepper.step(feed())
    if stepper.world.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - before


def step_times(
    stepper: Stepper, feed: Feed, warmup: int, steps: int
) -> tuple[list[float], float, float]:
    """Milliseconds of each step after the warm-up, their wall-clock mean, and the mean waiting."""
    cuda = stepper.world.device.type == "cuda"
    for _ in range(warmup):
        stepper.step(feed())
    times = []
    if cuda:
        torch.cuda.synchronize()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
        marks[0].record()
    feed.waited = 0.0
    started = time.perf_counter()
    for step in range(steps):
        before = time.perf_counter()
        stepper.step(feed())
        if cuda:
            marks[step + 1].record()
        else:
            times.append(1e3 * (time.perf_counter() - before))
    if cuda:
        torch.cuda.synchronize()
        times = [a.elapsed_time(b) for a, b in zip(marks, marks[1:], strict=False)]
    return times, 1e3 * (time.perf_counter() - started) / steps, 1e3 * feed.waited / steps


def host_time(stepper: Stepper, feed: Feed, steps: int) -> float:
    """Median milliseconds until a step returns to the host, the device idle when it begins."""
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
    """GiB: allocated on the GPU since the last reset, or of this process since it began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def figures(stepper: Stepper, feed: Feed, arguments: argparse.Namespace, trace: Path) -> dict:
    """What a row says about a step; the step's Chrome trace is written to `trace`."""
    where, batch = stepper.world.device, arguments.batch
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times, wall, waited = step_times(stepper, feed, arguments.warmup, arguments.steps)
    stepper.check()
    memory = peak_memory(where)
    low, middle, high = percentiles(times)
    host = middle  # where the host computes
    if where.type == "cuda":
        host = host_time(stepper, feed, min(HOST_STEPS, arguments.steps))
    stepper.name_ranges()
    profiled = min(PROFILED, arguments.steps)
    parts = step_profile.run(lambda: stepper.step(feed()), profiled, where, trace)
    whole = middle if where.type == "cuda" else parts.window_ms
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    rate = 1e3 * batch / middle
    flops = budget(stepper.config, stepper.metadata).train_flops
    return {
        "ms_p20": low,
        "ms_p50": middle,
        "ms_p80": high,
        "ms_wall": wall,
        "stall_ms": waited,
        "images_per_second": rate,
        "gflop_per_image": flops / 1e9,
        **utilisation(rate * flops, peak_flops(device_name(where)), matmul_rate(dtype, where)),
        "peak_memory_gib": memory,
        "host_ms": host,
        "launches": parts.launches,
        "profiled_ms": parts.window_ms,
        "ms_by_category": parts.milliseconds(whole),
        "kernels": parts.kernels,
        "gaps": parts.gaps,
    }


def utilisation(rate: float, peak: float | None, matmul: float) -> dict:
    """FLOP/s of the model as shares of the datasheet's peak and of a large product's rate."""
    return {
        "mfu": rate / peak if peak else None,
        "matmul_tflop_per_s": matmul / 1e12,
        "mfu_of_matmul": rate / matmul,
    }


def settings(stepper: Stepper, arguments: argparse.Namespace) -> dict:
    """What a row says about how the step was run."""
    return {
        "preset": arguments.preset,
        "batch": arguments.batch,
        "micro_batch": stepper.micro_batch,
        "compile": stepper.config.compile,
        "precision": str(stepper.precision or torch.float32).removeprefix("torch."),
        "steps": arguments.steps,
        "warmup": arguments.warmup,
        "data": arguments.data or "made up",
    }


def measure(arguments: argparse.Namespace) -> dict:
    """One result row."""
    with tempfile.TemporaryDirectory() as folder:
        changes = {"compile": arguments.compile, "mixed_precision": arguments.precision}
        state = build(arguments, Path(folder), **changes)
        stepper = Ours(state)
        with open_batches(state, arguments, Path(folder)) as batches:
            trace = arguments.trace or Path(folder) / "trace.json"
            feed = Feed(batches)
            start = {"first_step_seconds": first_step(stepper, feed)}
            found = figures(stepper, feed, arguments, trace)
    row = {"rung": "", "status": "ok", **settings(stepper, arguments), **start, **found}
    return {**row, "notes": state.notes, **stamp()}


def append(folder: Path, row: dict) -> None:
    """Write the row, and the report of all rows there, into a folder that need not be there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "rows.jsonl", "a") as rows:
        rows.write(json.dumps(row) + "\n")
    step_report.write(folder)


def parser(description: str, preset: str) -> argparse.ArgumentParser:
    """The flags that a single step and the ladder have in common."""
    found = argparse.ArgumentParser(description=description)
    found.add_argument("--preset", default=preset, choices=presets.PRESETS)
    found.add_argument("--batch", type=int, default=32, help="images per step")
    found.add_argument("--steps", type=int, default=50, help="steps that are measured")
    cuda = torch.cuda.is_available()
    warmup = 10 if cuda else 2
    found.add_argument("--warmup", type=int, default=warmup, help="steps before them")
    found.add_argument("--device", default="cuda" if cuda else "cpu")
    found.add_argument("--out", type=Path, help="folder for rows, report and picture")
    return found


def main(argv: list[str] | None = None) -> int:
    """Measure one configuration."""
    flags = parser(__doc__.splitlines()[0], "sit-xl2-repa")
    flags.add_argument("--micro-batch", type=int, default=0, help="0: the whole batch")
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
