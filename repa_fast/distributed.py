"""Processes of a run: what torchrun started, or this one alone."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class World:
    """This process among all: global rank, number of processes, and its device."""

    rank: int
    size: int
    device: torch.device

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


@contextmanager
def session() -> Iterator[World]:
    """The world of torchrun's environment variables; gloo on CPU tensors, NCCL on CUDA ones."""
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
    dist.init_process_group(backend)
    try:
        yield World(rank, size, device)
    finally:
        dist.destroy_process_group()
