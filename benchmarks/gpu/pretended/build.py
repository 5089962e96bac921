"""The pretended card's two libraries, and the environment in which programs find them."""

import functools
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
RUNTIME = ("runtime.c", "memory.c", "streams.c", "graphs.c", "counts.c", "blas.c")
DRIVER = ("driver.c",)
FLAGS = ("-std=gnu11", "-O2", "-Wall", "-Wextra", "-fPIC", "-shared", "-fvisibility=hidden")
MARK = "PRETENDED_FOLDER"
"""Variable that names the libraries' folder in a process that runs on the pretended card."""


def why_not() -> str | None:
    """Why nothing can be pretended here, or None. Imports no torch."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"the pretended card is for Linux on x86-64, not {sys.platform} {platform.machine()}"
    if shutil.which("gcc") is None:
        return "the pretended card needs a gcc"
    if _folder("torch") is None:
        return "torch is not installed"
    cuda = re.search(r"^cuda\b.*= '(\d+)", _torch_version(), re.MULTILINE)
    if cuda is None:
        return "this torch is built without CUDA"
    if int(cuda[1]) != 13:
        return f"the pretended card is written for CUDA 13, this torch is built for CUDA {cuda[1]}"
    if not includes():
        return "there is no cuda_runtime_api.h of torch's packages or Triton's"
    return None


def includes() -> list[Path]:
    """Folders of CUDA's headers: of the packages that torch brings, then Triton's for the rest."""
    nvidia, triton = _folder("nvidia"), _folder("triton")
    found = sorted(nvidia.glob("cu*/include")) if nvidia else []
    if triton:
        found.append(triton / "backends" / "nvidia" / "include")
    return [folder for folder in found if (folder / "cuda_runtime_api.h").is_file()]


def build(parent: Path | None = None) -> Path:
    """Build the libraries unless they are there; return their folder, in `parent` or .cache.

    Raises:
        RuntimeError: it cannot be built here, with the reason.
    """
    reason = why_not()
    if reason:
        raise RuntimeError(reason)
    folder = (parent or ROOT / ".cache" / "pretended").resolve() / key()
    if (folder / "complete").is_file():
        return folder
    work = folder.with_name(f"{folder.name}.{os.getpid()}")
    work.mkdir(parents=True, exist_ok=True)
    _compile(RUNTIME, work / "libpretended.so", "-lpthread", "-ldl")
    _compile(DRIVER, work / "libcuda.so.1", "-Wl,-soname,libcuda.so.1", "-ldl")
    (work / "libcuda.so").symlink_to("libcuda.so.1")
    (work / "complete").touch()
    try:
        work.rename(folder)
    except OSError:  # another process was faster
        shutil.rmtree(work)
    return folder


def versions() -> str:
    """Return the versions of Python and torch, for names of folders."""
    torch = re.search(r"^__version__ = '(.*)'", _torch_version(), re.MULTILINE)
    return f"py{sys.version_info[0]}.{sys.version_info[1]}-torch{torch[1]}"


@functools.cache
def key() -> str:
    """Return a hash of the sources, torch's version and the headers of the libraries."""
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for file in sorted([*HERE.glob("*.c"), *HERE.glob("*.h")]):
        digest.update(file.read_bytes())
    digest.update(_torch_version().encode())
    digest.update((includes()[0] / "cuda_runtime_api.h").read_bytes())
    return digest.hexdigest()[:16]


def environment(folder: Path, base: dict[str, str] | None = None) -> dict[str, str]:
    """Return the environment of a process that runs on the card whose libraries are in `folder`.

    Compiled code is kept apart from that of a real card: some of it depends on the driver, and a
    real run shall not find what was tuned here.
    """
    caches = folder.parent / f"compiled-{versions()}"
    return {
        **(os.environ if base is None else base),
        MARK: str(folder),
        "LD_PRELOAD": str(folder / "libpretended.so"),
        "LD_LIBRARY_PATH": str(folder),
        "TRITON_LIBCUDA_PATH": str(folder),
        "CC": "gcc",
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "OMP_NUM_THREADS": "1",
        "KINETO_LOG_LEVEL": "99",  # it warns that there is no CUPTI
    }


def is_here() -> bool:
    """Return whether this process runs on the pretended card."""
    return MARK in os.environ and "libpretended.so" in os.environ.get("LD_PRELOAD", "")


def _folder(package: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    places = list(spec.submodule_search_locations or []) if spec else []
    return Path(places[0]) if places else None


def _torch_version() -> str:
    return (_folder("torch") / "version.py").read_text()


def _compile(sources: tuple[str, ...], target: Path, *last: str) -> None:
    headers = [f"-isystem{folder}" for folder in includes()]
    files = [str(HERE / name) for name in sources]
    command = ["gcc", *FLAGS, *headers, "-o", str(target), *files, *last]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"gcc cannot build {target.name}:\n{done.stderr[-2000:]}")
