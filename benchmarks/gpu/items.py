"""What the queue measures, in order of value.

An item is a process of its own, so that memory, compiled code and a kernel that breaks the device
are of one alone. Seconds are of an H100 with 16 cores and cold caches.
"""

import hashlib
from dataclasses import dataclass

from benchmarks.environment import sources

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
    """

    name: str
    seconds: int
    command: tuple[str, ...]
    limit: int = 0
    needs: str = ""

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
    return ("benchmarks.ladder", *flags)


def kernels(*ops: str, batches: tuple[str, ...] = ("32",)) -> tuple[str, ...]:
    """Return the command that measures ops forward and backward at SiT-XL/2's shapes."""
    flags = (flag for op in ops for flag in ("--op", op))
    modes = ("--mode", "forward", "--mode", "backward")
    return ("benchmarks.run", "--quick", "--batch", *batches, *modes, *flags)


STREAM_OPS = ("gate_residual_adaln", "adaln", "gate_residual")
SMALL_OPS = ("align_loss", "euler_maruyama_step")

ITEMS = (
    Item("card", 20, ("benchmarks.gpu.card",)),
    Item("step", 60, ladder("e")),
    Item("tests", 75, tests("-m", "gpu and not slow", *TESTS)),
    Item("recipe", 85, ladder("a", "o"), needs="REPA_OFFICIAL"),
    Item("graph", 50, ladder("g")),
    Item("attention", 30, kernels("attention")),
    Item("kernels", 60, kernels(*STREAM_OPS)),
    Item("optimizer", 30, ("benchmarks.optim", "--provider", "cuda", "stock", "official")),
    Item("step-256", 70, ladder("e", batch=256, steps=10)),
    Item("epilogues", 50, ladder("l")),
    Item("bf16-residual", 50, ladder("i")),
    Item("joint-adaln", 50, ladder("f")),
    Item("compiled", 70, ladder("c", "d")),
    Item("kernels-256", 60, kernels(*STREAM_OPS, batches=("256",))),
    Item("small-kernels", 40, kernels(*SMALL_OPS, batches=("32", "64"))),
    Item("gelu-mlp", 30, kernels("gelu_mlp")),
    Item("encoder-stream", 50, ladder("j")),
    Item("features", 50, ladder("h")),
    Item("sampling", 60, ("benchmarks.sample", "--rounds", "1")),
    Item("sra", 80, ("benchmarks.sra", "--compile")),
    Item("sanitizer", 60, ("benchmarks.gpu.sanitize",)),
    Item("tuned", 40, ladder("b")),
    Item("parity", 90, ("benchmarks.parity", "--train", "100", "--rung", "e", "l")),
    Item("all-tests", 120, tests("-m", "gpu", "tests")),
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


def missing(item: Item, environment) -> str:
    """Return why an item cannot be begun here, or ""."""
    if item.needs and not environment.get(item.needs):
        return f"{item.needs} is not set"
    return ""
