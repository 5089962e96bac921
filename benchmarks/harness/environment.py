"""Where a row is measured, where it is kept, and the flags that all benchmarks have."""

import argparse
import datetime
import functools
import hashlib
import importlib.metadata
import os
import platform
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from repa_fast.doctor import commit, cpu_name

ROOT = Path(__file__).parents[2]
RESULTS = Path(os.environ.get("REPA_FAST_RESULTS") or ROOT / "benchmarks" / "results")


def stamp() -> dict[str, str | int]:
    """Return date, commit, command, versions and device of this process."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "sources": sources(),
        "command": command(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton,
        "device": device(),
        "cores": len(os.sched_getaffinity(0)),
    }


@functools.cache
def sources() -> str:
    """Return a hash of the code that is measured: repa_fast/, kernels/ and csrc/."""
    digest = hashlib.sha256()
    for folder in ("repa_fast", "kernels", "csrc"):
        for file in sorted((ROOT / folder).rglob("*")):
            if file.suffix in (".py", ".cu", ".cuh", ".h"):
                digest.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def results_folder(name: str, where: str = "cuda") -> Path:
    """Return RESULTS/<card or cpu>/<date>_<name>, made if it does not exist."""
    card = "cpu" if where == "cpu" else device().lower().replace(" ", "-")
    folder = RESULTS / card / f"{datetime.date.today().isoformat()}_{name}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def parser(
    description: str, out: str = "folder for rows, report and picture", device: bool = True
) -> argparse.ArgumentParser:
    """Return a parser with --out and, unless there is no choice, --device."""
    found = argparse.ArgumentParser(description=description)
    found.add_argument("--out", type=Path, help=out)
    if device:
        found.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return found


def at_least(least: int) -> Callable[[str], int]:
    """Return the type of a flag: a whole number from `least` on, or argparse's one line."""

    def number(text: str) -> int:
        if not text.removeprefix("-").isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r}, expected a whole number from {least} on")
        return int(text)

    return number


def command() -> str:
    """Return the command line, as one would type it in the repository root."""
    name = getattr(sys.modules["__main__"].__spec__, "name", None)
    program = (
        ["-m", name.removesuffix(".__main__")] if name else [os.path.relpath(sys.argv[0], ROOT)]
    )
    return shlex.join(["python", *program, *sys.argv[1:]])


def device() -> str:
    """Return the GPU's name, or the CPU's."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return cpu_name()
