"""Moments and rows of one set of features, spread unevenly over gloo processes."""

import os

import torch

from repa_fast.distributed import World, session
from repa_fast.eval.statistics import Moments, Rows
from repa_fast.testing import seeded

COUNT, WIDTH = 11, 5
SIZE = 3


def features() -> torch.Tensor:
    """fp64 (11, 5), with means that are large beside the deviations."""
    return seeded((COUNT, WIDTH), seed=0, dtype=torch.float64, mean=1e3)


def share(rank: int) -> torch.Tensor:
    """Indices of a rank: it has 8, 5 (two of them beyond the last image) or no images."""
    of_ranks = ([10, 0, 2, 4, 6, 8, 1, 3], [9, 7, 11, 5, 12], [])
    return torch.tensor(of_ranks[rank], dtype=torch.int64)


def collect(world: World) -> dict:
    """State of the merged moments, and the gathered rows."""
    moments, rows, index = Moments(WIDTH), Rows(WIDTH), share(world.rank)
    kept = features()[index[index < COUNT]]
    for part in kept.split(3):
        moments.update(part)
    rows.add(index, torch.cat([features(), torch.full((2, WIDTH), torch.nan)])[index])
    moments.reduce(world)
    return {"moments": moments.state_dict(), "rows": rows.gather(COUNT, world)}


def main() -> None:
    """Under torchrun: every rank saves what it has in the end."""
    with session() as world:
        torch.save(collect(world), f"{os.environ['OUT']}/{world.rank}.pt")


if __name__ == "__main__":
    main()
