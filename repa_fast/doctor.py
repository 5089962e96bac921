"""`repa-fast doctor`: what is installed here, and what a run would choose, for an issue."""

import contextlib
import importlib.metadata
import inspect
import os
import platform
import re
import shutil
import socket
import subprocess
import textwrap
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from repa_fast import __version__
from repa_fast.words import first_line, one_line

if typing.TYPE_CHECKING:
    import torch

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "triton": ("triton", "pytorch-triton"),
    "timm": ("timm",),
    "diffusers": ("diffusers",),
    "huggingface_hub": ("huggingface-hub",),
    "pylance": ("pylance",),
    "pyarrow": ("pyarrow",),
    "tyro": ("tyro",),
    "nvidia-dali": ("nvidia-dali-cuda130", "nvidia-dali-cuda120"),
    "flash-attn 2": ("flash-attn",),
    "flash-attn 3": ("flash-attn-3", "flashattn-hopper"),
    "cudnn-frontend": ("nvidia-cudnn-frontend",),
    "xformers": ("xformers",),
    "apex": ("apex",),
    "torchdiffeq": ("torchdiffeq",),
    "torch-fidelity": ("torch-fidelity",),
    "wandb": ("wandb",),
}
"""Packages by the distributions that they come in."""
VARIABLES = re.compile(r"CUDA_VISIBLE_DEVICES|OMP_NUM_THREADS|(REPA_FAST|TORCH|NCCL)_\w+")
"""Of the environment; all else stays private."""
PLAIN = re.compile(r"(?!hf_)[\w.,:+*-]{0,40}|[~/][\w./+-]*")
"""Values that are shown: numbers, words and paths. Others may be secrets."""
SECRET = re.compile(r"TOKEN|KEY|SECRET|PASS|PWD|CREDENTIAL|AUTH", re.IGNORECASE)
SHAPE = {"heads": 16, "tokens": 256, "head_dim": 72, "batch": 32}
"""Of attention in SiT-XL/2, at images of 256 pixels."""
INDENT, COLUMNS = 16, 110
"""Where texts begin, and where lines end if they can."""


def doctor(words: Sequence[str]) -> str:
    """Say what is installed here and what a run would choose, to be pasted into an issue.

    It takes no words. Paths under the home folder begin with ~, and of the environment it shows
    only what VARIABLES names. ValueError for any word.
    """
    if set(words) & {"-h", "--help"}:
        return f"usage: repa-fast doctor\n\n{inspect.getdoc(doctor)}"
    if words:
        raise ValueError(f"doctor takes no words, got {' '.join(words)}")
    parts = (
        versions, torch_versions, packages, environment, machine, gpus, kernels, attention,
        optimizer, cuda_graph, decode, compiler, adaptive, evaluation,
    )  # fmt: skip
    return "\n".join(["```text", *(line for part in parts for line in told(part)), "```"])


def told(part: Callable[[], Iterable[str]]) -> list[str]:
    """Return a part's lines, or one that says why there are none."""
    try:
        return list(part())
    except (Exception, SystemExit) as error:  # of a broken package, which raises anything
        return [row(part.__name__, f"not known, {type(error).__name__}: {first_line(error)}")]


def row(name: str, text: str) -> str:
    """Return the lines of the table that say something, without what is private."""
    indent = " " * (INDENT - len(name))
    return textwrap.fill(
        private(one_line(text)),
        COLUMNS,
        initial_indent=name + indent,
        subsequent_indent=" " * INDENT,
        break_long_words=False,
        break_on_hyphens=False,
    )


def private(text: str) -> str:
    """Return a text without the home folder, and the names of its user and of the machine."""
    home, host = os.path.expanduser("~"), socket.gethostname()
    if home != "/":
        text = re.sub(rf"{re.escape(home)}(?![\w.-])", "~", text)
    for name in {os.environ.get(n, "") for n in ("USER", "LOGNAME")} | {os.path.basename(home)}:
        if name:  # in a path; elsewhere it may be a word as any other
            text = re.sub(rf"(?<=/){re.escape(name)}(?![\w.-])", "USER", text)
    text = re.sub(r"//[^/@\s]+@", "//", text)  # of a URL
    for name in (host, host.partition(".")[0]):
        if name not in ("", "localhost"):
            text = re.sub(rf"(?<![\w-]){re.escape(name)}(?![\w-])", "HOST", text)
    return text


