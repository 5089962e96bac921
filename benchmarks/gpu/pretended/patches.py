"""What only the pretence needs, applied from outside: the product knows nothing of it.

Numbers are rubbish, so nothing that compares them may decide; all that launches still runs.
"""

import dataclasses
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import torch

from benchmarks.gpu.pretended import build, waits

OURS = tuple(build.ROOT / name for name in ("repa_fast", "kernels", "benchmarks"))
HERE = Path(__file__).parent
FRAMES = 3
"""Innermost frames of our own that the place of a synchronisation consists of."""
SYNCHRONISES = "called a synchronizing CUDA operation"


def apply() -> None:
    """Patch torch, and our own modules as soon as they are imported; once."""
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    torch.backends.cudnn.enabled = False
    torch.backends.cuda.enable_cudnn_sdp(False)
    record_synchronisations()
    name_tensors(torch.Tensor)
    profile_host_alone(torch.profiler.profile)
    check_rates_on_host(torch.optim.Adam)
    sys.meta_path.insert(0, _Finder())
    for name, patch in BY_MODULE.items():
        if name in sys.modules:
            patch(sys.modules[name])


# Synchronisations


def record_synchronisations() -> None:
    """Add to each of torch's warnings the place in our code, and note it in `waits`."""
    shown = warnings.showwarning

    def show(message, category, filename, lineno, file=None, line=None) -> None:
        if SYNCHRONISES in str(message):
            waits.append(place())
            message = f"{str(message).splitlines()[0]} at {waits[-1]}"
        shown(message, category, filename, lineno, file, line)

    warnings.showwarning = show
    warnings.filterwarnings("always", message=SYNCHRONISES)


def place() -> str:
    """Innermost frames of our own code, else of code that no package brought, as file:line."""
    stack = [one for one in reversed(traceback.extract_stack()) if Path(one.filename).is_file()]
    own = [frame for frame in stack if _is_ours(Path(frame.filename))]
    if not own:
        own = [frame for frame in stack if not _is_installed(Path(frame.filename))]
    return " <- ".join(_name(frame) for frame in own[:FRAMES]) or "unknown"


def _name(frame: traceback.FrameSummary) -> str:
    file = Path(frame.filename).resolve()
    short = file.relative_to(build.ROOT) if file.is_relative_to(build.ROOT) else file
    return f"{short}:{frame.lineno}"


def _is_ours(file: Path) -> bool:
    inside = any(file.is_relative_to(folder) for folder in OURS)
    return inside and not file.is_relative_to(HERE)


def _is_installed(file: Path) -> bool:
    lib = Path(warnings.__file__).parent
    installed = "site-packages" in file.parts or file.is_relative_to(lib)
    return installed or file.is_relative_to(HERE)


def name_tensors(tensor: type) -> None:
    """Show a tensor of the card by its shape: a failed assertion would walk through its rubbish."""
    shown = tensor.__repr__

    def show(self, **options) -> str:
        if self.is_cuda:
            return f"<{self.dtype} {tuple(self.shape)} on the pretended card>"
        return shown(self, **options)

    tensor.__repr__ = show


def profile_host_alone(profile: type) -> None:
    """Leave CUDA out of torch's profiler, which would only say that there is no such device."""
    made = profile.__init__

    def make(self, *, activities=None, **options) -> None:
        host = torch.profiler.ProfilerActivity.CPU
        made(self, activities=[one for one in activities or [host] if one is host], **options)

    profile.__init__ = make


def check_rates_on_host(optimizer: type) -> None:
    """Compare a learning rate on the device with 0 where comparing works, and use it as it is."""
    made = optimizer.__init__

    def make(self, params, lr=1e-3, *arguments, **options) -> None:
        on_device = isinstance(lr, torch.Tensor) and lr.is_cuda
        made(self, params, lr.cpu() if on_device else lr, *arguments, **options)
        if on_device:
            self.defaults["lr"] = lr
            for group in self.param_groups:
                group["lr"] = lr

    optimizer.__init__ = make


