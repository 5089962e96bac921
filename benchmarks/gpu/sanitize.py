"""csrc's optimizer under compute-sanitizer: `python -m benchmarks.gpu.sanitize`.

A few steps on tensors of odd sizes, compared with the reference, under memcheck and racecheck.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.harness.environment import ROOT

TOOLS = ("memcheck", "racecheck")
USUAL = Path("/usr/local/cuda/bin/compute-sanitizer")


def main() -> int:
    """Run both tools; 1 if one found something or there is none."""
    sanitizer = shutil.which("compute-sanitizer") or USUAL
    if not Path(sanitizer).exists():
        print("there is no compute-sanitizer: memory and races are not checked")
        return 1
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # overruns show
    status = 0
    for tool in TOOLS:
        options = ["--tool", tool, "--error-exitcode", "1", "--report-api-errors", "no"]
        gate = ["-m", "benchmarks.step.optim", "--gate-only", "--provider", "cuda"]
        print(tool, flush=True)
        command = [sanitizer, *options, sys.executable, *gate]
        status |= subprocess.run(command, cwd=ROOT, env=environment).returncode
    return int(status != 0)


if __name__ == "__main__":
    sys.exit(main())