# What is installed


def versions() -> Iterator[str]:
    """Yield what runs: this package, Python, the system."""
    found = commit()
    yield row("repa-fast", __version__ + (f", commit {found}" if found != "unknown" else ""))
    yield row("Python", f"{platform.python_version()}, {platform.python_implementation()}")
    kernel = f"{platform.system()} {platform.release()} {platform.machine()}"
    named = [" ".join(platform.libc_ver())]
    with contextlib.suppress(OSError):  # a system that does not say its name
        named.insert(0, platform.freedesktop_os_release()["PRETTY_NAME"])
    yield row("system", ", ".join([kernel, *named]))


def commit() -> str:
    """Return REPA_FAST_COMMIT, or a checkout's short hash (+ if files differ), or "unknown"."""
    if named := os.environ.get("REPA_FAST_COMMIT"):
        return named
    if not (ROOT / "setup.py").is_file():  # installed, maybe into a folder of another repository
        return "unknown"

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("diff", "HEAD", "--stat") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def torch_versions() -> Iterator[str]:
    """Yield torch's version, with those of what it is built for."""
    import torch

    parts = {"CUDA": torch.version.cuda}
    if torch.version.cuda:
        parts["cuDNN"] = torch.backends.cudnn.version()
        parts["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    built = ", ".join(f"{name} {version or 'not built in'}" for name, version in parts.items())
    yield row("torch", f"{torch.__version__}, {built}")


def packages() -> Iterator[str]:
    """Yield the versions of what is used where it is installed."""
    found, absent = [], []
    for name, distributions in PACKAGES.items():
        version = next(filter(None, map(installed, distributions)), "")
        (found if version else absent).append(f"{name} {version}".rstrip())
    yield row("packages", ", ".join(found) or "none of those that are looked for")
    yield row("not installed", ", ".join(absent) or "nothing of the rest")


def installed(distribution: str) -> str:
    """Return the version of a distribution, "" where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def environment() -> Iterator[str]:
    """Yield the variables of the environment that change a run."""
    found = {name: os.environ[name] for name in sorted(os.environ) if VARIABLES.fullmatch(name)}
    shown = (
        f"{n}={value if PLAIN.fullmatch(value) and not SECRET.search(n) else '(hidden)'}"
        for n, value in found.items()
    )
    yield row("environment", ", ".join(shown) or "nothing that matters is set")


def machine() -> Iterator[str]:
    """Yield the CPU, its memory and the space on the disk."""
    cores = f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} cores"
    lines = Path("/proc/meminfo").read_text().splitlines()
    kib = {name: int(line.split()[0]) for name, line in (line.split(":") for line in lines)}
    whole, free = kib["MemTotal"] / 2**20, kib["MemAvailable"] / 2**20
    yield row("CPU", f"{cpu_name()}, {cores}, {whole:.0f} GiB of memory, {free:.0f} of them free")
    disk = shutil.disk_usage(".").free / 2**30
    yield row("disk", f"{disk:.1f} GiB free in the current folder")


def cpu_name() -> str:
    """Return the CPU's name, as the kernel has it, or its kind."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def gpus() -> Iterator[str]:
    """Yield the GPUs, or why there are none."""
    import torch

    file = Path("/proc/driver/nvidia/version")
    found = re.search(r"\d{3}\.[\d.]+", file.read_text()) if file.is_file() else None
    driver = f"driver {found[0]}" if found else "driver not known"
    if not torch.cuda.is_available():
        try:
            torch.cuda.init()
            reason = "torch finds none that it can use"
        except Exception as error:  # AssertionError of a build without CUDA, RuntimeError of others
            reason = one_line(error).partition(". ")[0]
        yield row("GPUs", f"none, {driver if found else 'no NVIDIA driver'}: {reason}")
        return
    for index in range(torch.cuda.device_count()):
        has = torch.cuda.get_device_properties(index)
        memory, capability = has.total_memory / 2**30, f"{has.major}.{has.minor}"
        said = f"{has.name}, {memory:.0f} GiB, compute capability {capability}, {driver}"
        yield row("" if index else "GPUs", f"{index}: {said}")


# What a run would choose


def this_device() -> "torch.device":
    """Return the device of a run of one process."""
    from repa_fast.distributed import own_device

    return own_device()


def choice(
    name: str, options: Iterable[str], choose: Callable[[str], tuple[str, str]]
) -> Iterator[str]:
    """Yield what "auto" takes and why, and what would become of the other options by name.

    Args:
        name: of the choice.
        options: what can be asked for.
        choose: returns who runs and why for "auto" or one of them, as `dispatch.choose`, or raises.
    """
    taken, reason = choose("auto")
    yield row(name, f"{taken}, {reason}")
    said: dict[str, list[str]] = {}
    for option in options:
        if option not in ("auto", taken):
            try:
                choose(option)
                text = "can be asked for"
            except (ValueError, RuntimeError) as error:
                text = re.split(r", but |cannot run: ", one_line(error), maxsplit=1)[-1]
            said.setdefault(text, []).append(option)
    for text, others in said.items():
        if text not in reason:
            yield row("", f"{', '.join(others)}: {text}")


def options_of(field: str) -> tuple[str, ...]:
    """Return what a field of TrainConfig may be."""
    from repa_fast.configs.config import TrainConfig

    return typing.get_args(typing.get_type_hints(TrainConfig)[field])


def kernels() -> Iterator[str]:
    """Yield which kernels run."""
    from repa_fast.backend import dispatch

    def choose(asked: str) -> tuple[str, str]:
        return dispatch.chosen(this_device().type, None if asked == "auto" else asked)

    yield from choice("kernels", options_of("kernels"), choose)


def attention() -> Iterator[str]:
    """Yield which backend attention runs on, tested, and on a GPU timed, at SHAPE."""
    import torch

    from repa_fast import ops
    from repa_fast.configs.config import TrainConfig
    from repa_fast.train.state import autocast_dtype

    dtype = autocast_dtype(TrainConfig(), this_device()) or torch.float32

    def choose(asked: str) -> tuple[str, str]:
        found = ops.select_attention(asked, **SHAPE, dtype=dtype, device=this_device())
        return found.backend, found.reason

    yield from choice("attention", ops.ATTENTION_BACKENDS, choose)


def optimizer() -> Iterator[str]:
    """Yield who does the optimizer's step."""
    import torch

    from repa_fast.train.optim import choose_implementation

    def choose(asked: str) -> tuple[str, str]:
        return choose_implementation(asked, [torch.empty(0, device=this_device())])

    yield from choice("optimizer", options_of("optimizer_impl"), choose)


def cuda_graph() -> Iterator[str]:
    """Yield whether a step is one CUDA graph."""
    from repa_fast.configs.config import TrainConfig
    from repa_fast.distributed import World
    from repa_fast.train.graph import why_not

    reason = why_not(TrainConfig(), World(0, 1, this_device()))
    yield row("cuda_graph", f"off, since {reason}" if reason else "on, in one process")


def decode() -> Iterator[str]:
    """Yield who decodes images."""
    from repa_fast.data import dali

    yield from choice(
        "decode", options_of("decode"), lambda asked: dali.choose(asked, this_device())
    )


def compiler() -> Iterator[str]:
    """Yield what torch.compile makes code with on this device."""
    from repa_fast.backend.dispatch import why_not_triton
    from repa_fast.train.torch_private import cpp_compiler

    device = this_device().type
    try:
        compiler, missing = cpp_compiler(), ""
    except RuntimeError as error:
        compiler, missing = "", str(error)
    reason = why_not_triton(device) if device == "cuda" else missing
    makers = " and ".join(["Triton"] * (device == "cuda") + [compiler or "no C++ compiler"])
    yield row("compile", f"cannot run: {reason}" if reason else f"can run, with {makers}")


def adaptive() -> Iterator[str]:
    """Yield whether samplers can take adaptive steps."""
    from repa_fast.diffusion.samplers import why_not_adaptive

    reason = why_not_adaptive()
    yield row("adaptive", f"cannot run: dopri5 {reason}" if reason else "can run: dopri5")


def evaluation() -> Iterator[str]:
    """Yield which features images can be compared in."""
    from repa_fast.eval import inception

    reason = inception.why_not()
    if not reason:
        file = inception.cached_weights()
        there = file.is_file()
        reason = f"its weights are {'' if there else 'fetched once, they are not yet '}at {file}"
    yield row("evaluation", f"inception: {reason}")
    yield row("", "fitted, digits-judge: can run, without any download")
