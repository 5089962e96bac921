"""One stage of `make gpu`: `python -m benchmarks.stage {kernels,optim,step,sample,data}`.

A stage that cannot run says so in one line and succeeds.
"""

import argparse
import datetime
import importlib.util
import subprocess
import sys

import torch

from benchmarks.environment import RESULTS, ROOT, device

STAGES = ("kernels", "optim", "step", "sample", "data")


def kernels() -> int:
    """pytest-benchmark comparisons of every op, as a JSON file under benchmarks/results/."""
    folder = device().lower().replace(" ", "-")
    out = RESULTS / folder / f"{datetime.date.today().isoformat()}_kernels"
    out.mkdir(parents=True, exist_ok=True)
    arguments = ["benchmarks/kernels", "--benchmark-only", f"--benchmark-json={out / 'rows.json'}"]
    return subprocess.run([sys.executable, "-m", "pytest", *arguments], cwd=ROOT).returncode


def step() -> int:
    """The training step of SiT-B/2 and XL/2 with REPA, eager and compiled, a row at a time."""
    status = 0
    for preset in ("sit-b2-repa", "sit-xl2-repa"):
        for flags in ([], ["--compile"]):
            arguments = ["-m", "benchmarks.step", "--preset", preset, "--batch", "32", *flags]
            status |= subprocess.run([sys.executable, *arguments], cwd=ROOT).returncode
    return status


def why_not(stage: str) -> str | None:
    """The reason a stage cannot run here, or None."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if stage not in WORK:
        return "nothing to measure yet"
    _, package = WORK[stage]
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    return None


WORK = {"kernels": (kernels, "pytest_benchmark"), "step": (step, "timm")}
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
