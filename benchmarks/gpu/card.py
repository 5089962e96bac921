"""The card and its rates: `python -m benchmarks.gpu.card`.

Floors are counted from what this card reaches in a large copy and in a large bf16 matmul of random
numbers, not from a datasheet. Stops the queue where the CUDA library of csrc/ does not load, since
the configurations that name it would all fail.
"""

import json
import subprocess
import sys

import torch

from benchmarks.harness import timing
from benchmarks.harness.environment import results_folder, stamp
from repa_fast.backend import extension

COPY_BYTES = 8 * 2**30
"""Read and written together; many times the L2 cache."""


def driver() -> str:
    """Return the driver's version as nvidia-smi has it, or "unknown"."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return found.stdout.strip()


def facts(device: torch.device) -> dict:
    """Return the card's row: memory, driver, versions, bytes/s of a copy, FLOP/s of a matmul."""
    properties = torch.cuda.get_device_properties(device)
    copy = timing.copy_time(COPY_BYTES, device, timing.QUICK)
    return {
        "item": "card",
        "status": "ok",
        "copy_tb_per_s": COPY_BYTES / copy.p50 / 1e9,
        "matmul_tflop_per_s": timing.matmul_rate(torch.bfloat16, device) / 1e12,
        "memory_gib": properties.total_memory / 2**30,
        "multiprocessors": properties.multi_processor_count,
        "driver": driver(),
        "cudnn": torch.backends.cudnn.version(),
        **stamp(),
    }


def main() -> int:
    """Append the row; 1 where csrc does not load."""
    reason = extension.why_not()
    if reason:
        print(f"csrc: {reason}; `make csrc-gpu` builds it")
        return 1
    row = facts(torch.device("cuda"))
    folder = results_folder("card")
    with open(folder / "rows.jsonl", "a") as rows:
        rows.write(json.dumps(row) + "\n")
    print(json.dumps(row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
