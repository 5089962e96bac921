"""Runs on a disk that fills up, and on one that is read-only: `... disk_faults DIGITS FOLDER`.

It mounts a tmpfs over FOLDER, so it needs a mount namespace of its own (`unshare -rm`). Prints what
it found as JSON, on the last line.
"""

import contextlib
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.faults import chaos
from repa_fast.checkpoint.layout import path_of, steps
from repa_fast.cli import main as command

STEPS, SAVE_EVERY = 20, 5


def train(data: Path, run: Path) -> str:
    """What a run said when it failed, "" if it did not."""
    flags = chaos.flags(data, STEPS, SAVE_EVERY, chaos.LOG_EVERY, "--resume auto")
    place = ["--output-dir", str(run.parent), "--exp-name", run.name]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            status = command(["train", *flags, *place])
    except BaseException as error:  # torch's CheckpointException is no Exception
        return str(error)
    return said.getvalue() if status else ""


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def main() -> None:
    torch.set_num_threads(1)
    data, disk = map(Path, sys.argv[1:])
    mount("-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk))
    whole, run = disk / "whole", disk / "run"
    train(data, whole)
    last = path_of(whole / "checkpoints", STEPS)
    size = sum(file.stat().st_size for file in last.iterdir())
    filler = disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(disk).free - 3 * size // 2))
    found = {"full": train(data, run), "left": steps(run / "checkpoints")}
    filler.unlink()
    found["freed"] = train(data, run)
    found["differences"] = chaos.differences(run, whole)
    mount("-o", "remount,ro", str(disk))
    found["read-only"] = train(data, disk / "other")
    found["finished, read-only"] = train(data, run)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
