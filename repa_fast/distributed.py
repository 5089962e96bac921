"""Processes of a run: what torchrun started, or this one alone."""

import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor

COLLECTIVE_TIMEOUT = 1800.0
"""Seconds a process waits for the others: the first one may be saving or downloading alone."""


@dataclass(frozen=True)
class World:
    """This process among all: global rank, number of processes, its device, and how long it waits
    for the others."""

    rank: int
    size: int
    device: torch.device
    timeout: timedelta = timedelta(seconds=COLLECTIVE_TIMEOUT)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """In-place sum over processes; returns `tensor`."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def max(self, tensor: torch.Tensor) -> torch.Tensor:
        """In-place maximum over processes; returns `tensor`."""
        if self.size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Every process's `tensor`, stacked along a new first axis by rank."""
        if self.size == 1:
            return tensor[None]
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor)
        return torch.stack(parts)

    def broadcast(self, text: str) -> str:
        """The first process's `text`, on every process."""
        if self.size == 1:
            return text
        held = [text]
        dist.broadcast_object_list(held, device=torch.device("cpu"))
        return held[0]

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on any process; blocks the host, not the device."""
        return bool(self.max(torch.tensor(int(flag))).item()) if self.size > 1 else flag


def shard_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole `tensor` that every process has, sharded as `like` is; itself if that is whole too.

    Nothing is communicated.
    """
    if not isinstance(like, DTensor) or isinstance(tensor, DTensor):
        return tensor
    moved = tensor.to(like.device)
    return distribute_tensor(moved, like.device_mesh, like.placements, src_data_rank=None)


@contextmanager
def session(timeout: float = COLLECTIVE_TIMEOUT) -> Iterator[World]:
    """The world of torchrun's environment variables; gloo on CPU tensors, NCCL on CUDA ones.

    A collective that takes longer than `timeout` seconds raises (gloo) or ends the process (NCCL,
    with TORCH_NCCL_ASYNC_ERROR_HANDLING as torchrun and torch set it).
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if size == 1:
        yield World(rank, size, device)
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    limit = timedelta(seconds=timeout)
    store, _, _ = next(dist.rendezvous("env://", timeout=limit))
    store.set_timeout(limit)
    store = dist.PrefixStore(meet(store, rank, size, timeout), store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
    try:
        yield World(rank, size, device, limit)
    finally:
        dist.destroy_process_group()


def meet(store: dist.Store, rank: int, size: int, timeout: float) -> str:
    """A word that these processes agree on, and that none before them had.

    torchrun keeps its store when it restarts processes, with the addresses of those that are gone;
    whoever reads before the new one is written connects to nobody (pytorch issue 135712). Its count
    of restarts differs between nodes. So the first process answers, again and again, what each of
    the others says last, until all have found the answer to a word of their own.

    Raises:
        TimeoutError: on the first process, some have not come; the others' store raises.
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
