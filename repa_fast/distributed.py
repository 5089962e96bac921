"""Processes of a run: what torchrun started, or this one alone."""

import os
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor

from repa_fast.failure import Failure
from repa_fast.words import note, rate

SAID_EVERY = 30.0
"""Seconds between lines about progress where there is no terminal for a bar."""

T = TypeVar("T")
COLLECTIVE_TIMEOUT = 1800.0
"""Seconds a process waits for the others: the first one may be saving or downloading alone."""
PATIENCE = 20.0
"""Seconds until it is said that processes wait for others to come."""


@dataclass(frozen=True)
class World:
    """This process among all."""

    rank: int
    size: int
    device: torch.device
    timeout: timedelta = timedelta(seconds=COLLECTIVE_TIMEOUT)  # of waiting for the others

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum `tensor` over processes, in place, and return it."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def max(self, tensor: torch.Tensor) -> torch.Tensor:
        """Take the maximum of `tensor` over processes, in place, and return it."""
        if self.size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Stack every process's `tensor` along a new first axis, by rank."""
        if self.size == 1:
            return tensor[None]
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor)
        return torch.stack(parts)

    def on_first(self, call: Callable[[], T]) -> T:
        """Call on the first process alone; return on every one what it returned, or raise that."""
        if self.size == 1:
            return call()
        held: list = [None]
        if self.is_main:
            try:
                held = [call()]
            except Exception as error:
                held = [error]
        dist.broadcast_object_list(held, device=torch.device("cpu"))
        if isinstance(held[0], Exception):
            raise held[0]
        return held[0]

    def any(self, flag: bool) -> bool:
        """Return whether `flag` is set on any process; blocks the host, not the device."""
        return bool(self.max(torch.tensor(int(flag))).item()) if self.size > 1 else flag


def shard_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Shard a whole `tensor` that every process has as `like` is, without communication."""
    if not isinstance(like, DTensor) or isinstance(tensor, DTensor):
        return tensor
    moved = tensor.to(like.device)
    return distribute_tensor(moved, like.device_mesh, like.placements, src_data_rank=None)


@contextmanager
def session(timeout: float = COLLECTIVE_TIMEOUT) -> Iterator[World]:
    """Yield the world of torchrun's environment variables: gloo on CPU tensors, NCCL on CUDA.

    A collective that takes longer than `timeout` seconds raises (gloo) or ends the process (NCCL,
    with TORCH_NCCL_ASYNC_ERROR_HANDLING as torchrun and torch set it).
    """
    (rank, size), device = rank_and_size(), own_device()
    if size == 1:
        yield World(rank, size, device)
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    limit = timedelta(seconds=timeout)
    place = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
    waiting = threading.Timer(PATIENCE, print, [f"waiting for {size} processes at {place}"])
    waiting.start()
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=limit))
        store.set_timeout(limit)
        store = dist.PrefixStore(meet(store, rank, size, timeout), store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
    except (dist.DistError, TimeoutError) as error:
        reason = str(error).splitlines()[0]
        raise Failure(f"{size} processes did not meet at {place}: {reason}") from error
    finally:
        waiting.cancel()
    try:
        yield World(rank, size, device, limit)
    finally:
        dist.destroy_process_group()


def meet(store: dist.Store, rank: int, size: int, timeout: float) -> str:
    """Agree on a word among these processes that none before them had.

    torchrun keeps its store when it restarts processes, with the addresses of those that are gone;
    whoever reads before the new one is written connects to nobody (pytorch issue 135712). Its count
    of restarts differs between nodes. So the first process answers, again and again, what each of
    the others says last, until all have found the answer to a word of their own. Where some do not
    come, it raises TimeoutError, and the others' store raises.
    """
    own = secrets.token_hex(8)
    if rank:
        store.set(f"repa-fast/{rank}", own)
        word = store.get(f"repa-fast/{own}").decode()
        store.set(f"repa-fast/{word}/{rank}", "here")
        return word
    missing, end = set(range(1, size)), time.monotonic() + timeout
    while missing:
        for other in sorted(missing):
            if store.check([f"repa-fast/{other}"]):
                store.set(f"repa-fast/{store.get(f'repa-fast/{other}').decode()}", own)
            if store.check([f"repa-fast/{own}/{other}"]):
                missing.remove(other)
        if missing and time.monotonic() > end:
            raise TimeoutError(f"processes {sorted(missing)} did not come within {timeout:g} s")
        time.sleep(0.01)
    return own


def rank_and_size() -> tuple[int, int]:
    """Return this process's number and how many there are, by torchrun; (0, 1) without it.

    ValueError if RANK and WORLD_SIZE say something else.
    """
    said = {"RANK": "0", "WORLD_SIZE": "1"}
    said = {name: os.environ.get(name, alone) for name, alone in said.items()}
    for name, value in said.items():
        if not value.isdecimal():
            raise ValueError(f"{name} is {value!r} in the environment, expected a number")
    rank, size = map(int, said.values())
    if rank >= size:
        raise ValueError(
            f"RANK is {rank} in the environment, expected less than {size}, WORLD_SIZE"
        )
    return rank, size


def own_device() -> torch.device:
    """Return the CPU, or this process's GPU, which becomes the current one."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


@contextmanager
def progress_bar(description: str, shown: bool) -> Iterator[Callable]:
    """Yield progress(total) -> advance_to(done): a bar with images/s and the time left.

    Where there is no terminal, a line every SAID_EVERY seconds.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), "{task.fields[rate]}")
    watched = shown and sys.stdout.isatty()
    with Progress(*columns, TimeRemainingColumn(), disable=not watched) as bar:
        task = bar.add_task(description, total=None, rate="")

        def start(total: int | None) -> Callable[[int], None]:
            bar.update(task, total=total)
            said = time.monotonic()

            def advance(done: int) -> None:
                nonlocal said
                if shown and not watched and time.monotonic() - said >= SAID_EVERY:
                    said = time.monotonic()
                    note(f"{description}: {done} of {total or 'an unknown number'}")
                speed = bar.tasks[0].speed
                bar.update(task, completed=done, rate=rate(speed) if speed else "")

            return advance

        yield start
