"""What the queue measures, in order of value.

An item is a process of its own, so that memory, compiled code and a kernel that breaks the device
are of one alone. Seconds are of an H200 with 16 cores, caches of compiled code cold for
the first item and warm for the others.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.harness.environment import sources

TESTS = ("tests/kernels", "tests/train/test_optim.py", "tests/train/test_gpu.py")


@dataclass(frozen=True)
class Item:
    """A process of the queue.

    Attributes:
        name: of the item, its log and its state.
        seconds: it is expected to take; it is not begun when fewer are left.
        command: what follows `python -m`.
        limit: seconds after which it is stopped; 0 is 1.6 times `seconds`.
        needs: the environment variable without which it is left out.
        unpretended: why a rehearsal leaves it out, or "".
    """

    name: str
    seconds: int
    command: tuple[str, ...]
    limit: int = 0
    needs: str = ""
    unpretended: str = ""

    @property
    def most(self) -> float:
        """Seconds after which the item is stopped."""
        return self.limit or 1.6 * self.seconds

    @property
    def key(self) -> str:
        """What its result depends on: the command and the sources that it measures."""
        return hashlib.sha256(f"{sources()} {self.command}".encode()).hexdigest()[:16]


def tests(*flags: str) -> tuple[str, ...]:
    """Return the command of the tests that need a GPU."""
    return ("pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "-n", "6", *flags)


def ladder(*rungs: str, batch: int = 32, steps: int = 30) -> tuple[str, ...]:
    """Return the command that measures configurations of the training step, in one process."""
    flags = ("--batch", str(batch), "--steps", str(steps), "--rung", *rungs)
    return ("benchmarks.step.ladder", *flags)


def kernels(*ops: str, dtype: str = "fp32", batches: tuple[str, ...] = ("32",)) -> tuple[str, ...]:
    """Return the command that measures ops forward and backward at SiT-XL/2's shapes."""
    flags = [flag for op in ops for flag in ("--op", op)]
    flags += ["--mode", "forward", "--mode", "backward", "--dtype", dtype]
    return ("benchmarks.kernels.run", "--quick", "--batch", *batches, *flags)


def parity(*rungs: str) -> tuple[str, ...]:
    """Return the command that compares configurations with plain fp32."""
    return ("benchmarks.step.parity", "--train", "100", "--rung", *rungs)


NO_SANITIZER = "compute-sanitizer looks into a real card's driver"
OPTIMIZERS = ("leaves", "cuda", "stock", "official")
STREAM_OPS = ("gate_residual_adaln", "adaln", "gate_residual")

ITEMS = (
    Item("card", 10, ("benchmarks.gpu.card",)),
    Item("step", 70, ladder("one-pass", "graph")),
    Item("tests", 90, tests("--full", "-m", "gpu and not heavy", *TESTS)),
    Item("recipe", 45, ladder("recipe", "released"), needs="REPA_OFFICIAL"),
    Item("kernels", 60, kernels(*STREAM_OPS, batches=("32", "256"))),
    Item("optimizer", 25, ("benchmarks.step.optim", "--provider", *OPTIMIZERS)),
    Item("step-256", 60, ladder("graph", batch=256, steps=10)),
    Item("experiments", 35, ladder("bf16-residual")),
    Item("attention", 40, kernels("attention", dtype="bf16")),
    Item("compiled", 50, ladder("compiled", "kernels")),
    Item("experiments-256", 50, ladder("bf16-residual", batch=256, steps=10)),
    Item("sampling", 85, ("benchmarks.sample.sample", "--rounds", "1")),
    Item("sra", 70, ("benchmarks.step.sra", "--compile")),
    Item("align-loss", 20, kernels("align_loss", dtype="bf16")),
    Item("sampler-step", 20, kernels("euler_maruyama_step", batches=("64",))),
    Item("sanitizer", 60, ("benchmarks.gpu.sanitize",), unpretended=NO_SANITIZER),
    Item("features", 30, ladder("features")),
    Item("tuned", 30, ladder("tuned")),
    Item("parity", 90, parity("one-pass", "bf16-residual")),
    Item("all-tests", 120, tests("--full", "-m", "gpu", "tests")),
)


def by_name(names: list[str]) -> list[Item]:
    """Return the items of these names, in the queue's order.

    Raises:
        ValueError: a name that no item has.
    """
    known = [item.name for item in ITEMS]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"no item is called {', '.join(unknown)}; there are {', '.join(known)}")
    return [item for item in ITEMS if item.name in names]


def missing(item: Item, environment: Mapping[str, str], pretended: bool) -> str:
    """Return why an item cannot be begun here, or ""."""
    if pretended and item.unpretended:
        return item.unpretended
    if item.needs and not environment.get(item.needs):
        return f"{item.needs} is not set"
    return ""
