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


def why_not(stage: str) -> str | None:
    """The reason a stage cannot run here, or None."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if stage != "kernels":
        return "nothing to measure yet"
    if importlib.util.find_spec("pytest_benchmark") is None:
        return "pytest-benchmark is not installed"
    return None


def main() -> int:
    """Run or skip the stage; the exit status is its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=STAGES)
    stage = parser.parse_args().stage
    reason = why_not(stage)
    if reason is not None:
        print(f"gpu-{stage}: skipped, {reason}")
        return 0
    return kernels()


if __name__ == "__main__":
    sys.exit(main())
