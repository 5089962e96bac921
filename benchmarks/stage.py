"""One stage of `make gpu`: `python -m benchmarks.stage {kernels,optim,step,sample,data}`.

A stage that cannot run says so in one line and succeeds.
"""

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.environment import ROOT
from benchmarks.kernels.ops import CASES

STAGES = ("kernels", "optim", "step", "sample", "data")
KERNELS_MEASURE, KERNELS_END = 390, 455
"""Seconds after which gpu-kernels measures no further op, and after which it has ended."""

STEP_RUNS = (
    ("ladder", "--batch", "32", "--rung", "a", "o"),
    ("ladder", "--batch", "32", "--rung", "e"),
    ("ladder", "--batch", "256", "--rung", "e", "--steps", "20"),
    ("parity", "--train", "100", "--rung", "e", "l"),
    *(("ladder", "--batch", "32", "--rung", rung) for rung in "lfgijdcbh"),
    *(("step", "--preset", f"sit-{size}2-repa", "--compile") for size in "bl"),
    ("sra", "--compile"),
    ("gemm",),
    ("ladder", "--batch", "32", "--rung", "k"),
)
STEP_END, STEP_LEAST, STEP_MOST = 465, 45, 150
"""Seconds after which gpu-step has ended, which have to be left to begin another figure, and which
one may take."""

SAMPLE_PROVIDERS = ("ours-compile-bf16", "official", "ours-eager-bf16", "ours-compile-tf32")
SAMPLE_END, SAMPLE_LEAST = 465, 60
"""Seconds after which gpu-sample has ended, and which have to be left to begin another figure."""


def kernels() -> int:
    """Every op's gate and figures, then a sweep of launch parameters in the time that is left.

    One process per op, so that a kernel that breaks the device spoils no other op; an op may take
    twice its share of the time that is left, what it leaves is the next ones'.
    """
    started = time.monotonic()
    status = 0
    for number, op in enumerate(CASES):
        left = KERNELS_MEASURE - (time.monotonic() - started)
        limit = max(15.0, min(left, 2 * left / (len(CASES) - number)))
        print(f"gpu-kernels: {op}, at most {limit:.0f} s", flush=True)
        status |= limited(["benchmarks.run", "--op", op, "--limit", f"{limit:.0f}"], limit + 40)
    left = KERNELS_END - (time.monotonic() - started)
    if left < 30:
        print("gpu-kernels: no time is left to sweep launch parameters", flush=True)
        return status
    print(f"gpu-kernels: launch parameters, at most {left:.0f} s", flush=True)
    arguments = ["benchmarks.kernels.tune", "--limit", f"{left - 20:.0f}"]
    return status | limited(arguments, left)


def limited(arguments: list[str], seconds: float) -> int:
    """Exit status of `python -m` with these arguments, 1 if it had to be stopped."""
    try:
        command = [sys.executable, "-m", *arguments]
        return subprocess.run(command, cwd=ROOT, timeout=seconds).returncode
    except subprocess.TimeoutExpired:
        print(f"{' '.join(arguments)}: stopped after {seconds:.0f} s", flush=True)
        return 1


def optim() -> int:
    """The optimizer against its rivals, then a few tensors under compute-sanitizer."""
    status = limited(["benchmarks.optim"], 240)
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(sanitizer).exists():
        print("gpu-optim: no compute-sanitizer, memory and races are not checked", flush=True)
        return status
    gate = ["-m", "benchmarks.optim", "--gate-only", "--provider", "cuda"]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # overruns show
    for tool in ("memcheck", "racecheck"):
        options = ["--tool", tool, "--error-exitcode", "1", "--report-api-errors", "no"]
        command = [sanitizer, *options, sys.executable, *gate]
        print(f"gpu-optim: {tool}", flush=True)
        try:
            status |= subprocess.run(command, cwd=ROOT, env=environment, timeout=100).returncode
        except subprocess.TimeoutExpired:
            print(f"gpu-optim: {tool} was stopped after 100 s", flush=True)
            status = 1
    return status


def step() -> int:
    """The ladder of SiT-XL/2 with REPA, then the other sizes, as far as the time goes.

    What the goals speak of comes first: the rival and rung e at batch 32, then that rung at 256 and
    its kind's parity with fp32, of SiT-S/2; the rungs beside and between and the cached features
    after them, and what compiles for minutes last. A process each, so that memory and compiled code
    are of one alone; rungs write into one report.
    """
    started = time.monotonic()
    status = 0
    for name, *flags in STEP_RUNS:
        left = STEP_END - (time.monotonic() - started)
        if left < STEP_LEAST:
            print(f"gpu-step: no time is left for {name} {' '.join(flags)}", flush=True)
            continue
        left = min(left, STEP_MOST)
        print(f"gpu-step: {name} {' '.join(flags)}, at most {left:.0f} s", flush=True)
        status |= limited([f"benchmarks.{name}", *flags], left)
    return status


def sample() -> int:
    """Sampling of SiT-XL/2, then of SiT-B/2: the fastest way, its rival, then the others.

    A process each, since the rival runs other kernels, and so that memory is of one alone.
    """
    started = time.monotonic()
    status = 0
    for model in ("SiT-XL/2", "SiT-B/2"):
        for provider in SAMPLE_PROVIDERS:
            left = SAMPLE_END - (time.monotonic() - started)
            if left < SAMPLE_LEAST:
                print(f"gpu-sample: no time is left for {model} {provider}", flush=True)
                continue
            print(f"gpu-sample: {model} {provider}, at most {left:.0f} s", flush=True)
            arguments = ["benchmarks.sample", "--model", model, "--provider", provider]
            status |= limited(arguments, left)
    return status


def data() -> int:
    """The data path's readers and their rivals, then a step fed by it, with its waiting time."""
    readers = ["rows", "torch", "dali-cpu", "dali-gpu", "official", "dali-224"]
    arguments = ["benchmarks.data", "--threads", "4", "--rounds", "3", "--reader", *readers]
    status = limited(arguments, 280)
    step = ["benchmarks.step", "--preset", "sit-b2-repa", "--compile", "--data", "photographs"]
    return status | limited([*step, "--batch", "128"], 180)


def why_not(stage: str) -> str | None:
    """The reason a stage cannot run here, or None."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    _, package = WORK[stage]
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    return None


WORK = {
    "kernels": (kernels, "triton"),
    "optim": (optim, "torch"),
    "step": (step, "timm"),
    "sample": (sample, "triton"),
    "data": (data, "lance"),
}
"""Stage -> what runs it, and the package it needs."""


def main() -> int:
    """Run or skip the stage; the exit status is its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=STAGES)
    stage = parser.parse_args().stage
    reason = why_not(stage)
    if reason is not None:
        print(f"gpu-{stage}: skipped, {reason}")
        return 0
    return WORK[stage][0]()


if __name__ == "__main__":
    sys.exit(main())
