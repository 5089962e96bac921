"""The real training step: `python -m benchmarks.step --preset sit-xl2-repa`.

Encoder online with random weights (its speed does not depend on them), forward, losses, backward,
clip, optimizer, average. The batch is made up and stays on the device, or batches come from the
real pipeline (`--data photographs`, or a dataset's folder), with the time a step waits for one.
Prints a report and appends a JSON row.
"""

import argparse
import dataclasses
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks.data import METADATA as PHOTOGRAPHS
from benchmarks.data import photographs
from benchmarks.environment import RESULTS, stamp
from repa_fast.cli import expected_metadata
from repa_fast.configs import presets
from repa_fast.data.dataset import write
from repa_fast.data.loader import Batch, Loader
from repa_fast.data.open import open_dataset
from repa_fast.data.order import SampleOrder
from repa_fast.distributed import World
from repa_fast.testing import random_encoder_weights
from repa_fast.train.memory import budget, peak_flops
from repa_fast.train.state import TrainState, build_state, device_name
from repa_fast.train.step import synthetic_batch, train_step

PHOTOGRAPH_ROWS, QUALITY = 4096, 95


def build(arguments: argparse.Namespace, folder: Path) -> TrainState:
    """The state of a preset at the asked batch, ready to step."""
    config = dataclasses.replace(
        presets.get(arguments.preset),
        batch_size=arguments.batch,
        compile=arguments.compile,
        mixed_precision=arguments.precision,
        report_to="none",
    )
    if "dinov2" in config.enc_type:
        files = random_encoder_weights(config.enc_type, config.resolution, folder)
        config = dataclasses.replace(config, enc_weights=files)
    world = World(rank=0, size=1, device=torch.device(arguments.device))
    state = build_state(config, expected_metadata(config), world)
    state.micro_batch = arguments.micro_batch or state.local_batch
    return state


@contextmanager
def open_batches(
    state: TrainState, arguments: argparse.Namespace, folder: Path
) -> Iterator[Iterator[Batch]]:
    """The batches of all steps."""
    steps = arguments.warmup + arguments.steps
    if not arguments.data:
        batch, _ = synthetic_batch(state, state.local_batch)
        yield itertools.repeat(batch)
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
        stop=steps,
        images=bool(state.encoders),
        num_workers=arguments.threads,
        pin_memory=state.world.device.type == "cuda",
        device=state.world.device,
    ) as loader:
        yield iter(loader)


def step_times(
    state: TrainState, batches: Iterator[Batch], warmup: int, steps: int
) -> tuple[list[float], float, float]:
    """Milliseconds of each step after the warm-up, their wall-clock mean, and the mean waiting."""
    cuda = state.world.device.type == "cuda"
    device = state.world.device
    waited = 0.0

    def following() -> Batch:
        nonlocal waited
        before = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - before
        return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}

    for _ in range(warmup):
        train_step(state, following())
    waited = 0.0
    times = []
    if cuda:
        torch.cuda.synchronize()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
        marks[0].record()
    started = time.perf_counter()
    for step in range(steps):
        before = time.perf_counter()
        train_step(state, following())
        if cuda:
            marks[step + 1].record()
        else:
            times.append(1e3 * (time.perf_counter() - before))
    if cuda:
        torch.cuda.synchronize()
        times = [a.elapsed_time(b) for a, b in zip(marks, marks[1:], strict=False)]
    return times, 1e3 * (time.perf_counter() - started) / steps, 1e3 * waited / steps


def measure(arguments: argparse.Namespace) -> dict:
    """One result row."""
    with tempfile.TemporaryDirectory() as folder:
        state = build(arguments, Path(folder))
        if state.world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with open_batches(state, arguments, Path(folder)) as batches:
            times, wall, waited = step_times(state, batches, arguments.warmup, arguments.steps)
    reading = state.metrics.read(state.world)
    if reading["loss"] is None or reading["skipped"]:
        raise RuntimeError(f"{reading['skipped']} steps were skipped; no figure")
    # quantiles() interpolates; with fewer than two steps there is nothing to interpolate
    cuts = statistics.quantiles(times, n=10) if len(times) > 1 else times * 9
    rate = 1e3 * arguments.batch / statistics.median(times)
    flops = budget(state.config, state.metadata).train_flops
    peak = peak_flops(device_name(state.world.device))
    memory = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
    return {
        "preset": arguments.preset,
        "batch": arguments.batch,
        "micro_batch": state.micro_batch,
        "compile": arguments.compile,
        "precision": str(state.autocast_dtype or torch.float32).removeprefix("torch."),
        "steps": arguments.steps,
        "ms_p20": cuts[1],
        "ms_p50": statistics.median(times),
        "ms_p80": cuts[7],
        "ms_wall": wall,
        "data": arguments.data or "made up",
        "stall_ms": waited,
        "images_per_second": rate,
        "gflop_per_image": flops / 1e9,
        "mfu": rate * flops / peak if peak else None,
        "peak_memory_gib": memory,
        **stamp(),
    }


def report(row: dict) -> str:
    """The row for people."""
    lines = [f"{name}: {value}" for name, value in row.items()]
    return "\n".join(lines)


def main() -> None:
    """Measure one configuration."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="sit-xl2-repa", choices=presets.PRESETS)
    parser.add_argument("--batch", type=int, default=32, help="images per step")
    parser.add_argument("--micro-batch", type=int, default=0, help="0: the whole batch")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--precision", default="auto", choices=("auto", "no", "bf16", "fp16"))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--data", default="", help="photographs, or a dataset's folder")
    parser.add_argument("--threads", type=int, default=4, help="that decode images")
    parser.add_argument("--out", type=Path, help="file to append the row to")
    arguments = parser.parse_args()
    row = measure(arguments)
    print(report(row))
    folder = "cpu" if arguments.device == "cpu" else row["device"].lower().replace(" ", "-")
    out = arguments.out or RESULTS / folder / f"{row['date']}_step" / "rows.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out, "a") as rows:
        rows.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
