"""Gradients of whole weights, summed in fp32 over micro-batches and over processes.

As DDP does it, they are moved to flat buffers as they come, and a buffer that is complete is summed
over the processes while the backward pass goes on. DDP itself would sum those of bf16 weights in
bf16, over micro-batches too.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar
from weakref import WeakMethod

import torch
import torch.distributed as dist
from torch import Tensor, nn

from repa_fast.distributed import World

T = TypeVar("T")
BUCKET_NUMBERS = 2**24
"""The least in a bucket, but for the last one: 64 MiB in fp32."""


class Bucket:
    """A flat fp32 buffer with a place for the gradient of each of its parameters."""

    def __init__(self, parameters: list[nn.Parameter], wire: torch.dtype) -> None:
        sizes = [p.numel() for p in parameters]
        self.sums = torch.zeros(sum(sizes), device=parameters[0].device)
        self.wire = self.sums if wire == torch.float32 else self.sums.to(wire)
        self.places, self.results = (
            {p: part.view_as(p) for p, part in zip(parameters, flat.split(sizes))}
            for flat in (self.sums, self.wire)
        )
        self.waiting: list[nn.Parameter] = []  # whose gradient has come

    def take(self, held: dict[nn.Parameter, Tensor]) -> None:
        """Take the gradients that have come, in addition to those of parameters in `held`."""
        alike = defaultdict(list)  # foreach would launch a kernel for each of several dtypes
        for p in self.waiting:
            alike[p in held, p.grad.dtype].append(p)
        for (known, _), moved in alike.items():
            move = torch._foreach_add_ if known else torch._foreach_copy_
            move([self.places[p] for p in moved], [p.grad for p in moved])
        for p in self.waiting:
            p.grad, held[p] = None, self.results[p]
        self.waiting = []


class Gradients:
    """Sums the gradients of trained parameters, fp32 or bf16; a step finds the sums in `held`.

    Alone and with a single micro-batch it has none: they are where autograd leaves them. Buckets
    are in the order in which gradients come in the first pass, on the first process.

    Args:
        parameters: of which those that are frozen later have no gradients from there on.
        world: the processes whose gradients are summed: of means, as many times too large.
        wire: fp32 or bf16, in which they are.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], world: World, wire: torch.dtype) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        self.world = world
        self.wire = wire if world.size > 1 else torch.float32
        self.held: dict[nn.Parameter, Tensor] = {}
        self._moves = self._last = self._hooked = False
        self.forget()

    def forget(self) -> None:
        """Form the buckets anew: other parameters get gradients from here on."""
        self._buckets: list[Bucket] = []
        self._bucket_of: dict[nn.Parameter, Bucket] = {}
        self._come: list[nn.Parameter] = []
        self._expected: set[int] = set()  # of what the gradients of a step are, by id

    def room(self, passes: int) -> Tensor | None:
        """Return memory as large as the buffers, if a step of so many passes has them."""
        if passes == 1 and self.world.size == 1:
            return None
        each = 4 if self.wire == torch.float32 else 4 + self.wire.itemsize
        size = each * sum(p.numel() for p in self.parameters if p.requires_grad)
        return torch.empty(size, dtype=torch.uint8, device=self.world.device)

    @contextmanager
    def of_pass(self, *, first: bool, last: bool) -> Iterator[None]:
        """Sum what comes in the backward pass of a micro-batch, of a step's `first` or `last`.

        RuntimeError if several processes are given gradients of other weights than in the first
        step, or than each other in that one.
        """
        self._moves, self._last = self.world.size > 1 or not (first and last), last
        self._closed, self._works = 0, []
        if first:
            self.held.clear()
            self._come = []
            for bucket in self._buckets:
                bucket.waiting = []  # where a pass broke off, as a CUDA graph's capture may
        if self._moves and not self._hooked:
            self._hooked = True
            arrive = weakly(self._arrive)
            for p in self.parameters:
                if p.requires_grad:  # it is not frozen meanwhile
                    p.register_post_accumulate_grad_hook(arrive)
        yield
        if self._moves:
            if not self._buckets:
                self._form()
            for bucket in self._buckets[self._closed :]:
                self._close(bucket)
        for work in self._works:
            work.wait()
        self._moves = False  # what others leave at parameters is theirs
        if last and self.world.size > 1:
            self._expect_the_same()

    def _expect_the_same(self) -> None:
        came = {id(p) for p in self.held}  # a tensor's hash is slow
        self._expected = self._expected or came
        if came != self._expected:
            raise RuntimeError(
                f"gradients of {len(came)} weights came in this step, of {len(self._expected)} in "
                "the first: several processes expect those of the same weights in every step"
            )

    def _arrive(self, parameter: nn.Parameter) -> None:
        if not self._moves:
            return
        if not self._buckets:
            self._come.append(parameter)
            return
        self._bucket_of[parameter].waiting.append(parameter)
        for bucket in self._buckets[self._closed :]:  # in one order on all processes
            if len(bucket.waiting) < len(bucket.places):
                break
            self._close(bucket)

    def _close(self, bucket: Bucket) -> None:
        bucket.take(self.held)
        self._closed += 1
        if self._last and self.world.size > 1:
            if bucket.wire is not bucket.sums:
                bucket.wire.copy_(bucket.sums)
            self._works.append(dist.all_reduce(bucket.wire, async_op=True))

    def _form(self) -> None:
        """Form the buckets by what has come; what has not, and is trained, is last."""
        numbers = {p: n for n, p in enumerate(self.parameters)}
        order = self.world.on_first(lambda: [numbers[p] for p in self._come])
        if self.world.any({*order} != {numbers[p] for p in self._come}):
            raise RuntimeError(
                "gradients of other weights came on a process than on the first one: several "
                "processes expect those of the same weights"
            )
        rest = [n for n, p in enumerate(self.parameters) if p.requires_grad and n not in order]
        ordered = [self.parameters[n] for n in order + rest]
        self._buckets = [
            Bucket(some, self.wire) for some in grouped(ordered, BUCKET_NUMBERS, nn.Parameter.numel)
        ]
        self._bucket_of = {p: bucket for bucket in self._buckets for p in bucket.places}
        for p in self._come:
            self._bucket_of[p].waiting.append(p)


def weakly(method: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    """Return what calls a method while its object lives.

    Python does not see through a tensor's hooks: one that held what holds the tensor would keep
    both, and buffers as large as the model, for ever.
    """
    found = WeakMethod(method)

    def call(tensor: Tensor) -> None:
        if (alive := found()) is not None:
            alive(tensor)

    return call


def grouped(rows: Iterable[T], numbers: int, size: Callable[[T], int]) -> Iterator[list[T]]:
    """Yield rows in groups that end where their sizes reach `numbers`."""
    group: list[T] = []
    total = 0
    for row in rows:
        group.append(row)
        total += size(row)
        if total >= numbers:
            yield group
            group, total = [], 0
    if group:
        yield group
