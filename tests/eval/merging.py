"""Moments and rows of one set of features, spread unevenly over processes."""

import pytest
import torch

from repa_fast.distributed import World
from repa_fast.eval.statistics import Moments, Rows
from repa_fast.testing import seeded

COUNT, WIDTH = 11, 5
UNEVEN = [10, 0, 2, 4, 6, 8, 1, 3], [9, 7, 11, 5, 12]  # 11 and 12 are beyond the last image
SHARES = [
    UNEVEN,
    (list(range(COUNT)), []),
    pytest.param((*UNEVEN, []), marks=pytest.mark.heavy),
]
"""By case: the images of every rank."""


def features() -> torch.Tensor:
    """fp64 (11, 5), with means that are large beside the deviations."""
    return seeded((COUNT, WIDTH), seed=0, dtype=torch.float64, mean=1e3)


def collect(world: World, shares: tuple[list[int], ...]) -> dict:
    """State of the merged moments, and the gathered rows."""
    index = torch.tensor(shares[world.rank], dtype=torch.int64)
    moments, rows = Moments(WIDTH), Rows(WIDTH)
    kept = features()[index[index < COUNT]]
    for part in kept.split(3):
        moments.update(part)
    rows.add(index, torch.cat([features(), torch.full((2, WIDTH), torch.nan)])[index])
    moments.reduce(world)
    return {"moments": moments.state_dict(), "rows": rows.gather(COUNT, world)}
