"""csrc's library in a form whose launches the pretended runtime sees.

The real one has CUDA's runtime inside, so that nothing can take its place; the same sources with
the runtime as a shared library are built once, where there is an nvcc. Without it csrc is not
there.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu.pretended import build

SHARED = b"libcudart.so"


def library(real: Path) -> Path:
    """Return the library to load in place of `real`, or `real` if it needs no replacement."""
    if real.is_file() and SHARED in real.read_bytes():
        return real
    folder = build.build().parent / f"csrc-{key()}"
    found = folder / "repa_fast" / "lib" / "csrc.so"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several processes of a rehearsal begin at once
        if not found.is_file():
            compile_into(folder)
    return found


def key() -> str:
    """Return a hash of the sources and what they are built with."""
    digest = hashlib.sha256(build.versions().encode())
    for file in sorted([*(build.ROOT / "csrc").glob("*/*.cu*"), build.ROOT / "setup.py"]):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def compile_into(folder: Path) -> None:
    """Build it for the pretended card's architecture; where that fails, say so and go without."""
    if shutil.which("nvcc") is None:
        print("pretended: no nvcc, so csrc is not there", file=sys.stderr)
        return
    values = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    values |= {"NVCC_APPEND_FLAGS": "-cudart=shared", "REPA_FAST_CUDA_ARCHS": "9.0"}
    command = [sys.executable, "-W", "ignore", "setup.py", "-q", "build_ext"]
    command += ["--build-lib", str(folder), "--build-temp", str(folder / "temp")]
    done = subprocess.run(command, cwd=build.ROOT, env=values, capture_output=True, text=True)
    if done.returncode:
        print(f"pretended: csrc is not built:\n{done.stderr[-2000:]}", file=sys.stderr)
