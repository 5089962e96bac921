"""What every result row says about where it was measured."""

import datetime
import functools
import hashlib
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
RESULTS = Path(os.environ.get("REPA_FAST_RESULTS") or ROOT / "benchmarks" / "results")


def stamp() -> dict[str, str | int]:
    """Date, commit, command, versions and device of this process."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "sources": sources(),
        "command": command(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version(),
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


def triton_version() -> str:
    """Return the installed version of Triton, or "none"."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "none"


def results_folder(name: str, where: str = "cuda") -> Path:
    """Return RESULTS/<card, or cpu>/<date>_<name>, made where it was not there."""
    card = "cpu" if where == "cpu" else device().lower().replace(" ", "-")
    folder = RESULTS / card / f"{datetime.date.today().isoformat()}_{name}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def commit() -> str:
    """What REPA_FAST_COMMIT says; else the short hash of HEAD, with a + where tracked files differ.

    Without git "unknown".
    """
    named = os.environ.get("REPA_FAST_COMMIT")
    if named:
        return named

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("diff", "HEAD", "--stat") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def command() -> str:
    """The command line, as one would type it in the repository root."""
    name = getattr(sys.modules["__main__"].__spec__, "name", None)
    program = ["python", os.path.relpath(sys.argv[0], ROOT)]
    if name:
        program = ["python", "-m", name.removesuffix(".__main__")]
    return shlex.join([*program, *sys.argv[1:]])


def device() -> str:
    """The GPU's name, or the CPU's."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()