# Gates


def forgive_selection(selection: ModuleType) -> None:
    """Take a backend that runs for right, and torch's flash attention for the fastest."""
    tested, timed = selection._self_test, selection._timed

    def self_test(*arguments):
        row = tested(*arguments)
        return row if row.error is None else dataclasses.replace(row, error=0.0, left_out="")

    def time(row, *arguments):
        row = timed(row, *arguments)
        return dataclasses.replace(row, ms=1.0 if row.backend == "sdpa-flash" else 2.0)

    selection._self_test, selection._timed = self_test, time


def forgive_gate(gate: ModuleType) -> None:
    """Take a provider that runs for right."""
    gate.Expected.compare = lambda expected, got: None


def forgive_budget(module: ModuleType) -> None:
    """Nothing is outside its error budget."""
    module.assert_within_budget = lambda *arguments, **options: None


def forgive_labels(guidance: ModuleType) -> None:
    """No label is out of range."""
    guidance.check_guidance = lambda *arguments, **options: None


def forgive_parity(parity: ModuleType) -> None:
    """Losses are as far apart as one likes, and every configuration holds what is asked of it."""
    parity.distance = lambda found, exact: 0.0
    parity.misses = lambda row, usual: []


def forgive_baseline(baseline: ModuleType) -> None:
    """No loss is bad."""
    baseline.Baseline.check = without_figures(baseline.Baseline.check)


def patch_step(step: ModuleType) -> None:
    """No step is skipped, and a report is written of each that is measured."""
    from benchmarks.gpu.pretended import report

    report.begin()
    step.Ours.check = without_figures(step.Ours.check)
    step.figures = report.reported(step.figures)


def patch_ladder(ladder: ModuleType) -> None:
    """No loss is wrong, and the report knows the configuration."""
    from benchmarks.gpu.pretended import report

    ladder.LOSS_TOLERANCE = float("inf")
    ladder.measure = report.named(ladder.measure, ladder.RUNGS)


def without_figures(check: Callable) -> Callable:
    """`check`, which may find that there is no figure."""

    def forgiven(stepper) -> None:
        try:
            check(stepper)
        except RuntimeError as error:
            if "no figure" not in str(error):
                raise

    return forgiven


def use_csrc(extension: ModuleType) -> None:
    """csrc with CUDA's runtime as a library of its own, which the pretended one can take over."""
    from benchmarks.gpu.pretended import csrc

    extension.LIBRARY = csrc.library(extension.LIBRARY)


BY_MODULE: dict[str, Callable[[ModuleType], None]] = {
    "repa_fast.backend.extension": use_csrc,
    "repa_fast.kernels.attention.selection": forgive_selection,
    "benchmarks.kernels.gate": forgive_gate,
    "benchmarks.step.optim": forgive_budget,
    "benchmarks.sample.gate": forgive_budget,
    "repa_fast.diffusion.guidance": forgive_labels,
    "benchmarks.step.parity": forgive_parity,
    "benchmarks.step.baseline": forgive_baseline,
    "benchmarks.step.step": patch_step,
    "benchmarks.step.ladder": patch_ladder,
}


# Modules that are imported later


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules to patch as the other finders do, and patches them once they have run."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in BY_MODULE:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (one.find_spec(name, path, target) for one in others)), None)
        if spec and spec.loader:
            spec.loader = _Loader(spec.loader, BY_MODULE[name])
        return spec


class _Loader(importlib.abc.Loader):
    """A module's own loader, and a patch after it."""

    def __init__(self, loader: importlib.abc.Loader, patch: Callable[[ModuleType], None]) -> None:
        self.loader, self.patch = loader, patch

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        self.patch(module)

    def __getattr__(self, name: str):
        return getattr(self.loader, name)  # get_source and the like
